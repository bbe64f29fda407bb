//! Model to wire. Every field is named where a struct is taken apart, so that a new one cannot be forgotten.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::network::{Encapsulation, EndpointToHostAction, Failsafe, FelixSettings, NodeInfo};
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange};
use margay_api::settings::TimeUnit;
use margay_calc::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, PolicyRecord, PoolRecord, Record, RecordId,
    RouteRecord, RuleRecord, SetId, SetKind, SideMatch, TierBinding,
};
use prost::Message;

use super::members::{pack, pack_pieces};
use super::{Ack, ChangeRef, ERRORS, LocalEndpoint, NodeProblem, REASON, Trailer, wire};

/// Members that one change of a frame has at most, where they may come in several: far less than a part of a frame.
const MEMBERS: usize = 16_384;
/// A list of ports of at least so many entries is worth a place among those that rules share.
const LISTED: usize = 3;

/// The bytes of a frame that holds this change and nothing else. Frames' bytes one after another are one frame with all changes.
pub fn encode_change(change: ChangeRef<'_>) -> Bytes {
    changes([match change {
        ChangeRef::Upsert(id, value) => wire::change::Change::Upsert(encode_record(id, value)),
        ChangeRef::Remove(id) => wire::change::Change::Remove(encode_id(id)),
        ChangeRef::Members(set, kind, delta) => members(set, kind, pack(&delta.added), pack(&delta.removed)),
    }])
}

/// The same for a node that reads what is compact: rules share lists of ports, and many members come in several changes. A few bytes for each rule,
/// however long its list is, and no change of a set is larger than a part of a frame.
pub fn encode_compact(change: ChangeRef<'_>) -> Bytes {
    use wire::change::Change;
    match change {
        ChangeRef::Upsert(id, Record::Policy(value)) => {
            let value = wire::record::Value::Policy(compact(value));
            changes([Change::Upsert(wire::Record { id: Some(encode_id(id)), value: Some(value) })])
        }
        ChangeRef::Upsert(id @ RecordId::IpSet(set), Record::IpSet(IpSetRecord { kind, members: all }))
            if all.len() > MEMBERS =>
        {
            let mut pieces = pack_pieces(all, MEMBERS);
            let first = wire::IpSet { kind: set_kind(*kind).into(), members: pieces.next() };
            let value = Some(wire::record::Value::IpSet(first));
            let first = Change::Upsert(wire::Record { id: Some(encode_id(id)), value });
            let rest = pieces.map(|piece| members(set, *kind, piece, wire::Members::default()));
            changes([first].into_iter().chain(rest))
        }
        ChangeRef::Members(set, kind, delta) if delta.added.len() + delta.removed.len() > MEMBERS => {
            let removed = pack_pieces(&delta.removed, MEMBERS);
            let removed = removed.map(|piece| members(set, kind, wire::Members::default(), piece));
            let added = pack_pieces(&delta.added, MEMBERS);
            changes(removed.chain(added.map(|piece| members(set, kind, piece, wire::Members::default()))))
        }
        other => encode_change(other),
    }
}

fn members(set: &SetId, kind: SetKind, added: wire::Members, removed: wire::Members) -> wire::change::Change {
    wire::change::Change::Members(wire::MemberDelta {
        ip_set: set.0.clone(),
        kind: set_kind(kind).into(),
        added: Some(added),
        removed: Some(removed),
    })
}

fn changes(changes: impl IntoIterator<Item = wire::change::Change>) -> Bytes {
    let mut bytes = BytesMut::new();
    for change in changes {
        let change = wire::Change { change: Some(change) };
        bytes.reserve(prost::encoding::message::encoded_len(1, &change));
        // Tag and length of the repeated field, as the frame's encoder would write them.
        prost::encoding::message::encode(1, &change, &mut bytes);
    }
    bytes.freeze()
}

/// The bytes of a frame without changes.
pub fn encode_trailer(trailer: &Trailer) -> Bytes {
    let Trailer { revision, restated_buckets, in_sync, traceparent, event_unix_ns } = trailer;
    let frame = wire::Frame {
        changes: Vec::new(),
        revision: *revision,
        restated_buckets: restated_buckets.clone(),
        in_sync: *in_sync,
        traceparent: traceparent.clone(),
        event_unix_ns: *event_unix_ns,
        more: false,
    };
    frame.encode_to_vec().into()
}

/// An ack as the node sends it.
pub fn encode_ack(ack: &Ack) -> wire::Up {
    let error = |(id, message): &(RecordId, String)| wire::RecordError {
        id: Some(encode_id(id)),
        message: message[..message.floor_char_boundary(REASON)].to_owned(),
    };
    let errors = ack.errors.iter().take(ERRORS).map(error);
    up(wire::up::Message::Ack(wire::Ack {
        revision: ack.revision,
        errors: errors.collect(),
        plan_us: ack.plan_us,
        commit_us: ack.commit_us,
        traceparent: ack.traceparent.clone(),
    }))
}

/// Addresses of a pod as the node sends them.
pub fn encode_local_endpoint(endpoint: &LocalEndpoint) -> wire::Up {
    up(wire::up::Message::LocalEndpoint(wire::LocalEndpoint {
        namespace: endpoint.key.namespace.clone(),
        name: endpoint.key.name.clone(),
        addresses: texts(&endpoint.addresses),
        uid: endpoint.uid.clone(),
    }))
}

/// What is wrong with a node, as the node sends it.
pub fn encode_problems(problems: &[NodeProblem]) -> wire::Up {
    let problems = problems.iter().cloned().map(NodeProblem::into_wire);
    up(wire::up::Message::Problems(wire::NodeProblems { problems: problems.collect() }))
}

/// The identity of a record.
pub fn encode_id(id: &RecordId) -> wire::RecordId {
    use wire::record_id::Id;
    let id = match id {
        RecordId::Settings => Id::Settings(true),
        RecordId::Pool(range) => Id::Pool(range.to_string()),
        RecordId::Node(name) => Id::Node(name.clone()),
        RecordId::Route(range) => Id::Route(range.to_string()),
        RecordId::IpSet(set) => Id::IpSet(set.0.clone()),
        RecordId::Policy(key) => Id::Policy(policy_key(key)),
        RecordId::Endpoint(key) => Id::Endpoint(endpoint_key(key)),
        RecordId::HostEndpoint(name) => Id::HostEndpoint(name.clone()),
    };
    wire::RecordId { id: Some(id) }
}

/// A record with its identity.
pub fn encode_record(id: &RecordId, record: &Record) -> wire::Record {
    use wire::record::Value;
    let value = match record {
        Record::Settings(value) => Value::Settings(settings(value)),
        Record::Pool(value) => Value::Pool(pool(value)),
        Record::Node(value) => Value::Node(node(value)),
        Record::Route(value) => Value::Route(route(value)),
        Record::IpSet(value) => Value::IpSet(ip_set(value)),
        Record::Policy(value) => Value::Policy(policy(value)),
        Record::Endpoint(value) => Value::Endpoint(endpoint(value)),
        Record::HostEndpoint(value) => Value::HostEndpoint(host_endpoint(value)),
    };
    wire::Record { id: Some(encode_id(id)), value: Some(value) }
}

fn up(message: wire::up::Message) -> wire::Up {
    wire::Up { message: Some(message) }
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(T::to_string).collect()
}

fn endpoint_key(key: &EndpointKey) -> wire::EndpointKey {
    wire::EndpointKey { namespace: key.namespace.clone(), name: key.name.clone() }
}

fn policy_key(key: &PolicyKey) -> wire::PolicyKey {
    wire::PolicyKey { kind: key.kind.as_str().to_owned(), namespace: key.namespace.clone(), name: key.name.clone() }
}

fn settings(value: &FelixSettings) -> wire::Settings {
    let FelixSettings {
        endpoint_to_host,
        vxlan_vni,
        vxlan_port,
        vxlan_mtu,
        vxlan_mtu_v6,
        checksum_offload_broken,
        nat_exclude_hosts,
        allow_conntrack_invalid,
        log_prefix,
        log_rate,
        log_burst,
        ipv6,
        failsafe_inbound,
        failsafe_outbound,
    } = value;
    let endpoint_to_host = match endpoint_to_host {
        EndpointToHostAction::Drop => wire::EndpointToHost::Drop,
        EndpointToHostAction::Accept => wire::EndpointToHost::Accept,
        EndpointToHostAction::Return => wire::EndpointToHost::Return,
    };
    wire::Settings {
        endpoint_to_host: endpoint_to_host.into(),
        vxlan_vni: *vxlan_vni,
        vxlan_port: (*vxlan_port).into(),
        vxlan_mtu: *vxlan_mtu,
        vxlan_mtu_v6: *vxlan_mtu_v6,
        checksum_offload_broken: *checksum_offload_broken,
        nat_exclude_hosts: *nat_exclude_hosts,
        allow_conntrack_invalid: *allow_conntrack_invalid,
        log_prefix: log_prefix.clone(),
        log_rate: log_rate.map(|rate| wire::LogRate { count: rate.count.into(), unit: time_unit(rate.unit) }),
        log_burst: (*log_burst).into(),
        ipv6: *ipv6,
        failsafe_inbound: Some(failsafes(failsafe_inbound)),
        failsafe_outbound: Some(failsafes(failsafe_outbound)),
    }
}

fn failsafes(value: &[Failsafe]) -> wire::Failsafes {
    let ports = value.iter().map(|Failsafe { protocol, port, net }| wire::Failsafe {
        protocol: protocol.0.into(),
        port: (*port).into(),
        net: net.map(|net| net.to_string()).unwrap_or_default(),
    });
    wire::Failsafes { ports: ports.collect() }
}

fn time_unit(value: TimeUnit) -> i32 {
    let value = match value {
        TimeUnit::Second => wire::TimeUnit::Second,
        TimeUnit::Minute => wire::TimeUnit::Minute,
        TimeUnit::Hour => wire::TimeUnit::Hour,
        TimeUnit::Day => wire::TimeUnit::Day,
    };
    value.into()
}

fn encapsulation(value: Encapsulation) -> i32 {
    let value = match value {
        Encapsulation::None => wire::Encapsulation::None,
        Encapsulation::Vxlan => wire::Encapsulation::Vxlan,
        Encapsulation::VxlanCrossSubnet => wire::Encapsulation::VxlanCrossSubnet,
        Encapsulation::Ipip => wire::Encapsulation::Ipip,
        Encapsulation::IpipCrossSubnet => wire::Encapsulation::IpipCrossSubnet,
    };
    value.into()
}

fn pool(value: &PoolRecord) -> wire::Pool {
    let PoolRecord { nat_outgoing, encapsulation: travel } = value;
    wire::Pool { nat_outgoing: *nat_outgoing, encapsulation: encapsulation(*travel) }
}

fn node(value: &NodeInfo) -> wire::Node {
    let NodeInfo { ipv4, ipv6, vtep, vtep6, labels, standing: _ } = value;
    wire::Node {
        ipv4: ipv4.map(|net| net.to_string()).unwrap_or_default(),
        ipv6: ipv6.map(|net| net.to_string()).unwrap_or_default(),
        vtep_address: vtep.as_ref().map(|vtep| vtep.address.to_bits()).unwrap_or_default(),
        vtep_mac: vtep.as_ref().map(|vtep| Bytes::copy_from_slice(&vtep.mac.0)).unwrap_or_default(),
        vtep6_address: vtep6.map(|vtep| Bytes::copy_from_slice(&vtep.address.octets())).unwrap_or_default(),
        vtep6_mac: vtep6.map(|vtep| Bytes::copy_from_slice(&vtep.mac.0)).unwrap_or_default(),
        labels: labels.clone().into_iter().collect(),
    }
}

fn route(value: &RouteRecord) -> wire::Route {
    let RouteRecord { node, encapsulation: travel } = value;
    wire::Route { node: node.clone(), encapsulation: encapsulation(*travel) }
}

fn set_kind(value: SetKind) -> wire::SetKind {
    match value {
        SetKind::Net => wire::SetKind::Net,
        SetKind::AddressPort => wire::SetKind::AddressPort,
    }
}

fn ip_set(value: &IpSetRecord) -> wire::IpSet {
    let IpSetRecord { kind, members } = value;
    wire::IpSet { kind: set_kind(*kind).into(), members: Some(pack(members)) }
}

fn policy(PolicyRecord { ingress, egress }: &PolicyRecord) -> wire::Policy {
    wire::Policy {
        ingress: ingress.iter().map(rule).collect(),
        egress: egress.iter().map(rule).collect(),
        port_lists: Vec::new(),
    }
}

/// The policy with each long list of ports once.
fn compact(PolicyRecord { ingress, egress }: &PolicyRecord) -> wire::Policy {
    let mut lists = PortLists::default();
    let ingress = ingress.iter().map(|rule| lists.rule(rule)).collect();
    let egress = egress.iter().map(|rule| lists.rule(rule)).collect();
    wire::Policy { ingress, egress, port_lists: lists.finish() }
}

/// Ports and port sets of sides, with their places.
#[derive(Default)]
struct PortLists<'a>(BTreeMap<(&'a [PortRange], &'a [SetId]), u32>);

impl<'a> PortLists<'a> {
    fn rule(&mut self, value: &'a RuleRecord) -> wire::Rule {
        sided(value, self.side(&value.source), self.side(&value.destination))
    }

    fn side(&mut self, value: &'a SideMatch) -> Option<wire::Side> {
        let list = (&*value.ports, &*value.port_sets);
        if list.0.len() + list.1.len() < LISTED {
            return side(value);
        }
        let next = u32::try_from(self.0.len()).expect("a policy has fewer rules");
        let place = *self.0.entry(list).or_insert(next);
        let rest = SideMatch { ports: Arc::default(), port_sets: Arc::default(), ..value.clone() };
        Some(wire::Side { port_list: Some(place), ..side(&rest).unwrap_or_default() })
    }

    fn finish(self) -> Vec<wire::PortList> {
        let mut lists: Vec<_> = self.0.into_iter().collect();
        lists.sort_unstable_by_key(|(_, place)| *place);
        let list = |(ports, sets): (&[PortRange], &[SetId])| wire::PortList {
            ports: ports.iter().map(port_range).collect(),
            port_sets: sets.iter().map(|set| set.0.clone()).collect(),
        };
        lists.into_iter().map(|(key, _)| list(key)).collect()
    }
}

fn action(value: Action) -> i32 {
    let value = match value {
        Action::Allow => wire::Action::Allow,
        Action::Deny => wire::Action::Deny,
        Action::Log => wire::Action::Log,
        Action::Pass => wire::Action::Pass,
    };
    value.into()
}

fn rule(value: &RuleRecord) -> wire::Rule {
    sided(value, side(&value.source), side(&value.destination))
}

/// The rule with its sides encoded.
fn sided(value: &RuleRecord, source: Option<wire::Side>, destination: Option<wire::Side>) -> wire::Rule {
    let RuleRecord { action: what, ip_version, protocol, not_protocol, icmp, not_icmp, source: _, destination: _ } =
        value;
    let icmp_match = |icmp: &Icmp| wire::Icmp { r#type: icmp.kind.map(u32::from), code: icmp.code.map(u32::from) };
    wire::Rule {
        action: action(*what),
        ip_version: match ip_version {
            None => 0,
            Some(IpVersion::V4) => 4,
            Some(IpVersion::V6) => 6,
        },
        protocol: protocol.map(|protocol| protocol.0.into()),
        not_protocol: not_protocol.map(|protocol| protocol.0.into()),
        icmp: icmp.as_ref().map(icmp_match),
        not_icmp: not_icmp.as_ref().map(icmp_match),
        source,
        destination,
    }
}

/// Absent when it demands nothing, which is what most sides do.
fn side(value: &SideMatch) -> Option<wire::Side> {
    if *value == SideMatch::default() {
        return None;
    }
    let SideMatch { nets, not_nets, sets, not_sets, ports, port_sets, not_ports, not_port_sets, service_set } = value;
    let names = |sets: &[SetId]| sets.iter().map(|set| set.0.clone()).collect();
    Some(wire::Side {
        nets: texts::<IpNet>(nets),
        not_nets: texts::<IpNet>(not_nets),
        sets: names(sets),
        not_sets: names(not_sets),
        ports: ports.iter().map(port_range).collect(),
        port_sets: names(port_sets),
        not_ports: not_ports.iter().map(port_range).collect(),
        not_port_sets: names(not_port_sets),
        service_set: service_set.as_ref().map(|set| set.0.clone()),
        port_list: None,
    })
}

fn port_range(value: &PortRange) -> wire::PortRange {
    wire::PortRange { first: value.first.into(), last: value.last.into() }
}

fn endpoint(value: &EndpointRecord) -> wire::Endpoint {
    let EndpointRecord { interface, uid, addresses, tiers, unmatched } = value;
    wire::Endpoint {
        interface: interface.clone(),
        uid: uid.clone(),
        addresses: texts(addresses),
        tiers: tiers.iter().map(tier).collect(),
        unmatched: action(*unmatched),
    }
}

fn host_endpoint(value: &HostEndpointRecord) -> wire::HostEndpoint {
    use wire::host_endpoint::Interfaces;
    let HostEndpointRecord { interfaces, normal, forward, pre_dnat, untracked, unmatched } = value;
    let interfaces = match interfaces {
        HostInterfaces::All => Interfaces::All(true),
        HostInterfaces::Named(name) => Interfaces::Named(name.clone()),
        HostInterfaces::WithAddress(addresses) => {
            let addresses = addresses.iter().map(ToString::to_string).collect();
            Interfaces::WithAddress(wire::Addresses { addresses })
        }
    };
    let tiers = |tiers: &[TierBinding]| tiers.iter().map(tier).collect();
    wire::HostEndpoint {
        interfaces: Some(interfaces),
        normal: tiers(normal),
        forward: tiers(forward),
        pre_dnat: tiers(pre_dnat),
        untracked: tiers(untracked),
        unmatched: action(*unmatched),
    }
}

fn tier(value: &TierBinding) -> wire::Tier {
    let TierBinding { name, default_action, ingress, egress } = value;
    wire::Tier {
        name: name.clone(),
        default_action: action(*default_action),
        ingress: ingress.iter().map(policy_key).collect(),
        egress: egress.iter().map(policy_key).collect(),
    }
}
