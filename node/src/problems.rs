//! Problems of this node that no record shows. Any part of the agent sets and clears them by a
//! code. typha gets the current list and passes it on to the operator, which shows it in
//! `TigeraStatus`.

use std::collections::BTreeMap;
use std::sync::Arc;

use margay_proto::sync::{NodeProblem, encode_problems, wire};
use tokio::sync::{mpsc, watch};

/// Problems of this node by code. Cheap to clone; clones share one list.
#[derive(Clone, Debug, Default)]
pub struct Problems(Arc<watch::Sender<BTreeMap<&'static str, NodeProblem>>>);

impl Problems {
    /// Sets the problem of this code, replacing its former message. `degraded`: something that was
    /// requested is not in effect; otherwise it is a hint. The message names the problem, its
    /// consequence and the remedy.
    pub fn set(&self, code: &'static str, degraded: bool, message: &str) {
        let problem = NodeProblem::new(code, message, degraded);
        self.0.send_if_modified(|problems| {
            if problems.get(code) == Some(&problem) {
                return false;
            }
            tracing::warn!(
                code,
                degraded,
                problem = problem.message,
                "this node has a problem"
            );
            problems.insert(code, problem);
            true
        });
    }

    /// Clears the problem of this code.
    pub fn clear(&self, code: &'static str) {
        self.0.send_if_modified(|problems| {
            let cleared = problems.remove(code).is_some();
            if cleared {
                tracing::info!(code, "a problem of this node is resolved");
            }
            cleared
        });
    }

    /// Sets the problem if there is one, else clears it.
    pub fn report(&self, code: &'static str, degraded: bool, problem: Option<&str>) {
        match problem {
            Some(message) => self.set(code, degraded, message),
            None => self.clear(code),
        }
    }

    /// All problems, ordered by code.
    pub fn list(&self) -> Vec<NodeProblem> {
        self.0.borrow().values().cloned().collect()
    }

    /// Sends the list and each change of it until the stream ends. A list that is replaced before
    /// the network accepts it is not sent.
    pub(crate) async fn send_changes(&self, up: mpsc::Sender<wire::Up>) {
        let mut problems = self.0.subscribe();
        // A server assumes that a node has no problems until it reports some.
        let mut sent = Vec::new();
        loop {
            let list: Vec<_> = problems.borrow_and_update().values().cloned().collect();
            if list != sent && up.send(encode_problems(&list)).await.is_err() {
                return;
            }
            sent = list;
            if problems.changed().await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_latest_list_is_sent() {
        let problems = Problems::default();
        let (up, mut received) = mpsc::channel(1);
        problems.set("routes", true, "no route to 10.0.0.0/26");
        problems.set("kernel", false, "old");
        problems.clear("nothing");
        let sending = tokio::spawn({
            let problems = problems.clone();
            async move { problems.send_changes(up).await }
        });
        assert_eq!(
            received.recv().await,
            Some(encode_problems(&problems.list()))
        );
        assert_eq!(
            problems
                .list()
                .iter()
                .map(|problem| problem.code.as_str())
                .collect::<Vec<_>>(),
            ["kernel", "routes"]
        );
        problems.report("kernel", false, None);
        assert_eq!(
            received.recv().await,
            Some(encode_problems(&problems.list()))
        );
        problems.report("routes", true, Some("no route to 10.0.0.0/26"));
        problems.clear("routes");
        assert_eq!(
            received.recv().await,
            Some(encode_problems(&[])),
            "and what did not change is not sent again"
        );
        drop(received);
        problems.set("routes", true, "again");
        sending.await.expect("it ends with the stream");
    }
}
