//! Acknowledgements that wait for routes: a node acknowledges a revision when policy and routes of
//! it are in force.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use margay_calc::model::RecordId;
use margay_proto::sync::Ack;
use tokio::sync::watch;

/// An acknowledgement of what nftables holds, still without errors, and the generation of the route
/// plan that belongs to it.
struct Waiting {
    ack: Ack,
    generation: u64,
}

/// Pending acknowledgements. One covers all before it, so two are enough: one whose routes are
/// being applied, and the newest. With the newest alone, a node whose routes change all the time
/// would never acknowledge anything.
pub(super) struct Acks {
    told: watch::Sender<Option<Arc<Ack>>>,
    waiting: VecDeque<Waiting>,
    /// The last one published on this stream.
    last: Option<Arc<Ack>>,
}

impl Acks {
    pub(super) fn new(told: watch::Sender<Option<Arc<Ack>>>) -> Self {
        Self { told, waiting: VecDeque::new(), last: None }
    }

    /// Drops everything that belongs to the last stream: its revisions mean nothing on another one.
    pub(super) fn forget(&mut self) {
        self.waiting.clear();
        self.last = None;
    }

    /// Adds an acknowledgement of what nftables holds; it is published once the route plan of this
    /// generation is applied.
    pub(super) fn push(&mut self, ack: Ack, generation: u64) {
        let replaces = self.waiting.back().is_some_and(|newest| newest.generation == generation);
        if replaces || self.waiting.len() > 1 {
            self.waiting.pop_back();
        }
        self.waiting.push_back(Waiting { ack, generation });
    }

    /// Publishes the newest acknowledgement whose generation is applied, or the last one again if
    /// the errors differ.
    pub(super) fn tell(&mut self, applied: u64, errors: &BTreeMap<RecordId, String>) {
        let mut due = None;
        while let Some(next) = self.waiting.pop_front_if(|waiting| waiting.generation <= applied) {
            due = Some(next.ack);
        }
        let differs = |last: &Arc<Ack>| !last.errors.iter().map(|(id, reason)| (id, reason)).eq(errors);
        if due.is_none() {
            let again = self.last.as_ref().filter(|last| differs(last));
            due = again.map(|last| Ack { traceparent: String::new(), ..Ack::clone(last) });
        }
        if let Some(ack) = due {
            let errors = errors.iter().map(|(id, reason)| (id.clone(), reason.clone())).collect();
            let ack = Arc::new(Ack { errors, ..ack });
            self.last = Some(ack.clone());
            self.told.send_replace(Some(ack));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_errors(names: &[&str]) -> BTreeMap<RecordId, String> {
        names.iter().map(|name| (RecordId::Node((*name).to_owned()), "x".to_owned())).collect()
    }

    /// Pushes revisions with their generations, then publishes as routes are applied.
    enum Step {
        Push(u64, u64),
        Tell(u64, &'static [&'static str]),
        Forget,
    }
    use Step::{Forget, Push, Tell};

    #[test]
    fn a_revision_is_told_of_when_its_routes_are_applied_and_again_when_its_errors_change() {
        for (steps, expected) in [
            (vec![Push(1, 0), Tell(0, &[])], vec![(1, 0)]),
            (vec![Push(1, 1), Tell(0, &[]), Tell(1, &[])], vec![(1, 0)]),
            (vec![Push(1, 1), Push(2, 1), Tell(1, &[])], vec![(2, 0)]),
            // The first is not lost though ever newer ones come.
            (vec![Push(1, 1), Push(2, 2), Push(3, 3), Tell(1, &[]), Push(4, 4), Tell(3, &[])], vec![(1, 0), (3, 0)]),
            (vec![Push(1, 1), Push(2, 2), Push(3, 3), Tell(9, &[])], vec![(3, 0)]),
            (vec![Push(1, 1), Tell(1, &["a"]), Tell(1, &["a"]), Tell(1, &[])], vec![(1, 1), (1, 0)]),
            (vec![Tell(1, &["a"])], vec![]),
            (vec![Push(1, 0), Tell(0, &[]), Push(2, 1), Forget, Tell(1, &["a"])], vec![(1, 0)]),
        ] {
            let (told, mut seen) = watch::channel(None::<Arc<Ack>>);
            let (mut acks, mut found) = (Acks::new(told), Vec::new());
            for step in steps {
                match step {
                    Push(revision, generation) => acks.push(Ack { revision, ..Ack::default() }, generation),
                    Tell(applied, names) => acks.tell(applied, &mk_errors(names)),
                    Forget => acks.forget(),
                }
                if seen.has_changed().expect("the sender lives") {
                    let ack = seen.borrow_and_update().clone().expect("an ack");
                    found.push((ack.revision, ack.errors.len()));
                }
            }
            assert_eq!(found, expected);
        }
    }
}
