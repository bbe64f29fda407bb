#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! In reading order: `ruleset`, `rule` and `set` (the value), `text` (the value as nft prints it),
//! `check`, `diff` and `transaction` (from one value to another), `encode` and `exec` (to the
//! kernel), `listing`, `present` and `monitor` (from the kernel).

// `rule`, `ruleset` and `set` are one recursive type: a rule holds sets, a map holds verdicts, a
// ruleset both. No other modules use each other both ways.
mod check;
mod constants;
mod diff;
mod encode;
mod exec;
mod listing;
mod monitor;
mod present;
mod rule;
mod ruleset;
mod set;
mod text;
mod transaction;

pub use check::CheckError;
pub use diff::diff;
pub use exec::{ExecError, Generation, NftSocket};
pub use monitor::{ChangedObject, ForeignCommit, Monitor, MonitorEvent, MonitorPause};
pub use present::{Drift, ListedChain, TableListing};
pub use rule::{
    AddressType, CmpOp, Limit, Log, LogTarget, MarkSet, Masquerade, Match, Nat, NatTarget, NatType,
    RateUnit, Reject, Rule, Selector, SetRef, Side, Statement, Transport, Verdict,
};
pub use ruleset::{
    Base, Chain, ChainName, ChainPolicy, ChainType, Hook, NameError, Ruleset, SetName, TableName,
};
pub use set::{
    CtState, Datum, Family, Field, FieldType, IfName, Key, Proto, Set, SetKind, Value, ValueType,
};
pub use transaction::{Transaction, TransactionOp};

#[cfg(test)]
mod tests;
