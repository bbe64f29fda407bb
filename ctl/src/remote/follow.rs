//! Following an object from the API server to every node's kernel.
//!
//! A replica of typha says whether it has received a version of the object and up to which revision
//! each of its nodes must then come. Revisions are a replica's own, so a node counts as there by
//! what the replica says that it is connected to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Result;
use margay_api::policy::PolicyKey;
use margay_calc::model::RecordId;
use margay_proto::debug::{FrameStages, NodeStatus, ReachedRequest, ReachedResponse};
use margay_proto::sync::{encode_id, wire};
use serde::Serialize;
use tokio::time::Instant;

use crate::remote::link::{self, Link, Replica};

/// Pause between two questions.
const PAUSE: Duration = Duration::from_millis(50);

/// Version of an object that is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Followed {
    /// Kind as typha calls it.
    pub kind: &'static str,
    /// Namespace; empty for cluster-wide kinds.
    pub namespace: String,
    /// Name in storage.
    pub stored_name: String,
    /// Its version; none: the object is to be gone.
    pub version: Option<u64>,
    /// The policy that it is, if it is one that nodes enforce.
    pub policy: Option<PolicyKey>,
}

/// How far a node is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "camelCase")]
pub enum State {
    /// It is in the node's kernel.
    InForce,
    /// The node has not acknowledged it.
    Behind,
    /// The node cannot enforce it.
    Refused {
        /// Why.
        reason: String,
    },
    /// The node has no connection to any replica.
    NotConnected,
}

/// A node on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeProgress {
    /// Name of the node.
    pub node: String,
    /// Replica that it is connected to; empty if there is none.
    pub replica: String,
    /// How far it is.
    #[serde(flatten)]
    pub state: State,
    /// Frames that it has acknowledged lately.
    #[serde(skip)]
    pub acked: Vec<FrameStages>,
}

/// How far an object is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Every node that has an agent.
    pub nodes: Vec<NodeProgress>,
    /// Replicas that have not received the version.
    pub unaware: Vec<String>,
    /// Reasons why the object is not enforced as written.
    pub problems: Vec<String>,
}

impl Progress {
    /// Returns true once waiting on changes nothing: every node enforces it or refuses it.
    pub fn is_final(&self) -> bool {
        let is_open =
            |node: &NodeProgress| matches!(node.state, State::Behind | State::NotConnected);
        self.unaware.is_empty() && !self.nodes.iter().any(is_open)
    }

    /// Returns true if every node enforces the object as it is written.
    pub fn holds(&self) -> bool {
        let is_in_force = |node: &NodeProgress| node.state == State::InForce;
        self.unaware.is_empty() && self.problems.is_empty() && self.nodes.iter().all(is_in_force)
    }
}

/// Revision that each node of each replica must acknowledge.
type Targets = BTreeMap<(String, String), u64>;

/// Follows the object until it is everywhere or the time is up.
pub async fn follow(
    link: &Link,
    replicas: &mut [Replica],
    followed: &Followed,
    end: Instant,
) -> Result<Progress> {
    let mut targets = Targets::new();
    loop {
        let mut answers = Vec::new();
        for replica in replicas.iter_mut() {
            let answer = replica.client.reached(request(followed)).await;
            answers.push((replica.name.clone(), link::answered(&replica.name, answer)?));
        }
        let agents: BTreeSet<String> = link.agents().await?.into_keys().collect();
        let progress = progress(followed, &agents, &answers, &mut targets);
        if progress.is_final() || Instant::now() >= end {
            return Ok(progress);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn request(followed: &Followed) -> ReachedRequest {
    ReachedRequest {
        kind: followed.kind.to_owned(),
        namespace: followed.namespace.clone(),
        name: followed.stored_name.clone(),
        resource_version: followed.version.unwrap_or_default(),
    }
}

/// Evaluates one round of answers.
fn progress(
    followed: &Followed,
    agents: &BTreeSet<String>,
    answers: &[(String, ReachedResponse)],
    targets: &mut Targets,
) -> Progress {
    let id = followed.policy.clone().map(RecordId::Policy);
    let id = id.as_ref().map(encode_id);
    let mut progress = Progress::default();
    let mut known = BTreeMap::new();
    for (replica, answer) in answers {
        if !answer.reached {
            progress.unaware.push(replica.clone());
        }
        for status in &answer.nodes {
            let state = state(replica, answer, status, id.as_ref(), targets);
            known.insert(status.node.clone(), (replica, state, status.acked.clone()));
        }
        progress.problems.extend(answer.problems.iter().cloned());
    }
    progress.problems.sort();
    progress.problems.dedup();
    let nodes = agents.iter().map(|node| match known.remove(node) {
        Some((replica, state, acked)) => NodeProgress {
            node: node.clone(),
            replica: replica.clone(),
            state,
            acked,
        },
        None => NodeProgress {
            node: node.clone(),
            replica: String::new(),
            state: State::NotConnected,
            acked: Vec::new(),
        },
    });
    progress.nodes = nodes.collect();
    progress
}

fn state(
    replica: &str,
    answer: &ReachedResponse,
    status: &NodeStatus,
    id: Option<&wire::RecordId>,
    targets: &mut Targets,
) -> State {
    if !answer.reached {
        return State::Behind;
    }
    let place = (replica.to_owned(), status.node.clone());
    // Later changes are not waited for: the first answer decides.
    let target = *targets
        .entry(place)
        .or_insert(match status.pending_records {
            0 => status.sent_revision,
            _ => answer.revision,
        });
    if status.acked_revision == 0 || status.acked_revision < target {
        return State::Behind;
    }
    let is_ours = |error: &&wire::RecordError| id.is_some() && error.id.as_ref() == id;
    match status.errors.iter().find(is_ours) {
        Some(error) => State::Refused {
            reason: error.message.clone(),
        },
        None => State::InForce,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_api::policy::PolicyKind;

    fn followed() -> Followed {
        Followed {
            kind: "GlobalNetworkPolicy",
            namespace: String::new(),
            stored_name: "p".to_owned(),
            version: Some(7),
            policy: Some(PolicyKey {
                kind: PolicyKind::GlobalNetworkPolicy,
                namespace: String::new(),
                name: "p".to_owned(),
            }),
        }
    }

    fn status(node: &str, sent: u64, acked: u64) -> NodeStatus {
        NodeStatus {
            node: node.to_owned(),
            sent_revision: sent,
            acked_revision: acked,
            ..NodeStatus::default()
        }
    }

    fn round(reached: bool, nodes: Vec<NodeStatus>, targets: &mut Targets) -> Progress {
        let answer = ReachedResponse {
            reached,
            revision: 9,
            nodes,
            problems: Vec::new(),
        };
        let agents = ["a", "b"].map(str::to_owned).into();
        progress(&followed(), &agents, &[("t".to_owned(), answer)], targets)
    }

    #[test]
    fn a_node_is_there_when_it_has_acknowledged_what_was_sent_then() {
        let mut targets = Targets::new();
        let current = || vec![status("a", 5, 5), status("b", 5, 5)];
        assert!(
            !round(false, current(), &mut targets).is_final(),
            "not received"
        );
        let waiting = round(
            true,
            vec![status("a", 9, 5), status("b", 5, 5)],
            &mut targets,
        );
        assert_eq!(waiting.nodes[0].state, State::Behind);
        assert_eq!(
            waiting.nodes[1].state,
            State::InForce,
            "it had nothing to do"
        );
        // A later change of others is under way.
        let done = round(
            true,
            vec![status("a", 12, 9), status("b", 5, 5)],
            &mut targets,
        );
        assert!(done.is_final() && done.holds());
    }

    #[test]
    fn what_is_pending_is_in_a_later_frame() {
        let mut targets = Targets::new();
        let slow = NodeStatus {
            pending_records: 3,
            ..status("a", 5, 5)
        };
        let first = round(true, vec![slow, status("b", 5, 5)], &mut targets);
        assert_eq!(first.nodes[0].state, State::Behind);
        assert!(
            round(
                true,
                vec![status("a", 10, 10), status("b", 5, 5)],
                &mut targets
            )
            .holds()
        );
    }

    #[test]
    fn nodes_without_a_connection_and_refusals_are_named() {
        let id = encode_id(&RecordId::Policy(followed().policy.expect("a policy")));
        let error = wire::RecordError {
            id: Some(id),
            message: "too large".to_owned(),
        };
        let refusing = NodeStatus {
            errors: vec![error],
            ..status("a", 5, 5)
        };
        let found = round(true, vec![refusing], &mut Targets::new());
        let reason = "too large".to_owned();
        assert_eq!(found.nodes[0].state, State::Refused { reason });
        assert_eq!(found.nodes[1].state, State::NotConnected);
        assert!(!found.is_final() && !found.holds());
    }
}
