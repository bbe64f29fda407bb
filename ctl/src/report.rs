//! Answers for people and programs.

use margay_api::policy::PolicyKey;
use margay_api::rule::Action;
use margay_calc::evaluate::{Direction, Records, Step};
use margay_calc::explain::{EndVerdict, Outcome, Place};
use margay_calc::model::{Record, RecordId, TierBinding};
use serde::Serialize;

use crate::cluster::{Cluster, Refused};
use crate::manifest::{Origin, Unreadable};
use crate::tree::Tree;

/// Policies that the end of a tier names.
const NAMED: usize = 8;

/// Verdict on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictName {
    /// It is allowed.
    Allow,
    /// It is denied.
    Deny,
}

impl VerdictName {
    /// The verdict by whether it is allowed.
    pub fn of(is_allowed: bool) -> Self {
        if is_allowed { Self::Allow } else { Self::Deny }
    }

    /// The word for people.
    pub fn word(self) -> &'static str {
        match self {
            Self::Allow => "ALLOWED",
            Self::Deny => "DENIED",
        }
    }
}

/// By which steps a connection is allowed or denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OutcomeReport {
    /// The verdict of both ends together.
    pub verdict: VerdictName,
    /// The ends, source first.
    pub ends: Vec<EndReport>,
}

/// Verdict at one end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndReport {
    /// `egress` or `ingress`.
    pub direction: &'static str,
    /// Whose policies decide: `pod NAMESPACE/NAME`, `host endpoint NAME`, or empty.
    pub endpoint: String,
    /// Action of the last step; absent where no policy applies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<&'static str>,
    /// What was met, in order; the last decided.
    pub steps: Vec<StepReport>,
}

/// A step of an evaluation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StepReport {
    /// `rule`, `tierEnd`, `failsafe`, `profile` or `missing`.
    pub kind: &'static str,
    /// Name of the tier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// The policy of a rule; at the end of a tier those whose rules did not match.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<String>,
    /// `egress` or `ingress`.
    #[serde(skip)]
    pub direction: &'static str,
    /// Position of the rule among those of its direction, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
    /// The action.
    pub action: &'static str,
    /// Where the policy was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
}

impl OutcomeReport {
    /// The report of an outcome by these records of the cluster.
    pub fn of(cluster: &Cluster, records: &dyn Records, outcome: &Outcome) -> Self {
        let ends = outcome
            .ends
            .iter()
            .map(|end| EndReport::of(cluster, records, end))
            .collect();
        Self {
            verdict: VerdictName::of(outcome.is_allowed),
            ends,
        }
    }

    /// The ends as branches.
    pub fn branches(&self) -> Vec<Tree> {
        self.ends.iter().map(EndReport::tree).collect()
    }

    /// The step that decides, in a few words: of the end that denies, else of the destination.
    pub fn reason(&self) -> String {
        let denies = self.ends.iter().find(|end| end.action == Some("deny"));
        let decides = denies.or_else(|| self.ends.iter().rev().find(|end| end.action.is_some()));
        let reason = decides
            .and_then(|end| Some(format!("{}: {}", end.direction, end.steps.last()?.line())));
        reason.unwrap_or_else(|| "no policy applies".to_owned())
    }
}

impl EndReport {
    fn of(cluster: &Cluster, records: &dyn Records, end: &EndVerdict) -> Self {
        let direction = end.direction_name();
        let (endpoint, id, verdict) = match &end.place {
            Place::Outside => {
                return Self {
                    direction,
                    endpoint: String::new(),
                    action: None,
                    steps: Vec::new(),
                };
            }
            Place::Pod(key, verdict) => (
                format!("pod {key}"),
                RecordId::Endpoint(key.clone()),
                verdict,
            ),
            Place::Host {
                name,
                is_certain,
                stage,
                verdict,
            } => {
                let certainty = if *is_certain {
                    ""
                } else {
                    ", if it is this one's interface"
                };
                (
                    format!("host endpoint {name}{certainty}, {stage:?}"),
                    RecordId::HostEndpoint(name.clone()),
                    verdict,
                )
            }
        };
        let step = |step| StepReport::of(cluster, records, &id, end, step);
        Self {
            direction,
            endpoint,
            action: Some(action_name(verdict.action)),
            steps: verdict.trace.iter().map(step).collect(),
        }
    }

    fn tree(&self) -> Tree {
        let Some(action) = self.action else {
            return Tree::leaf(format!(
                "{}: neither a pod nor a node with host endpoints, so no policy applies",
                self.direction
            ));
        };
        let steps = self.steps.iter().map(|step| Tree::leaf(step.line()));
        Tree::new(
            format!("{} of {}: {action}", self.direction, self.endpoint),
            steps,
        )
    }
}

impl StepReport {
    fn of(
        cluster: &Cluster,
        records: &dyn Records,
        id: &RecordId,
        end: &EndVerdict,
        step: &Step,
    ) -> Self {
        let report = |kind, action| Self {
            kind,
            tier: None,
            policies: Vec::new(),
            direction: end.direction_name(),
            rule: None,
            action: action_name(action),
            origin: None,
        };
        match step {
            Step::Rule {
                tier,
                policy,
                rule,
                action,
            } => Self {
                tier: Some(tier.clone()),
                policies: vec![policy.to_string()],
                rule: Some(*rule),
                origin: cluster.origins.get(policy).map(Origin::to_string),
                ..report("rule", *action)
            },
            Step::TierEnd { tier, action } => Self {
                policies: policies_of(records, id, tier, end.direction)
                    .iter()
                    .map(ToString::to_string)
                    .collect(),
                tier: Some(tier.clone()),
                ..report("tierEnd", *action)
            },
            Step::Failsafe(action) => report("failsafe", *action),
            Step::Unmatched(action) => report("profile", *action),
            Step::Missing(missing) => Self {
                policies: vec![format!("{} {}", missing.kind(), missing.name())],
                ..report("missing", Action::Deny)
            },
        }
    }

    fn line(&self) -> String {
        let Self {
            kind,
            tier,
            policies,
            direction,
            rule,
            action,
            origin,
        } = self;
        let tier = tier.as_deref().unwrap_or_default();
        let origin = origin
            .as_ref()
            .map(|origin| format!(" ({origin})"))
            .unwrap_or_default();
        match *kind {
            "rule" => {
                let rule = rule.unwrap_or_default();
                format!(
                    "tier {tier}: {}, {direction} rule {rule}: {action}{origin}",
                    policies.join(", ")
                )
            }
            "tierEnd" => {
                format!(
                    "tier {tier}: no rule matches of {}: {action}, by default",
                    self.named()
                )
            }
            "failsafe" => format!("failsafe port, which no policy applies to: {action}"),
            "profile" if *action == "deny" => {
                "no policy applies, and no profile allows it: deny".to_owned()
            }
            "profile" => format!("no policy decides: {action}"),
            _ => format!("{} is missing: deny", policies.join(", ")),
        }
    }

    /// The first policies.
    fn named(&self) -> String {
        let shown = self
            .policies
            .iter()
            .take(NAMED)
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", ");
        match self.policies.len().saturating_sub(NAMED) {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    }
}

/// Policies of a tier that apply to the endpoint.
fn policies_of(
    records: &dyn Records,
    id: &RecordId,
    tier: &str,
    direction: Direction,
) -> Vec<PolicyKey> {
    let record = records.record(id);
    let tiers: Vec<&TierBinding> = match record.as_deref() {
        Some(Record::Endpoint(endpoint)) => endpoint.tiers.iter().collect(),
        Some(Record::HostEndpoint(host)) => host
            .untracked
            .iter()
            .chain(&host.pre_dnat)
            .chain(&host.normal)
            .chain(&host.forward)
            .collect(),
        _ => Vec::new(),
    };
    let bindings = tiers.into_iter().filter(|binding| binding.name == tier);
    let policies = bindings.flat_map(|binding| match direction {
        Direction::Ingress => &binding.ingress,
        Direction::Egress => &binding.egress,
    });
    policies.cloned().collect()
}

/// Name of an action.
pub fn action_name(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Deny => "deny",
        Action::Log => "log",
        Action::Pass => "pass",
    }
}

/// An object that is not enforced as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RefusedReport {
    /// Kind and name; empty for a document that is no object.
    pub object: String,
    /// Where it was read.
    pub origin: String,
    /// Reasons.
    pub problems: Vec<String>,
}

/// Objects that are refused, and documents that are none.
pub fn refused(cluster: &Cluster) -> Vec<RefusedReport> {
    let unreadable = cluster
        .unreadable
        .iter()
        .map(|Unreadable { origin, reason }| RefusedReport {
            object: String::new(),
            origin: origin.to_string(),
            problems: vec![reason.clone()],
        });
    let refused = cluster.refused.iter().map(
        |Refused {
             object,
             origin,
             problems,
         }| RefusedReport {
            object: object.clone(),
            origin: origin.to_string(),
            problems: problems.clone(),
        },
    );
    unreadable.chain(refused).collect()
}

/// Appends what else a reader should know: objects that are refused, and notes.
pub fn write_remarks(refused: &[RefusedReport], notes: &[String], text: &mut String) {
    for RefusedReport {
        object,
        origin,
        problems,
    } in refused
    {
        let problems = problems.iter().map(Tree::leaf);
        let object = if object.is_empty() {
            "a document that is no object"
        } else {
            object.as_str()
        };
        Tree::new(format!("refused: {object} ({origin})"), problems).write(text);
    }
    notes
        .iter()
        .for_each(|note| Tree::leaf(format!("note: {note}")).write(text));
}

/// JSON of an answer, ending in a line break.
pub fn json(answer: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(answer).map(|text| text + "\n")
}
