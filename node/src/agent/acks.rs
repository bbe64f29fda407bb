//! Acknowledgements that wait for routes: a node acknowledges a revision when policy and routes of
//! it are in force.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use margay_calc::model::RecordId;
use margay_proto::sync::Ack;
use tokio::sync::watch;

/// An acknowledgement of what nftables holds, still without errors, and the generation of the route
/// plan that belongs to it.
struct PendingAck {
    ack: Ack,
    generation: u64,
}

/// Pending acknowledgements. One covers all before it, so two are enough: one whose routes are
/// being applied, and the newest. With the newest alone, a node whose routes change all the time
/// would never acknowledge anything.
pub(super) struct Acks {
    sender: watch::Sender<Option<Arc<Ack>>>,
    pending: VecDeque<PendingAck>,
    /// The last one published on this stream.
    last: Option<Arc<Ack>>,
}

impl Acks {
    pub(super) fn new(sender: watch::Sender<Option<Arc<Ack>>>) -> Self {
        Self {
            sender,
            pending: VecDeque::new(),
            last: None,
        }
    }

    /// Drops everything that belongs to the last stream: its revisions mean nothing on another one.
    pub(super) fn reset(&mut self) {
        self.pending.clear();
        self.last = None;
    }

    /// Adds an acknowledgement of what nftables holds; it is published once the route plan of this
    /// generation is applied.
    pub(super) fn push(&mut self, ack: Ack, generation: u64) {
        let replaces = self
            .pending
            .back()
            .is_some_and(|newest| newest.generation == generation);
        if replaces || self.pending.len() > 1 {
            self.pending.pop_back();
        }
        self.pending.push_back(PendingAck { ack, generation });
    }

    /// Publishes the newest acknowledgement whose generation is applied, or the last one again if
    /// the errors differ.
    pub(super) fn publish(&mut self, applied: u64, errors: &BTreeMap<RecordId, String>) {
        let mut due = None;
        while let Some(next) = self
            .pending
            .pop_front_if(|pending| pending.generation <= applied)
        {
            due = Some(next.ack);
        }
        let differs = |last: &Arc<Ack>| {
            !last
                .errors
                .iter()
                .map(|(id, reason)| (id, reason))
                .eq(errors)
        };
        if due.is_none() {
            let again = self.last.as_ref().filter(|last| differs(last));
            due = again.map(|last| Ack {
                traceparent: String::new(),
                ..Ack::clone(last)
            });
        }
        if let Some(ack) = due {
            let errors = errors
                .iter()
                .map(|(id, reason)| (id.clone(), reason.clone()))
                .collect();
            let ack = Arc::new(Ack { errors, ..ack });
            self.last = Some(ack.clone());
            self.sender.send_replace(Some(ack));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_errors(names: &[&str]) -> BTreeMap<RecordId, String> {
        names
            .iter()
            .map(|name| (RecordId::Node((*name).to_owned()), "x".to_owned()))
            .collect()
    }

    /// Pushes revisions with their generations, then publishes as routes are applied.
    enum Step {
        Push(u64, u64),
        Publish(u64, &'static [&'static str]),
        Reset,
    }
    use Step::{Publish, Push, Reset};

    #[test]
    fn a_revision_is_acknowledged_when_its_routes_are_applied_and_again_when_its_errors_change() {
        for (steps, expected) in [
            (vec![Push(1, 0), Publish(0, &[])], vec![(1, 0)]),
            (
                vec![Push(1, 1), Publish(0, &[]), Publish(1, &[])],
                vec![(1, 0)],
            ),
            (vec![Push(1, 1), Push(2, 1), Publish(1, &[])], vec![(2, 0)]),
            // The first is not lost while newer ones keep coming.
            (
                vec![
                    Push(1, 1),
                    Push(2, 2),
                    Push(3, 3),
                    Publish(1, &[]),
                    Push(4, 4),
                    Publish(3, &[]),
                ],
                vec![(1, 0), (3, 0)],
            ),
            (
                vec![Push(1, 1), Push(2, 2), Push(3, 3), Publish(9, &[])],
                vec![(3, 0)],
            ),
            (
                vec![
                    Push(1, 1),
                    Publish(1, &["a"]),
                    Publish(1, &["a"]),
                    Publish(1, &[]),
                ],
                vec![(1, 1), (1, 0)],
            ),
            (vec![Publish(1, &["a"])], vec![]),
            (
                vec![
                    Push(1, 0),
                    Publish(0, &[]),
                    Push(2, 1),
                    Reset,
                    Publish(1, &["a"]),
                ],
                vec![(1, 0)],
            ),
        ] {
            let (sender, mut seen) = watch::channel(None::<Arc<Ack>>);
            let (mut acks, mut found) = (Acks::new(sender), Vec::new());
            for step in steps {
                match step {
                    Push(revision, generation) => acks.push(
                        Ack {
                            revision,
                            ..Ack::default()
                        },
                        generation,
                    ),
                    Publish(applied, names) => acks.publish(applied, &mk_errors(names)),
                    Reset => acks.reset(),
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
