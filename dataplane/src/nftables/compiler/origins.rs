//! Answers which rules of policies a rule of a chain comes from.

use std::fmt::Write;

use super::{ClassState, Compiler};
use crate::nftables::class::Class;
use crate::nftables::origin::RuleOrigin;
use margay_nft::ChainName;

impl Compiler {
    /// The rules of policies that a rule of a chain comes from, by its position in the chain from 0; empty for one
    /// that comes from no policy, such as the end of a tier.
    pub fn origins(&self, chain: &ChainName, rule: usize) -> Vec<RuleOrigin> {
        let owner = self.classes.iter().find(|(_, state)| state.chains.contains_key(chain));
        let found = owner.and_then(|(class, state)| {
            let item = state.chains[chain].get(rule).copied().flatten()?;
            Some(origins_of_item(class, state, item).collect())
        });
        found.unwrap_or_default()
    }

    /// All origins as text for people: a comment in nft's language, a line for each rule of a chain and policy's rule.
    pub fn describe_origins(&self) -> String {
        let mut text =
            String::from("# rules of chains, counted from 0, and the rules of policies that they come from\n");
        for (class, state) in &self.classes {
            for (chain, items) in &state.chains {
                let known = items.iter().enumerate().filter_map(|(rule, item)| Some((rule, (*item)?)));
                for (rule, item) in known {
                    for origin in origins_of_item(class, state, item) {
                        writeln!(text, "# {chain} {rule}: {origin}").expect("a string takes all");
                    }
                }
            }
        }
        text
    }
}

fn origins_of_item(class: &Class, state: &ClassState, item: u32) -> impl Iterator<Item = RuleOrigin> {
    let rules = usize::try_from(item).ok().and_then(|item| state.origins.get(item));
    rules.into_iter().flatten().filter_map(move |rule| class.origin(*rule))
}
