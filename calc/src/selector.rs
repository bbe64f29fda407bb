//! Selectors compiled to symbols: the test of an item's labels, and the keys under which the index
//! finds a selector.

use std::collections::BTreeMap;

use margay_api::meta::{
    LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_PARENT_NAME, PREFIX_NAMESPACE,
    PREFIX_SERVICE_ACCOUNT,
};
use margay_api::selector::{Node, Selector};

use crate::interner::{Interner, Marks, Symbol};

/// One operation of a selector; lists of values are sorted.
#[derive(Debug)]
pub(crate) enum Test {
    All,
    Has(Symbol),
    Is(Symbol, Symbol),
    In(Symbol, Box<[Symbol]>),
    NotIn(Symbol, Box<[Symbol]>),
    Contains(Symbol, Box<str>),
    StartsWith(Symbol, Box<str>),
    EndsWith(Symbol, Box<str>),
    Not(Box<Test>),
    And(Box<[Test]>),
    Or(Box<[Test]>),
}

/// Necessary condition on one label of the items that match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Requirement {
    /// The label, with any value.
    Present,
    /// The label with one of these values, sorted.
    OneOf(Vec<Symbol>),
}

/// Requirements by label. Without an entry nothing is known about the label.
pub(crate) type Requirements = BTreeMap<Symbol, Requirement>;

/// Key under which the index finds a selector. An item looks up the few keys that its labels give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum IndexKey {
    /// Every item.
    Any,
    /// Items with this label.
    Key(Symbol),
    /// Items with this label and value.
    Pair(Symbol, Symbol),
    /// Items of this namespace.
    In(Symbol),
    /// Items of this namespace with this label and value of their own.
    InPair(Symbol, Symbol, Symbol),
}

/// Maximal number of index keys of one selector. With more it is indexed under fewer keys that are
/// looked up more often.
const MAX_INDEX_KEYS: usize = 64;

/// Symbols of the labels with special treatment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WellKnown {
    pub(crate) namespace: Symbol,
    pub(crate) orchestrator: Symbol,
}

impl WellKnown {
    pub(crate) fn new(interner: &mut Interner) -> Self {
        Self {
            namespace: interner.intern(LABEL_NAMESPACE),
            orchestrator: interner.intern(LABEL_ORCHESTRATOR),
        }
    }
}

/// Compiles a selector.
pub(crate) fn compile(selector: &Selector, interner: &mut Interner) -> Test {
    node(&selector.root, interner)
}

fn node(root: &Node, interner: &mut Interner) -> Test {
    let one = |interner: &mut Interner, value: &str| -> Box<[Symbol]> {
        Box::new([interner.intern(value)])
    };
    match root {
        Node::All | Node::Global => Test::All,
        Node::Has(label) => Test::Has(interner.intern(label)),
        Node::Equals(label, value) => Test::Is(interner.intern(label), interner.intern(value)),
        Node::NotEquals(label, value) => Test::NotIn(interner.intern(label), one(interner, value)),
        Node::In(label, values) => Test::In(interner.intern(label), list(values, interner)),
        Node::NotIn(label, values) => Test::NotIn(interner.intern(label), list(values, interner)),
        Node::Contains(label, part) => Test::Contains(interner.intern(label), part.as_str().into()),
        Node::StartsWith(label, part) => {
            Test::StartsWith(interner.intern(label), part.as_str().into())
        }
        Node::EndsWith(label, part) => Test::EndsWith(interner.intern(label), part.as_str().into()),
        Node::Not(operand) => Test::Not(Box::new(node(operand, interner))),
        Node::And(operands) => Test::And(
            operands
                .iter()
                .map(|operand| node(operand, interner))
                .collect(),
        ),
        Node::Or(operands) => Test::Or(
            operands
                .iter()
                .map(|operand| node(operand, interner))
                .collect(),
        ),
    }
}

fn list<'a>(
    values: impl IntoIterator<Item = &'a String>,
    interner: &mut Interner,
) -> Box<[Symbol]> {
    let mut values: Vec<Symbol> = values
        .into_iter()
        .map(|value| interner.intern(value))
        .collect();
    values.sort_unstable();
    values.into()
}

impl Test {
    /// Returns true if an item matches; `label` returns the item's value of a label.
    pub(crate) fn matches(
        &self,
        interner: &Interner,
        label: &impl Fn(Symbol) -> Option<Symbol>,
    ) -> bool {
        let part = |key: &Symbol, test: &dyn Fn(&str) -> bool| {
            label(*key).is_some_and(|value| test(interner.get(value)))
        };
        match self {
            Self::All => true,
            Self::Has(key) => label(*key).is_some(),
            Self::Is(key, wanted) => label(*key) == Some(*wanted),
            Self::In(key, values) => {
                label(*key).is_some_and(|value| values.binary_search(&value).is_ok())
            }
            Self::NotIn(key, values) => {
                label(*key).is_none_or(|value| values.binary_search(&value).is_err())
            }
            Self::Contains(key, wanted) => part(key, &|value| value.contains(&**wanted)),
            Self::StartsWith(key, wanted) => part(key, &|value| value.starts_with(&**wanted)),
            Self::EndsWith(key, wanted) => part(key, &|value| value.ends_with(&**wanted)),
            Self::Not(operand) => !operand.matches(interner, label),
            Self::And(operands) => operands
                .iter()
                .all(|operand| operand.matches(interner, label)),
            Self::Or(operands) => operands
                .iter()
                .any(|operand| operand.matches(interner, label)),
        }
    }

    /// Requirements that every matching item meets.
    pub(crate) fn requirements(&self) -> Requirements {
        match self {
            Self::Has(key)
            | Self::Contains(key, _)
            | Self::StartsWith(key, _)
            | Self::EndsWith(key, _) => Requirements::from([(*key, Requirement::Present)]),
            Self::Is(key, value) => Requirements::from([(*key, Requirement::OneOf(vec![*value]))]),
            Self::In(key, values) => {
                Requirements::from([(*key, Requirement::OneOf(values.to_vec()))])
            }
            Self::And(operands) => operands
                .iter()
                .map(Self::requirements)
                .fold(Requirements::new(), both),
            Self::Or(operands) => operands
                .iter()
                .map(Self::requirements)
                .reduce(either)
                .unwrap_or_default(),
            Self::Not(operand) => match &**operand {
                Self::NotIn(key, values) => {
                    Requirements::from([(*key, Requirement::OneOf(values.to_vec()))])
                }
                _ => Requirements::new(),
            },
            Self::All | Self::NotIn(..) => Requirements::new(),
        }
    }

    /// Calls `visit` with every label that the test uses.
    pub(crate) fn keys(&self, visit: &mut impl FnMut(Symbol)) {
        match self {
            Self::All => {}
            Self::Has(key)
            | Self::Is(key, _)
            | Self::In(key, _)
            | Self::NotIn(key, _)
            | Self::Contains(key, _)
            | Self::StartsWith(key, _)
            | Self::EndsWith(key, _) => visit(*key),
            Self::Not(operand) => operand.keys(visit),
            Self::And(operands) | Self::Or(operands) => {
                operands.iter().for_each(|operand| operand.keys(visit))
            }
        }
    }

    /// Marks the symbols in use.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        self.keys(&mut |key| marks.mark(key));
        match self {
            Self::Is(_, value) => marks.mark(*value),
            Self::In(_, values) | Self::NotIn(_, values) => marks.mark_all(values.iter().copied()),
            Self::Not(operand) => operand.mark(marks),
            Self::And(operands) | Self::Or(operands) => {
                operands.iter().for_each(|operand| operand.mark(marks))
            }
            _ => {}
        }
    }
}

/// Conjunction: both must be met.
fn both(mut first: Requirements, second: Requirements) -> Requirements {
    for (key, requirement) in second {
        let merged = match (first.remove(&key), requirement) {
            (Some(Requirement::OneOf(first)), Requirement::OneOf(second)) => Requirement::OneOf(
                first
                    .into_iter()
                    .filter(|value| second.contains(value))
                    .collect(),
            ),
            (Some(Requirement::OneOf(values)), Requirement::Present)
            | (_, Requirement::OneOf(values)) => Requirement::OneOf(values),
            (_, Requirement::Present) => Requirement::Present,
        };
        first.insert(key, merged);
    }
    first
}

/// Disjunction: one of the two must be met, so only what both require is required.
fn either(first: Requirements, mut second: Requirements) -> Requirements {
    let common = first.into_iter().filter_map(|(key, requirement)| {
        let merged = match (requirement, second.remove(&key)?) {
            (Requirement::OneOf(mut first), Requirement::OneOf(second)) => {
                first.extend(second);
                first.sort_unstable();
                first.dedup();
                Requirement::OneOf(first)
            }
            _ => Requirement::Present,
        };
        Some((key, merged))
    });
    common.collect()
}

/// Index keys of a selector with these requirements: every item that matches looks up one of them.
pub(crate) fn index_keys(
    requirements: &Requirements,
    well_known: &WellKnown,
    interner: &Interner,
) -> Vec<IndexKey> {
    let namespaces = match requirements.get(&well_known.namespace) {
        Some(Requirement::OneOf(values)) => Some(values),
        _ => None,
    };
    let best = requirements
        .iter()
        .filter(|(key, _)| **key != well_known.namespace)
        .min_by_key(|(key, requirement)| (cost(**key, requirement, well_known, interner), **key));
    let own = |key: Symbol| !is_inherited(interner.get(key));
    match (namespaces, best) {
        (Some(namespaces), Some((key, Requirement::OneOf(values))))
            if own(*key) && namespaces.len().saturating_mul(values.len()) <= MAX_INDEX_KEYS =>
        {
            let pairs = namespaces.iter().flat_map(|namespace| {
                values
                    .iter()
                    .map(|value| IndexKey::InPair(*namespace, *key, *value))
            });
            pairs.collect()
        }
        (Some(namespaces), _) if namespaces.len() <= MAX_INDEX_KEYS => namespaces
            .iter()
            .map(|namespace| IndexKey::In(*namespace))
            .collect(),
        (_, Some((key, Requirement::OneOf(values)))) if values.len() <= MAX_INDEX_KEYS => values
            .iter()
            .map(|value| IndexKey::Pair(*key, *value))
            .collect(),
        (_, Some((key, _))) => vec![IndexKey::Key(*key)],
        (_, None) if requirements.contains_key(&well_known.namespace) => {
            vec![IndexKey::Key(well_known.namespace)]
        }
        (_, None) => vec![IndexKey::Any],
    }
}

/// Rank by the number of items that a requirement is expected to leave: few for the name of a
/// namespace, all for what every pod has.
fn cost(
    key: Symbol,
    requirement: &Requirement,
    well_known: &WellKnown,
    interner: &Interner,
) -> usize {
    let text = interner.get(key);
    let rank = match requirement {
        _ if key == well_known.orchestrator => 4,
        Requirement::Present => 3,
        Requirement::OneOf(_) if is_name(text) => 0,
        Requirement::OneOf(_) if !is_inherited(text) => 1,
        Requirement::OneOf(_) => 2,
    };
    let values = match requirement {
        Requirement::OneOf(values) => values.len(),
        Requirement::Present => 0,
    };
    rank * 1_000_000 + values.min(999_999)
}

/// Returns true for labels that items only inherit from their namespace or service account.
pub(crate) fn is_inherited(key: &str) -> bool {
    key.starts_with(PREFIX_NAMESPACE) || key.starts_with(PREFIX_SERVICE_ACCOUNT)
}

/// Returns true for labels whose value is the name of a namespace.
fn is_name(key: &str) -> bool {
    key.strip_prefix(PREFIX_NAMESPACE)
        .is_some_and(|key| key == "kubernetes.io/metadata.name" || key == LABEL_PARENT_NAME)
}
