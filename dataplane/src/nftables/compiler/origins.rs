//! Answers which rules of policies a rule of a chain comes from.

use super::{ClassState, Compiler};
use crate::nftables::class::Class;
use crate::nftables::origin::RuleOrigin;
use crate::nftables::stage::Direction;
use margay_nft::ChainName;

impl Compiler {
    /// The rules of policies that a rule of a chain comes from, by its position in the chain from
    /// 0; empty for one that comes from no policy, such as the end of a tier.
    pub fn origins(&self, chain: &ChainName, rule: usize) -> Vec<RuleOrigin> {
        let owner = self
            .classes
            .iter()
            .find(|(_, state)| state.chains.contains_key(chain));
        let found = owner.and_then(|(class, state)| {
            let item = state.chains[chain].get(rule).copied().flatten()?;
            Some(origins_of_item(class, state, item).collect())
        });
        found.unwrap_or_default()
    }

    /// All origins as text for people: a comment in nft's language, of one line for each rule of a
    /// chain.
    pub fn describe_origins(&self) -> String {
        let mut text = String::from(
            "# rules of chains, counted from 0, and the rules of policies that they come from\n",
        );
        for (class, state) in &self.classes {
            for (chain, items) in &state.chains {
                for (position, item) in items.iter().enumerate() {
                    let origins = item.map(|item| describe_item(class, state, item));
                    origins
                        .into_iter()
                        .for_each(|origins| text += &format!("# {chain} {position}: {origins}\n"));
                }
            }
        }
        text
    }
}

/// The origins of an item, which are all of one tier.
fn describe_item(class: &Class, state: &ClassState, item: u32) -> String {
    let mut text = String::new();
    for RuleOrigin {
        tier,
        policy,
        direction,
        rule,
    } in origins_of_item(class, state, item)
    {
        if text.is_empty() {
            let direction = if direction == Direction::Ingress {
                "ingress"
            } else {
                "egress"
            };
            text = format!("tier {tier}, {direction} of {policy}");
        } else {
            text += &format!(", {policy}");
        }
        match rule {
            Some(rule) => text += &format!(" rule {rule}"),
            None => text += " as a whole",
        }
    }
    text
}

fn origins_of_item(
    class: &Class,
    state: &ClassState,
    item: u32,
) -> impl Iterator<Item = RuleOrigin> {
    let rules = usize::try_from(item)
        .ok()
        .and_then(|item| state.origins.get(item));
    rules
        .into_iter()
        .flatten()
        .filter_map(move |rule| class.origin(*rule))
}
