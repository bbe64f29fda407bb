//! Saves the view for a node that boots without typha.

use super::StateOwner;
use crate::store;

impl StateOwner {
    /// Saves the view in a thread. It must be complete: at the next start a partial one would be
    /// taken for the whole.
    pub(super) fn save(&mut self) {
        let Some(store) = self.store.clone() else {
            return;
        };
        let encoded = store::encode(self.state.records());
        let write = move || {
            if let Err(error) = store.save(&encoded) {
                tracing::warn!(
                    %error,
                    "the view could not be saved; if this node boots while typha is unreachable, \
                     it enforces an older one",
                );
            }
        };
        // Writing blocks on the disk.
        match std::thread::Builder::new()
            .name("save-view".to_owned())
            .spawn(write)
        {
            Ok(thread) => self.saving = Some(thread),
            Err(error) => tracing::warn!(%error, "the view could not be saved"),
        }
    }
}
