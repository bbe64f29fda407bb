//! What a rule demands of a packet, and the nftables rules that this takes.
//!
//! Each demand can be met in one of several ways. Few combinations of ways are a rule each, as fewer steps decide sooner. Where they are many, a demand
//! that has many ways gets a chain of its own, in which the first way that is met leads on to the chain of the next: so a rule of many named ports on both
//! sides takes as many nftables rules as it has ports, and not their product.

use super::names;
use margay_nft::{Chain, ChainName, CmpOp, MarkSet, Match, Rule, SetRef, Statement, Verdict};

/// Combinations that are rules of their own, at most, where there is another way.
const COMBINED: usize = 16;
/// Ways of a demand that are told apart by tests, at most: each tests all before it.
const EXCLUDED: usize = 4;
/// Chains that stand behind each other for one rule: the kernel follows no more than 16 in all. Demands with many ways are those for ports of both sides.
const STAGES: usize = 2;
/// Bit of the mark, within one tier: a rule that passes to the next tier has matched, in a chain that cannot leave the tier itself.
pub(super) const PASSED: u32 = 0x40000;

/// All the tests of one nftables rule.
pub(super) type Tests = Vec<Match>;

/// A rule for one family: what is done with the packets that pass one of the lists of tests, and one of each stage.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Compiled {
    alternatives: Vec<Tests>,
    /// Demands that have a chain of their own.
    stages: Vec<Vec<Tests>>,
    statements: Vec<Statement>,
}

/// What a rule demands, each demand as its ways.
pub(super) struct Demands {
    /// Whether a packet must take one of a demand's ways only.
    exclusive: bool,
    demands: Vec<Vec<Tests>>,
}

impl Compiled {
    /// Drops everything.
    pub(super) fn drop() -> Self {
        Self { alternatives: vec![Vec::new()], stages: Vec::new(), statements: vec![Statement::Verdict(Verdict::Drop)] }
    }

    /// As nftables rules, and the chains that they lead to. Those are called by this name and a number.
    pub(super) fn into_rules(self, name: &ChainName) -> (Vec<Rule>, Vec<(ChainName, Chain)>) {
        let Self { alternatives, mut stages, statements } = self;
        let is_limited = statements.iter().any(|statement| matches!(statement, Statement::Limit(_)));
        if stages.is_empty() && (!is_limited || alternatives.len() < 2) {
            return (rules(alternatives, &statements), Vec::new());
        }
        let chain = |number: usize| names::chain(&format!("{name}-{number}"));
        let jump = [Statement::Verdict(Verdict::Jump(chain(0)))];
        let passes = matches!(statements.last(), Some(Statement::Verdict(Verdict::Return)));
        let ends = matches!(statements.last(), Some(Statement::Verdict(_)));
        let last = match (passes, ends, stages.pop()) {
            (true, _, Some(ways)) => rules(ways, &[mark(PASSED), Statement::Verdict(Verdict::Return)]),
            (false, true, Some(ways)) => rules(ways, &statements),
            // A limit counts the packets of all ways, and none is reported twice: they meet in a chain.
            (_, _, ways) => {
                stages.extend(ways);
                vec![Rule { statements }]
            }
        };
        let mut chains = Vec::new();
        let count = stages.len();
        for (number, ways) in stages.into_iter().enumerate() {
            let next = [Statement::Verdict(Verdict::Goto(chain(number + 1)))];
            chains.push((chain(number), Chain { base: None, rules: rules(ways, &next) }));
        }
        chains.push((chain(count), Chain { base: None, rules: last }));
        let mut own = rules(alternatives, &jump);
        if passes {
            own.insert(0, Rule::new().then(mark(0)));
            let passed = Rule::new().when(Match::MarkBits { mask: PASSED, op: CmpOp::Eq, value: PASSED });
            own.push(passed.then(mark(0)).verdict(Verdict::Return));
        }
        (own, chains)
    }
}

fn mark(value: u32) -> Statement {
    Statement::MarkSet(MarkSet { mask: PASSED, value })
}

fn rules(ways: Vec<Tests>, then: &[Statement]) -> Vec<Rule> {
    let rule = |tests: Tests| {
        let tested = tests.into_iter().fold(Rule::new(), Rule::when);
        then.iter().cloned().fold(tested, Rule::then)
    };
    ways.into_iter().map(rule).collect()
}

impl Demands {
    /// No demands. `exclusive`: no packet may meet two of the rules.
    pub(super) const fn new(exclusive: bool) -> Self {
        Self { exclusive, demands: Vec::new() }
    }

    /// Demands this.
    pub(super) fn must(&mut self, test: Match) {
        self.demands.push(vec![vec![test]]);
    }

    /// Demands one of these.
    pub(super) fn any_of(&mut self, ways: Vec<Tests>) {
        self.demands.push(ways);
    }

    /// Every combination of ways that have no chain of their own; what is cheap to test comes first.
    pub(super) fn compile(mut self, statements: Vec<Statement>) -> Compiled {
        let stages = self.stages();
        self.demands.sort_by_key(|ways| ways.iter().flatten().map(cost).max());
        let mut alternatives: Vec<Tests> = vec![Vec::new()];
        for ways in self.demands {
            let ways = if self.exclusive { exclude(ways) } else { ways };
            alternatives = alternatives
                .iter()
                .flat_map(|tests| ways.iter().map(|way| tests.iter().chain(way).cloned().collect()))
                .collect();
        }
        Compiled { alternatives, stages, statements }
    }

    /// Takes the demands out that have too many ways to be combined with the others.
    fn stages(&mut self) -> Vec<Vec<Tests>> {
        let mut stages = Vec::new();
        while stages.len() < STAGES {
            let combined = self.demands.iter().map(Vec::len).fold(1, usize::saturating_mul);
            let most = self.demands.iter().enumerate().max_by_key(|(_, ways)| ways.len());
            let Some((place, most)) = most.map(|(place, ways)| (place, ways.len())) else { break };
            let is_product = combined > COMBINED && combined > most;
            if !(is_product || self.exclusive && most > EXCLUDED) {
                break;
            }
            stages.push(self.demands.remove(place));
        }
        stages
    }
}

/// Makes alternatives exclude each other: each demands that the last test of every former one fails. A packet that a guard keeps from a former
/// alternative is kept from the later ones' negations by guards of their own, as all guards of a demand are the same or exclude each other.
fn exclude(ways: Vec<Tests>) -> Vec<Tests> {
    let mut before: Vec<(Tests, Match)> = Vec::new();
    let mut exclusive = Vec::new();
    for way in ways {
        let Some((last, guards)) = way.split_last() else { continue };
        let negated = before.iter().filter(|(others, _)| others.iter().all(|guard| guards.contains(guard)));
        let negated: Vec<Match> = negated.map(|(_, negated)| negated.clone()).collect();
        before.extend(negate(last).map(|negated| (guards.to_vec(), negated)));
        exclusive.push(way.into_iter().chain(negated).collect());
    }
    exclusive
}

/// Order of tests by what they cost: a comparison, a lookup in a constant set, a lookup in a set of the table.
fn cost(test: &Match) -> u8 {
    match test {
        Match::In(_, _, SetRef::Named(_)) => 2,
        Match::In(..) => 1,
        _ => 0,
    }
}

/// The opposite of a test, for those that are alternatives of one demand.
fn negate(test: &Match) -> Option<Match> {
    let flip = |op: &CmpOp| if *op == CmpOp::Eq { CmpOp::Ne } else { CmpOp::Eq };
    match test {
        Match::In(key, op, set) => Some(Match::In(key.clone(), flip(op), set.clone())),
        Match::Is(selector, op, field) => Some(Match::Is(*selector, flip(op), *field)),
        _ => None,
    }
}
