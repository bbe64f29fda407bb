//! The view on disk, for a node that boots without typha.

use super::Owner;
use crate::store;

impl Owner {
    /// Saves the view, which must be whole: half of one would be taken for the whole at the next start.
    pub(super) fn save(&mut self) {
        let Some(store) = self.store.clone() else { return };
        let encoded = store::encode(self.state.records());
        let write = move || {
            if let Err(error) = store.save(&encoded) {
                tracing::warn!(%error, "the view could not be saved; a node that boots without typha would enforce an older one");
            }
        };
        // Writing waits for the disk.
        match std::thread::Builder::new().name("save-view".to_owned()).spawn(write) {
            Ok(thread) => self.saving = Some(thread),
            Err(error) => tracing::warn!(%error, "the view could not be saved"),
        }
    }
}
