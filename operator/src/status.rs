//! Conditions of the installation: `Available`, `Progressing`, `Degraded`, each with reason and a
//! message that names object, node and remedy. Pure.

mod pods;

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use margay_api::fields::Ignored;
use margay_api::installation::StatusCondition;
use margay_api::report::{Entry, Report};

use crate::advice::Failure;
use crate::fields;
use crate::inputs::Inputs;
use crate::names::{NAMESPACE, NODE, TYPHA};
use crate::validate::Problem;

/// Maximum number of examples in one message.
const EXAMPLES: usize = 3;
/// Maximum number of fields without effect in one message: more than anybody sets.
const LISTED: usize = 40;

/// Reason and message of a condition; reasons are from Calico's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Reason in CamelCase.
    pub reason: &'static str,
    /// Object, cause and remedy.
    pub message: String,
}

impl Finding {
    /// Creates a finding with that reason.
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

/// State of one part of the installation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// A problem that a person must solve.
    pub degraded: Option<Finding>,
    /// Work in progress.
    pub progressing: Option<Finding>,
    /// All works, but a person should know this: reported as Degraded beside Available.
    pub caution: Option<Finding>,
    /// Further information, which is appended to the first condition.
    pub notes: String,
}

impl State {
    fn is_available(&self) -> bool {
        self.degraded.is_none() && self.progressing.is_none()
    }
}

/// Reasons why the Installation's spec cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpecError {
    /// It cannot be decoded.
    Undecodable(String),
    /// Fields are invalid.
    Invalid(Vec<Problem>),
}

/// Results of one reconcile, beside its inputs.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Reason why the Installation's spec cannot be used.
    pub spec: Option<SpecError>,
    /// Prerequisites that are not there yet.
    pub waiting: Vec<String>,
    /// Objects that could not be written.
    pub failures: Vec<Failure>,
    /// Problem with certificates.
    pub certificates: Option<String>,
    /// Pools of the Installation that cannot be created or changed.
    pub conflicts: Vec<String>,
    /// Problems with automatic host endpoints.
    pub hosts: Vec<String>,
    /// Pools and blocks that overlap.
    pub overlaps: Vec<String>,
    /// Settings without effect.
    pub ignored: fields::Report,
}

/// State of the installation as a whole: TigeraStatus `calico`.
pub fn calico(inputs: &Inputs, findings: &Findings) -> State {
    let health = pods::health(inputs);
    State {
        degraded: degraded(findings)
            .or(health.failing)
            .or_else(|| nodes(inputs)),
        progressing: progressing(inputs, findings, health.waiting),
        caution: caution(&findings.ignored.calico),
        notes: notes(&findings.ignored.calico),
    }
}

/// Fields without effect that somebody may rely on.
fn caution(ignored: &BTreeSet<Ignored>) -> Option<Finding> {
    let texts: Vec<String> = ignored
        .iter()
        .filter(|one| one.is_unsafe)
        .map(Ignored::to_string)
        .collect();
    (!texts.is_empty()).then(|| Finding::new("InvalidConfigurationError", first_of(&texts, LISTED)))
}

/// The other fields without effect.
fn notes(ignored: &BTreeSet<Ignored>) -> String {
    let texts: Vec<String> = ignored
        .iter()
        .filter(|one| !one.is_unsafe)
        .map(Ignored::to_string)
        .collect();
    if texts.is_empty() {
        String::new()
    } else {
        format!("without effect: {}", first_of(&texts, LISTED))
    }
}

/// State of the objects with which users write policy, which only users can correct: TigeraStatus
/// `policies`.
pub fn policies(inputs: &Inputs) -> State {
    let Report {
        objects, records, ..
    } = &inputs.reports;
    let counts = [
        (objects.total, "objects not used as written"),
        (records.total, "records not enforced on a node as written"),
    ];
    let counts = counts.iter().filter(|(count, _)| *count > 0);
    let counts: Vec<String> = counts
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    let named: Vec<String> = objects
        .first
        .iter()
        .chain(&records.first)
        .map(entry_text)
        .collect();
    let first = named[..named.len().min(EXAMPLES)].join("; ");
    let message = format!("{}: {first}", counts.join(", "));
    let degraded = (!counts.is_empty()).then(|| Finding::new("ResourceValidationError", message));
    State {
        degraded,
        ..State::default()
    }
}

fn entry_text(entry: &Entry) -> String {
    format!("{}: {}", entry.subject, entry.reason)
}

/// Problems that agents report of their nodes.
fn nodes(inputs: &Inputs) -> Option<Finding> {
    let nodes = &inputs.reports.nodes;
    let named: Vec<String> = nodes
        .first
        .iter()
        .map(|entry| format!("node {}", entry_text(entry)))
        .collect();
    let shown = named[..named.len().min(EXAMPLES)].join("; ");
    let more = nodes.total.saturating_sub(EXAMPLES);
    let more = if more > 0 {
        format!("; and {more} more")
    } else {
        String::new()
    };
    (nodes.total > 0).then(|| Finding::new("NodeNotAsWanted", format!("{shown}{more}")))
}

/// State of the address pools: TigeraStatus `ippools`.
pub fn ippools(inputs: &Inputs, findings: &Findings) -> State {
    let ignored = &findings.ignored.ippools;
    let mut state = State {
        caution: caution(ignored),
        notes: notes(ignored),
        ..State::default()
    };
    let failures = findings
        .failures
        .iter()
        .filter(|f| f.key.kind.kind == "IPPool");
    let found = findings.conflicts.iter().chain(&findings.overlaps).cloned();
    let wrong: Vec<String> = found.chain(failures.map(failure_text)).collect();
    let problems = match &findings.spec {
        Some(SpecError::Invalid(problems)) => problems.as_slice(),
        _ => &[],
    };
    let bad: Vec<String> = problems
        .iter()
        .filter(|problem| problem.field.contains(".ipPools"))
        .map(Problem::to_string)
        .collect();
    if !bad.is_empty() {
        let message = examples(&bad);
        state.degraded = Some(Finding::new("InvalidConfigurationError", message));
    } else if !wrong.is_empty() {
        state.degraded = Some(Finding::new("ResourceValidationError", examples(&wrong)));
    }
    if inputs.pools.is_none() {
        state.progressing = Some(Finding::new(
            "ResourceNotFound",
            "the API does not serve IPPool (projectcalico.org/v3) yet; apply the CRDs of \
             deploy/operator.yaml",
        ));
    }
    state
}

fn degraded(findings: &Findings) -> Option<Finding> {
    match &findings.spec {
        Some(SpecError::Undecodable(error)) => {
            return Some(Finding::new(
                "InvalidConfigurationError",
                format!(
                    "Installation spec: {error}; correct the type of the field; until then nothing \
                     is changed"
                ),
            ));
        }
        Some(SpecError::Invalid(problems)) => {
            let problems: Vec<String> = problems.iter().map(Problem::to_string).collect();
            return Some(Finding::new(
                "InvalidConfigurationError",
                examples(&problems),
            ));
        }
        None => {}
    }
    if let Some(error) = &findings.certificates {
        return Some(Finding::new("CertificateError", error.clone()));
    }
    if !findings.hosts.is_empty() {
        return Some(Finding::new(
            "ResourceValidationError",
            examples(&findings.hosts),
        ));
    }
    let failures: Vec<String> = findings
        .failures
        .iter()
        .filter(|failure| failure.key.kind.kind != "IPPool" && !failure.transient)
        .map(failure_text)
        .collect();
    (!failures.is_empty()).then(|| Finding::new("ResourceUpdateError", examples(&failures)))
}

fn failure_text(failure: &Failure) -> String {
    format!("{} cannot be applied: {}", failure.key, failure.message)
}

fn progressing(inputs: &Inputs, findings: &Findings, pods: Vec<String>) -> Option<Finding> {
    let mut waiting = findings.waiting.clone();
    let retried = findings.failures.iter().filter(|failure| failure.transient);
    waiting.extend(retried.map(|failure| format!("{}, retrying", failure_text(failure))));
    let deployment = inputs
        .deployments
        .iter()
        .find(|d| d.metadata.name.as_deref() == Some(TYPHA));
    waiting.extend(deployment_lag(deployment));
    let daemon_set = inputs
        .daemon_sets
        .iter()
        .find(|d| d.metadata.name.as_deref() == Some(NODE));
    waiting.extend(daemon_set_lag(daemon_set));
    if waiting.is_empty() {
        return None;
    }
    waiting.extend(pods);
    Some(Finding::new("ResourceNotReady", examples(&waiting)))
}

/// Describes how far the rollout of typha is; none when it is complete.
pub(crate) fn deployment_lag(found: Option<&Deployment>) -> Option<String> {
    let name = format!("Deployment {NAMESPACE}/{TYPHA}");
    let Some(found) = found else {
        return Some(format!("{name} does not exist yet"));
    };
    let wanted = found.spec.replicas.unwrap_or(1);
    let status = found.status.clone().unwrap_or_default();
    if status.observed_generation < found.metadata.generation {
        return Some(format!(
            "{name} has been changed, its rollout has not begun"
        ));
    }
    let updated = status.updated_replicas.unwrap_or(0);
    let available = status.available_replicas.unwrap_or(0);
    if updated < wanted {
        return Some(format!(
            "{name}: {updated} of {wanted} replicas have the newest revision"
        ));
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
        return Some(format!(
            "{name} has been changed, its rollout has not begun"
        ));
    }
    let wanted = status.desired_number_scheduled;
    let updated = status.updated_number_scheduled.unwrap_or(0);
    let available = status.number_available.unwrap_or(0);
    if updated < wanted {
        return Some(format!(
            "{name}: {updated} of {wanted} agents have the newest revision"
        ));
    }
    (available < wanted).then(|| format!("{name}: {available} of {wanted} agents are available"))
}

/// Joins the first few of a list, and counts the others.
fn examples(list: &[String]) -> String {
    first_of(list, EXAMPLES)
}

fn first_of(list: &[String], most: usize) -> String {
    let shown = list[..list.len().min(most)].join("; ");
    match list.len().saturating_sub(most) {
        0 => shown,
        more => format!("{shown}; and {more} more"),
    }
}

/// Builds the three conditions, of which the first is called `available` (`Available`, or `Ready`
/// on the Installation). The transition time of a condition changes only with its status, as
/// Kubernetes requires.
pub fn conditions(
    available: &str,
    state: &State,
    generation: i64,
    before: &[StatusCondition],
    now: Timestamp,
) -> Vec<StatusCondition> {
    let gap = if state.notes.is_empty() { "" } else { "; " };
    let all = Finding::new(
        "AllObjectsAvailable",
        format!("All objects available{gap}{}", state.notes),
    );
    let first = state.is_available().then_some(&all);
    let degraded = state.degraded.as_ref().or(state.caution.as_ref());
    [
        (available, first),
        ("Progressing", state.progressing.as_ref()),
        ("Degraded", degraded),
    ]
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

/// Formats a time as the API does: in whole seconds.
pub(crate) fn rfc3339(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second())
        .unwrap_or(now)
        .to_string()
}

/// State shown on the Installation: that of the whole, with the problems of pools.
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
