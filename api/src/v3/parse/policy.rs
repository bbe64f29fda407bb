//! Parses policies: endpoints, directions and rules, and the replacement of a refused policy.

use crate::limits::Budget;
use crate::policy::{DEFAULT_TIER, Order, Policy, Traffic};
use crate::problem::{Problems, Refusal};
use crate::rule::{Action, Rule};
use crate::selector::{Node, Selector};
use crate::v3::policy::{
    GlobalNetworkPolicy, GlobalNetworkPolicySpec, NetworkPolicy, NetworkPolicySpec,
};
use crate::v3::rule::RuleSpec;

use super::rule::{Direction, RuleReader};
use super::scope;

/// Parses a namespaced policy.
pub fn network_policy(policy: &NetworkPolicy) -> Result<Policy, Refusal> {
    namespaced(namespace_of(&policy.metadata.namespace), &policy.spec)
}

/// Parses a cluster-wide policy.
pub fn global_network_policy(policy: &GlobalNetworkPolicy) -> Result<Policy, Refusal> {
    global(&policy.spec)
}

pub(super) fn namespace_of(namespace: &Option<String>) -> &str {
    namespace.as_deref().unwrap_or_default()
}

pub(super) fn namespaced(namespace: &str, spec: &NetworkPolicySpec) -> Result<Policy, Refusal> {
    let mut problems = Problems::default();
    let own = Some(scope::in_namespace(namespace));
    let selector = selector(&mut problems, "spec.selector", &spec.selector);
    let accounts = accounts(&mut problems, &spec.service_account_selector);
    let parts = [own, selector, accounts];
    let common = Common {
        namespace: Some(namespace),
        tier: &spec.tier,
        order: spec.order,
        types: &spec.types,
        ingress: &spec.ingress,
        egress: &spec.egress,
    };
    common.parse(problems, parts, Traffic::Normal)
}

pub(super) fn global(spec: &GlobalNetworkPolicySpec) -> Result<Policy, Refusal> {
    let mut problems = Problems::default();
    let parts = [
        selector(&mut problems, "spec.selector", &spec.selector),
        namespaces(&mut problems, &spec.namespace_selector),
        accounts(&mut problems, &spec.service_account_selector),
    ];
    let traffic = traffic(spec, &mut problems);
    let common = Common {
        namespace: None,
        tier: &spec.tier,
        order: spec.order,
        types: &spec.types,
        ingress: &spec.ingress,
        egress: &spec.egress,
    };
    common.parse(problems, parts, traffic)
}

/// Fields that both kinds of policies have, besides their selectors.
struct Common<'a> {
    namespace: Option<&'a str>,
    tier: &'a str,
    order: Option<f64>,
    types: &'a [String],
    ingress: &'a [RuleSpec],
    egress: &'a [RuleSpec],
}

impl Common<'_> {
    /// `parts` of the selector are `None` if they do not parse. Then the policy may apply to any
    /// endpoint that the other parts select, and its replacement applies to all of them.
    fn parse(
        self,
        mut problems: Problems,
        parts: [Option<Selector>; 3],
        traffic: Traffic,
    ) -> Result<Policy, Refusal> {
        let is_known = parts.iter().all(Option::is_some);
        let selector = Selector::and(parts.into_iter().flatten());
        let (applies_ingress, applies_egress) = self.directions(&mut problems);
        let mut budget = Budget::default();
        let mut rules = |specs: &[RuleSpec], direction| {
            let mut reader = RuleReader::new(self.namespace, direction, &mut budget, &mut problems);
            specs
                .iter()
                .enumerate()
                .map(|(index, spec)| reader.read(index, spec))
                .collect::<Vec<_>>()
        };
        let ingress = rules(self.ingress, Direction::Ingress);
        let egress = rules(self.egress, Direction::Egress);
        let policy = Policy {
            tier: match self.tier {
                "" => DEFAULT_TIER.to_owned(),
                tier => tier.to_owned(),
            },
            order: Order(self.order),
            selector,
            traffic,
            applies_ingress,
            // Packets that leave have no DNAT before them, so preDNAT policies have no egress.
            applies_egress: applies_egress && traffic != Traffic::PreDnat,
            ingress: ingress.iter().flatten().cloned().collect(),
            egress: egress.iter().flatten().cloned().collect(),
        };
        let closed = |policy| {
            Some(Policy {
                ingress: closed_rules(self.ingress),
                egress: closed_rules(self.egress),
                ..policy
            })
        };
        problems
            .finish(policy, closed)
            .map_err(|refusal| refusal.or_former(!is_known))
    }

    fn directions(&self, problems: &mut Problems) -> (bool, bool) {
        let known = |wanted: &str| self.types.iter().any(|found| found == wanted);
        let mut is_unknown = false;
        for (index, found) in self.types.iter().enumerate() {
            if !["Ingress", "Egress"].contains(&found.as_str()) {
                is_unknown = true;
                problems.add(
                    format!("spec.types[{index}]"),
                    found,
                    "not a direction",
                    "use Ingress or Egress",
                );
            }
        }
        if is_unknown {
            return (true, true);
        }
        if self.types.is_empty() {
            let has_egress = !self.egress.is_empty();
            return (!has_egress || !self.ingress.is_empty(), has_egress);
        }
        (known("Ingress"), known("Egress"))
    }
}

/// Replacement of the rules of a refused policy. Leaving out Allow and Log can only close; if a
/// rule would deny, or pass to a tier that might, everything is denied.
fn closed_rules(specs: &[RuleSpec]) -> Vec<Rule> {
    let opens_only = |spec: &RuleSpec| ["Allow", "Log"].contains(&spec.action.as_str());
    match specs.iter().all(opens_only) {
        true => vec![],
        false => vec![Rule::any(Action::Deny)],
    }
}

fn selector(problems: &mut Problems, field: &str, text: &Option<String>) -> Option<Selector> {
    let selector = problems.selector(field, text.as_deref().unwrap_or_default())?;
    if selector.root.uses_global() {
        problems.add(
            field,
            selector,
            "global() is only for namespace selectors",
            "use it alone in a namespaceSelector",
        );
        return None;
    }
    Some(selector)
}

fn namespaces(problems: &mut Problems, text: &Option<String>) -> Option<Selector> {
    let field = "spec.namespaceSelector";
    let text = text.as_deref().unwrap_or_default();
    if text.is_empty() {
        return Some(Selector::all());
    }
    let selector = problems.selector(field, text)?;
    if selector.root != Node::Global && selector.root.uses_global() {
        problems.add(
            field,
            text,
            "global() combined with something else",
            "use global() alone",
        );
        return None;
    }
    Some(scope::of_namespaces(&selector))
}

fn accounts(problems: &mut Problems, text: &Option<String>) -> Option<Selector> {
    match text.as_deref().unwrap_or_default() {
        "" => Some(Selector::all()),
        text => {
            let parsed = selector(
                problems,
                "spec.serviceAccountSelector",
                &Some(text.to_owned()),
            )?;
            Some(scope::of_policy_accounts(&parsed))
        }
    }
}

/// Reads the flags for host endpoints. Of flags that exclude each other, the one that sees more
/// packets is used: a replacement may close too much, never too little.
fn traffic(spec: &GlobalNetworkPolicySpec, problems: &mut Problems) -> Traffic {
    let is_set = |flag: Option<bool>| flag.unwrap_or(false);
    let (untracked, early) = (is_set(spec.do_not_track), is_set(spec.pre_dnat));
    if untracked && early {
        problems.add(
            "spec.preDNAT",
            true,
            "doNotTrack and preDNAT exclude each other",
            "set only one of them",
        );
    }
    let forward = is_set(spec.apply_on_forward);
    for (field, flag) in [("spec.doNotTrack", untracked), ("spec.preDNAT", early)] {
        if flag && !forward {
            problems.add(
                field,
                true,
                "needs applyOnForward: true",
                "set applyOnForward: true",
            );
        }
    }
    if early && (!spec.egress.is_empty() || spec.types.iter().any(|found| found == "Egress")) {
        problems.add(
            "spec.egress",
            "Egress",
            "preDNAT policies apply to incoming packets only",
            "remove the egress rules and the type Egress",
        );
    }
    match (untracked, early, forward) {
        (true, _, _) => Traffic::Untracked,
        (false, true, _) => Traffic::PreDnat,
        (false, false, true) => Traffic::Forwarded,
        (false, false, false) => Traffic::Normal,
    }
}
