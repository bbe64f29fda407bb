//! Restrictions of single labels: a necessary condition of a selector, from which indexes find
//! candidates without trying every object.

use std::collections::{BTreeMap, BTreeSet};

use super::{Node, Selector};

/// Condition on one label that holds wherever the selector matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restriction {
    /// The label is present.
    Present,
    /// The label is absent.
    Absent,
    /// The label has one of these values; an empty set means that the selector matches nothing.
    OneOf(BTreeSet<String>),
}

type Restrictions = BTreeMap<String, Restriction>;

impl Selector {
    /// Returns the restriction of each label. Labels that are not in the map are free; an empty map
    /// restricts nothing.
    pub fn restrictions(&self) -> BTreeMap<String, Restriction> {
        of(&self.root, false)
    }
}

/// Returns the restrictions of a node, or of its negation.
fn of(node: &Node, negated: bool) -> Restrictions {
    use Restriction::{Absent, OneOf, Present};
    let single = |label: &String, restriction| Restrictions::from([(label.clone(), restriction)]);
    let one = |value: &String| OneOf(BTreeSet::from([value.clone()]));
    match (node, negated) {
        (Node::Has(label), false) => single(label, Present),
        (Node::Has(label), true) => single(label, Absent),
        (Node::Equals(label, value), false) | (Node::NotEquals(label, value), true) => {
            single(label, one(value))
        }
        (Node::In(label, values), false) | (Node::NotIn(label, values), true) => {
            single(label, OneOf(values.clone()))
        }
        (
            Node::Contains(label, _) | Node::StartsWith(label, _) | Node::EndsWith(label, _),
            false,
        ) => single(label, Present),
        (Node::Not(operand), _) => of(operand, !negated),
        (Node::And(operands), false) | (Node::Or(operands), true) => {
            all_of(operands.iter().map(|operand| of(operand, negated)))
        }
        (Node::Or(operands), false) | (Node::And(operands), true) => {
            any_of(operands.iter().map(|operand| of(operand, negated)))
        }
        _ => Restrictions::new(),
    }
}

fn all_of(parts: impl Iterator<Item = Restrictions>) -> Restrictions {
    let mut all = Restrictions::new();
    for (label, restriction) in parts.flatten() {
        let merged = match all.remove(&label) {
            Some(present) => both(present, restriction),
            None => restriction,
        };
        all.insert(label, merged);
    }
    all
}

fn any_of(parts: impl Iterator<Item = Restrictions>) -> Restrictions {
    let mut any: Option<Restrictions> = None;
    for part in parts {
        any = Some(match any {
            Some(found) if is_never(&part) => found,
            Some(found) if !is_never(&found) => found
                .into_iter()
                .filter_map(|(label, restriction)| {
                    let other = part.get(&label)?.clone();
                    Some((label, either(restriction, other)?))
                })
                .collect(),
            _ => part,
        });
    }
    any.unwrap_or_default()
}

fn is_never(restrictions: &Restrictions) -> bool {
    restrictions
        .values()
        .any(|restriction| matches!(restriction, Restriction::OneOf(values) if values.is_empty()))
}

fn both(one: Restriction, other: Restriction) -> Restriction {
    use Restriction::{Absent, OneOf, Present};
    match (one, other) {
        (Present, Present) => Present,
        (Absent, Absent) => Absent,
        (Present, OneOf(values)) | (OneOf(values), Present) => OneOf(values),
        (OneOf(one), OneOf(other)) => OneOf(one.intersection(&other).cloned().collect()),
        (Absent, _) | (_, Absent) => OneOf(BTreeSet::new()),
    }
}

fn either(one: Restriction, other: Restriction) -> Option<Restriction> {
    use Restriction::{Absent, OneOf, Present};
    match (one, other) {
        (Absent, Absent) => Some(Absent),
        (Absent, _) | (_, Absent) => None,
        (OneOf(one), OneOf(other)) => Some(OneOf(one.union(&other).cloned().collect())),
        _ => Some(Present),
    }
}
