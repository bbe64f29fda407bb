//! Conditions of a rule, and the nftables rules that they take.
//!
//! Each condition can be met in one of several ways. Where there are few combinations, each is a
//! rule of its own, as fewer steps decide sooner. Otherwise a condition with many ways gets a chain
//! of its own, in which the first way that is met leads on to the chain of the next condition: a
//! rule with many named ports on both sides takes as many nftables rules as it has ports, not their
//! product.

use super::names;
use margay_nft::{Chain, ChainName, CmpOp, MarkSet, Match, Rule, SetRef, Statement, Verdict};

/// Maximal number of combinations compiled to rules of their own, if there is another way.
const MAX_COMBINATIONS: usize = 16;
/// Maximal number of ways made exclusive by negated tests: each tests all before it.
const MAX_EXCLUSIVE_WAYS: usize = 4;
/// Maximal number of chained conditions per rule: the kernel follows 16 jumps in all
/// (`NFT_JUMP_STACK_SIZE` in `net/netfilter/nf_tables.h`). The conditions with many ways are the
/// ports of both sides.
const MAX_STAGES: usize = 2;
/// Mark bit, used within one tier: a rule with action Pass has matched, in a chain that cannot
/// leave the tier itself.
pub(super) const PASSED: u32 = 0x40000;

/// Tests of one nftables rule.
pub(super) type Tests = Vec<Match>;

/// A rule compiled for one family: its statements apply to packets that pass one of the
/// alternatives and one way of each stage.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Compiled {
    alternatives: Vec<Tests>,
    /// Conditions with a chain of their own.
    stages: Vec<Vec<Tests>>,
    statements: Vec<Statement>,
}

/// Conditions of a rule, each as its list of ways.
pub(super) struct Demands {
    /// Whether a packet may match only one of the compiled rules.
    exclusive: bool,
    demands: Vec<Vec<Tests>>,
}

impl Compiled {
    /// A rule that drops everything.
    pub(super) fn drop() -> Self {
        Self {
            alternatives: vec![Vec::new()],
            stages: Vec::new(),
            statements: vec![Statement::Verdict(Verdict::Drop)],
        }
    }

    /// Renders nftables rules and the chains that they lead to, named by this name and a number.
    pub(super) fn into_rules(self, name: &ChainName) -> (Vec<Rule>, Vec<(ChainName, Chain)>) {
        let Self {
            alternatives,
            mut stages,
            statements,
        } = self;
        let is_limited = statements
            .iter()
            .any(|statement| matches!(statement, Statement::Limit(_)));
        if stages.is_empty() && (!is_limited || alternatives.len() < 2) {
            return (render_rules(alternatives, &statements), Vec::new());
        }
        let chain = |number: usize| names::chain(&format!("{name}-{number}"));
        let jump = [Statement::Verdict(Verdict::Jump(chain(0)))];
        let passes = matches!(statements.last(), Some(Statement::Verdict(Verdict::Return)));
        let ends = matches!(statements.last(), Some(Statement::Verdict(_)));
        let last = match (passes, ends, stages.pop()) {
            (true, _, Some(ways)) => render_rules(
                ways,
                &[set_mark(PASSED), Statement::Verdict(Verdict::Return)],
            ),
            (false, true, Some(ways)) => render_rules(ways, &statements),
            // A shared chain: a limit must count the packets of all ways, and none may be logged
            // twice.
            (_, _, ways) => {
                stages.extend(ways);
                vec![Rule { statements }]
            }
        };
        let mut chains = Vec::new();
        let count = stages.len();
        for (number, ways) in stages.into_iter().enumerate() {
            let next = [Statement::Verdict(Verdict::Goto(chain(number + 1)))];
            chains.push((
                chain(number),
                Chain {
                    base: None,
                    rules: render_rules(ways, &next),
                },
            ));
        }
        chains.push((
            chain(count),
            Chain {
                base: None,
                rules: last,
            },
        ));
        let mut own = render_rules(alternatives, &jump);
        if passes {
            own.insert(0, Rule::new().then(set_mark(0)));
            let passed = Rule::new().when(Match::MarkBits {
                mask: PASSED,
                op: CmpOp::Eq,
                value: PASSED,
            });
            own.push(passed.then(set_mark(0)).verdict(Verdict::Return));
        }
        (own, chains)
    }
}

fn set_mark(value: u32) -> Statement {
    Statement::MarkSet(MarkSet {
        mask: PASSED,
        value,
    })
}

fn render_rules(ways: Vec<Tests>, then: &[Statement]) -> Vec<Rule> {
    let rule = |tests: Tests| {
        let tested = tests.into_iter().fold(Rule::new(), Rule::when);
        then.iter().cloned().fold(tested, Rule::then)
    };
    ways.into_iter().map(rule).collect()
}

impl Demands {
    /// No conditions. `exclusive`: no packet may match two of the rules.
    pub(super) const fn new(exclusive: bool) -> Self {
        Self {
            exclusive,
            demands: Vec::new(),
        }
    }

    /// Adds a test that every packet must pass.
    pub(super) fn must(&mut self, test: Match) {
        self.demands.push(vec![vec![test]]);
    }

    /// Adds a condition with alternative ways.
    pub(super) fn any_of(&mut self, ways: Vec<Tests>) {
        self.demands.push(ways);
    }

    /// Compiles all combinations of ways without a chain of their own; cheap tests come first.
    pub(super) fn compile(mut self, statements: Vec<Statement>) -> Compiled {
        let stages = self.take_stages();
        self.demands
            .sort_by_key(|ways| ways.iter().flatten().map(test_cost).max());
        let mut alternatives: Vec<Tests> = vec![Vec::new()];
        for ways in self.demands {
            let ways = if self.exclusive {
                make_exclusive(ways)
            } else {
                ways
            };
            alternatives = alternatives
                .iter()
                .flat_map(|tests| {
                    ways.iter()
                        .map(|way| tests.iter().chain(way).cloned().collect())
                })
                .collect();
        }
        Compiled {
            alternatives,
            stages,
            statements,
        }
    }

    /// Takes out the conditions with too many ways to be combined with the others.
    fn take_stages(&mut self) -> Vec<Vec<Tests>> {
        let mut stages = Vec::new();
        while stages.len() < MAX_STAGES {
            let combined = self
                .demands
                .iter()
                .map(Vec::len)
                .fold(1, usize::saturating_mul);
            let most = self
                .demands
                .iter()
                .enumerate()
                .max_by_key(|(_, ways)| ways.len());
            let Some((place, most)) = most.map(|(place, ways)| (place, ways.len())) else {
                break;
            };
            let is_product = combined > MAX_COMBINATIONS && combined > most;
            if !(is_product || self.exclusive && most > MAX_EXCLUSIVE_WAYS) {
                break;
            }
            stages.push(self.demands.remove(place));
        }
        stages
    }
}

/// Makes alternatives mutually exclusive: each requires that the last test of all former ones
/// fails. A packet that a guard keeps from a former alternative is kept from the negation by the
/// same guard, as all guards of a condition are the same or exclude each other.
fn make_exclusive(ways: Vec<Tests>) -> Vec<Tests> {
    let mut before: Vec<(Tests, Match)> = Vec::new();
    let mut exclusive = Vec::new();
    for way in ways {
        let Some((last, guards)) = way.split_last() else {
            continue;
        };
        let negated = before
            .iter()
            .filter(|(others, _)| others.iter().all(|guard| guards.contains(guard)));
        let negated: Vec<Match> = negated.map(|(_, negated)| negated.clone()).collect();
        before.extend(negate_test(last).map(|negated| (guards.to_vec(), negated)));
        exclusive.push(way.into_iter().chain(negated).collect());
    }
    exclusive
}

/// Relative cost of a test: comparison, lookup in a constant set, lookup in a named set.
fn test_cost(test: &Match) -> u8 {
    match test {
        Match::In(_, _, SetRef::Named(_)) => 2,
        Match::In(..) => 1,
        _ => 0,
    }
}

/// Negates a test of the kinds that occur as alternatives of a condition.
fn negate_test(test: &Match) -> Option<Match> {
    let flip = |op: &CmpOp| {
        if *op == CmpOp::Eq {
            CmpOp::Ne
        } else {
            CmpOp::Eq
        }
    };
    match test {
        Match::In(key, op, set) => Some(Match::In(key.clone(), flip(op), set.clone())),
        Match::Is(selector, op, field) => Some(Match::Is(*selector, flip(op), *field)),
        _ => None,
    }
}
