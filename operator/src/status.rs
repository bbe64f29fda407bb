//! What is said about the installation: `Available`, `Progressing`, `Degraded`, each with reason and a message that names object, node and
//! remedy. Pure.

mod pods;

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use margay_api::installation::StatusCondition;
use margay_api::report::{Entry, Report};

use crate::fields::{self, Ignored};
use crate::inputs::Inputs;
use crate::object::Key;
use crate::render::{NAMESPACE, NODE, TYPHA};
use crate::validate::Problem;

/// Most examples named in one message.
const EXAMPLES: usize = 3;
/// Most fields without effect named in one message: all that anybody has set.
const LISTED: usize = 40;

/// A reason from Calico's list, and a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// One word.
    pub reason: &'static str,
    /// What, where, what to do.
    pub message: String,
}

impl Finding {
    /// A finding with that reason.
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// The state of one part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Something is wrong and needs a person.
    pub degraded: Option<Finding>,
    /// Something is on its way.
    pub progressing: Option<Finding>,
    /// All works, and yet a person should know it: told as Degraded, beside being available.
    pub caution: Option<Finding>,
    /// What else is to be known; told with the first condition.
    pub notes: String,
}

impl State {
    fn is_available(&self) -> bool {
        self.degraded.is_none() && self.progressing.is_none()
    }
}

/// An object that could not be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which.
    pub key: Key,
    /// The API's words.
    pub message: String,
    /// Whether trying again later can help without a change by a person.
    pub transient: bool,
}

/// What the round found, beside the inputs.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// Problems of the Installation.
    pub problems: Vec<Problem>,
    /// Why its spec could not be decoded.
    pub undecodable: Option<String>,
    /// What is waited for.
    pub waiting: Vec<String>,
    /// What could not be written.
    pub failures: Vec<Failure>,
    /// What is wrong with certificates.
    pub certificates: Option<String>,
    /// Pools that cannot be had.
    pub conflicts: Vec<String>,
    /// What is wrong about host endpoints of nodes.
    pub hosts: Vec<String>,
    /// Pools and blocks that overlap.
    pub overlaps: Vec<String>,
    /// What is set and not followed.
    pub ignored: fields::Report,
}

/// State of the whole: TigeraStatus `calico`.
pub fn calico(inputs: &Inputs, round: &Round) -> State {
    let health = pods::health(inputs);
    State {
        degraded: degraded(round).or(health.failing).or_else(|| nodes(inputs)),
        progressing: progressing(inputs, round, health.waiting),
        caution: caution(&round.ignored.calico),
        notes: notes(&round.ignored.calico),
    }
}

/// Fields without effect that somebody may rely on.
fn caution(ignored: &BTreeSet<Ignored>) -> Option<Finding> {
    let texts: Vec<String> = ignored.iter().filter(|one| one.is_unsafe).map(Ignored::to_string).collect();
    (!texts.is_empty()).then(|| Finding::new("InvalidConfigurationError", some_of(&texts, LISTED)))
}

/// The other fields without effect.
fn notes(ignored: &BTreeSet<Ignored>) -> String {
    let texts: Vec<String> = ignored.iter().filter(|one| !one.is_unsafe).map(Ignored::to_string).collect();
    if texts.is_empty() { String::new() } else { format!("not followed: {}", some_of(&texts, LISTED)) }
}

/// State of what users write about policy, which is theirs to mend: TigeraStatus `policies`.
pub fn policies(inputs: &Inputs) -> State {
    let Report { objects, records, .. } = &inputs.reports;
    let counts = [
        (objects.total, "not used as they are written"),
        (records.total, "not enforced on a node as they are written"),
    ];
    let counts = counts.iter().filter(|(count, _)| *count > 0);
    let counts: Vec<String> = counts.map(|(count, what)| format!("{count} {what}")).collect();
    let named: Vec<String> = objects.first.iter().chain(&records.first).map(entry_text).collect();
    let first = named[..named.len().min(EXAMPLES)].join("; ");
    let message = format!("{}: {first}", counts.join(", "));
    let degraded = (!counts.is_empty()).then(|| Finding::new("ResourceValidationError", message));
    State { degraded, ..State::default() }
}

fn entry_text(entry: &Entry) -> String {
    format!("{}: {}", entry.subject, entry.reason)
}

/// What is wrong with nodes, as their agents say.
fn nodes(inputs: &Inputs) -> Option<Finding> {
    let nodes = &inputs.reports.nodes;
    let named: Vec<String> = nodes.first.iter().map(|entry| format!("node {}", entry_text(entry))).collect();
    let shown = named[..named.len().min(EXAMPLES)].join("; ");
    let more = nodes.total.saturating_sub(EXAMPLES);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    (nodes.total > 0).then(|| Finding::new("NodeNotAsWanted", format!("{shown}{more}")))
}

/// State of the address pools: TigeraStatus `ippools`.
pub fn ippools(inputs: &Inputs, round: &Round) -> State {
    let ignored = &round.ignored.ippools;
    let mut state = State { caution: caution(ignored), notes: notes(ignored), ..State::default() };
    let failures = round.failures.iter().filter(|f| f.key.kind.kind == "IPPool");
    let found = round.conflicts.iter().chain(&round.overlaps).cloned();
    let wrong: Vec<String> = found.chain(failures.map(failure_text)).collect();
    let bad: Vec<String> =
        round.problems.iter().filter(|problem| problem.field.contains(".ipPools")).map(Problem::to_string).collect();
    if !bad.is_empty() {
        let message = some(&bad);
        state.degraded = Some(Finding::new("InvalidConfigurationError", message));
    } else if !wrong.is_empty() {
        state.degraded = Some(Finding::new("ResourceValidationError", some(&wrong)));
    }
    if inputs.pools.is_none() {
        state.progressing = Some(Finding::new(
            "ResourceNotFound",
            "the API does not serve IPPool (projectcalico.org/v3) yet; apply the CRDs of deploy/operator.yaml",
        ));
    }
    state
}

fn degraded(round: &Round) -> Option<Finding> {
    if let Some(error) = &round.undecodable {
        return Some(Finding::new(
            "InvalidConfigurationError",
            format!("Installation spec: {error}; correct the field's type, nothing was changed meanwhile"),
        ));
    }
    if !round.problems.is_empty() {
        let problems: Vec<String> = round.problems.iter().map(Problem::to_string).collect();
        return Some(Finding::new("InvalidConfigurationError", some(&problems)));
    }
    if let Some(error) = &round.certificates {
        return Some(Finding::new("CertificateError", error.clone()));
    }
    if !round.hosts.is_empty() {
        return Some(Finding::new("ResourceValidationError", some(&round.hosts)));
    }
    let failures: Vec<String> = round
        .failures
        .iter()
        .filter(|failure| failure.key.kind.kind != "IPPool" && !failure.transient)
        .map(failure_text)
        .collect();
    (!failures.is_empty()).then(|| Finding::new("ResourceUpdateError", some(&failures)))
}

fn failure_text(failure: &Failure) -> String {
    format!("{} cannot be applied: {}", failure.key, failure.message)
}

fn progressing(inputs: &Inputs, round: &Round, pods: Vec<String>) -> Option<Finding> {
    let mut waiting = round.waiting.clone();
    let retried = round.failures.iter().filter(|failure| failure.transient);
    waiting.extend(retried.map(|failure| format!("{}, trying again", failure_text(failure))));
    let deployment = inputs.deployments.iter().find(|d| d.metadata.name.as_deref() == Some(TYPHA));
    waiting.extend(deployment_lag(deployment));
    let daemon_set = inputs.daemon_sets.iter().find(|d| d.metadata.name.as_deref() == Some(NODE));
    waiting.extend(daemon_set_lag(daemon_set));
    if waiting.is_empty() {
        return None;
    }
    waiting.extend(pods);
    Some(Finding::new("ResourceNotReady", some(&waiting)))
}

/// How far a rollout of typha is from its end, if it is.
pub(crate) fn deployment_lag(found: Option<&Deployment>) -> Option<String> {
    let name = format!("Deployment {NAMESPACE}/{TYPHA}");
    let Some(found) = found else {
        return Some(format!("{name} does not exist yet"));
    };
    let wanted = found.spec.replicas.unwrap_or(1);
    let status = found.status.clone().unwrap_or_default();
    if status.observed_generation < found.metadata.generation {
        return Some(format!("{name} has been changed, its rollout has not begun"));
    }
    let updated = status.updated_replicas.unwrap_or(0);
    let available = status.available_replicas.unwrap_or(0);
    if updated < wanted {
        return Some(format!("{name}: {updated} of {wanted} replicas are of the newest revision"));
    }
    (available < wanted).then(|| format!("{name}: {available} of {wanted} replicas are available"))
}

fn daemon_set_lag(found: Option<&DaemonSet>) -> Option<String> {
    let name = format!("DaemonSet {NAMESPACE}/{NODE}");
    let Some(found) = found else {
        return Some(format!("{name} does not exist yet"));
    };
    let status = found.status.clone().unwrap_or_default();
    if status.observed_generation < found.metadata.generation {
        return Some(format!("{name} has been changed, its rollout has not begun"));
    }
    let wanted = status.desired_number_scheduled;
    let updated = status.updated_number_scheduled.unwrap_or(0);
    let available = status.number_available.unwrap_or(0);
    if updated < wanted {
        return Some(format!("{name}: {updated} of {wanted} agents are of the newest revision"));
    }
    (available < wanted).then(|| format!("{name}: {available} of {wanted} agents are available"))
}

/// The first few of a list, and how many more there are.
fn some(list: &[String]) -> String {
    some_of(list, EXAMPLES)
}

fn some_of(list: &[String], most: usize) -> String {
    let shown = list[..list.len().min(most)].join("; ");
    match list.len().saturating_sub(most) {
        0 => shown,
        more => format!("{shown}; and {more} more"),
    }
}

/// The three conditions, of which the first is called `available` (`Available`, or `Ready` on the Installation). The time of a condition moves
/// only with its status.
pub fn conditions(
    available: &str,
    state: &State,
    generation: i64,
    before: &[StatusCondition],
    now: Timestamp,
) -> Vec<StatusCondition> {
    let gap = if state.notes.is_empty() { "" } else { "; " };
    let all = Finding::new("AllObjectsAvailable", format!("All objects available{gap}{}", state.notes));
    let first = state.is_available().then_some(&all);
    let degraded = state.degraded.as_ref().or(state.caution.as_ref());
    [(available, first), ("Progressing", state.progressing.as_ref()), ("Degraded", degraded)]
        .into_iter()
        .map(|(kind, finding)| {
            let status = if finding.is_some() { "True" } else { "False" };
            let since = before
                .iter()
                .find(|old| old.kind == kind && old.status == status)
                .map(|old| old.last_transition_time.clone());
            StatusCondition {
                kind: kind.to_owned(),
                status: status.to_owned(),
                last_transition_time: since.unwrap_or_else(|| rfc3339(now)),
                reason: finding.map_or("NotApplicable", |f| f.reason).to_owned(),
                message: finding.map(|f| f.message.clone()).unwrap_or_default(),
                observed_generation: generation,
            }
        })
        .collect()
}

/// A time as the API writes it: whole seconds.
pub(crate) fn rfc3339(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

/// The state shown on the Installation: that of the whole, and what is wrong with pools.
pub fn overall(calico: &State, ippools: &State) -> State {
    State {
        degraded: calico.degraded.clone().or(ippools.degraded.clone()),
        progressing: calico.progressing.clone(),
        caution: calico.caution.clone().or(ippools.caution.clone()),
        notes: calico.notes.clone(),
    }
}

#[cfg(test)]
#[path = "status/tests.rs"]
mod tests;
