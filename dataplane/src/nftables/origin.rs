//! Where the rules of chains come from.
//!
//! Merged rules (`merge.rs`) stand for rules of several policies, and a chain does not show which.
//! The compiler keeps that beside each class: for every rule of a chain the item that it was made
//! of, and for every item the rules of policies that it joins. Nothing of this reaches the kernel,
//! and it takes a few bytes per rule.

use margay_api::policy::PolicyKey;

use super::stage::Direction;
use margay_nft::{Chain, Rule};

/// Rule of a policy, as part of what decides about an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleOrigin {
    /// Name of the tier.
    pub tier: String,
    /// The policy.
    pub policy: PolicyKey,
    /// Direction that the rule is for.
    pub direction: Direction,
    /// Position among the policy's rules of that direction, from 0; none: the policy as a whole,
    /// which cannot be enforced and denies everything.
    pub rule: Option<usize>,
}

/// Position of a rule in a class: that of its tier, of its policy in the tier, and its own in the
/// policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RuleRef {
    pub(super) tier: u32,
    pub(super) policy: u32,
    /// None: the policy as a whole.
    pub(super) rule: Option<u32>,
}

/// Chain whose rules are known by the items of a class that they were made of.
#[derive(Debug, Default)]
pub(super) struct TracedChain {
    pub(super) chain: Chain,
    /// For each rule the number of its item; none: it comes from no policy.
    pub(super) items: Vec<Option<u32>>,
}

impl RuleRef {
    /// Reference by positions, which limits keep far below what 32 bits hold.
    pub(super) fn new(tier: usize, policy: usize, rule: Option<usize>) -> Self {
        let narrow = |position: usize| u32::try_from(position).unwrap_or(u32::MAX);
        Self {
            tier: narrow(tier),
            policy: narrow(policy),
            rule: rule.map(narrow),
        }
    }
}

impl TracedChain {
    /// Chain whose rules were all made of one item.
    pub(super) fn of(chain: Chain, item: Option<u32>) -> Self {
        let items = vec![item; chain.rules.len()];
        Self { chain, items }
    }

    /// Appends rules that were made of one item.
    pub(super) fn push(&mut self, rules: Vec<Rule>, item: Option<u32>) {
        self.items.extend(rules.iter().map(|_| item));
        self.chain.rules.extend(rules);
    }

    /// Appends the rules of another chain.
    pub(super) fn append(&mut self, other: Self) {
        self.items.extend(other.items);
        self.chain.rules.extend(other.chain.rules);
    }
}
