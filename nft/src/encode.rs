//! Encoding of transactions: one nfnetlink batch, one buffer, one `send`.

use crate::constants::*;
use crate::ruleset::{Base, Chain, ChainName, ChainPolicy, ChainType, Hook, TableName};
use crate::set::SetKind;
use crate::transaction::{Transaction, TransactionOp};
use margay_netlink::wire::{Header, Writer};

mod rule;
mod set;

pub(crate) use set::{data_length, field_width, nft_type};

/// Buffer memory kept for the next batch. A full rewrite of a large table takes many megabytes, but
/// only once.
const KEPT: usize = 1 << 20;

/// The messages of a transaction, and the operation that each came from.
#[derive(Debug, Default)]
pub struct Batch {
    writer: Writer,
    /// Sequence number of `NFNL_MSG_BATCH_BEGIN`; the others follow without a gap.
    first: u32,
    /// Origin of each message between the begin and end messages; `None` for the one that asks for
    /// the generation.
    origins: Vec<Option<Origin>>,
    last_message: usize,
    next_set_id: u32,
}

/// The operation that a message came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Index of the operation in its transaction.
    pub op: usize,
    /// Index of the rule in its chain, for an operation with several rules.
    pub rule: Option<usize>,
}

impl Batch {
    /// Encodes a transaction, numbering its messages from `first` on.
    pub fn encode(&mut self, transaction: &Transaction, first: u32) {
        self.writer.reset(KEPT);
        self.origins.clear();
        self.first = first;
        self.next_set_id = 0;
        self.put_batch_message(NFNL_MSG_BATCH_BEGIN, first);
        // The kernel answers `NLM_F_ECHO` with the generation that the commit made. Creating a
        // table that exists changes nothing and is echoed in no other way, so this message costs
        // one reply.
        self.put_message(NFT_MSG_NEWTABLE, NLM_F_CREATE | NLM_F_ECHO, None, |w| {
            w.put_str(NFTA_TABLE_NAME, transaction.table().as_str());
        });
        for (index, op) in transaction.ops().iter().enumerate() {
            self.put_op(transaction.table(), op, index);
        }
        // Only the last operation asks for an acknowledgement; the kernel reports errors of the
        // others unasked.
        self.writer.add_flags(self.last_message, NLM_F_ACK);
        self.put_batch_message(NFNL_MSG_BATCH_END, self.last_sequence().wrapping_add(1));
    }

    /// The encoded batch.
    pub fn bytes(&self) -> &[u8] {
        self.writer.bytes()
    }

    /// Sequence number of the last operation, which is acknowledged.
    pub fn last_sequence(&self) -> u32 {
        self.first.wrapping_add(self.origins.len() as u32)
    }

    /// Number of messages, begin and end included.
    pub fn sequence_count(&self) -> u32 {
        self.origins.len() as u32 + 2
    }

    /// Whether a reply with this sequence number belongs to this batch.
    pub fn contains(&self, sequence: u32) -> bool {
        sequence.wrapping_sub(self.first) < self.sequence_count()
    }

    /// The operation that the message with this sequence number came from; `None` if it came from
    /// none.
    pub fn origin(&self, sequence: u32) -> Option<Origin> {
        let index = sequence.wrapping_sub(self.first).checked_sub(1)?;
        self.origins.get(index as usize).copied().flatten()
    }

    fn put_batch_message(&mut self, kind: u16, sequence: u32) {
        let header = Header {
            kind,
            flags: NLM_F_REQUEST,
            sequence,
        };
        self.writer
            .put_message(header, 0, NFNL_SUBSYS_NFTABLES, |_| {});
    }

    /// Appends one nf_tables message.
    fn put_message(
        &mut self,
        kind: u16,
        flags: u16,
        origin: impl Into<Option<Origin>>,
        body: impl FnOnce(&mut Writer),
    ) {
        self.last_message = self.writer.bytes().len();
        self.origins.push(origin.into());
        let header = Header {
            kind: NFNL_SUBSYS_NFTABLES << 8 | kind,
            flags: NLM_F_REQUEST | flags,
            sequence: self.last_sequence(),
        };
        self.writer.put_message(header, NFPROTO_INET, 0, body);
    }

    fn put_op(&mut self, table: &TableName, op: &TransactionOp, index: usize) {
        let origin = Origin {
            op: index,
            rule: None,
        };
        match op {
            TransactionOp::CreateTable => {
                self.put_message(NFT_MSG_NEWTABLE, NLM_F_CREATE, origin, |w| {
                    w.put_str(NFTA_TABLE_NAME, table.as_str());
                })
            }
            TransactionOp::DeleteTable => self.put_message(NFT_MSG_DELTABLE, 0, origin, |w| {
                w.put_str(NFTA_TABLE_NAME, table.as_str());
            }),
            TransactionOp::PutChain(name, base) => {
                self.put_message(NFT_MSG_NEWCHAIN, NLM_F_CREATE, origin, |w| {
                    w.put_str(NFTA_CHAIN_TABLE, table.as_str());
                    w.put_str(NFTA_CHAIN_NAME, name.as_str());
                    base.iter().for_each(|base| put_base(w, base));
                })
            }
            TransactionOp::FlushChain(name) => self.put_message(NFT_MSG_DELRULE, 0, origin, |w| {
                w.put_str(NFTA_RULE_TABLE, table.as_str());
                w.put_str(NFTA_RULE_CHAIN, name.as_str());
            }),
            TransactionOp::DeleteChain(name) => {
                self.put_message(NFT_MSG_DELCHAIN, 0, origin, |w| {
                    w.put_str(NFTA_CHAIN_TABLE, table.as_str());
                    w.put_str(NFTA_CHAIN_NAME, name.as_str());
                })
            }
            TransactionOp::CreateSet(name, kind) => {
                self.put_set_creation(table, name.as_str(), kind, origin)
            }
            TransactionOp::DeleteSet(name) => self.put_message(NFT_MSG_DELSET, 0, origin, |w| {
                w.put_str(NFTA_SET_TABLE, table.as_str());
                w.put_str(NFTA_SET_NAME, name.as_str());
            }),
            TransactionOp::AddElements(name, set) => {
                let list = set::ElementList {
                    table,
                    name: name.as_str(),
                    id: None,
                };
                self.put_elements(NFT_MSG_NEWSETELEM, list, set, origin);
            }
            TransactionOp::DeleteElements(name, set) => {
                let list = set::ElementList {
                    table,
                    name: name.as_str(),
                    id: None,
                };
                self.put_elements(NFT_MSG_DELSETELEM, list, set, origin);
            }
            TransactionOp::AppendRules(name, chain, from) => {
                self.put_rules(table, name, chain, *from, index)
            }
        }
    }

    fn put_set_creation(&mut self, table: &TableName, name: &str, kind: &SetKind, origin: Origin) {
        let id = self.take_set_id();
        self.put_message(NFT_MSG_NEWSET, NLM_F_CREATE, origin, |w| {
            set::put_set_attributes(
                w,
                table,
                set::SetCreation {
                    name,
                    kind,
                    id,
                    extra_flags: 0,
                    size: None,
                },
            );
        });
    }

    fn take_set_id(&mut self) -> u32 {
        self.next_set_id += 1;
        self.next_set_id
    }

    fn put_rules(
        &mut self,
        table: &TableName,
        name: &ChainName,
        chain: &Chain,
        from: usize,
        op: usize,
    ) {
        for (index, rule) in chain.rules.iter().enumerate().skip(from) {
            let origin = Origin {
                op,
                rule: Some(index),
            };
            let ids = self.put_anonymous_sets(table, rule, origin);
            self.put_message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, origin, |w| {
                w.put_str(NFTA_RULE_TABLE, table.as_str());
                w.put_str(NFTA_RULE_CHAIN, name.as_str());
                w.nest(NFTA_RULE_EXPRESSIONS, |w| {
                    rule::put_expressions(w, rule, &ids)
                });
                w.put(NFTA_RULE_USERDATA, &comment_record(&rule.comment()));
            });
        }
    }
}

/// A comment as a libnftnl user data record: type, length, text and a zero byte.
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
    w.put_u32(
        NFTA_CHAIN_POLICY,
        (base.policy == ChainPolicy::Accept).into(),
    );
    w.put_str(NFTA_CHAIN_TYPE, chain_type_name(base.kind));
}

pub(crate) const fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

pub(crate) const fn chain_type_name(kind: ChainType) -> &'static str {
    match kind {
        ChainType::Filter => "filter",
        ChainType::Nat => "nat",
        ChainType::Route => "route",
    }
}
