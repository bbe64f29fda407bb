//! A transaction: operations that the kernel makes true together, or not at all.

use std::fmt;
use std::sync::Arc;

use super::ruleset::{Base, Chain, ChainName, SetName, TableName};
use super::set::{Set, SetKind};

/// Operations on one table, applied in order and as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    table: TableName,
    ops: Vec<Op>,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Makes the table unless it is there.
    CreateTable,
    /// Removes the table with everything in it; it must be there.
    DeleteTable,
    /// Makes a chain without rules. It must not be there, unless with the same base: then only the policy changes.
    PutChain(ChainName, Option<Base>),
    /// Removes every rule of a chain.
    FlushChain(ChainName),
    /// Removes a chain that nothing refers to.
    DeleteChain(ChainName),
    /// Makes an empty set.
    CreateSet(SetName, SetKind),
    /// Removes a set that no rule refers to.
    DeleteSet(SetName),
    /// Adds the elements of this value; those there already must have the same value.
    AddElements(SetName, Arc<Set>),
    /// Removes the elements of this value, all of which must be there.
    DeleteElements(SetName, Arc<Set>),
    /// Adds the rules of this value, from an index on, at the end of a chain.
    AppendRules(ChainName, Arc<Chain>, usize),
}

impl Transaction {
    /// Nothing to do on this table.
    pub const fn new(table: TableName) -> Self {
        Self { table, ops: Vec::new() }
    }

    /// Removes the table, if there is one.
    pub fn remove(table: TableName) -> Self {
        Self { table, ops: vec![Op::CreateTable, Op::DeleteTable] }
    }

    /// Appends the operations of another transaction.
    pub(super) fn append(&mut self, other: Self) {
        self.ops.extend(other.ops);
    }

    /// The table it is about.
    pub const fn table(&self) -> &TableName {
        &self.table
    }

    /// The operations in order.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// How many elements it adds and removes.
    pub fn elements(&self) -> usize {
        let elements = |op: &Op| match op {
            Op::AddElements(_, set) | Op::DeleteElements(_, set) => set.elements.len(),
            _ => 0,
        };
        self.ops.iter().map(elements).sum()
    }

    /// Adds an operation.
    pub fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// Adds elements to the set of this name, which is of the same kind: the way of frequent changes, with no
    /// ruleset compared.
    pub fn add_elements(&mut self, name: &SetName, elements: impl Into<Arc<Set>>) {
        let elements = elements.into();
        if !elements.elements.is_empty() {
            self.push(Op::AddElements(name.clone(), elements));
        }
    }

    /// Removes elements from the set of this name, which is of the same kind; their values do not matter.
    pub fn delete_elements(&mut self, name: &SetName, elements: impl Into<Arc<Set>>) {
        let elements = elements.into();
        if !elements.elements.is_empty() {
            self.push(Op::DeleteElements(name.clone(), elements));
        }
    }
}

/// What an operation does, for errors and logs; long lists are counted, not shown.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateTable => f.write_str("create the table"),
            Self::DeleteTable => f.write_str("delete the table"),
            Self::PutChain(name, None) => write!(f, "create chain {name}"),
            Self::PutChain(name, Some(base)) => write!(f, "create chain {name} with {base}"),
            Self::FlushChain(name) => write!(f, "flush chain {name}"),
            Self::DeleteChain(name) => write!(f, "delete chain {name}"),
            Self::CreateSet(name, kind) => write!(f, "create set {name} of {kind}"),
            Self::DeleteSet(name) => write!(f, "delete set {name}"),
            Self::AddElements(name, set) => match set.elements.first_key_value() {
                Some((key, value)) if set.elements.len() == 1 => {
                    write!(f, "add {key}{value} to set {name}")
                }
                _ => write!(f, "add {} elements to set {name}", set.elements.len()),
            },
            Self::DeleteElements(name, set) => match set.elements.first_key_value() {
                Some((key, _)) if set.elements.len() == 1 => {
                    write!(f, "delete {key} from set {name}")
                }
                _ => write!(f, "delete {} elements from set {name}", set.elements.len()),
            },
            Self::AppendRules(name, chain, from) => {
                write!(f, "add {} rule(s) to chain {name}", chain.rules.len() - from)
            }
        }
    }
}

/// One operation per line.
impl fmt::Display for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ops.iter().try_for_each(|op| writeln!(f, "{op}"))
    }
}
