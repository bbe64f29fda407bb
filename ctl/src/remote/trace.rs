//! `trace -f FILE`: makes a change and shows its way to every node's kernel, with the times of its
//! stages.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use margay_proto::debug::{FrameStages, ListNodesRequest};
use serde::Serialize;
use tokio::time::Instant;

use crate::calico::get::missing;
use crate::calico::write::{self, Verb, Written};
use crate::live::{self, Connection, ConnectionArgs};
use crate::output::{Finding, Output};
use crate::remote::follow::{self, NodeProgress, State};
use crate::remote::link::{self, Link, Replica};
use crate::remote::wait::{self, Known};
use crate::report;
use crate::tree::Tree;

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// File or folder of Calico's objects, which are applied one after the other; - is standard
    /// input.
    #[arg(short = 'f', long = "filename", value_name = "PATH", required = true)]
    pub files: Vec<String>,
    /// Delete the objects.
    #[arg(long)]
    pub delete: bool,
    /// Namespace of objects without one.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Time limit of each object, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Way of a change.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// The object.
    pub object: String,
    /// What was done with it.
    pub done: &'static str,
    /// From the request to the API server until its response, in microseconds.
    pub api_us: u64,
    /// From the request until every node was seen to enforce it, in microseconds; questions to
    /// typha are a part of that.
    pub total_us: u64,
    /// True if every node enforces it as written.
    pub in_force: bool,
    /// Reasons why it is not enforced as written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// Each node that has an agent.
    pub nodes: Vec<NodeTrace>,
}

/// Way of a change to a node.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeTrace {
    /// How far it is.
    #[serde(flatten)]
    pub progress: NodeProgress,
    /// Times of the frame with the change; none if nothing that the node holds has changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stages: Option<Stages>,
}

/// Times of a frame, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stages {
    /// Revision of the replica.
    pub revision: u64,
    /// From typha's receipt of the change until the frame was on its stream.
    pub sent_us: u64,
    /// To compute the wanted state of the kernel.
    pub plan_us: u64,
    /// To commit it.
    pub commit_us: u64,
    /// From typha's receipt of the change until the node's acknowledgement.
    pub acked_us: u64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let written = write::read(&args.files, &args.namespace)?;
    let answers = live::block_on(async {
        let cluster = Connection::open(&args.connection).await?;
        let link = Link::open(&cluster).await?;
        let mut replicas = link.replicas().await?;
        let mut answers = Vec::new();
        for one in written {
            answers.push(trace(&cluster, &link, &mut replicas, one, args).await?);
        }
        Ok(answers)
    })?;
    let text = match args.output {
        Output::Tree => answers.iter().map(show).collect(),
        Output::Json => report::json(&answers)?,
    };
    Ok(Finding {
        text,
        holds: answers.iter().all(|answer| answer.in_force),
    })
}

async fn trace(
    cluster: &Connection,
    link: &Link,
    replicas: &mut [Replica],
    one: Written,
    args: &Args,
) -> Result<Answer> {
    let known = Known::of(cluster.mode(), one.kind.kind)?;
    let namespace = one.namespace.clone().unwrap_or_default();
    let (object, name) = (known.subject(&namespace, &one.name), one.name.clone());
    let before = revisions(replicas).await?;
    let begin = Instant::now();
    let end = begin + Duration::from_secs(args.timeout);
    let done = match args.delete {
        true => delete(cluster, &one).await?,
        false => write::write(cluster, Verb::Apply, one, false).await?,
    };
    let api_us = micros(begin);
    let followed = match args.delete {
        true => known.gone(cluster, &namespace, &name, end).await?,
        false => vec![known.present(cluster, &namespace, &name).await?],
    };
    let mut progress = follow::Progress::default();
    for one in &followed {
        progress = follow::follow(link, replicas, one, end).await?;
    }
    Ok(Answer {
        object,
        done,
        api_us,
        total_us: micros(begin),
        in_force: progress.holds(),
        problems: progress.problems,
        nodes: progress
            .nodes
            .into_iter()
            .map(|node| of_node(node, &before))
            .collect(),
    })
}

async fn delete(cluster: &Connection, one: &Written) -> Result<&'static str> {
    let found = cluster
        .find(one.kind, one.namespace.as_deref(), &one.name)
        .await?;
    let found = found.ok_or_else(|| missing(one.kind, one.namespace.as_deref(), &one.name))?;
    let deleted = cluster.delete(one.kind, &found).await;
    deleted.with_context(|| format!("{} {}", one.kind.kind, one.name))?;
    Ok("deleted")
}

/// Revision of each replica.
async fn revisions(replicas: &mut [Replica]) -> Result<BTreeMap<String, u64>> {
    let mut revisions = BTreeMap::new();
    for replica in replicas {
        let answer = replica.client.list_nodes(ListNodesRequest {}).await;
        let answer = link::answered(&replica.name, answer)?;
        revisions.insert(replica.name.clone(), answer.revision);
    }
    Ok(revisions)
}

/// The first frame after the revision that the replica had before the change is the one with it:
/// changes of others at the same time share it.
fn of_node(progress: NodeProgress, before: &BTreeMap<String, u64>) -> NodeTrace {
    let since = before.get(&progress.replica).copied().unwrap_or(u64::MAX);
    let is_later = |frame: &&FrameStages| frame.revision > since && frame.received_unix_ns > 0;
    let stages = progress.acked.iter().find(is_later).map(|frame| Stages {
        revision: frame.revision,
        sent_us: frame.sent_us,
        plan_us: frame.plan_us,
        commit_us: frame.commit_us,
        acked_us: frame.acked_us,
    });
    NodeTrace { progress, stages }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn ms(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

fn show(answer: &Answer) -> String {
    let mut by_replica: BTreeMap<&str, Vec<&NodeTrace>> = BTreeMap::new();
    for node in &answer.nodes {
        by_replica
            .entry(&node.progress.replica)
            .or_default()
            .push(node);
    }
    let replicas = by_replica.into_iter().map(|(replica, nodes)| {
        let line = match replica {
            "" => "without typha".to_owned(),
            replica => format!("{replica} received the change"),
        };
        Tree::new(line, nodes.into_iter().map(of_node_tree))
    });
    let problems = answer.problems.iter();
    let problems = problems.map(|problem| Tree::leaf(format!("not as written: {problem}")));
    let Answer { object, done, .. } = answer;
    let (api, total) = (ms(answer.api_us), ms(answer.total_us));
    let mut text = String::new();
    Tree::new(
        format!("{object}: {done}, answered after {api}, seen in force after {total}"),
        problems.chain(replicas),
    )
    .write(&mut text);
    text
}

fn of_node_tree(node: &NodeTrace) -> Tree {
    match (&node.progress.state, &node.stages) {
        (State::InForce, Some(stages)) => Tree::new(
            format!(
                "{}: acknowledged after {}",
                node.progress.node,
                ms(stages.acked_us)
            ),
            [
                format!("computed and sent after {}", ms(stages.sent_us)),
                format!("plan {}", ms(stages.plan_us)),
                format!("commit {}", ms(stages.commit_us)),
            ]
            .map(Tree::leaf),
        ),
        (State::InForce, None) => Tree::leaf(format!(
            "{}: nothing that it holds has changed",
            node.progress.node
        )),
        _ => Tree::leaf(wait::describe(&node.progress)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, state: State, acked: Vec<FrameStages>) -> NodeProgress {
        NodeProgress {
            node: name.to_owned(),
            replica: "typha-1".to_owned(),
            state,
            acked,
        }
    }

    fn frame(revision: u64) -> FrameStages {
        FrameStages {
            revision,
            received_unix_ns: 1,
            sent_us: 900,
            acked_us: 3210,
            plan_us: 400,
            commit_us: 1100,
        }
    }

    #[test]
    fn the_frame_of_a_change_is_the_first_after_it() {
        let before = [("typha-1".to_owned(), 7)].into();
        let frames = vec![frame(6), frame(7), frame(9), frame(10)];
        let found = of_node(node("a", State::InForce, frames), &before);
        assert_eq!(found.stages.expect("a frame").revision, 9);
        assert_eq!(
            of_node(node("a", State::InForce, vec![frame(7)]), &before).stages,
            None
        );
    }

    #[test]
    fn a_change_is_a_tree() {
        let before = [("typha-1".to_owned(), 7)].into();
        let nodes = [
            node("a", State::InForce, vec![frame(8)]),
            node("b", State::InForce, Vec::new()),
            node("c", State::Behind, Vec::new()),
        ];
        let answer = Answer {
            object: "Tier t".to_owned(),
            done: "created",
            api_us: 5_150,
            total_us: 21_000,
            in_force: false,
            problems: Vec::new(),
            nodes: nodes.map(|node| of_node(node, &before)).into(),
        };
        expect_test::expect![[r#"
            Tier t: created, answered after 5.1 ms, seen in force after 21.0 ms
            └─ typha-1 received the change
               ├─ a: acknowledged after 3.2 ms
               │  ├─ computed and sent after 0.9 ms
               │  ├─ plan 0.4 ms
               │  └─ commit 1.1 ms
               ├─ b: nothing that it holds has changed
               └─ c: not acknowledged yet (connected to typha-1)
        "#]]
        .assert_eq(&show(&answer));
    }
}
