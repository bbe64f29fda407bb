//! A transaction as netlink messages: one batch, one buffer, one send.

use super::constants::*;
use super::ruleset::{Base, Chain, ChainName, ChainType, Hook, Policy, TableName};
use super::set::SetKind;
use super::transaction::{Op, Transaction};
use margay_netlink::wire::{Header, Writer};

mod rule;
mod set;

pub(super) use set::{data_length, field_width, nft_type};

/// Memory kept for the next batch; a full rewrite of a large table needs megabytes once.
const KEPT: usize = 1 << 20;

/// The messages of one transaction, and where each came from.
#[derive(Debug, Default)]
pub struct Batch {
    writer: Writer,
    /// Sequence number of the opening message; the others follow without a gap.
    first: u32,
    /// Where each message between the opening and the closing one came from; `None` for that which asks for the
    /// generation.
    origins: Vec<Option<Origin>>,
    last_message: usize,
    next_set_id: u32,
}

/// Where a message came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Index of the operation in its transaction.
    pub op: usize,
    /// Index of the rule in its chain, for operations with several.
    pub rule: Option<usize>,
}

impl Batch {
    /// Encodes the transaction, whose messages get the sequence numbers from `first` on.
    pub fn encode(&mut self, transaction: &Transaction, first: u32) {
        self.writer.reset(KEPT);
        self.origins.clear();
        self.first = first;
        self.next_set_id = 0;
        self.frame(NFNL_MSG_BATCH_BEGIN, first);
        // The kernel answers an echo flag on the first message with the generation that the commit made. The message
        // itself changes nothing when the table is there, and then has no other echo.
        self.message(NFT_MSG_NEWTABLE, NLM_F_CREATE | NLM_F_ECHO, None, |w| {
            w.put_str(NFTA_TABLE_NAME, transaction.table().as_str());
        });
        for (index, op) in transaction.ops().iter().enumerate() {
            self.op(transaction.table(), op, index);
        }
        self.writer.add_flags(self.last_message, NLM_F_ACK);
        self.frame(NFNL_MSG_BATCH_END, self.last_sequence().wrapping_add(1));
    }

    /// The bytes to send.
    pub fn bytes(&self) -> &[u8] {
        self.writer.bytes()
    }

    /// Sequence number of the last operation, the one that is acknowledged.
    pub fn last_sequence(&self) -> u32 {
        self.first.wrapping_add(self.origins.len() as u32)
    }

    /// Number of sequence numbers used.
    pub fn sequences(&self) -> u32 {
        self.origins.len() as u32 + 2
    }

    /// Whether a reply with this number belongs to this batch.
    pub fn holds(&self, sequence: u32) -> bool {
        sequence.wrapping_sub(self.first) < self.sequences()
    }

    /// Where the message with this number came from; `None` for those that belong to
    /// none of the operations.
    pub fn origin(&self, sequence: u32) -> Option<Origin> {
        let index = sequence.wrapping_sub(self.first).checked_sub(1)?;
        self.origins.get(index as usize).copied().flatten()
    }

    fn frame(&mut self, kind: u16, sequence: u32) {
        let header = Header { kind, flags: NLM_F_REQUEST, sequence };
        self.writer.message(header, 0, NFNL_SUBSYS_NFTABLES, |_| {});
    }

    /// Adds one message about our table.
    fn message(&mut self, kind: u16, flags: u16, origin: impl Into<Option<Origin>>, body: impl FnOnce(&mut Writer)) {
        self.last_message = self.writer.bytes().len();
        self.origins.push(origin.into());
        let header = Header {
            kind: NFNL_SUBSYS_NFTABLES << 8 | kind,
            flags: NLM_F_REQUEST | flags,
            sequence: self.last_sequence(),
        };
        self.writer.message(header, NFPROTO_INET, 0, body);
    }

    fn op(&mut self, table: &TableName, op: &Op, index: usize) {
        let origin = Origin { op: index, rule: None };
        match op {
            Op::CreateTable => self.message(NFT_MSG_NEWTABLE, NLM_F_CREATE, origin, |w| {
                w.put_str(NFTA_TABLE_NAME, table.as_str());
            }),
            Op::DeleteTable => self.message(NFT_MSG_DELTABLE, 0, origin, |w| {
                w.put_str(NFTA_TABLE_NAME, table.as_str());
            }),
            Op::PutChain(name, base) => self.message(NFT_MSG_NEWCHAIN, NLM_F_CREATE, origin, |w| {
                w.put_str(NFTA_CHAIN_TABLE, table.as_str());
                w.put_str(NFTA_CHAIN_NAME, name.as_str());
                base.iter().for_each(|base| put_base(w, base));
            }),
            Op::FlushChain(name) => self.message(NFT_MSG_DELRULE, 0, origin, |w| {
                w.put_str(NFTA_RULE_TABLE, table.as_str());
                w.put_str(NFTA_RULE_CHAIN, name.as_str());
            }),
            Op::DeleteChain(name) => self.message(NFT_MSG_DELCHAIN, 0, origin, |w| {
                w.put_str(NFTA_CHAIN_TABLE, table.as_str());
                w.put_str(NFTA_CHAIN_NAME, name.as_str());
            }),
            Op::CreateSet(name, kind) => self.create_set(table, name.as_str(), kind, origin),
            Op::DeleteSet(name) => self.message(NFT_MSG_DELSET, 0, origin, |w| {
                w.put_str(NFTA_SET_TABLE, table.as_str());
                w.put_str(NFTA_SET_NAME, name.as_str());
            }),
            Op::AddElements(name, set) => {
                let list = set::List { table, name: name.as_str(), id: None };
                self.elements(NFT_MSG_NEWSETELEM, list, set, origin);
            }
            Op::DeleteElements(name, set) => {
                let list = set::List { table, name: name.as_str(), id: None };
                self.elements(NFT_MSG_DELSETELEM, list, set, origin);
            }
            Op::AppendRules(name, chain, from) => self.rules(table, name, chain, *from, index),
        }
    }

    fn create_set(&mut self, table: &TableName, name: &str, kind: &SetKind, origin: Origin) {
        let id = self.new_set_id();
        self.message(NFT_MSG_NEWSET, NLM_F_CREATE, origin, |w| {
            set::put_set(w, table, set::Creation { name, kind, id, extra_flags: 0, size: None });
        });
    }

    fn new_set_id(&mut self) -> u32 {
        self.next_set_id += 1;
        self.next_set_id
    }

    fn rules(&mut self, table: &TableName, name: &ChainName, chain: &Chain, from: usize, op: usize) {
        for (index, rule) in chain.rules.iter().enumerate().skip(from) {
            let origin = Origin { op, rule: Some(index) };
            let ids = self.anonymous_sets(table, rule, origin);
            self.message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, origin, |w| {
                w.put_str(NFTA_RULE_TABLE, table.as_str());
                w.put_str(NFTA_RULE_CHAIN, name.as_str());
                w.nest(NFTA_RULE_EXPRESSIONS, |w| rule::put_expressions(w, rule, &ids));
                w.put(NFTA_RULE_USERDATA, &comment_record(&rule.comment()));
            });
        }
    }
}

/// A comment in the form in which nft keeps it: type, length, text, zero.
fn comment_record(comment: &str) -> Vec<u8> {
    let length = u8::try_from(comment.len() + 1).expect("a fingerprint has 16 digits");
    let mut record = vec![UDATA_RULE_COMMENT, length];
    record.extend_from_slice(comment.as_bytes());
    record.push(0);
    record
}

fn put_base(w: &mut Writer, base: &Base) {
    w.nest(NFTA_CHAIN_HOOK, |w| {
        w.put_u32(NFTA_HOOK_HOOKNUM, hook_number(base.hook));
        w.put(NFTA_HOOK_PRIORITY, &base.priority.to_be_bytes());
    });
    w.put_u32(NFTA_CHAIN_POLICY, (base.policy == Policy::Accept).into());
    w.put_str(NFTA_CHAIN_TYPE, chain_type_name(base.kind));
}

pub(super) const fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

pub(super) const fn chain_type_name(kind: ChainType) -> &'static str {
    match kind {
        ChainType::Filter => "filter",
        ChainType::Nat => "nat",
        ChainType::Route => "route",
    }
}
