//! IP sets: members with their reference counts, and the changes since the last flush.
//!
//! A set exists while some policy mentions it. It is *live*, which means that its members are
//! maintained, while such a policy is in force on a node. A set that is no longer needed stays live
//! until the next flush, so releasing and acquiring it in one batch costs nothing and sends
//! nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use ipnet::{IpNet, Ipv4Net};
use margay_api::rule::Protocol;

use crate::digest;
use crate::flush::{Change, Flush, MemberDelta, NodeSet};
use crate::interner::{Interner, Marks, Symbol};
use crate::model::{IpSetRecord, Member, Record, RecordId, SetId, SetKind};
use crate::refcount::{RefCounts, change_for_kept, transition};
use crate::store::{Map, Slab};

/// Content of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SetSpec {
    /// Addresses of the endpoints and ranges of the network sets that the selector selects.
    Selected(u32),
    /// Address, protocol and port of the selected endpoints that declare a port with a name of this
    /// list of [`crate::port_names`]; `None`: of any protocol.
    NamedPorts(u32, Option<Protocol>, Symbol),
    /// Addresses of the nodes that the selector with this canonical text matches.
    Nodes(Symbol),
    /// Address, protocol and port of the backends of a Service.
    Service(Symbol, Symbol),
    /// Addresses of the backends of a Service: the source of packets that come from one.
    ServiceAddresses(Symbol, Symbol),
}

impl SetSpec {
    /// Handle of the selector that it depends on.
    pub(crate) fn selector(self) -> Option<u32> {
        match self {
            Self::Selected(selector) | Self::NamedPorts(selector, ..) => Some(selector),
            Self::Nodes(_) | Self::Service(..) | Self::ServiceAddresses(..) => None,
        }
    }

    /// Kind of the members.
    pub(crate) fn kind(self) -> SetKind {
        match self {
            Self::Selected(_) | Self::Nodes(_) | Self::ServiceAddresses(..) => SetKind::Net,
            Self::NamedPorts(..) | Self::Service(..) => SetKind::AddressPort,
        }
    }
}

#[derive(Debug)]
struct Set {
    id: Symbol,
    spec: SetSpec,
    /// Number of policies that refer to it.
    mentions: u32,
    /// Per node, the number of policies in force that refer to it.
    nodes: RefCounts,
    live: Option<Box<Live>>,
}

#[derive(Debug)]
struct Live {
    /// Always [`Record::IpSet`]: stored in the form in which it is returned.
    record: Record,
    /// Per member that is contributed more than once, the number of further contributions.
    extra: BTreeMap<Member, u32>,
    /// Computed when somebody asks for it first: nobody waits for the hash of a hundred thousand
    /// members when a policy is written.
    digest: OnceLock<u64>,
    /// Relative to what was last flushed; empty while nothing was.
    delta: MemberDelta,
    /// Nodes that held it at the last flush; `None`: it did not exist.
    sent: Option<Box<[Symbol]>>,
}

/// All sets.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    sets: Slab<Set>,
    by_spec: Map<SetSpec, u32>,
    by_id: Map<Symbol, u32>,
    dirty: BTreeSet<u32>,
    audiences: Audiences,
}

/// Audiences of sets with many nodes whose members changed recently and whose nodes did not.
/// Sorting the names of five thousand nodes for each change would cost more than all else about it.
#[derive(Debug, Default)]
struct Audiences(BTreeMap<u32, NodeSet>);

impl Audiences {
    /// Number of nodes from which on an audience is kept.
    const MANY: usize = 32;
    /// Maximal number of audiences.
    const MOST: usize = 64;

    /// Audience of a set, whose nodes are those of the last call unless it was removed since.
    fn get(&mut self, set: u32, nodes: &[Symbol], interner: &Interner) -> NodeSet {
        if let Some(known) = self.0.get(&set) {
            return known.clone();
        }
        let audience: NodeSet = nodes.iter().map(|node| interner.share(*node)).collect();
        if nodes.len() >= Self::MANY {
            if self.0.len() >= Self::MOST {
                self.0.clear();
            }
            self.0.insert(set, audience.clone());
        }
        audience
    }

    fn remove(&mut self, set: u32) {
        self.0.remove(&set);
    }
}

impl Sets {
    /// Takes a reference to the set with this content, creating it with an id from `id`. Returns
    /// its handle, and true if it is new.
    pub(crate) fn mention(&mut self, spec: SetSpec, id: impl FnOnce() -> Symbol) -> (u32, bool) {
        if let Some(known) = self.by_spec.get(&spec) {
            self.sets[*known].mentions += 1;
            return (*known, false);
        }
        let id = id();
        let set = self.sets.insert(Set {
            id,
            spec,
            mentions: 1,
            nodes: RefCounts::default(),
            live: None,
        });
        self.by_spec.insert(spec, set);
        self.by_id.insert(id, set);
        (set, true)
    }

    /// Drops a reference.
    pub(crate) fn unmention(&mut self, set: u32) {
        self.sets[set].mentions -= 1;
        self.dirty.insert(set);
    }

    pub(crate) fn spec(&self, set: u32) -> SetSpec {
        self.sets[set].spec
    }

    pub(crate) fn id(&self, set: u32) -> Symbol {
        self.sets[set].id
    }

    /// Sets whose record exists, in no order.
    pub(crate) fn ids(&self) -> impl Iterator<Item = Symbol> {
        let sets = self.sets.iter().map(|(_, set)| set);
        sets.filter(|set| set.live.as_ref().is_some_and(|live| live.sent.is_some()))
            .map(|set| set.id)
    }

    /// Counts one more policy in force on the node. Returns true if the set must now be made live.
    pub(crate) fn need(&mut self, set: u32, node: Symbol) -> bool {
        let entry = &mut self.sets[set];
        if entry.nodes.add(node) {
            self.dirty.insert(set);
        }
        entry.live.is_none()
    }

    /// Counts one policy less in force on the node.
    pub(crate) fn release(&mut self, set: u32, node: Symbol) {
        if self.sets[set].nodes.remove(node) {
            self.dirty.insert(set);
        }
    }

    /// Makes the set live with these members; one that is contributed several times occurs as
    /// often.
    pub(crate) fn activate(&mut self, set: u32, mut members: Vec<Member>) {
        let entry = &mut self.sets[set];
        let kind = entry.spec.kind();
        sort(&mut members);
        let mut extra = BTreeMap::new();
        members.dedup_by(|again, member| {
            let is_again = again == member;
            if is_again {
                *extra.entry(member.clone()).or_default() += 1;
            }
            is_again
        });
        entry.live = Some(Box::new(Live {
            record: Record::IpSet(IpSetRecord {
                kind,
                members: members.into_iter().collect(),
            }),
            extra,
            digest: OnceLock::new(),
            delta: MemberDelta::default(),
            sent: None,
        }));
        self.dirty.insert(set);
    }

    /// Counts one more contribution of a member.
    pub(crate) fn add(&mut self, set: u32, member: Member) {
        if let Some(live) = &mut self.sets[set].live
            && live.add(member)
        {
            self.dirty.insert(set);
        }
    }

    /// Counts one contribution less.
    pub(crate) fn remove(&mut self, set: u32, member: Member) {
        if let Some(live) = &mut self.sets[set].live
            && live.remove(member)
        {
            self.dirty.insert(set);
        }
    }

    /// Adds what changed to the flush. Returns the sets that are not live any more, and the content
    /// of those that were freed.
    pub(crate) fn flush(
        &mut self,
        flush: &mut Flush,
        interner: &Interner,
    ) -> (Vec<(u32, SetSpec)>, Vec<SetSpec>) {
        let (mut deactivated, mut gone) = (Vec::new(), Vec::new());
        for set in std::mem::take(&mut self.dirty) {
            let entry = &mut self.sets[set];
            if let Some(live) = &mut entry.live {
                let was = live.sent.as_deref().unwrap_or_default();
                let delta = std::mem::take(&mut live.delta);
                let change = match delta.added.is_empty() && delta.removed.is_empty() {
                    true => Change::Same,
                    false => Change::Members(delta),
                };
                let change = if !was.is_empty() && entry.nodes.nodes().eq(was.iter().copied()) {
                    let is_changed = change != Change::Same;
                    is_changed
                        .then(|| change_for_kept(self.audiences.get(set, was, interner), change))
                } else {
                    self.audiences.remove(set);
                    let is: Box<[Symbol]> = entry.nodes.nodes().collect();
                    let change = transition(was, &is, change, interner);
                    live.sent = Some(is);
                    change
                };
                if let Some(change) = change {
                    flush.records.insert(
                        RecordId::IpSet(SetId(interner.get(entry.id).to_owned())),
                        change,
                    );
                }
                // Only after its removal is in the flush.
                if entry.nodes.is_empty() {
                    entry.live = None;
                    deactivated.push((set, entry.spec));
                }
            }
            if entry.mentions == 0 {
                self.by_spec.remove(&entry.spec);
                self.by_id.remove(&entry.id);
                gone.push(entry.spec);
                self.audiences.remove(set);
                self.sets.remove(set);
            }
        }
        (deactivated, gone)
    }

    /// Content of the set with this id.
    pub(crate) fn find(&self, id: Symbol) -> Option<SetSpec> {
        Some(self.sets[*self.by_id.get(&id)?].spec)
    }

    /// Record of a live set.
    pub(crate) fn record(&self, id: Symbol) -> Option<&Record> {
        Some(&self.live(id)?.record)
    }

    pub(crate) fn digest(&self, id: Symbol, interner: &Interner) -> Option<u64> {
        let live = self.live(id)?;
        Some(*live.digest.get_or_init(|| {
            let id = RecordId::IpSet(SetId(interner.get(id).to_owned()));
            digest::digest(&id, &live.record)
        }))
    }

    pub(crate) fn nodes(&self, id: Symbol) -> Option<&RefCounts> {
        Some(&self.sets[*self.by_id.get(&id)?].nodes)
    }

    /// Marks the symbols in use.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for (_, set) in self.sets.iter() {
            marks.mark(set.id);
            marks.mark_all(set.nodes.nodes());
            marks.mark_all(
                set.live
                    .iter()
                    .flat_map(|live| live.sent.iter().flatten().copied()),
            );
            match set.spec {
                SetSpec::Selected(_) => {}
                SetSpec::NamedPorts(_, _, text) | SetSpec::Nodes(text) => marks.mark(text),
                SetSpec::Service(namespace, name) | SetSpec::ServiceAddresses(namespace, name) => {
                    marks.mark_all([namespace, name])
                }
            }
        }
    }

    fn live(&self, id: Symbol) -> Option<&Live> {
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

    /// Returns true if the member is new.
    fn add(&mut self, member: Member) -> bool {
        if !self.members().insert(member.clone()) {
            *self.extra.entry(member).or_default() += 1;
            return false;
        }
        if let Some(digest) = self.digest.get_mut() {
            *digest = digest.wrapping_add(digest::member(&member));
        }
        // Before the first flush there is no delta: the whole set is sent.
        if self.sent.is_some() && !self.delta.removed.remove(&member) {
            self.delta.added.insert(member);
        }
        true
    }

    /// Returns true if the member is gone.
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
        if let Some(digest) = self.digest.get_mut() {
            *digest = digest.wrapping_sub(digest::member(&member));
        }
        if self.sent.is_some() && !self.delta.added.remove(&member) {
            self.delta.removed.insert(member);
        }
        true
    }
}

/// Sorts members. Those that are IPv4 ranges, as nearly all are, are sorted as numbers.
fn sort(members: &mut [Member]) {
    let number = |member: &Member| match member {
        Member::Net(IpNet::V4(net)) => {
            Some(u64::from(u32::from(net.addr())) << 8 | u64::from(net.prefix_len()))
        }
        _ => None,
    };
    let numbers: Option<Vec<u64>> = members.iter().map(number).collect();
    let Some(mut numbers) = numbers else {
        return members.sort_unstable();
    };
    numbers.sort_unstable();
    for (member, number) in members.iter_mut().zip(numbers) {
        let (address, length) = ((number >> 8) as u32, (number & 0xff) as u8);
        if let Ok(net) = Ipv4Net::new(address.into(), length) {
            *member = Member::Net(net.into());
        }
    }
}

/// Converts an address to a member of full prefix length.
pub(crate) fn address(address: std::net::IpAddr) -> Member {
    Member::Net(IpNet::from(address))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member() -> impl Strategy<Value = Member> {
        let v4 = (any::<u32>(), 0..=32_u8).prop_map(|(address, length)| {
            let net = Ipv4Net::new((address % 64).into(), length).expect("a length of IPv4");
            Member::Net(net.into())
        });
        let other = prop_oneof![
            (0..9_u16).prop_map(|port| Member::AddressPort(
                [10, 0, 0, 1].into(),
                Protocol::TCP,
                port
            )),
            (0..9_u16).prop_map(|number| address([0, 0, 0, 0, 0, 0, 0, number].into())),
        ];
        prop_oneof![30 => v4, 1 => other]
    }

    proptest! {
        #[test]
        fn members_are_sorted_in_their_own_order(
            mut members in proptest::collection::vec(member(), 0..60),
        ) {
            let mut wanted = members.clone();
            wanted.sort();
            sort(&mut members);
            prop_assert_eq!(members, wanted);
        }
    }
}
