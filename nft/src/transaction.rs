//! Transactions: operations that the kernel commits together, or not at all.

use std::fmt;
use std::sync::Arc;

use crate::ruleset::{Base, Chain, ChainName, SetName, TableName};
use crate::set::{Set, SetKind};

/// Operations on one table, applied in order and committed atomically.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    table: TableName,
    ops: Vec<TransactionOp>,
}

/// One operation of a [`Transaction`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransactionOp {
    /// `add table`: creates the table unless it exists.
    CreateTable,
    /// `delete table`: deletes the table with everything in it; it must exist.
    DeleteTable,
    /// `add chain`: creates an empty chain, or changes the policy of a chain that exists with the
    /// same type, hook and priority.
    PutChain(ChainName, Option<Base>),
    /// `flush chain`: deletes all rules of a chain.
    FlushChain(ChainName),
    /// `delete chain`: deletes a chain that has no rules and that nothing refers to.
    DeleteChain(ChainName),
    /// `add set` or `add map`: creates an empty set.
    CreateSet(SetName, SetKind),
    /// `delete set`: deletes a set that no rule refers to.
    DeleteSet(SetName),
    /// `add element`: adds the elements of this set; those that exist must have the same value.
    AddElements(SetName, Arc<Set>),
    /// `delete element`: deletes the elements of this set, all of which must exist.
    DeleteElements(SetName, Arc<Set>),
    /// `add rule`: appends the rules of this chain to it, from an index on.
    AppendRules(ChainName, Arc<Chain>, usize),
}

impl Transaction {
    /// An empty transaction.
    pub const fn new(table: TableName) -> Self {
        Self {
            table,
            ops: Vec::new(),
        }
    }

    /// Appends the operations of another transaction.
    pub(crate) fn append(&mut self, other: Self) {
        self.ops.extend(other.ops);
    }

    /// Deletes the table if it exists.
    pub fn remove(table: TableName) -> Self {
        Self {
            table,
            ops: vec![TransactionOp::CreateTable, TransactionOp::DeleteTable],
        }
    }

    /// Name of the table.
    pub const fn table(&self) -> &TableName {
        &self.table
    }

    /// The operations, in order.
    pub fn ops(&self) -> &[TransactionOp] {
        &self.ops
    }

    /// Whether it has no operations.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Number of set elements that it adds and deletes.
    pub fn element_count(&self) -> usize {
        let elements = |op: &TransactionOp| match op {
            TransactionOp::AddElements(_, set) | TransactionOp::DeleteElements(_, set) => {
                set.elements.len()
            }
            _ => 0,
        };
        self.ops.iter().map(elements).sum()
    }

    /// Appends an operation.
    pub fn push(&mut self, op: TransactionOp) {
        self.ops.push(op);
    }

    /// Appends [`TransactionOp::AddElements`], unless there are none. The named set must be of the
    /// same kind.
    ///
    /// This is the cheap path for frequent changes of large sets: no rulesets are compared.
    pub fn add_elements(&mut self, name: &SetName, elements: impl Into<Arc<Set>>) {
        let elements = elements.into();
        if !elements.elements.is_empty() {
            self.push(TransactionOp::AddElements(name.clone(), elements));
        }
    }

    /// Appends [`TransactionOp::DeleteElements`], unless there are none. The named set must be of
    /// the same kind; the values do not matter.
    pub fn delete_elements(&mut self, name: &SetName, elements: impl Into<Arc<Set>>) {
        let elements = elements.into();
        if !elements.elements.is_empty() {
            self.push(TransactionOp::DeleteElements(name.clone(), elements));
        }
    }
}

/// A description for errors and logs, which counts elements and rules instead of listing them.
impl fmt::Display for TransactionOp {
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
                write!(
                    f,
                    "add {} rule(s) to chain {name}",
                    chain.rules.len() - from
                )
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
