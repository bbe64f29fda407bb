//! Classes: endpoints to which the same policies apply in a direction share the chains that decide.

use std::collections::{BTreeMap, BTreeSet};

use margay_api::policy::PolicyKey;
use margay_api::rule::Action;
use margay_calc::model::{EndpointRecord, PolicyRecord, RuleRecord, SetId, SideMatch, TierBinding};

use super::demands::Compiled;
use super::merge::{self, Item, Role, Traced, Unions};
use super::names;
use super::origin::{RuleOrigin, RuleRef, TracedChain};
use super::rule::{self, Context, Origin};
use super::stage::{Direction, Stage};
use margay_nft::{Chain, ChainName, Family, Rule, Statement, Verdict};

/// What the rules of one policy in one direction may list: more than a server lets through
/// (`margay_api::limits`), and little enough that one policy keeps no node from programming the
/// others.
const MAX_SIZE: usize = 131_072;

/// The policies of one tier, in order, and what follows them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tier {
    /// Name of the tier, which reports give.
    pub name: String,
    /// Policies that apply in the direction; at least one.
    pub policies: Vec<PolicyKey>,
    /// What happens at the end of the tier.
    pub default_action: Action,
}

/// What decides about an endpoint's packets in one direction; see the module.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class {
    /// The direction.
    pub direction: Direction,
    /// What comes after it.
    pub stage: Stage,
    /// Tiers in order, without those that have no policy in this direction.
    pub tiers: Vec<Tier>,
    /// What happens to a packet that no tier decided.
    pub unmatched: Action,
}

/// Where the policies of a class come from.
pub(super) trait Policies {
    /// The policy, if it is there and can be enforced.
    fn policy(&self, key: &PolicyKey) -> Option<&PolicyRecord>;
}

/// What decides about a class, before it is written for a family.
#[derive(Debug, Default)]
pub(super) struct Plan<'a> {
    /// By tier, what stands in it in order.
    pub(super) tiers: Vec<Vec<Traced<'a>>>,
    /// Unions that the rules name, with the sets that they are of.
    pub(super) unions: Unions,
    /// Policies that are named and not there, or that name a set that is not there: what they apply
    /// to is denied.
    pub(super) broken: BTreeMap<PolicyKey, String>,
}

impl Class {
    /// The class of an endpoint in a direction.
    pub fn of(endpoint: &EndpointRecord, direction: Direction) -> Self {
        Self::new(
            Stage::Workload,
            direction,
            &endpoint.tiers,
            endpoint.unmatched,
        )
    }

    /// The class of these tiers at a stage. Before other stages the end of a tier decides nothing.
    pub(super) fn new(
        stage: Stage,
        direction: Direction,
        tiers: &[TierBinding],
        unmatched: Action,
    ) -> Self {
        let tiers = tiers.iter().map(|tier| Tier {
            name: tier.name.clone(),
            policies: match direction {
                Direction::Ingress => tier.ingress.clone(),
                Direction::Egress => tier.egress.clone(),
            },
            default_action: if stage.goes_on() {
                Action::Pass
            } else {
                tier.default_action
            },
        });
        Self {
            direction,
            stage,
            tiers: tiers.filter(|tier| !tier.policies.is_empty()).collect(),
            unmatched,
        }
    }

    /// Families for which it is compiled, on a node whose pods have these: a host has both.
    pub(super) fn families<'a>(&self, pods: &'a [Family]) -> &'a [Family] {
        if self.stage == Stage::Workload {
            pods
        } else {
            &Family::ALL
        }
    }

    /// Every policy it names.
    pub fn policies(&self) -> impl Iterator<Item = &PolicyKey> {
        self.tiers.iter().flat_map(|tier| &tier.policies)
    }

    /// What a packet of the class meets first: without tiers its fate is known.
    pub fn entry(&self, family: Family) -> Verdict {
        if self.tiers.is_empty() {
            self.end()
        } else {
            Verdict::Goto(self.chain(family))
        }
    }

    /// Name of its first chain: stands for the list of policies, not for their rules.
    pub(super) fn chain(&self, family: Family) -> ChainName {
        let Self {
            direction,
            stage,
            tiers,
            unmatched,
        } = self;
        let (ingress, egress) = match stage {
            Stage::Workload => ("i", "e"),
            Stage::Host => ("hi", "he"),
            Stage::PreDnat => ("di", "de"),
            Stage::Untracked => ("ui", "ue"),
        };
        let letters = if *direction == Direction::Ingress {
            ingress
        } else {
            egress
        };
        // The letters tell stages apart.
        let text = format!(
            "Class {{ direction: {direction:?}, tiers: {tiers:?}, unmatched: {unmatched:?} }}"
        );
        names::chain(&format!(
            "{letters}{}-{}",
            names::digit(family),
            names::hash(text.as_bytes())
        ))
    }

    /// What happens to a packet that nothing decided.
    const fn end(&self) -> Verdict {
        if self.stage.goes_on() {
            Verdict::Accept
        } else {
            default(self.unmatched)
        }
    }

    /// Gathers the rules of its policies.
    pub(super) fn plan<'a>(
        &'a self,
        policies: &'a impl Policies,
        role: &impl Fn(&SetId) -> Role,
    ) -> Plan<'a> {
        let mut plan = Plan::default();
        for (tier_index, tier) in self.tiers.iter().enumerate() {
            let mut items = Vec::new();
            for (policy_index, key) in tier.policies.iter().enumerate() {
                let at = |rule| RuleRef::new(tier_index, policy_index, rule);
                let Some(policy) = policies.policy(key) else {
                    let reason =
                        "it is not there: everything is denied where it applies".to_owned();
                    plan.broken.insert(key.clone(), reason);
                    items.push((Item::Closed, at(None)));
                    continue;
                };
                let rules = self.rules(policy);
                let size = rules
                    .iter()
                    .map(size_of_rule)
                    .fold(0, usize::saturating_add);
                if size > MAX_SIZE {
                    let reason = format!(
                        "its rules list {size} ranges, sets and ports, more than the {MAX_SIZE} \
                         that a node takes of one policy: everything is denied where it applies"
                    );
                    plan.broken.insert(key.clone(), reason);
                    items.push((Item::Closed, at(None)));
                    continue;
                }
                if let Some(set) = rules
                    .iter()
                    .flat_map(sets_of_rule)
                    .find(|set| role(set) == Role::Missing)
                {
                    let reason = format!(
                        "set {set} is not there: what a rule would have to look up in it is denied"
                    );
                    plan.broken.insert(key.clone(), reason);
                }
                let origin = Origin {
                    tier: &tier.name,
                    policy: key,
                };
                items.extend(rules.iter().enumerate().map(|(index, rule)| {
                    let item = match rule.action {
                        Action::Log => Item::Report(rule, origin),
                        Action::Allow | Action::Deny | Action::Pass => Item::Rule(rule),
                    };
                    (item, at(Some(index)))
                }));
            }
            let merged = merge::merge(&items, role, &mut plan.unions);
            plan.tiers.push(merged);
        }
        plan
    }

    /// Its chains for one family; none if it has no tiers.
    ///
    /// A tier's rules stand in the chain of the class; only a tier with a Pass rule has a chain of
    /// its own, as Pass is `return` from there.
    pub(super) fn compile(
        &self,
        plan: &Plan<'_>,
        context: &Context<'_>,
    ) -> BTreeMap<ChainName, TracedChain> {
        let mut chains = BTreeMap::new();
        if self.tiers.is_empty() {
            return chains;
        }
        let name = self.chain(context.family);
        let mut all = TracedChain::default();
        let mut open = true;
        // Items are counted through all tiers, as `ClassState::origins` lists them.
        let mut numbers = 0_u32..;
        for (index, (tier, items)) in self.tiers.iter().zip(&plan.tiers).enumerate() {
            let mut own = TracedChain::default();
            for (position, traced) in items.iter().enumerate() {
                let number = numbers.next();
                let compiled = match &traced.item {
                    Item::Rule(rule) => context.decide(rule),
                    Item::Joined(rule) => context.decide(rule),
                    Item::Crossed(rule, side, set) => context.decide_crossed(rule, *side, set),
                    Item::Report(rule, origin) => context.report(rule, *origin),
                    Item::Closed => Compiled::drop(),
                };
                let (rules, more) =
                    compiled.into_rules(&names::chain(&format!("{name}-{index}-{position}")));
                own.push(rules, number);
                chains.extend(
                    more.into_iter()
                        .map(|(name, chain)| (name, TracedChain::of(chain, number))),
                );
            }
            let passes = own.chain.rules.iter().any(is_pass);
            open = tier.default_action == Action::Pass || passes;
            if tier.default_action != Action::Pass {
                own.push(vec![Rule::new().drop()], None);
            }
            if passes {
                let inner = names::chain(&format!("{name}-{index}"));
                all.push(vec![Rule::new().jump(&inner)], None);
                chains.insert(inner, own);
            } else {
                all.append(own);
            }
            if !open {
                break;
            }
        }
        if open {
            all.push(vec![Rule::new().verdict(self.end())], None);
        }
        chains.insert(name, all);
        chains
    }

    /// The rule of a policy at this position.
    pub(super) fn origin(&self, at: RuleRef) -> Option<RuleOrigin> {
        let wide = |position: u32| usize::try_from(position).ok();
        let tier = self.tiers.get(wide(at.tier)?)?;
        let policy = tier.policies.get(wide(at.policy)?)?;
        let rule = at.rule.and_then(wide);
        Some(RuleOrigin {
            tier: tier.name.clone(),
            policy: policy.clone(),
            direction: self.direction,
            rule,
        })
    }

    /// Whether a rule of its policies reports.
    pub(super) fn reports(&self, policies: &impl Policies) -> bool {
        let known = self.policies().filter_map(|key| policies.policy(key));
        known
            .flat_map(|policy| self.rules(policy))
            .any(|rule| rule.action == Action::Log)
    }

    fn rules<'a>(&self, policy: &'a PolicyRecord) -> &'a [RuleRecord] {
        match self.direction {
            Direction::Ingress => &policy.ingress,
            Direction::Egress => &policy.egress,
        }
    }

    /// The class in its failed state: a chain that drops everything, for a class that the kernel
    /// refuses.
    pub(super) fn closed(&self, family: Family) -> BTreeMap<ChainName, TracedChain> {
        let chain = Chain {
            base: None,
            rules: vec![Rule::new().drop()],
        };
        BTreeMap::from([(self.chain(family), TracedChain::of(chain, None))])
    }
}

/// Sets that a policy names.
pub(super) fn sets_of(policy: &PolicyRecord) -> BTreeSet<&SetId> {
    policy
        .ingress
        .iter()
        .chain(&policy.egress)
        .flat_map(sets_of_rule)
        .collect()
}

fn sets_of_rule(rule: &RuleRecord) -> impl Iterator<Item = &SetId> {
    rule::sets_of_side(&rule.source).chain(rule::sets_of_side(&rule.destination))
}

/// What a rule lists: the nftables rules, tests and elements that it takes are a small multiple of
/// it.
fn size_of_rule(rule: &RuleRecord) -> usize {
    let side = |side: &SideMatch| {
        let SideMatch {
            nets,
            not_nets,
            sets,
            not_sets,
            ports,
            port_sets,
            not_ports,
            not_port_sets,
            service_set,
        } = side;
        nets.len()
            + not_nets.len()
            + sets.len()
            + not_sets.len()
            + ports.len()
            + port_sets.len()
            + not_ports.len()
            + not_port_sets.len()
            + usize::from(service_set.is_some())
    };
    1 + side(&rule.source) + side(&rule.destination)
}

fn is_pass(rule: &Rule) -> bool {
    matches!(
        rule.statements.last(),
        Some(Statement::Verdict(Verdict::Return))
    )
}

const fn default(action: Action) -> Verdict {
    match action {
        Action::Allow => Verdict::Accept,
        Action::Deny | Action::Log | Action::Pass => Verdict::Drop,
    }
}
