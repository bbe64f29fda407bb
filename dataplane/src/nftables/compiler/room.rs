//! Finds the largest parts of a transaction, for a kernel that lacks memory for it.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::{Compiler, TablePart};
use margay_nft::{Chain, Match, Rule, SetRef, Statement, Transaction, TransactionOp};

impl Compiler {
    /// The largest parts of a transaction, largest first, without those already refused.
    pub fn largest_parts(&self, transaction: &Transaction, count: usize) -> Vec<TablePart> {
        let classes = self
            .classes
            .iter()
            .flat_map(|(class, state)| state.chains.keys().map(move |name| (name, class)));
        let classes: BTreeMap<_, _> = classes.collect();
        let sets = self
            .shapes
            .iter()
            .flat_map(|(id, shape)| shape.sets(id).into_keys().map(move |name| (name, id)));
        let sets: BTreeMap<_, _> = sets.collect();
        let mut sizes: BTreeMap<TablePart, usize> = BTreeMap::new();
        for operation in transaction.ops() {
            let (part, size) = match operation {
                TransactionOp::AppendRules(name, chain, from) => (
                    classes
                        .get(name)
                        .map(|class| TablePart::Class((***class).clone())),
                    chain_size(chain, *from),
                ),
                TransactionOp::AddElements(name, set) => (
                    sets.get(name).map(|id| TablePart::Set((*id).clone())),
                    set.elements.len(),
                ),
                _ => continue,
            };
            if let Some(part) = part.filter(|part| !self.has_refused(part)) {
                *sizes.entry(part).or_default() += size;
            }
        }
        let mut parts: Vec<(TablePart, usize)> = sizes.into_iter().collect();
        parts.sort_by_key(|(_, size)| Reverse(*size));
        parts
            .into_iter()
            .take(count)
            .map(|(part, _)| part)
            .collect()
    }
}

fn chain_size(chain: &Chain, from: usize) -> usize {
    chain.rules.iter().skip(from).map(rule_size).sum()
}

fn rule_size(rule: &Rule) -> usize {
    let elements = |statement: &Statement| match statement {
        Statement::Match(Match::In(_, _, SetRef::Anonymous(set))) => set.elements.len(),
        _ => 0,
    };
    rule.statements.len() + rule.statements.iter().map(elements).sum::<usize>()
}
