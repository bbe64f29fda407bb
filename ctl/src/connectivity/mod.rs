//! `connectivity test`: pods on several nodes talk to each other, through Services, node ports and
//! DNS, with packets of full size, and while a policy comes and goes.
//!
//! Clients are asked through the API server's port-forward, so that nothing but the tested
//! connections crosses the network. [`check`] says what is tried and what failures come from,
//! [`stage`] sets it up and removes it.

pub mod check;
pub mod stage;

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Subcommand;
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Node;
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use crate::calico::table::aligned;
use crate::live::{self, Connection, ConnectionArgs};
use crate::output::{Finding, Output};
use crate::report;
use check::{Check, Outcome};
use stage::Stage;

/// Checks that run at the same time.
const CONCURRENT: usize = 8;
/// Time limit of one check: netexec gives up after five seconds.
const CHECK: Duration = Duration::from_secs(15);
/// Pause before what is not as it must be is tried again.
const PAUSE: Duration = Duration::from_secs(1);
/// Time limit of the removal.
const REMOVAL: Duration = Duration::from_secs(120);

/// A command about connections.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Tries connections among pods, Services and nodes, with a policy and without.
    Test(Args),
}

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Namespace that is created for it, and deleted at the end.
    #[arg(short, long, default_value = "margay-connectivity")]
    pub namespace: String,
    /// Image with agnhost.
    #[arg(long, default_value = "registry.k8s.io/e2e-test-images/agnhost:2.53")]
    pub image: String,
    /// Nodes that take part, at most; the first by name.
    #[arg(long, value_name = "NUMBER", default_value_t = 3)]
    pub nodes: usize,
    /// Seconds after which pods must run, and after which what fails has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
    /// Leave the namespace with the pods.
    #[arg(long)]
    pub keep: bool,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Nodes that took part.
    pub nodes: Vec<String>,
    /// Connections that were as they must be.
    pub passed: usize,
    /// What was not tried, and why.
    pub skipped: Vec<String>,
    /// Connections that were not.
    pub failed: Vec<Outcome>,
}

/// Runs the command.
pub fn run(command: &Command) -> Result<Finding> {
    let Command::Test(args) = command;
    let answer = live::block_on(test(args))?;
    let text = match args.output {
        Output::Tree => show(&answer),
        Output::Json => report::json(&answer)?,
    };
    Ok(Finding {
        text,
        holds: answer.failed.is_empty(),
    })
}

async fn test(args: &Args) -> Result<Answer> {
    let cluster = Connection::open(&args.connection).await?;
    let client = cluster.client().clone();
    let nodes = stage::nodes(&client, args.nodes).await?;
    let stage = Stage::create(client, &args.namespace, &args.image).await?;
    // Whatever happens, the namespace is removed.
    let answer = tokio::select! {
        answer = play(&stage, &nodes, args) => answer,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    let removed = match args.keep {
        true => Ok(()),
        false => stage.remove(Instant::now() + REMOVAL).await,
    };
    let answer = answer?;
    removed.context("the test is over, but not removed")?;
    Ok(answer)
}

async fn play(stage: &Stage, nodes: &[Node], args: &Args) -> Result<Answer> {
    let limit = Duration::from_secs(args.timeout);
    let (places, service) = stage.fill(nodes, Instant::now() + limit).await?;
    let mut outcomes = all(stage, check::open(&places, &service), limit).await;
    stage.close().await?;
    outcomes.extend(all(stage, check::closed(&places), limit).await);
    stage.open().await?;
    outcomes.extend(all(stage, check::reopened(&places), limit).await);
    check::explain(&mut outcomes);
    let mut skipped = Vec::new();
    if service.name.is_none() {
        skipped.push("DNS: there is no Service kube-system/kube-dns".to_owned());
    }
    if places.len() < 2 {
        skipped.push("connections between nodes: there is one node".to_owned());
    }
    let tried = outcomes.len();
    outcomes.retain(|outcome| !outcome.holds);
    Ok(Answer {
        nodes: places.into_iter().map(|place| place.node).collect(),
        passed: tried - outcomes.len(),
        skipped,
        failed: outcomes,
    })
}

/// Tries all, and again what is not as it must be, until the time is up: pods, Services and
/// policies take a moment.
async fn all(stage: &Stage, checks: Vec<Check>, limit: Duration) -> Vec<Outcome> {
    let end = Instant::now() + limit;
    let (mut done, mut open) = (Vec::new(), checks);
    loop {
        let tried = stream::iter(open)
            .map(|check| one(stage, check))
            .buffered(CONCURRENT);
        let tried: Vec<Outcome> = tried.collect().await;
        let (holding, failing): (Vec<_>, Vec<_>) =
            tried.into_iter().partition(|outcome| outcome.holds);
        done.extend(holding);
        if failing.is_empty() || Instant::now() >= end {
            done.extend(failing);
            return done;
        }
        open = failing.into_iter().map(|outcome| outcome.check).collect();
        tokio::time::sleep(PAUSE).await;
    }
}

async fn one(stage: &Stage, check: Check) -> Outcome {
    let role = if check.is_guest { "guest" } else { "client" };
    let (pods, pod) = (stage.pods(), stage::name_of(role, &check.from));
    let path = format!(
        "/dial?host={}&port={}&protocol={}&request={}&tries=1",
        check.host,
        check.port,
        check.protocol,
        check.request.replace('?', "%3F").replace('=', "%3D"),
    );
    let answer = tokio::time::timeout(CHECK, stage::dial(&pods, &pod, &path)).await;
    let seen = match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(format!("the client cannot be asked: {error:#}")),
        Err(_) => Err(format!("the client was silent for {} s", CHECK.as_secs())),
    };
    let (holds, seen) = match seen {
        Ok(answer) => judge(&check, &answer),
        Err(error) => (false, error),
    };
    Outcome {
        check,
        holds,
        seen: if holds { String::new() } else { seen },
        cause: String::new(),
    }
}

/// Whether netexec's answer is as it must be, and what it is.
fn judge(check: &Check, answer: &Value) -> (bool, String) {
    let list = |field: &str| {
        let values = answer[field].as_array().into_iter().flatten();
        values
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let responses: Vec<String> = list("responses")
        .into_iter()
        .filter(|text| !text.is_empty())
        .collect();
    let is_answered = !responses.is_empty();
    let seen = match is_answered {
        true => "it was answered".to_owned(),
        false => match list("errors").as_slice() {
            [] => "no answer".to_owned(),
            errors => errors.join("; "),
        },
    };
    (is_answered == check.is_allowed, seen)
}

fn show(answer: &Answer) -> String {
    let mut text = format!(
        "{} nodes: {}\n",
        answer.nodes.len(),
        answer.nodes.join(", ")
    );
    answer
        .skipped
        .iter()
        .for_each(|reason| text += &format!("not tried: {reason}\n"));
    text += &format!("{} connections are as they must be\n", answer.passed);
    if answer.failed.is_empty() {
        return text;
    }
    let header = ["FROM", "TO", "PROTOCOL", "WHEN", "SEEN", "LIKELY CAUSE"];
    let row = |outcome: &Outcome| {
        let check = &outcome.check;
        let from = match check.is_guest {
            true => format!("{} (let in)", check.from),
            false => check.from.clone(),
        };
        vec![
            from,
            check.target.to_string(),
            check.protocol.to_owned(),
            check.phase.words().to_owned(),
            outcome.seen.clone(),
            outcome.cause.clone(),
        ]
    };
    let rows = std::iter::once(header.map(str::to_owned).to_vec());
    let rows: Vec<Vec<String>> = rows.chain(answer.failed.iter().map(row)).collect();
    text += &format!(
        "{} connections are not:\n{}",
        answer.failed.len(),
        aligned(&rows)
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use check::{Phase, Target};
    use serde_json::json;

    fn check(is_allowed: bool) -> Check {
        Check {
            phase: Phase::Policy,
            from: "n1".to_owned(),
            is_guest: false,
            target: Target::Pod {
                node: "n2".to_owned(),
            },
            protocol: "http",
            host: "10.0.0.1".to_owned(),
            port: check::HTTP,
            request: "hostname".to_owned(),
            is_allowed,
        }
    }

    #[test]
    fn silence_is_right_where_nothing_may_pass() {
        let answered = json!({"responses": ["server-n2"]});
        let silent = json!({"errors": ["timeout"], "responses": [""]});
        assert!(judge(&check(true), &answered).0);
        assert_eq!(judge(&check(true), &silent), (false, "timeout".to_owned()));
        assert!(judge(&check(false), &silent).0);
        assert_eq!(
            judge(&check(false), &answered),
            (false, "it was answered".to_owned())
        );
    }

    #[test]
    fn failures_are_a_table() {
        let failed = Outcome {
            check: check(false),
            holds: false,
            seen: "it was answered".to_owned(),
            cause: "the agent of n2".to_owned(),
        };
        let answer = Answer {
            nodes: vec!["n1".to_owned(), "n2".to_owned()],
            passed: 7,
            skipped: vec!["DNS: there is none".to_owned()],
            failed: vec![failed],
        };
        expect_test::expect![[r#"
            2 nodes: n1, n2
            not tried: DNS: there is none
            7 connections are as they must be
            1 connections are not:
            FROM   TO          PROTOCOL   WHEN            SEEN              LIKELY CAUSE
            n1     pod on n2   http       with a policy   it was answered   the agent of n2
        "#]]
        .assert_eq(&show(&answer));
    }
}
