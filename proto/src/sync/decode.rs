//! Conversion from wire to model. There are no defaults: a missing field that the model needs is an
//! [`Error`].

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use margay_api::endpoint::EndpointKey;
use margay_api::network::{BgpAnnotations, Encapsulation, Mac, NodeInfo, Standing, Vtep};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_calc::flush::MemberDelta;
use margay_calc::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, PolicyRecord, PoolRecord,
    Record, RecordId, RouteRecord, RuleRecord, SetId, SetKind, SideMatch, TierBinding,
};

use super::bgp::{decode_bgp, decode_node_bgp};
use super::fields::{
    ADDRESS, RANGE, decode_byte, decode_port, non_empty, out_of_range, parse, parse_list, require,
    truncate, unknown_kind,
};
use super::members::unpack;
use super::settings::decode_settings;
use super::{
    Ack, Change, Error, Frame, LocalEndpoint, MAX_ADDRESSES, MAX_ERRORS, MAX_KINDS, MAX_NAME,
    MAX_REASON, NodeProblem, Trailer, Versions, wire,
};

/// Decodes a frame. One change that cannot be decoded refuses all of it, because others may refer
/// to it.
pub fn decode_frame(frame: wire::Frame) -> Result<Frame, Error> {
    let changes: Result<_, Error> = frame.changes.into_iter().map(decode_change).collect();
    Ok(Frame {
        changes: changes?,
        trailer: Trailer {
            revision: frame.revision,
            restated_buckets: frame.restated_buckets,
            in_sync: frame.in_sync,
            traceparent: frame.traceparent,
            event_unix_ns: frame.event_unix_ns,
            versions: decode_versions(frame.versions)?,
            servers: frame.servers,
        },
    })
}

/// Decodes versions of the API.
pub fn decode_versions(versions: Vec<wire::KindVersion>) -> Result<Versions, Error> {
    if versions.len() > MAX_KINDS {
        return Err(Error::Number {
            field: "versions",
            value: versions.len() as u64,
            rule: "0..=128 kinds",
        });
    }
    let named = |wire::KindVersion { kind, version }: wire::KindVersion| {
        if kind.is_empty() || kind.len() > MAX_NAME {
            return Err(Error::Text {
                field: "versions.kind",
                value: truncate(&kind),
                rule: "a name of 1 to 253 bytes",
            });
        }
        Ok((kind, version))
    };
    versions.into_iter().map(named).collect()
}

/// Decodes one change of a frame.
pub fn decode_change(change: wire::Change) -> Result<Change, Error> {
    use wire::change::Change as Wire;
    match require("change", change.change)? {
        Wire::Upsert(value) => {
            let (id, value) = decode_record(value)?;
            Ok(Change::Upsert(id, value))
        }
        Wire::Remove(id) => Ok(Change::Remove(decode_id(id)?)),
        Wire::Members(delta) => {
            let kind = decode_set_kind(delta.kind)?;
            let members = MemberDelta {
                added: unpack(kind, &delta.added.unwrap_or_default())?,
                removed: unpack(kind, &delta.removed.unwrap_or_default())?,
            };
            Ok(Change::Members(decode_set_id(delta.ip_set)?, kind, members))
        }
    }
}

/// Decodes a record with its id.
pub fn decode_record(record: wire::Record) -> Result<(RecordId, Record), Error> {
    use wire::record::Value;
    let id = decode_id(require("record.id", record.id)?)?;
    let value = match (&id, require("record.value", record.value)?) {
        (RecordId::Settings, Value::Settings(value)) => Record::Settings(decode_settings(value)?),
        (RecordId::Pool(_), Value::Pool(value)) => Record::Pool(decode_pool(&value)?),
        (RecordId::Node(_), Value::Node(value)) => Record::Node(decode_node(value)?),
        (RecordId::Route(_), Value::Route(value)) => Record::Route(decode_route(value)?),
        (RecordId::IpSet(_), Value::IpSet(value)) => Record::IpSet(decode_ip_set(value)?),
        (RecordId::Policy(_), Value::Policy(value)) => Record::Policy(decode_policy(value)?),
        (RecordId::Endpoint(_), Value::Endpoint(value)) => {
            Record::Endpoint(decode_endpoint(value)?)
        }
        (RecordId::HostEndpoint(_), Value::HostEndpoint(value)) => {
            Record::HostEndpoint(decode_host_endpoint(value)?)
        }
        (RecordId::Bgp, Value::Bgp(value)) => Record::Bgp(Box::new(decode_bgp(value)?)),
        _ => {
            return Err(Error::Kind {
                id: truncate(&format!("{id:?}")),
            });
        }
    };
    Ok((id, value))
}

/// Decodes the id of a record.
pub fn decode_id(id: wire::RecordId) -> Result<RecordId, Error> {
    use wire::record_id::Id;
    match require("record_id", id.id)? {
        Id::Settings(_) => Ok(RecordId::Settings),
        Id::Pool(range) => Ok(RecordId::Pool(parse("record_id.pool", &range, RANGE)?)),
        Id::Node(name) => Ok(RecordId::Node(non_empty("record_id.node", name)?)),
        Id::Route(range) => Ok(RecordId::Route(parse("record_id.route", &range, RANGE)?)),
        Id::IpSet(set) => Ok(RecordId::IpSet(decode_set_id(set)?)),
        Id::Policy(key) => Ok(RecordId::Policy(decode_policy_key(key)?)),
        Id::Endpoint(key) => Ok(RecordId::Endpoint(EndpointKey {
            namespace: non_empty("record_id.endpoint.namespace", key.namespace)?,
            name: non_empty("record_id.endpoint.name", key.name)?,
        })),
        Id::Bgp(_) => Ok(RecordId::Bgp),
        Id::HostEndpoint(name) => Ok(RecordId::HostEndpoint(non_empty(
            "record_id.host_endpoint",
            name,
        )?)),
    }
}

/// Decodes an ack, limited to the number and length of errors that a node of this version sends.
pub fn decode_ack(ack: wire::Ack) -> Result<Ack, Error> {
    let error = |mut error: wire::RecordError| {
        error
            .message
            .truncate(error.message.floor_char_boundary(MAX_REASON));
        Ok((
            decode_id(require("ack.errors.id", error.id)?)?,
            error.message,
        ))
    };
    let errors: Result<_, Error> = ack.errors.into_iter().take(MAX_ERRORS).map(error).collect();
    Ok(Ack {
        revision: ack.revision,
        errors: errors?,
        plan_us: ack.plan_us,
        commit_us: ack.commit_us,
        traceparent: ack.traceparent,
        waited_us: ack.waited_us,
    })
}

/// Decodes addresses of a pod, limited in number and length of names because the server keeps them.
pub fn decode_local_endpoint(endpoint: wire::LocalEndpoint) -> Result<LocalEndpoint, Error> {
    if endpoint.addresses.len() > MAX_ADDRESSES {
        let count = u32::try_from(endpoint.addresses.len()).unwrap_or(u32::MAX);
        return Err(out_of_range(
            "local_endpoint.addresses",
            count,
            "0..=8 addresses",
        ));
    }
    Ok(LocalEndpoint {
        key: EndpointKey {
            namespace: bounded_name(
                "local_endpoint.namespace",
                non_empty("local_endpoint.namespace", endpoint.namespace)?,
            )?,
            name: bounded_name(
                "local_endpoint.name",
                non_empty("local_endpoint.name", endpoint.name)?,
            )?,
        },
        addresses: parse_list("local_endpoint.addresses", &endpoint.addresses, ADDRESS)?,
        uid: bounded_name("local_endpoint.uid", endpoint.uid)?,
    })
}

/// Decodes problems of a node, limited in number and length.
pub fn decode_problems(problems: wire::NodeProblems) -> Result<Vec<NodeProblem>, Error> {
    let decode = |problem: wire::NodeProblem| {
        let code = non_empty("problems.code", problem.code)?;
        Ok(NodeProblem {
            code,
            message: problem.message,
            degraded: problem.degraded,
        })
    };
    let problems: Result<Vec<_>, Error> = problems.problems.into_iter().map(decode).collect();
    Ok(NodeProblem::bounded(problems?))
}

fn bounded_name(field: &'static str, value: String) -> Result<String, Error> {
    if value.len() > MAX_NAME {
        return Err(Error::Length {
            field,
            length: value.len(),
            rule: "0..=253",
        });
    }
    Ok(value)
}

fn decode_set_id(id: String) -> Result<SetId, Error> {
    non_empty("ip_set", id).map(SetId)
}

fn decode_policy_key(key: wire::PolicyKey) -> Result<PolicyKey, Error> {
    let kind = PolicyKind::parse(&key.kind).ok_or_else(|| Error::Text {
        field: "policy.kind",
        value: truncate(&key.kind),
        rule: "a kind of policy that this version knows",
    })?;
    Ok(PolicyKey {
        kind,
        namespace: key.namespace,
        name: non_empty("policy.name", key.name)?,
    })
}

fn decode_encapsulation(value: i32) -> Result<Encapsulation, Error> {
    match wire::Encapsulation::try_from(value) {
        Ok(wire::Encapsulation::None) => Ok(Encapsulation::None),
        Ok(wire::Encapsulation::Vxlan) => Ok(Encapsulation::Vxlan),
        Ok(wire::Encapsulation::VxlanCrossSubnet) => Ok(Encapsulation::VxlanCrossSubnet),
        Ok(wire::Encapsulation::Ipip) => Ok(Encapsulation::Ipip),
        Ok(wire::Encapsulation::IpipCrossSubnet) => Ok(Encapsulation::IpipCrossSubnet),
        Ok(wire::Encapsulation::Unspecified) | Err(_) => Err(unknown_kind("encapsulation")),
    }
}

fn decode_pool(value: &wire::Pool) -> Result<PoolRecord, Error> {
    Ok(PoolRecord {
        nat_outgoing: value.nat_outgoing,
        encapsulation: decode_encapsulation(value.encapsulation)?,
    })
}

fn decode_node(value: wire::Node) -> Result<NodeInfo, Error> {
    let optional = |value: String| (!value.is_empty()).then_some(value);
    let ipv4 = optional(value.ipv4);
    let ipv6 = optional(value.ipv6);
    let vtep = decode_mac("node.vtep_mac", &value.vtep_mac)?.map(|mac| Vtep {
        address: Ipv4Addr::from_bits(value.vtep_address),
        mac,
    });
    let vtep6 = match decode_mac("node.vtep6_mac", &value.vtep6_mac)? {
        Some(mac) => {
            let bytes = decode_bytes::<16>("node.vtep6_address", &value.vtep6_address, "16")?;
            Some(Vtep {
                address: Ipv6Addr::from(bytes),
                mac,
            })
        }
        None => None,
    };
    Ok(NodeInfo {
        ipv4: ipv4
            .map(|net| parse("node.ipv4", &net, RANGE))
            .transpose()?,
        ipv6: ipv6
            .map(|net| parse("node.ipv6", &net, RANGE))
            .transpose()?,
        vtep,
        vtep6,
        ipip: (value.ipip_address != 0).then(|| Ipv4Addr::from_bits(value.ipip_address)),
        labels: value.labels.into_iter().collect(),
        bgp: value.bgp.map(decode_node_bgp).transpose()?,
        bgp_annotations: BgpAnnotations::default(),
        standing: Standing::default(),
    })
}

fn decode_mac(field: &'static str, value: &[u8]) -> Result<Option<Mac>, Error> {
    if value.is_empty() {
        Ok(None)
    } else {
        decode_bytes::<6>(field, value, "6").map(|mac| Some(Mac(mac)))
    }
}

fn decode_bytes<const N: usize>(
    field: &'static str,
    value: &[u8],
    rule: &'static str,
) -> Result<[u8; N], Error> {
    value.try_into().map_err(|_| Error::Length {
        field,
        length: value.len(),
        rule,
    })
}

fn decode_route(value: wire::Route) -> Result<RouteRecord, Error> {
    Ok(RouteRecord {
        encapsulation: decode_encapsulation(value.encapsulation)?,
        node: non_empty("route.node", value.node)?,
    })
}

fn decode_set_kind(value: i32) -> Result<SetKind, Error> {
    match wire::SetKind::try_from(value) {
        Ok(wire::SetKind::Net) => Ok(SetKind::Net),
        Ok(wire::SetKind::AddressPort) => Ok(SetKind::AddressPort),
        Ok(wire::SetKind::Unspecified) | Err(_) => Err(unknown_kind("ip_set.kind")),
    }
}

fn decode_ip_set(value: wire::IpSet) -> Result<IpSetRecord, Error> {
    let kind = decode_set_kind(value.kind)?;
    Ok(IpSetRecord {
        kind,
        members: unpack(kind, &value.members.unwrap_or_default())?,
    })
}

/// Ports and port sets shared by rules.
type PortList = (Arc<[PortRange]>, Arc<[SetId]>);

fn decode_policy(value: wire::Policy) -> Result<PolicyRecord, Error> {
    let list =
        |list: wire::PortList| Ok((decode_ranges(&list.ports)?, decode_sets(list.port_sets)?));
    let lists = value
        .port_lists
        .into_iter()
        .map(list)
        .collect::<Result<Vec<PortList>, Error>>()?;
    let rules = |rules: Vec<wire::Rule>| {
        rules
            .into_iter()
            .map(|one| decode_rule(one, &lists))
            .collect::<Result<_, Error>>()
    };
    Ok(PolicyRecord {
        ingress: rules(value.ingress)?,
        egress: rules(value.egress)?,
    })
}

fn decode_action(field: &'static str, value: i32) -> Result<Action, Error> {
    match wire::Action::try_from(value) {
        Ok(wire::Action::Allow) => Ok(Action::Allow),
        Ok(wire::Action::Deny) => Ok(Action::Deny),
        Ok(wire::Action::Log) => Ok(Action::Log),
        Ok(wire::Action::Pass) => Ok(Action::Pass),
        Ok(wire::Action::Unspecified) | Err(_) => Err(unknown_kind(field)),
    }
}

fn decode_rule(value: wire::Rule, lists: &[PortList]) -> Result<RuleRecord, Error> {
    let protocol = |field, value: Option<u32>| {
        value
            .map(|value| decode_byte(field, value).map(Protocol))
            .transpose()
    };
    Ok(RuleRecord {
        action: decode_action("rule.action", value.action)?,
        ip_version: match value.ip_version {
            0 => None,
            4 => Some(IpVersion::V4),
            6 => Some(IpVersion::V6),
            other => return Err(out_of_range("rule.ip_version", other, "0, 4 or 6")),
        },
        protocol: protocol("rule.protocol", value.protocol)?,
        not_protocol: protocol("rule.not_protocol", value.not_protocol)?,
        icmp: value.icmp.as_ref().map(decode_icmp).transpose()?,
        not_icmp: value.not_icmp.as_ref().map(decode_icmp).transpose()?,
        source: decode_side(value.source.unwrap_or_default(), lists)?,
        destination: decode_side(value.destination.unwrap_or_default(), lists)?,
    })
}

fn decode_icmp(value: &wire::Icmp) -> Result<Icmp, Error> {
    let part = |field, value: Option<u32>| value.map(|value| decode_byte(field, value)).transpose();
    Ok(Icmp {
        kind: part("icmp.type", value.r#type)?,
        code: part("icmp.code", value.code)?,
    })
}

fn decode_sets<T: FromIterator<SetId>>(sets: Vec<String>) -> Result<T, Error> {
    sets.into_iter().map(decode_set_id).collect()
}

fn decode_ranges<T: FromIterator<PortRange>>(ranges: &[wire::PortRange]) -> Result<T, Error> {
    ranges.iter().map(decode_port_range).collect()
}

fn decode_side(value: wire::Side, lists: &[PortList]) -> Result<SideMatch, Error> {
    let (ports, port_sets) = match value.port_list {
        None => (decode_ranges(&value.ports)?, decode_sets(value.port_sets)?),
        Some(place) => {
            let list = lists
                .get(place as usize)
                .filter(|_| value.ports.is_empty() && value.port_sets.is_empty());
            list.cloned().ok_or_else(|| {
                out_of_range("side.port_list", place, "the lists of the policy, alone")
            })?
        }
    };
    Ok(SideMatch {
        nets: parse_list("side.nets", &value.nets, RANGE)?,
        not_nets: parse_list("side.not_nets", &value.not_nets, RANGE)?,
        sets: decode_sets(value.sets)?,
        not_sets: decode_sets(value.not_sets)?,
        ports,
        port_sets,
        not_ports: decode_ranges(&value.not_ports)?,
        not_port_sets: decode_sets(value.not_port_sets)?,
        service_set: value.service_set.map(decode_set_id).transpose()?,
    })
}

fn decode_port_range(value: &wire::PortRange) -> Result<PortRange, Error> {
    let range = PortRange {
        first: decode_port("ports.first", value.first)?,
        last: decode_port("ports.last", value.last)?,
    };
    if range.first > range.last {
        return Err(out_of_range("ports.first", value.first, "0..=last"));
    }
    Ok(range)
}

fn decode_endpoint(value: wire::Endpoint) -> Result<EndpointRecord, Error> {
    Ok(EndpointRecord {
        addresses: parse_list("endpoint.addresses", &value.addresses, ADDRESS)?,
        interface: non_empty("endpoint.interface", value.interface)?,
        uid: value.uid,
        tiers: decode_tiers(value.tiers)?,
        unmatched: decode_decision("endpoint.unmatched", value.unmatched)?,
    })
}

fn decode_host_endpoint(value: wire::HostEndpoint) -> Result<HostEndpointRecord, Error> {
    use wire::host_endpoint::Interfaces;
    const INTERFACES: &str = "host_endpoint.interfaces";
    Ok(HostEndpointRecord {
        interfaces: match require(INTERFACES, value.interfaces)? {
            Interfaces::All(_) => HostInterfaces::All,
            Interfaces::Named(name) => HostInterfaces::Named(non_empty(INTERFACES, name)?),
            Interfaces::WithAddress(with) => HostInterfaces::WithAddress(
                parse_list(INTERFACES, &with.addresses, ADDRESS)?
                    .into_iter()
                    .collect(),
            ),
        },
        normal: decode_tiers(value.normal)?,
        forward: decode_tiers(value.forward)?,
        pre_dnat: decode_tiers(value.pre_dnat)?,
        untracked: decode_tiers(value.untracked)?,
        unmatched: decode_decision("host_endpoint.unmatched", value.unmatched)?,
    })
}

/// Decodes an action that must be `Allow` or `Deny`.
fn decode_decision(field: &'static str, value: i32) -> Result<Action, Error> {
    match decode_action(field, value)? {
        decided @ (Action::Allow | Action::Deny) => Ok(decided),
        Action::Log | Action::Pass => Err(unknown_kind(field)),
    }
}

fn decode_tiers(value: Vec<wire::Tier>) -> Result<Vec<TierBinding>, Error> {
    value.into_iter().map(decode_tier).collect()
}

fn decode_tier(value: wire::Tier) -> Result<TierBinding, Error> {
    let keys = |keys: Vec<wire::PolicyKey>| {
        keys.into_iter()
            .map(decode_policy_key)
            .collect::<Result<_, Error>>()
    };
    let default_action = match decode_action("tier.default_action", value.default_action)? {
        decided @ (Action::Deny | Action::Pass) => decided,
        Action::Allow | Action::Log => return Err(unknown_kind("tier.default_action")),
    };
    Ok(TierBinding {
        name: non_empty("tier.name", value.name)?,
        default_action,
        ingress: keys(value.ingress)?,
        egress: keys(value.egress)?,
    })
}
