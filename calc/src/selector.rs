//! Selectors over numbered texts: the test of an item, and where in the index a selector is found.

use std::collections::BTreeMap;

use margay_api::meta::{
    LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_PARENT_NAME, PREFIX_NAMESPACE, PREFIX_SERVICE_ACCOUNT,
};
use margay_api::selector::{Node, Selector};

use crate::texts::{Marks, Text, Texts};

/// One operation of a selector; the values of lists are sorted.
#[derive(Debug)]
pub(crate) enum Test {
    All,
    Has(Text),
    Is(Text, Text),
    In(Text, Box<[Text]>),
    NotIn(Text, Box<[Text]>),
    Contains(Text, Box<str>),
    StartsWith(Text, Box<str>),
    EndsWith(Text, Box<str>),
    Not(Box<Test>),
    And(Box<[Test]>),
    Or(Box<[Test]>),
}

/// What the labels of an item that matches must hold at least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The label, with any value.
    Present,
    /// The label with one of these values, sorted.
    OneOf(Vec<Text>),
}

/// Per label what is needed. No entry: nothing is known.
pub(crate) type Needs = BTreeMap<Text, Need>;

/// Place in the index under which a selector is found. An item looks at the few places that its labels lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Place {
    /// Every item.
    Any,
    /// Items with this label.
    Key(Text),
    /// Items with this label and value.
    Pair(Text, Text),
    /// Items of this namespace.
    In(Text),
    /// Items of this namespace with this label and value of their own.
    InPair(Text, Text, Text),
}

/// A selector that would have to be put into more places than this is put into fewer that are looked at more often.
const PLACES: usize = 64;

/// Numbers of the labels that have a part of their own here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) namespace: Text,
    pub(crate) orchestrator: Text,
}

impl Known {
    pub(crate) fn new(texts: &mut Texts) -> Self {
        Self { namespace: texts.intern(LABEL_NAMESPACE), orchestrator: texts.intern(LABEL_ORCHESTRATOR) }
    }
}

/// The test of a selector.
pub(crate) fn compile(selector: &Selector, texts: &mut Texts) -> Test {
    node(&selector.root, texts)
}

fn node(root: &Node, texts: &mut Texts) -> Test {
    let one = |texts: &mut Texts, value: &str| -> Box<[Text]> { Box::new([texts.intern(value)]) };
    match root {
        Node::All | Node::Global => Test::All,
        Node::Has(label) => Test::Has(texts.intern(label)),
        Node::Equals(label, value) => Test::Is(texts.intern(label), texts.intern(value)),
        Node::NotEquals(label, value) => Test::NotIn(texts.intern(label), one(texts, value)),
        Node::In(label, values) => Test::In(texts.intern(label), list(values, texts)),
        Node::NotIn(label, values) => Test::NotIn(texts.intern(label), list(values, texts)),
        Node::Contains(label, part) => Test::Contains(texts.intern(label), part.as_str().into()),
        Node::StartsWith(label, part) => Test::StartsWith(texts.intern(label), part.as_str().into()),
        Node::EndsWith(label, part) => Test::EndsWith(texts.intern(label), part.as_str().into()),
        Node::Not(operand) => Test::Not(Box::new(node(operand, texts))),
        Node::And(operands) => Test::And(operands.iter().map(|operand| node(operand, texts)).collect()),
        Node::Or(operands) => Test::Or(operands.iter().map(|operand| node(operand, texts)).collect()),
    }
}

fn list<'a>(values: impl IntoIterator<Item = &'a String>, texts: &mut Texts) -> Box<[Text]> {
    let mut values: Vec<Text> = values.into_iter().map(|value| texts.intern(value)).collect();
    values.sort_unstable();
    values.into()
}

impl Test {
    /// Whether an item matches whose value of a label is what `label` says.
    pub(crate) fn matches(&self, texts: &Texts, label: &impl Fn(Text) -> Option<Text>) -> bool {
        let part = |key: &Text, test: &dyn Fn(&str) -> bool| label(*key).is_some_and(|value| test(texts.get(value)));
        match self {
            Self::All => true,
            Self::Has(key) => label(*key).is_some(),
            Self::Is(key, wanted) => label(*key) == Some(*wanted),
            Self::In(key, values) => label(*key).is_some_and(|value| values.binary_search(&value).is_ok()),
            Self::NotIn(key, values) => label(*key).is_none_or(|value| values.binary_search(&value).is_err()),
            Self::Contains(key, wanted) => part(key, &|value| value.contains(&**wanted)),
            Self::StartsWith(key, wanted) => part(key, &|value| value.starts_with(&**wanted)),
            Self::EndsWith(key, wanted) => part(key, &|value| value.ends_with(&**wanted)),
            Self::Not(operand) => !operand.matches(texts, label),
            Self::And(operands) => operands.iter().all(|operand| operand.matches(texts, label)),
            Self::Or(operands) => operands.iter().any(|operand| operand.matches(texts, label)),
        }
    }

    /// What every item that matches must hold.
    pub(crate) fn needs(&self) -> Needs {
        match self {
            Self::Has(key) | Self::Contains(key, _) | Self::StartsWith(key, _) | Self::EndsWith(key, _) => {
                Needs::from([(*key, Need::Present)])
            }
            Self::Is(key, value) => Needs::from([(*key, Need::OneOf(vec![*value]))]),
            Self::In(key, values) => Needs::from([(*key, Need::OneOf(values.to_vec()))]),
            Self::And(operands) => operands.iter().map(Self::needs).fold(Needs::new(), both),
            Self::Or(operands) => operands.iter().map(Self::needs).reduce(either).unwrap_or_default(),
            Self::Not(operand) => match &**operand {
                Self::NotIn(key, values) => Needs::from([(*key, Need::OneOf(values.to_vec()))]),
                _ => Needs::new(),
            },
            Self::All | Self::NotIn(..) => Needs::new(),
        }
    }

    /// Calls `see` with every label that the test looks at.
    pub(crate) fn keys(&self, see: &mut impl FnMut(Text)) {
        match self {
            Self::All => {}
            Self::Has(key)
            | Self::Is(key, _)
            | Self::In(key, _)
            | Self::NotIn(key, _)
            | Self::Contains(key, _)
            | Self::StartsWith(key, _)
            | Self::EndsWith(key, _) => see(*key),
            Self::Not(operand) => operand.keys(see),
            Self::And(operands) | Self::Or(operands) => operands.iter().for_each(|operand| operand.keys(see)),
        }
    }

    /// Marks the texts that the test keeps.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        self.keys(&mut |key| marks.mark(key));
        match self {
            Self::Is(_, value) => marks.mark(*value),
            Self::In(_, values) | Self::NotIn(_, values) => marks.all(values.iter().copied()),
            Self::Not(operand) => operand.mark(marks),
            Self::And(operands) | Self::Or(operands) => operands.iter().for_each(|operand| operand.mark(marks)),
            _ => {}
        }
    }
}

/// Both have to hold.
fn both(mut first: Needs, second: Needs) -> Needs {
    for (key, need) in second {
        let merged = match (first.remove(&key), need) {
            (Some(Need::OneOf(first)), Need::OneOf(second)) => {
                Need::OneOf(first.into_iter().filter(|value| second.contains(value)).collect())
            }
            (Some(Need::OneOf(values)), Need::Present) | (_, Need::OneOf(values)) => Need::OneOf(values),
            (_, Need::Present) => Need::Present,
        };
        first.insert(key, merged);
    }
    first
}

/// One of the two has to hold, so only what both demand is demanded.
fn either(first: Needs, mut second: Needs) -> Needs {
    let common = first.into_iter().filter_map(|(key, need)| {
        let merged = match (need, second.remove(&key)?) {
            (Need::OneOf(mut first), Need::OneOf(second)) => {
                first.extend(second);
                first.sort_unstable();
                first.dedup();
                Need::OneOf(first)
            }
            _ => Need::Present,
        };
        Some((key, merged))
    });
    common.collect()
}

/// The places under which a selector with these needs is found: every item that matches looks at one of them.
pub(crate) fn places(needs: &Needs, known: &Known, texts: &Texts) -> Vec<Place> {
    let namespaces = match needs.get(&known.namespace) {
        Some(Need::OneOf(values)) => Some(values),
        _ => None,
    };
    let best = needs
        .iter()
        .filter(|(key, _)| **key != known.namespace)
        .min_by_key(|(key, need)| (cost(**key, need, known, texts), **key));
    let own = |key: Text| !is_inherited(texts.get(key));
    match (namespaces, best) {
        (Some(namespaces), Some((key, Need::OneOf(values))))
            if own(*key) && namespaces.len().saturating_mul(values.len()) <= PLACES =>
        {
            let pairs = namespaces
                .iter()
                .flat_map(|namespace| values.iter().map(|value| Place::InPair(*namespace, *key, *value)));
            pairs.collect()
        }
        (Some(namespaces), _) if namespaces.len() <= PLACES => {
            namespaces.iter().map(|namespace| Place::In(*namespace)).collect()
        }
        (_, Some((key, Need::OneOf(values)))) if values.len() <= PLACES => {
            values.iter().map(|value| Place::Pair(*key, *value)).collect()
        }
        (_, Some((key, _))) => vec![Place::Key(*key)],
        (_, None) if needs.contains_key(&known.namespace) => vec![Place::Key(known.namespace)],
        (_, None) => vec![Place::Any],
    }
}

/// How many items a need is expected to leave, as a rank: names of namespaces leave few, what every pod carries leaves all.
fn cost(key: Text, need: &Need, known: &Known, texts: &Texts) -> usize {
    let text = texts.get(key);
    let rank = match need {
        _ if key == known.orchestrator => 4,
        Need::Present => 3,
        Need::OneOf(_) if is_name(text) => 0,
        Need::OneOf(_) if !is_inherited(text) => 1,
        Need::OneOf(_) => 2,
    };
    let values = match need {
        Need::OneOf(values) => values.len(),
        Need::Present => 0,
    };
    rank * 1_000_000 + values.min(999_999)
}

/// Whether items have the label from their namespace or service account only.
pub(crate) fn is_inherited(key: &str) -> bool {
    key.starts_with(PREFIX_NAMESPACE) || key.starts_with(PREFIX_SERVICE_ACCOUNT)
}

/// Whether the label is the name of one namespace.
fn is_name(key: &str) -> bool {
    key.strip_prefix(PREFIX_NAMESPACE)
        .is_some_and(|key| key == "kubernetes.io/metadata.name" || key == LABEL_PARENT_NAME)
}
