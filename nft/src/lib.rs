#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! In reading order: `ruleset`, `rule` and `set` (the value), `text` (the value as nft prints it), `check`, `diff` and
//! `transaction` (from one value to another), `encode` and `exec` (to the kernel), `listing` and `monitor` (from the
//! kernel).

mod check;
mod constants;
mod diff;
mod encode;
mod exec;
mod listing;
mod monitor;
mod rule;
mod ruleset;
mod set;
mod text;
mod transaction;

pub use check::CheckError;
pub use diff::diff;
pub use exec::{ExecError, Generation, NftSocket};
pub use listing::{Drift, ListedChain, TableListing};
pub use monitor::{ChangedObject, ForeignCommit, Monitor, MonitorEvent, MonitorPause};
pub use rule::{
    AddressType, CmpOp, Limit, Log, LogTarget, MarkSet, Masquerade, Match, Nat, NatTarget, NatType, RateUnit, Reject,
    Rule, Selector, SetRef, Side, Statement, Transport, Verdict,
};
pub use ruleset::{Base, Chain, ChainName, ChainPolicy, ChainType, Hook, NameError, Ruleset, SetName, TableName};
pub use set::{CtState, Datum, Family, Field, FieldType, IfName, Key, Proto, Set, SetKind, Value, ValueType};
pub use transaction::{Transaction, TransactionOp};

#[cfg(test)]
mod tests;
