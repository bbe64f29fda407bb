//! IP sets: what each holds, how often each member is held, and what changed since the last flush.
//!
//! A set exists while some policy mentions it; it is *live*, that is it has members, while such a policy is in force on a node. A set
//! that is not needed any more stays live until the next flush, so that coming back costs nothing and shows nothing.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use margay_api::rule::Protocol;

use crate::counts::{Counts, transition};
use crate::digest;
use crate::flush::{Change, Flush, MemberDelta};
use crate::model::{IpSetRecord, Member, Record, RecordId, SetId, SetKind};
use crate::store::{Map, Slab};
use crate::texts::{Marks, Text, Texts};

/// What a set holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Spec {
    /// Addresses of the endpoints and ranges of the network sets that the selector selects.
    Selected(u32),
    /// Address, protocol and port of the selected endpoints that declare a port of a name of this list of [`crate::port_names`]; of any protocol when it
    /// is absent.
    NamedPorts(u32, Option<Protocol>, Text),
    /// Addresses of the nodes that the selector of this canonical text selects.
    Nodes(Text),
    /// Address, protocol and port of the backends of a Service.
    Service(Text, Text),
    /// Addresses of the backends of a Service: what a packet that comes from one carries.
    ServiceAddresses(Text, Text),
}

impl Spec {
    /// The selector that it depends on.
    pub(crate) fn selector(self) -> Option<u32> {
        match self {
            Self::Selected(selector) | Self::NamedPorts(selector, ..) => Some(selector),
            Self::Nodes(_) | Self::Service(..) | Self::ServiceAddresses(..) => None,
        }
    }

    /// The kind of its members.
    pub(crate) fn kind(self) -> SetKind {
        match self {
            Self::Selected(_) | Self::Nodes(_) | Self::ServiceAddresses(..) => SetKind::Net,
            Self::NamedPorts(..) | Self::Service(..) => SetKind::AddressPort,
        }
    }
}

#[derive(Debug)]
struct Set {
    id: Text,
    spec: Spec,
    /// Policies that mention it.
    mentions: u32,
    /// Per node, the policies in force that refer to it.
    nodes: Counts,
    live: Option<Box<Live>>,
}

#[derive(Debug)]
struct Live {
    /// Always [`Record::IpSet`]: kept as it is asked for.
    record: Record,
    /// How much more often than once a member is held.
    extra: BTreeMap<Member, u32>,
    digest: u64,
    /// Against what was told; empty while nobody was.
    delta: MemberDelta,
    /// Who was told; none: it did not exist.
    told: Option<Box<[Text]>>,
}

/// All sets.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    sets: Slab<Set>,
    by_spec: Map<Spec, u32>,
    by_id: Map<Text, u32>,
    dirty: BTreeSet<u32>,
}

impl Sets {
    /// The set of this content, mentioned once more. `id` makes its id if it is new; true says that it is.
    pub(crate) fn mention(&mut self, spec: Spec, id: impl FnOnce() -> Text) -> (u32, bool) {
        if let Some(known) = self.by_spec.get(&spec) {
            self.sets[*known].mentions += 1;
            return (*known, false);
        }
        let id = id();
        let set = self.sets.insert(Set { id, spec, mentions: 1, nodes: Counts::default(), live: None });
        self.by_spec.insert(spec, set);
        self.by_id.insert(id, set);
        (set, true)
    }

    /// One mention less.
    pub(crate) fn unmention(&mut self, set: u32) {
        self.sets[set].mentions -= 1;
        self.dirty.insert(set);
    }

    pub(crate) fn spec(&self, set: u32) -> Spec {
        self.sets[set].spec
    }

    pub(crate) fn id(&self, set: u32) -> Text {
        self.sets[set].id
    }

    /// Sets whose record exists, in no order.
    pub(crate) fn ids(&self) -> impl Iterator<Item = Text> {
        let sets = self.sets.iter().map(|(_, set)| set);
        sets.filter(|set| set.live.as_ref().is_some_and(|live| live.told.is_some())).map(|set| set.id)
    }

    /// One more policy that refers to it is in force on the node. True if the set must now be filled.
    pub(crate) fn need(&mut self, set: u32, node: Text) -> bool {
        let entry = &mut self.sets[set];
        if entry.nodes.add(node) {
            self.dirty.insert(set);
        }
        entry.live.is_none()
    }

    /// One policy less.
    pub(crate) fn release(&mut self, set: u32, node: Text) {
        if self.sets[set].nodes.remove(node) {
            self.dirty.insert(set);
        }
    }

    /// The set becomes live, with these members; a member is there once for each reason.
    pub(crate) fn enliven(&mut self, set: u32, mut members: Vec<Member>, texts: &Texts) {
        let entry = &mut self.sets[set];
        let kind = entry.spec.kind();
        let id = SetId(texts.get(entry.id).to_owned());
        members.sort_unstable();
        let mut extra = BTreeMap::new();
        members.dedup_by(|again, member| {
            let is_again = again == member;
            if is_again {
                *extra.entry(member.clone()).or_default() += 1;
            }
            is_again
        });
        let digests = members.iter().map(digest::member);
        let digest = digests.fold(digest::empty_set(&id, kind), u64::wrapping_add);
        entry.live = Some(Box::new(Live {
            record: Record::IpSet(IpSetRecord { kind, members: members.into_iter().collect() }),
            extra,
            digest,
            delta: MemberDelta::default(),
            told: None,
        }));
        self.dirty.insert(set);
    }

    /// One more reason for a member.
    pub(crate) fn add(&mut self, set: u32, member: Member) {
        if let Some(live) = &mut self.sets[set].live
            && live.add(member)
        {
            self.dirty.insert(set);
        }
    }

    /// One reason less.
    pub(crate) fn remove(&mut self, set: u32, member: Member) {
        if let Some(live) = &mut self.sets[set].live
            && live.remove(member)
        {
            self.dirty.insert(set);
        }
    }

    /// Puts what changed into the flush. Answers with the sets that are not live any more, and those that are gone altogether.
    pub(crate) fn flush(&mut self, flush: &mut Flush, texts: &Texts) -> (Vec<(u32, Spec)>, Vec<Spec>) {
        let (mut retired, mut gone) = (Vec::new(), Vec::new());
        for set in std::mem::take(&mut self.dirty) {
            let entry = &mut self.sets[set];
            if let Some(live) = &mut entry.live {
                let was = live.told.as_deref().unwrap_or_default();
                let is: Box<[Text]> = entry.nodes.nodes().collect();
                let delta = std::mem::take(&mut live.delta);
                let change = match delta.added.is_empty() && delta.removed.is_empty() {
                    true => Change::Same,
                    false => Change::Members(delta),
                };
                if let Some(change) = transition(was, &is, change, texts) {
                    flush.records.insert(RecordId::IpSet(SetId(texts.get(entry.id).to_owned())), change);
                }
                live.told = Some(is);
                if entry.nodes.is_empty() {
                    entry.live = None;
                    retired.push((set, entry.spec));
                }
            }
            if entry.mentions == 0 {
                self.by_spec.remove(&entry.spec);
                self.by_id.remove(&entry.id);
                gone.push(entry.spec);
                self.sets.remove(set);
            }
        }
        (retired, gone)
    }

    /// What the set of this id holds.
    pub(crate) fn find(&self, id: Text) -> Option<Spec> {
        Some(self.sets[*self.by_id.get(&id)?].spec)
    }

    /// The record of a live set.
    pub(crate) fn record(&self, id: Text) -> Option<&Record> {
        Some(&self.live(id)?.record)
    }

    pub(crate) fn digest(&self, id: Text) -> Option<u64> {
        Some(self.live(id)?.digest)
    }

    pub(crate) fn nodes(&self, id: Text) -> Option<&Counts> {
        Some(&self.sets[*self.by_id.get(&id)?].nodes)
    }

    /// Marks every text that is kept here.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for (_, set) in self.sets.iter() {
            marks.mark(set.id);
            marks.all(set.nodes.nodes());
            marks.all(set.live.iter().flat_map(|live| live.told.iter().flatten().copied()));
            match set.spec {
                Spec::Selected(_) => {}
                Spec::NamedPorts(_, _, text) | Spec::Nodes(text) => marks.mark(text),
                Spec::Service(namespace, name) | Spec::ServiceAddresses(namespace, name) => {
                    marks.all([namespace, name])
                }
            }
        }
    }

    fn live(&self, id: Text) -> Option<&Live> {
        self.sets[*self.by_id.get(&id)?].live.as_deref()
    }
}

impl Live {
    fn members(&mut self) -> &mut BTreeSet<Member> {
        match &mut self.record {
            Record::IpSet(set) => &mut set.members,
            _ => unreachable!("a set's record is a set"),
        }
    }

    /// True if the member is new.
    fn add(&mut self, member: Member) -> bool {
        if !self.members().insert(member.clone()) {
            *self.extra.entry(member).or_default() += 1;
            return false;
        }
        self.digest = self.digest.wrapping_add(digest::member(&member));
        if self.told.is_some() && !self.delta.removed.remove(&member) {
            self.delta.added.insert(member);
        }
        true
    }

    /// True if the member is gone.
    fn remove(&mut self, member: Member) -> bool {
        if let Some(extra) = self.extra.get_mut(&member) {
            *extra -= 1;
            if *extra == 0 {
                self.extra.remove(&member);
            }
            return false;
        }
        if !self.members().remove(&member) {
            return false;
        }
        self.digest = self.digest.wrapping_sub(digest::member(&member));
        if self.told.is_some() && !self.delta.added.remove(&member) {
            self.delta.removed.insert(member);
        }
        true
    }
}

/// A whole address as a member.
pub(crate) fn address(address: std::net::IpAddr) -> Member {
    Member::Net(IpNet::from(address))
}
