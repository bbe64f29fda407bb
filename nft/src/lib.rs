//! Typed nftables over netlink: one table of family `inet` as a plain value, and the transactions that change it.
//!
//! A [`Ruleset`] prints as the text that `nft list table` shows ([`Ruleset::to_string`]), and two of them become the
//! one [`Transaction`] that leads from the first to the second ([`diff`]). [`Socket::exec`] carries it out whole or
//! not at all, [`Socket::list`] reads the table back, and [`Monitor`] reports what other programs do to it.
//!
//! No program is started and no foreign table is read. Everything that can change often belongs into sets and maps:
//! a set element costs microseconds, a new jump or verdict makes the kernel validate everything it can reach.
#![doc = include_str!("../README.md")]

// `rule`, `ruleset` and `set` are one recursive type: a rule holds sets, a map holds verdicts, a ruleset both. No other
// modules use each other both ways.
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

pub use check::Fault;
pub use diff::diff;
pub use exec::{ExecError, Generation, Socket};
pub use monitor::{Change, Event, Monitor, Silence, Touched};
pub use present::{Drift, Present, PresentChain};
pub use rule::{
    AddressType, Limit, Log, LogTarget, MarkSet, Masquerade, Match, Nat, NatTarget, NatType, Op, RateUnit, Reject,
    Rule, Selector, SetRef, Side, Statement, Transport, Verdict,
};
pub use ruleset::{Base, Chain, ChainName, ChainType, Hook, NameError, Policy, Ruleset, SetName, TableName};
pub use set::{CtState, Datum, Family, Field, FieldType, IfName, Key, Proto, Set, SetKind, Value, ValueType};
pub use transaction::{Op as TransactionOp, Transaction};

#[cfg(test)]
mod tests;
