//! `explain FROM TO`: whether a connection is allowed, and which rule decides at both ends.

use anyhow::{Context, Result, anyhow};
use margay_calc::explain::{Explanation, Party, Question, explain};
use serde::Serialize;

use crate::cluster::Cluster;
use crate::live::ConnectionArgs;
use crate::output::{Finding, Output};
use crate::party::{Destination, End};
use crate::report::{self, OutcomeReport, RefusedReport, VerdictName};
use crate::source;
use crate::tree::Tree;

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Source: `[pod/][NAMESPACE/]NAME` or an IP address.
    pub from: String,
    /// Destination: `[pod/][NAMESPACE/]NAME`, `svc/[NAMESPACE/]NAME` or an IP address.
    pub to: String,
    /// Port of the destination, a number or a name [default: every port that it declares].
    #[arg(short, long)]
    pub port: Option<String>,
    /// tcp, udp, sctp, icmp or a number [default: that of the port, else tcp].
    #[arg(long)]
    pub protocol: Option<String>,
    /// File or folder of manifests that is taken for the cluster; - is standard input [default:
    /// what the API server has].
    #[arg(short = 'f', long = "filename", value_name = "PATH")]
    pub files: Vec<String>,
    /// Namespace of names and objects without one.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Answer to the question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// `allow` if every connection is allowed.
    pub verdict: VerdictName,
    /// Each port and backend that is meant.
    pub connections: Vec<ConnectionReport>,
    /// Objects that are not enforced as written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedReport>,
    /// What was assumed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Verdict on one connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConnectionReport {
    /// Pod or address of the source.
    pub from: String,
    /// Pod or address of the destination.
    pub to: String,
    /// Port of a Service that leads there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub through: Option<String>,
    /// Address of the source.
    pub source: String,
    /// Address of the destination.
    pub destination: String,
    /// Protocol.
    pub protocol: String,
    /// Port of the destination.
    pub port: u16,
    /// By the policies in force.
    #[serde(flatten)]
    pub enforced: OutcomeReport,
    /// As if staged policies were enforced; absent if nothing is staged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staged: Option<OutcomeReport>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let objects = source::objects(&args.files, &args.namespace, &args.connection)?;
    let answer = answer(args, &Cluster::of(&objects))?;
    let text = match args.output {
        Output::Tree => show(&answer),
        Output::Json => report::json(&answer)?,
    };
    Ok(Finding {
        text,
        holds: answer.verdict == VerdictName::Allow,
    })
}

/// Answers the question for a cluster.
pub fn answer(args: &Args, cluster: &Cluster) -> Result<Answer> {
    let (from, to) = (
        End::parse(&args.from, &args.namespace)?,
        End::parse(&args.to, &args.namespace)?,
    );
    let source = from.source(cluster)?;
    let destinations = to.destinations(cluster, args.protocol.as_deref(), args.port.as_deref())?;
    let connections = destinations
        .iter()
        .map(|destination| connection(cluster, &source, destination));
    let connections: Vec<ConnectionReport> = connections.collect::<Result<_>>()?;
    Ok(Answer {
        verdict: VerdictName::of(
            connections
                .iter()
                .all(|found| found.enforced.verdict == VerdictName::Allow),
        ),
        connections,
        refused: report::refused(cluster),
        notes: cluster.notes.clone(),
    })
}

fn connection(
    cluster: &Cluster,
    source: &Party,
    destination: &Destination,
) -> Result<ConnectionReport> {
    let Destination {
        party,
        protocol,
        port,
        through,
    } = destination;
    let question = Question {
        from: Some(source.clone()),
        to: Some(party.clone()),
        protocol: protocol.clone(),
        port: u32::from(*port),
    };
    let explanation = explain(&cluster.graph, &question).map_err(|error| anyhow!("{error}"));
    let Explanation {
        packet,
        enforced,
        staged,
    } = explanation.with_context(|| format!("{} to {}", name(source), name(party)))?;
    let staged = staged.zip(cluster.graph.staged_view());
    Ok(ConnectionReport {
        from: name(source).to_owned(),
        to: name(party).to_owned(),
        through: through.clone(),
        source: packet.source.to_string(),
        destination: packet.destination.to_string(),
        protocol: protocol.to_ascii_lowercase(),
        port: *port,
        enforced: OutcomeReport::of(cluster, &cluster.graph, &enforced),
        staged: staged.map(|(outcome, view)| OutcomeReport::of(cluster, &view, &outcome)),
    })
}

fn name(party: &Party) -> &str {
    match party {
        Party::Pod(name) | Party::Address(name) => name,
    }
}

fn show(answer: &Answer) -> String {
    let mut text = String::new();
    for found in &answer.connections {
        let mut below = found.enforced.branches();
        if let Some(staged) = &found.staged {
            below.push(Tree::new(
                format!(
                    "if staged policies were enforced: {}",
                    staged.verdict.word()
                ),
                staged.branches(),
            ));
        }
        Tree::new(headline(found), below).write(&mut text);
    }
    report::write_remarks(&answer.refused, &answer.notes, &mut text);
    text
}

fn headline(found: &ConnectionReport) -> String {
    let with_address = |name: &str, address: &str| match name == address {
        true => name.to_owned(),
        false => format!("{name} ({address})"),
    };
    let (from, to) = (
        with_address(&found.from, &found.source),
        with_address(&found.to, &found.destination),
    );
    let port = if found.port == 0 {
        String::new()
    } else {
        format!(" {}", found.port)
    };
    let through = found
        .through
        .as_ref()
        .map(|through| format!(", by {through}"))
        .unwrap_or_default();
    format!(
        "{}: {from} to {to} {}{port}{through}",
        found.enforced.verdict.word(),
        found.protocol
    )
}
