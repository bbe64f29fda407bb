//! Conversion from model to wire. Structs are destructured field by field, so that a new field
//! cannot be forgotten.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::network::{Encapsulation, NodeInfo};
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange};
use margay_calc::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, PolicyRecord, PoolRecord,
    Record, RecordId, RouteRecord, RuleRecord, SetId, SetKind, SideMatch, TierBinding,
};
use prost::Message;

use super::bgp::{encode_bgp, encode_node_bgp};
use super::members::{pack, pack_chunks};
use super::settings::encode_settings;
use super::{
    Ack, ChangeRef, LocalEndpoint, MAX_ERRORS, MAX_REASON, NodeProblem, Trailer, Versions, wire,
};

/// Maximal number of members in one change of a frame for agents that accept several changes per
/// set: far less than [`super::PART_SIZE`].
const MAX_MEMBERS: usize = 16_384;
/// Minimal length of a port list that is worth an entry in the policy's shared lists.
const MIN_SHARED_LIST: usize = 3;

/// Encodes a frame with this change only. Concatenated frames are one frame with all changes.
pub fn encode_change(change: ChangeRef<'_>) -> Bytes {
    encode_changes([match change {
        ChangeRef::Upsert(id, value) => wire::change::Change::Upsert(encode_record(id, value)),
        ChangeRef::Remove(id) => wire::change::Change::Remove(encode_id(id)),
        ChangeRef::Members(set, kind, delta) => {
            encode_members(set, kind, pack(&delta.added), pack(&delta.removed))
        }
    }])
}

/// Encodes a change for an agent that reads the compact form: rules share port lists, and large
/// sets come in several changes. Costs a few bytes per rule however long its list is, and no change
/// of a set exceeds the size of a part.
pub fn encode_compact(change: ChangeRef<'_>) -> Bytes {
    use wire::change::Change;
    match change {
        ChangeRef::Upsert(id, Record::Policy(value)) => {
            let value = wire::record::Value::Policy(encode_compact_policy(value));
            encode_changes([Change::Upsert(wire::Record {
                id: Some(encode_id(id)),
                value: Some(value),
            })])
        }
        ChangeRef::Upsert(
            id @ RecordId::IpSet(set),
            Record::IpSet(IpSetRecord { kind, members: all }),
        ) if all.len() > MAX_MEMBERS => {
            let mut pieces = pack_chunks(all, MAX_MEMBERS);
            let first = wire::IpSet {
                kind: encode_set_kind(*kind).into(),
                members: pieces.next(),
            };
            let value = Some(wire::record::Value::IpSet(first));
            let first = Change::Upsert(wire::Record {
                id: Some(encode_id(id)),
                value,
            });
            let rest =
                pieces.map(|piece| encode_members(set, *kind, piece, wire::Members::default()));
            encode_changes([first].into_iter().chain(rest))
        }
        ChangeRef::Members(set, kind, delta)
            if delta.added.len() + delta.removed.len() > MAX_MEMBERS =>
        {
            let removed = pack_chunks(&delta.removed, MAX_MEMBERS);
            let removed =
                removed.map(|piece| encode_members(set, kind, wire::Members::default(), piece));
            let added = pack_chunks(&delta.added, MAX_MEMBERS);
            encode_changes(removed.chain(
                added.map(|piece| encode_members(set, kind, piece, wire::Members::default())),
            ))
        }
        other => encode_change(other),
    }
}

fn encode_members(
    set: &SetId,
    kind: SetKind,
    added: wire::Members,
    removed: wire::Members,
) -> wire::change::Change {
    wire::change::Change::Members(wire::MemberDelta {
        ip_set: set.0.clone(),
        kind: encode_set_kind(kind).into(),
        added: Some(added),
        removed: Some(removed),
    })
}

fn encode_changes(changes: impl IntoIterator<Item = wire::change::Change>) -> Bytes {
    let mut bytes = BytesMut::new();
    for change in changes {
        let change = wire::Change {
            change: Some(change),
        };
        bytes.reserve(prost::encoding::message::encoded_len(1, &change));
        // Tag and length of the repeated field, as the encoder of a frame writes them.
        prost::encoding::message::encode(1, &change, &mut bytes);
    }
    bytes.freeze()
}

/// Encodes a frame without changes.
pub fn encode_trailer(trailer: &Trailer) -> Bytes {
    let Trailer {
        revision,
        restated_buckets,
        in_sync,
        traceparent,
        event_unix_ns,
        versions,
        servers,
    } = trailer;
    let frame = wire::Frame {
        changes: Vec::new(),
        revision: *revision,
        restated_buckets: restated_buckets.clone(),
        in_sync: *in_sync,
        traceparent: traceparent.clone(),
        event_unix_ns: *event_unix_ns,
        more: false,
        versions: encode_versions(versions),
        servers: servers.clone(),
    };
    frame.encode_to_vec().into()
}

/// Encodes versions of the API.
pub fn encode_versions(versions: &Versions) -> Vec<wire::KindVersion> {
    versions
        .iter()
        .map(|(kind, version)| wire::KindVersion {
            kind: kind.clone(),
            version: *version,
        })
        .collect()
}

/// Encodes an ack.
pub fn encode_ack(ack: &Ack) -> wire::Up {
    let error = |(id, message): &(RecordId, String)| wire::RecordError {
        id: Some(encode_id(id)),
        message: message[..message.floor_char_boundary(MAX_REASON)].to_owned(),
    };
    let errors = ack.errors.iter().take(MAX_ERRORS).map(error);
    up(wire::up::Message::Ack(wire::Ack {
        revision: ack.revision,
        errors: errors.collect(),
        plan_us: ack.plan_us,
        commit_us: ack.commit_us,
        traceparent: ack.traceparent.clone(),
        waited_us: ack.waited_us,
    }))
}

/// Encodes addresses of a pod.
pub fn encode_local_endpoint(endpoint: &LocalEndpoint) -> wire::Up {
    up(wire::up::Message::LocalEndpoint(wire::LocalEndpoint {
        namespace: endpoint.key.namespace.clone(),
        name: endpoint.key.name.clone(),
        addresses: to_strings(&endpoint.addresses),
        uid: endpoint.uid.clone(),
    }))
}

/// Encodes problems of a node.
pub fn encode_problems(problems: &[NodeProblem]) -> wire::Up {
    let problems = problems.iter().cloned().map(NodeProblem::into_wire);
    up(wire::up::Message::Problems(wire::NodeProblems {
        problems: problems.collect(),
    }))
}

/// Encodes the id of a record.
pub fn encode_id(id: &RecordId) -> wire::RecordId {
    use wire::record_id::Id;
    let id = match id {
        RecordId::Settings => Id::Settings(true),
        RecordId::Pool(range) => Id::Pool(range.to_string()),
        RecordId::Node(name) => Id::Node(name.clone()),
        RecordId::Route(range) => Id::Route(range.to_string()),
        RecordId::IpSet(set) => Id::IpSet(set.0.clone()),
        RecordId::Policy(key) => Id::Policy(encode_policy_key(key)),
        RecordId::Endpoint(key) => Id::Endpoint(encode_endpoint_key(key)),
        RecordId::HostEndpoint(name) => Id::HostEndpoint(name.clone()),
        RecordId::Bgp => Id::Bgp(true),
    };
    wire::RecordId { id: Some(id) }
}

/// Encodes a record with its id.
pub fn encode_record(id: &RecordId, record: &Record) -> wire::Record {
    use wire::record::Value;
    let value = match record {
        Record::Settings(value) => Value::Settings(encode_settings(value)),
        Record::Pool(value) => Value::Pool(encode_pool(value)),
        Record::Node(value) => Value::Node(encode_node(value)),
        Record::Route(value) => Value::Route(encode_route(value)),
        Record::IpSet(value) => Value::IpSet(encode_ip_set(value)),
        Record::Policy(value) => Value::Policy(encode_policy(value)),
        Record::Endpoint(value) => Value::Endpoint(encode_endpoint(value)),
        Record::HostEndpoint(value) => Value::HostEndpoint(encode_host_endpoint(value)),
        Record::Bgp(value) => Value::Bgp(encode_bgp(value)),
    };
    wire::Record {
        id: Some(encode_id(id)),
        value: Some(value),
    }
}

fn up(message: wire::up::Message) -> wire::Up {
    wire::Up {
        message: Some(message),
    }
}

fn to_strings<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(T::to_string).collect()
}

fn encode_endpoint_key(key: &EndpointKey) -> wire::EndpointKey {
    wire::EndpointKey {
        namespace: key.namespace.clone(),
        name: key.name.clone(),
    }
}

fn encode_policy_key(key: &PolicyKey) -> wire::PolicyKey {
    wire::PolicyKey {
        kind: key.kind.as_str().to_owned(),
        namespace: key.namespace.clone(),
        name: key.name.clone(),
    }
}

fn encode_encapsulation(value: Encapsulation) -> i32 {
    let value = match value {
        Encapsulation::None => wire::Encapsulation::None,
        Encapsulation::Vxlan => wire::Encapsulation::Vxlan,
        Encapsulation::VxlanCrossSubnet => wire::Encapsulation::VxlanCrossSubnet,
        Encapsulation::Ipip => wire::Encapsulation::Ipip,
        Encapsulation::IpipCrossSubnet => wire::Encapsulation::IpipCrossSubnet,
    };
    value.into()
}

fn encode_pool(value: &PoolRecord) -> wire::Pool {
    let PoolRecord {
        nat_outgoing,
        encapsulation: travel,
    } = value;
    wire::Pool {
        nat_outgoing: *nat_outgoing,
        encapsulation: encode_encapsulation(*travel),
    }
}

fn encode_node(value: &NodeInfo) -> wire::Node {
    let NodeInfo {
        ipv4,
        ipv6,
        vtep,
        vtep6,
        ipip,
        labels,
        bgp,
        bgp_annotations: _,
        standing: _,
    } = value;
    wire::Node {
        ipv4: ipv4.map(|net| net.to_string()).unwrap_or_default(),
        ipv6: ipv6.map(|net| net.to_string()).unwrap_or_default(),
        vtep_address: vtep
            .as_ref()
            .map(|vtep| vtep.address.to_bits())
            .unwrap_or_default(),
        vtep_mac: vtep
            .as_ref()
            .map(|vtep| Bytes::copy_from_slice(&vtep.mac.0))
            .unwrap_or_default(),
        vtep6_address: vtep6
            .map(|vtep| Bytes::copy_from_slice(&vtep.address.octets()))
            .unwrap_or_default(),
        vtep6_mac: vtep6
            .map(|vtep| Bytes::copy_from_slice(&vtep.mac.0))
            .unwrap_or_default(),
        ipip_address: ipip.map(Ipv4Addr::to_bits).unwrap_or_default(),
        labels: labels.clone().into_iter().collect(),
        bgp: bgp.as_ref().map(encode_node_bgp),
    }
}

fn encode_route(value: &RouteRecord) -> wire::Route {
    let RouteRecord {
        node,
        encapsulation: travel,
    } = value;
    wire::Route {
        node: node.clone(),
        encapsulation: encode_encapsulation(*travel),
    }
}

fn encode_set_kind(value: SetKind) -> wire::SetKind {
    match value {
        SetKind::Net => wire::SetKind::Net,
        SetKind::AddressPort => wire::SetKind::AddressPort,
    }
}

fn encode_ip_set(value: &IpSetRecord) -> wire::IpSet {
    let IpSetRecord { kind, members } = value;
    wire::IpSet {
        kind: encode_set_kind(*kind).into(),
        members: Some(pack(members)),
    }
}

fn encode_policy(PolicyRecord { ingress, egress }: &PolicyRecord) -> wire::Policy {
    wire::Policy {
        ingress: ingress.iter().map(encode_rule).collect(),
        egress: egress.iter().map(encode_rule).collect(),
        port_lists: Vec::new(),
    }
}

/// Encodes a policy with each long port list once.
fn encode_compact_policy(PolicyRecord { ingress, egress }: &PolicyRecord) -> wire::Policy {
    let mut lists = PortLists::default();
    let ingress = ingress.iter().map(|rule| lists.add_rule(rule)).collect();
    let egress = egress.iter().map(|rule| lists.add_rule(rule)).collect();
    wire::Policy {
        ingress,
        egress,
        port_lists: lists.into_lists(),
    }
}

/// Ports and port sets of sides, with their index.
#[derive(Default)]
struct PortLists<'a>(BTreeMap<(&'a [PortRange], &'a [SetId]), u32>);

impl<'a> PortLists<'a> {
    fn add_rule(&mut self, value: &'a RuleRecord) -> wire::Rule {
        encode_rule_with_sides(
            value,
            self.add_side(&value.source),
            self.add_side(&value.destination),
        )
    }

    fn add_side(&mut self, value: &'a SideMatch) -> Option<wire::Side> {
        let list = (&*value.ports, &*value.port_sets);
        if list.0.len() + list.1.len() < MIN_SHARED_LIST {
            return encode_side(value);
        }
        let next = u32::try_from(self.0.len()).expect("a policy has fewer rules");
        let index = *self.0.entry(list).or_insert(next);
        let rest = SideMatch {
            ports: Arc::default(),
            port_sets: Arc::default(),
            ..value.clone()
        };
        Some(wire::Side {
            port_list: Some(index),
            ..encode_side(&rest).unwrap_or_default()
        })
    }

    fn into_lists(self) -> Vec<wire::PortList> {
        let mut lists: Vec<_> = self.0.into_iter().collect();
        lists.sort_unstable_by_key(|(_, index)| *index);
        let list = |(ports, sets): (&[PortRange], &[SetId])| wire::PortList {
            ports: ports.iter().map(encode_port_range).collect(),
            port_sets: sets.iter().map(|set| set.0.clone()).collect(),
        };
        lists.into_iter().map(|(key, _)| list(key)).collect()
    }
}

fn encode_action(value: Action) -> i32 {
    let value = match value {
        Action::Allow => wire::Action::Allow,
        Action::Deny => wire::Action::Deny,
        Action::Log => wire::Action::Log,
        Action::Pass => wire::Action::Pass,
    };
    value.into()
}

fn encode_rule(value: &RuleRecord) -> wire::Rule {
    encode_rule_with_sides(
        value,
        encode_side(&value.source),
        encode_side(&value.destination),
    )
}

/// Encodes a rule whose sides are encoded already.
fn encode_rule_with_sides(
    value: &RuleRecord,
    source: Option<wire::Side>,
    destination: Option<wire::Side>,
) -> wire::Rule {
    let RuleRecord {
        action: what,
        ip_version,
        protocol,
        not_protocol,
        icmp,
        not_icmp,
        source: _,
        destination: _,
    } = value;
    let icmp_match = |icmp: &Icmp| wire::Icmp {
        r#type: icmp.kind.map(u32::from),
        code: icmp.code.map(u32::from),
    };
    wire::Rule {
        action: encode_action(*what),
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

/// Encodes a side; `None` without criteria, as most sides are.
fn encode_side(value: &SideMatch) -> Option<wire::Side> {
    if *value == SideMatch::default() {
        return None;
    }
    let SideMatch {
        nets,
        not_nets,
        sets,
        not_sets,
        ports,
        port_sets,
        not_ports,
        not_port_sets,
        service_set,
    } = value;
    let names = |sets: &[SetId]| sets.iter().map(|set| set.0.clone()).collect();
    Some(wire::Side {
        nets: to_strings::<IpNet>(nets),
        not_nets: to_strings::<IpNet>(not_nets),
        sets: names(sets),
        not_sets: names(not_sets),
        ports: ports.iter().map(encode_port_range).collect(),
        port_sets: names(port_sets),
        not_ports: not_ports.iter().map(encode_port_range).collect(),
        not_port_sets: names(not_port_sets),
        service_set: service_set.as_ref().map(|set| set.0.clone()),
        port_list: None,
    })
}

fn encode_port_range(value: &PortRange) -> wire::PortRange {
    wire::PortRange {
        first: value.first.into(),
        last: value.last.into(),
    }
}

fn encode_endpoint(value: &EndpointRecord) -> wire::Endpoint {
    let EndpointRecord {
        interface,
        uid,
        addresses,
        tiers,
        unmatched,
    } = value;
    wire::Endpoint {
        interface: interface.clone(),
        uid: uid.clone(),
        addresses: to_strings(addresses),
        tiers: tiers.iter().map(encode_tier).collect(),
        unmatched: encode_action(*unmatched),
    }
}

fn encode_host_endpoint(value: &HostEndpointRecord) -> wire::HostEndpoint {
    use wire::host_endpoint::Interfaces;
    let HostEndpointRecord {
        interfaces,
        normal,
        forward,
        pre_dnat,
        untracked,
        unmatched,
    } = value;
    let interfaces = match interfaces {
        HostInterfaces::All => Interfaces::All(true),
        HostInterfaces::Named(name) => Interfaces::Named(name.clone()),
        HostInterfaces::WithAddress(addresses) => {
            let addresses = addresses.iter().map(ToString::to_string).collect();
            Interfaces::WithAddress(wire::Addresses { addresses })
        }
    };
    let tiers = |tiers: &[TierBinding]| tiers.iter().map(encode_tier).collect();
    wire::HostEndpoint {
        interfaces: Some(interfaces),
        normal: tiers(normal),
        forward: tiers(forward),
        pre_dnat: tiers(pre_dnat),
        untracked: tiers(untracked),
        unmatched: encode_action(*unmatched),
    }
}

fn encode_tier(value: &TierBinding) -> wire::Tier {
    let TierBinding {
        name,
        default_action,
        ingress,
        egress,
    } = value;
    wire::Tier {
        name: name.clone(),
        default_action: encode_action(*default_action),
        ingress: ingress.iter().map(encode_policy_key).collect(),
        egress: egress.iter().map(encode_policy_key).collect(),
    }
}
