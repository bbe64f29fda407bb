//! `node status` and `node checksystem`: what each agent says of itself and of its kernel.

use anyhow::{Result, bail};
use clap::Subcommand;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{ListParams, LogParams};
use kube::{Api, ResourceExt};
use margay_proto::debug::{StatusRequest, StatusResponse};
use margay_proto::sync::decode_id;
use serde::Serialize;

use crate::live::{self, Connection, ConnectionArgs, explained};
use crate::output::{Finding, Output};
use crate::remote::link::{self, Link};
use crate::report;
use crate::tree::Tree;

/// Code of the problem that tells what a kernel lacks.
const KERNEL: &str = "kernel";
/// Lines of the log of an agent that does not run.
const LOG_LINES: i64 = 3;

/// A command about nodes.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Says whether each agent enforces what it should, and what it waits for.
    Status(Args),
    /// Says what the kernel of each node lacks.
    Checksystem(Args),
}

/// Arguments of both.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Names of nodes [default: all].
    pub nodes: Vec<String>,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// A node as its agent has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Name of the node.
    pub node: String,
    /// Version of its kernel, from kubelet.
    pub kernel: String,
    /// True if the agent enforces what it should, and nothing is wrong with the node.
    pub is_ready: bool,
    /// Replica of typha that it is connected to; empty if to none.
    pub typha: String,
    /// Revision of that replica which is in the kernel.
    pub revision: u64,
    /// What keeps the agent from being ready; why it does not answer.
    pub waiting: Vec<String>,
    /// Records that cannot be enforced.
    pub errors: Vec<String>,
    /// Problems of the node.
    pub problems: Vec<Problem>,
}

/// Problem of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Its code.
    pub code: String,
    /// What is wrong, and the remedy.
    pub message: String,
    /// True if the node does not do what it should.
    pub degraded: bool,
}

/// Runs a command.
pub fn run(command: &Command) -> Result<Finding> {
    let (Command::Status(args) | Command::Checksystem(args)) = command;
    let mut answers = live::block_on(ask(args))?;
    if matches!(command, Command::Checksystem(_)) {
        answers = answers.into_iter().map(of_kernel).collect();
    }
    let text = match args.output {
        Output::Tree => answers.iter().map(show).collect(),
        Output::Json => report::json(&answers)?,
    };
    Ok(Finding {
        text,
        holds: answers.iter().all(|answer| answer.is_ready),
    })
}

async fn ask(args: &Args) -> Result<Vec<Answer>> {
    let cluster = Connection::open(&args.connection).await?;
    let nodes: Api<Node> = Api::all(cluster.client().clone());
    let mut nodes = nodes
        .list(&ListParams::default())
        .await
        .map_err(explained)?
        .items;
    let is_there = |name: &&String| nodes.iter().any(|node| node.name_any() == **name);
    if let Some(unknown) = args.nodes.iter().find(|name| !is_there(name)) {
        bail!("there is no Node {unknown}");
    }
    nodes.retain(|node| args.nodes.is_empty() || args.nodes.contains(&node.name_any()));
    let link = Link::open(&cluster).await?;
    let agents = link.agents().await?;
    let mut answers = Vec::new();
    for node in nodes {
        let answer = match agents.get(&node.name_any()) {
            Some(pod) => of_agent(&link, pod).await,
            None => waiting("no agent is scheduled to it".to_owned()),
        };
        let info = node
            .status
            .as_ref()
            .and_then(|status| status.node_info.as_ref());
        answers.push(Answer {
            node: node.name_any(),
            kernel: info
                .map(|info| info.kernel_version.clone())
                .unwrap_or_default(),
            ..answer
        });
    }
    Ok(answers)
}

/// What an agent says, or why it says nothing.
async fn of_agent(link: &Link, pod: &Pod) -> Answer {
    let asked = async {
        let mut agent = link.agent(pod).await?;
        link::answered(&pod.name_any(), agent.status(StatusRequest {}).await)
    };
    match asked.await {
        Ok(status) => answer(status),
        Err(error) => {
            let mut answer = waiting(format!("its agent does not answer: {error:#}"));
            answer.waiting.extend(last_words(link, pod).await);
            answer
        }
    }
}

/// The end of the log of an agent that has ended.
async fn last_words(link: &Link, pod: &Pod) -> Option<String> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    let previous = statuses.iter().any(|status| status.restart_count > 0);
    let params = LogParams {
        previous,
        tail_lines: Some(LOG_LINES),
        ..LogParams::default()
    };
    let text = link.pods().logs(&pod.name_any(), &params).await.ok()?;
    (!text.trim().is_empty()).then(|| format!("the end of its log: {}", text.trim()))
}

fn waiting(reason: String) -> Answer {
    Answer {
        waiting: vec![reason],
        ..Answer::default()
    }
}

fn answer(status: StatusResponse) -> Answer {
    let error = |error: margay_proto::sync::wire::RecordError| {
        let id = error.id.and_then(|id| decode_id(id).ok());
        let subject = id.map(|id| format!("{} {}", id.kind(), id.name()));
        format!("{}: {}", subject.unwrap_or_default(), error.message)
    };
    let problem = |problem: margay_proto::sync::wire::NodeProblem| Problem {
        code: problem.code,
        message: problem.message,
        degraded: problem.degraded,
    };
    let problems: Vec<Problem> = status.problems.into_iter().map(problem).collect();
    Answer {
        is_ready: status.in_sync
            && status.waiting.is_empty()
            && status.errors.is_empty()
            && !problems.iter().any(|problem| problem.degraded),
        typha: status.typha,
        revision: status.revision,
        waiting: status.waiting,
        errors: status.errors.into_iter().map(error).collect(),
        problems,
        ..Answer::default()
    }
}

/// Leaves what is about the kernel. An agent that does not answer may have found that it lacks
/// what nothing goes without.
fn of_kernel(answer: Answer) -> Answer {
    let problems: Vec<Problem> = answer
        .problems
        .into_iter()
        .filter(|problem| problem.code == KERNEL)
        .collect();
    let is_silent = answer.typha.is_empty() && answer.revision == 0;
    let waiting = if is_silent {
        answer.waiting
    } else {
        Vec::new()
    };
    Answer {
        node: answer.node,
        kernel: answer.kernel,
        is_ready: problems.is_empty() && waiting.is_empty(),
        waiting,
        problems,
        ..Answer::default()
    }
}

fn show(answer: &Answer) -> String {
    let word = if answer.is_ready {
        "ready"
    } else {
        "not ready"
    };
    let mut line = format!("{}: {word}, kernel {}", answer.node, answer.kernel);
    if !answer.typha.is_empty() {
        line += &format!(
            ", revision {} of typha at {}",
            answer.revision, answer.typha
        );
    }
    let waiting = answer
        .waiting
        .iter()
        .map(|reason| format!("waits: {reason}"));
    let errors = answer
        .errors
        .iter()
        .map(|error| format!("cannot enforce {error}"));
    let problems = answer
        .problems
        .iter()
        .map(|Problem { code, message, .. }| format!("problem {code}: {message}"));
    let mut text = String::new();
    Tree::new(line, waiting.chain(errors).chain(problems).map(Tree::leaf)).write(&mut text);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_proto::sync::wire;

    fn status(problem: &str, degraded: bool) -> StatusResponse {
        let problem = wire::NodeProblem {
            code: problem.to_owned(),
            message: "no such module".to_owned(),
            degraded,
        };
        StatusResponse {
            node: "n1".to_owned(),
            in_sync: true,
            revision: 4,
            typha: "10.0.0.1:5473".to_owned(),
            problems: vec![problem],
            ..StatusResponse::default()
        }
    }

    #[test]
    fn a_problem_that_costs_nothing_leaves_a_node_ready() {
        assert!(answer(status("kernel", false)).is_ready);
        assert!(!answer(status("routes", true)).is_ready);
        let behind = StatusResponse {
            in_sync: false,
            ..status("kernel", false)
        };
        assert!(!answer(behind).is_ready);
    }

    #[test]
    fn what_a_kernel_lacks_is_all_that_its_check_shows() {
        assert!(of_kernel(answer(status("routes", true))).is_ready);
        let lacking = of_kernel(answer(status("kernel", false)));
        assert!(!lacking.is_ready);
        let named = Answer {
            node: "n1".to_owned(),
            kernel: "6.1.0".to_owned(),
            ..lacking
        };
        assert_eq!(
            show(&named),
            "n1: not ready, kernel 6.1.0\n└─ problem kernel: no such module\n"
        );
        assert!(!of_kernel(waiting("no agent".to_owned())).is_ready);
    }
}
