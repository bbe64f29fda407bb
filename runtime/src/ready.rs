//! Named gates: a process is ready when every gate is open.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use crate::alive::Liveness;

/// Key of a gate: its name, and a number so that two gates may share a name.
type Key = (&'static str, u64);

#[derive(Debug, Default)]
struct State {
    next: u64,
    closed: BTreeMap<Key, String>,
}

/// Conditions that must hold before this process reports ready.
///
/// A process without gates is ready: a part that must be waited for adds its gate before the admin
/// port opens.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<watch::Sender<State>>, Liveness);

impl Default for Readiness {
    fn default() -> Self {
        let state = Arc::new(watch::Sender::new(State::default()));
        Self(state, Liveness::default())
    }
}

impl Readiness {
    /// Loops that must give signs of life.
    pub fn liveness(&self) -> &Liveness {
        &self.1
    }

    /// Adds a closed gate. `reason` names what is missing; `/readyz` prints it.
    pub fn gate(&self, name: &'static str, reason: impl Into<String>) -> Gate {
        let mut key = (name, 0);
        self.0.send_modify(|state| {
            key.1 = state.next;
            state.next += 1;
            state.closed.insert(key, reason.into());
        });
        Gate {
            key,
            state: self.0.clone(),
        }
    }

    /// Returns true when every gate is open.
    pub fn is_ready(&self) -> bool {
        self.0.borrow().closed.is_empty()
    }

    /// The closed gates with their reasons, in order of names.
    pub fn missing(&self) -> Vec<(&'static str, String)> {
        self.0
            .borrow()
            .closed
            .iter()
            .map(|((name, _), why)| (*name, why.clone()))
            .collect()
    }

    /// Returns when every gate is open.
    pub async fn wait(&self) {
        self.wait_for(true).await;
    }

    /// Returns when every gate is open, or when one is closed.
    pub async fn wait_for(&self, is_ready: bool) {
        let mut states = self.0.subscribe();
        let wanted = |state: &State| state.closed.is_empty() == is_ready;
        // The sender is `self`, so the channel cannot close meanwhile.
        let _ = states.wait_for(wanted).await;
    }
}

/// One thing that must be up. Dropping it opens it, except when its task panics: what has crashed
/// is not up.
#[derive(Debug)]
pub struct Gate {
    key: Key,
    state: Arc<watch::Sender<State>>,
}

impl Gate {
    /// Opens the gate.
    pub fn open(&self) {
        self.state
            .send_if_modified(|state| state.closed.remove(&self.key).is_some());
    }

    /// Closes the gate; `reason` replaces that of a gate that is closed already.
    pub fn close(&self, reason: impl Into<String>) {
        let reason = reason.into();
        self.state.send_if_modified(|state| {
            state.closed.insert(self.key, reason.clone()).as_ref() != Some(&reason)
        });
    }
}

// A part that ends normally no longer holds readiness back; one that panics must keep the process
// not ready, or a broken process would receive traffic.
impl Drop for Gate {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.close("its task has panicked; the log has the place; restart the process");
        } else {
            self.open();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_all_gates_are_open() {
        let ready = Readiness::default();
        assert!(ready.is_ready());
        let sync = ready.gate("sync", "no snapshot yet");
        let tls = ready.gate("tls", "no certificate yet");
        assert_eq!(
            ready.missing(),
            [
                ("sync", "no snapshot yet".to_owned()),
                ("tls", "no certificate yet".to_owned())
            ]
        );
        drop(tls);
        assert_eq!(ready.missing(), [("sync", "no snapshot yet".to_owned())]);
        sync.close("snapshot at 40 of 100 records");
        assert_eq!(
            ready.missing(),
            [("sync", "snapshot at 40 of 100 records".to_owned())]
        );
        sync.open();
        assert!(ready.is_ready());
        sync.close("lost");
        assert!(!ready.is_ready());
    }

    #[test]
    fn gates_of_one_name_are_two() {
        let ready = Readiness::default();
        let (first, second) = (ready.gate("kernel", "a"), ready.gate("kernel", "b"));
        first.open();
        assert_eq!(ready.missing(), [("kernel", "b".to_owned())]);
        second.open();
        assert!(ready.is_ready());
    }

    #[tokio::test]
    async fn waiting_ends_when_the_last_gate_opens() {
        let ready = Readiness::default();
        let (first, second) = (ready.gate("a", "a"), ready.gate("b", "b"));
        let waiter = tokio::spawn({
            let ready = ready.clone();
            async move { ready.wait().await }
        });
        first.open();
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        second.open();
        waiter.await.expect("waiter");
    }

    #[tokio::test]
    async fn a_panic_does_not_open_a_gate() {
        let ready = Readiness::default();
        let gate = ready.gate("owner", "starting");
        let task = tokio::spawn(async move {
            let _gate = gate;
            panic!("expected by this test");
        });
        assert!(task.await.is_err());
        let missing = ready.missing();
        assert_eq!(missing.len(), 1);
        assert!(missing[0].1.contains("panicked"), "{missing:?}");
    }
}
