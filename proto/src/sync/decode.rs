//! Wire to model. Nothing is defaulted: what the model needs and the message lacks is an [`Error`].

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use margay_api::endpoint::EndpointKey;
use margay_api::network::{
    Encapsulation, EndpointToHostAction, Failsafe, FelixSettings, Mac, NodeInfo, Standing, Vtep,
};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_api::settings::{LogRate, TimeUnit};
use margay_calc::flush::MemberDelta;
use margay_calc::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, PolicyRecord, PoolRecord, Record, RecordId,
    RouteRecord, RuleRecord, SetId, SetKind, SideMatch, TierBinding,
};

use super::members::unpack;
use super::{ADDRESSES, Ack, Change, ERRORS, Error, Frame, LocalEndpoint, NAME, NodeProblem, REASON, Trailer, wire};

/// The longest piece of a refused text that an error shows.
const SHOWN: usize = 64;

/// A frame; one change that cannot be decoded refuses all of it, because the rest may refer to it.
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
        },
    })
}

/// One change of a frame.
pub fn decode_change(change: wire::Change) -> Result<Change, Error> {
    use wire::change::Change as Wire;
    match present("change", change.change)? {
        Wire::Upsert(value) => {
            let (id, value) = decode_record(value)?;
            Ok(Change::Upsert(id, value))
        }
        Wire::Remove(id) => Ok(Change::Remove(decode_id(id)?)),
        Wire::Members(delta) => {
            let kind = set_kind(delta.kind)?;
            let members = MemberDelta {
                added: unpack(kind, &delta.added.unwrap_or_default())?,
                removed: unpack(kind, &delta.removed.unwrap_or_default())?,
            };
            Ok(Change::Members(set_id(delta.ip_set)?, kind, members))
        }
    }
}

/// A record with its identity.
pub fn decode_record(record: wire::Record) -> Result<(RecordId, Record), Error> {
    use wire::record::Value;
    let id = decode_id(present("record.id", record.id)?)?;
    let value = match (&id, present("record.value", record.value)?) {
        (RecordId::Settings, Value::Settings(value)) => Record::Settings(settings(value)?),
        (RecordId::Pool(_), Value::Pool(value)) => Record::Pool(pool(&value)?),
        (RecordId::Node(_), Value::Node(value)) => Record::Node(node(value)?),
        (RecordId::Route(_), Value::Route(value)) => Record::Route(route(value)?),
        (RecordId::IpSet(_), Value::IpSet(value)) => Record::IpSet(ip_set(value)?),
        (RecordId::Policy(_), Value::Policy(value)) => Record::Policy(policy(value)?),
        (RecordId::Endpoint(_), Value::Endpoint(value)) => Record::Endpoint(endpoint(value)?),
        (RecordId::HostEndpoint(_), Value::HostEndpoint(value)) => Record::HostEndpoint(host_endpoint(value)?),
        _ => {
            return Err(Error::Kind { id: shown(&format!("{id:?}")) });
        }
    };
    Ok((id, value))
}

/// The identity of a record.
pub fn decode_id(id: wire::RecordId) -> Result<RecordId, Error> {
    use wire::record_id::Id;
    match present("record_id", id.id)? {
        Id::Settings(_) => Ok(RecordId::Settings),
        Id::Pool(range) => Ok(RecordId::Pool(text("record_id.pool", &range, RANGE)?)),
        Id::Node(name) => Ok(RecordId::Node(filled("record_id.node", name)?)),
        Id::Route(range) => Ok(RecordId::Route(text("record_id.route", &range, RANGE)?)),
        Id::IpSet(set) => Ok(RecordId::IpSet(set_id(set)?)),
        Id::Policy(key) => Ok(RecordId::Policy(policy_key(key)?)),
        Id::Endpoint(key) => Ok(RecordId::Endpoint(EndpointKey {
            namespace: filled("record_id.endpoint.namespace", key.namespace)?,
            name: filled("record_id.endpoint.name", key.name)?,
        })),
        Id::HostEndpoint(name) => Ok(RecordId::HostEndpoint(filled("record_id.host_endpoint", name)?)),
    }
}

/// An ack as the server takes it: so many errors, and so much of each, as a node of this version says at most.
pub fn decode_ack(ack: wire::Ack) -> Result<Ack, Error> {
    let error = |mut error: wire::RecordError| {
        error.message.truncate(error.message.floor_char_boundary(REASON));
        Ok((decode_id(present("ack.errors.id", error.id)?)?, error.message))
    };
    let errors: Result<_, Error> = ack.errors.into_iter().take(ERRORS).map(error).collect();
    Ok(Ack {
        revision: ack.revision,
        errors: errors?,
        plan_us: ack.plan_us,
        commit_us: ack.commit_us,
        traceparent: ack.traceparent,
    })
}

/// Addresses of a pod as the server takes them: it keeps them, so none is longer than what it is the name of, and there are few.
pub fn decode_local_endpoint(endpoint: wire::LocalEndpoint) -> Result<LocalEndpoint, Error> {
    if endpoint.addresses.len() > ADDRESSES {
        let count = u32::try_from(endpoint.addresses.len()).unwrap_or(u32::MAX);
        return Err(number("local_endpoint.addresses", count, "0..=8 addresses"));
    }
    Ok(LocalEndpoint {
        key: EndpointKey {
            namespace: short("local_endpoint.namespace", filled("local_endpoint.namespace", endpoint.namespace)?)?,
            name: short("local_endpoint.name", filled("local_endpoint.name", endpoint.name)?)?,
        },
        addresses: list("local_endpoint.addresses", &endpoint.addresses, ADDRESS)?,
        uid: short("local_endpoint.uid", endpoint.uid)?,
    })
}

/// What is wrong with a node, as the server takes it: within the bounds, whatever was sent.
pub fn decode_problems(problems: wire::NodeProblems) -> Result<Vec<NodeProblem>, Error> {
    let decode = |problem: wire::NodeProblem| {
        let code = filled("problems.code", problem.code)?;
        Ok(NodeProblem { code, message: problem.message, degraded: problem.degraded })
    };
    let problems: Result<Vec<_>, Error> = problems.problems.into_iter().map(decode).collect();
    Ok(NodeProblem::bounded(problems?))
}

fn short(field: &'static str, value: String) -> Result<String, Error> {
    if value.len() > NAME {
        return Err(Error::Length { field, length: value.len(), rule: "0..=253" });
    }
    Ok(value)
}

const ADDRESS: &str = "an IP address";
const RANGE: &str = "an IP range ADDRESS/LENGTH";

fn present<T>(field: &'static str, value: Option<T>) -> Result<T, Error> {
    value.ok_or(Error::Missing { field })
}

fn filled(field: &'static str, value: String) -> Result<String, Error> {
    if value.is_empty() {
        return Err(Error::Missing { field });
    }
    Ok(value)
}

fn text<T: FromStr>(field: &'static str, value: &str, rule: &'static str) -> Result<T, Error> {
    value.parse().map_err(|_| Error::Text { field, value: shown(value), rule })
}

fn list<T: FromStr>(field: &'static str, values: &[String], rule: &'static str) -> Result<Vec<T>, Error> {
    values.iter().map(|value| text(field, value, rule)).collect()
}

fn shown(value: &str) -> String {
    value.chars().take(SHOWN).collect()
}

fn byte(field: &'static str, value: u32) -> Result<u8, Error> {
    u8::try_from(value).map_err(|_| number(field, value, "0..=255"))
}

fn port(field: &'static str, value: u32) -> Result<u16, Error> {
    u16::try_from(value).map_err(|_| number(field, value, "0..=65535"))
}

fn number(field: &'static str, value: u32, rule: &'static str) -> Error {
    Error::Number { field, value: value.into(), rule }
}

fn unknown(field: &'static str) -> Error {
    Error::Missing { field }
}

fn set_id(id: String) -> Result<SetId, Error> {
    filled("ip_set", id).map(SetId)
}

fn policy_key(key: wire::PolicyKey) -> Result<PolicyKey, Error> {
    let kind = PolicyKind::parse(&key.kind).ok_or_else(|| Error::Text {
        field: "policy.kind",
        value: shown(&key.kind),
        rule: "a kind of policy that this version knows",
    })?;
    Ok(PolicyKey { kind, namespace: key.namespace, name: filled("policy.name", key.name)? })
}

fn settings(value: wire::Settings) -> Result<FelixSettings, Error> {
    let endpoint_to_host = match value.endpoint_to_host() {
        wire::EndpointToHost::Drop => EndpointToHostAction::Drop,
        wire::EndpointToHost::Accept => EndpointToHostAction::Accept,
        wire::EndpointToHost::Return => EndpointToHostAction::Return,
        wire::EndpointToHost::Unspecified => return Err(unknown("settings.endpoint_to_host")),
    };
    Ok(FelixSettings {
        endpoint_to_host,
        vxlan_vni: value.vxlan_vni,
        vxlan_port: port("settings.vxlan_port", value.vxlan_port)?,
        vxlan_mtu: value.vxlan_mtu,
        vxlan_mtu_v6: value.vxlan_mtu_v6,
        checksum_offload_broken: value.checksum_offload_broken,
        nat_exclude_hosts: value.nat_exclude_hosts,
        allow_conntrack_invalid: value.allow_conntrack_invalid,
        log_rate: value.log_rate.map(log_rate).transpose()?,
        log_burst: match value.log_burst {
            0 => LogRate::BURST,
            burst => port("settings.log_burst", burst)?,
        },
        log_prefix: value.log_prefix,
        ipv6: value.ipv6,
        failsafe_inbound: match value.failsafe_inbound {
            None => Failsafe::default_inbound(),
            Some(ports) => failsafes(ports)?,
        },
        failsafe_outbound: match value.failsafe_outbound {
            None => Failsafe::default_outbound(),
            Some(ports) => failsafes(ports)?,
        },
    })
}

fn failsafes(value: wire::Failsafes) -> Result<Vec<Failsafe>, Error> {
    let failsafe = |value: wire::Failsafe| {
        Ok(Failsafe {
            protocol: byte("failsafe.protocol", value.protocol).map(Protocol)?,
            port: port("failsafe.port", value.port)?,
            net: match value.net.as_str() {
                "" => None,
                net => Some(text("failsafe.net", net, RANGE)?),
            },
        })
    };
    value.ports.into_iter().map(failsafe).collect()
}

fn log_rate(value: wire::LogRate) -> Result<LogRate, Error> {
    let unit = match value.unit() {
        wire::TimeUnit::Second => TimeUnit::Second,
        wire::TimeUnit::Minute => TimeUnit::Minute,
        wire::TimeUnit::Hour => TimeUnit::Hour,
        wire::TimeUnit::Day => TimeUnit::Day,
        wire::TimeUnit::Unspecified => return Err(unknown("settings.log_rate.unit")),
    };
    match u16::try_from(value.count) {
        Ok(count) if count > 0 => Ok(LogRate { count, unit }),
        _ => Err(number("settings.log_rate.count", value.count, "1..=65535")),
    }
}

fn encapsulation(value: i32) -> Result<Encapsulation, Error> {
    match wire::Encapsulation::try_from(value) {
        Ok(wire::Encapsulation::None) => Ok(Encapsulation::None),
        Ok(wire::Encapsulation::Vxlan) => Ok(Encapsulation::Vxlan),
        Ok(wire::Encapsulation::VxlanCrossSubnet) => Ok(Encapsulation::VxlanCrossSubnet),
        Ok(wire::Encapsulation::Ipip) => Ok(Encapsulation::Ipip),
        Ok(wire::Encapsulation::IpipCrossSubnet) => Ok(Encapsulation::IpipCrossSubnet),
        Ok(wire::Encapsulation::Unspecified) | Err(_) => Err(unknown("encapsulation")),
    }
}

fn pool(value: &wire::Pool) -> Result<PoolRecord, Error> {
    Ok(PoolRecord { nat_outgoing: value.nat_outgoing, encapsulation: encapsulation(value.encapsulation)? })
}

fn node(value: wire::Node) -> Result<NodeInfo, Error> {
    let optional = |value: String| (!value.is_empty()).then_some(value);
    let ipv4 = optional(value.ipv4);
    let ipv6 = optional(value.ipv6);
    let vtep = mac("node.vtep_mac", &value.vtep_mac)?
        .map(|mac| Vtep { address: Ipv4Addr::from_bits(value.vtep_address), mac });
    let vtep6 = match mac("node.vtep6_mac", &value.vtep6_mac)? {
        Some(mac) => {
            let bytes = bytes::<16>("node.vtep6_address", &value.vtep6_address, "16")?;
            Some(Vtep { address: Ipv6Addr::from(bytes), mac })
        }
        None => None,
    };
    Ok(NodeInfo {
        ipv4: ipv4.map(|net| text("node.ipv4", &net, RANGE)).transpose()?,
        ipv6: ipv6.map(|net| text("node.ipv6", &net, RANGE)).transpose()?,
        vtep,
        vtep6,
        labels: value.labels.into_iter().collect(),
        standing: Standing::default(),
    })
}

fn mac(field: &'static str, value: &[u8]) -> Result<Option<Mac>, Error> {
    if value.is_empty() { Ok(None) } else { bytes::<6>(field, value, "6").map(|mac| Some(Mac(mac))) }
}

fn bytes<const N: usize>(field: &'static str, value: &[u8], rule: &'static str) -> Result<[u8; N], Error> {
    value.try_into().map_err(|_| Error::Length { field, length: value.len(), rule })
}

fn route(value: wire::Route) -> Result<RouteRecord, Error> {
    Ok(RouteRecord { encapsulation: encapsulation(value.encapsulation)?, node: filled("route.node", value.node)? })
}

fn set_kind(value: i32) -> Result<SetKind, Error> {
    match wire::SetKind::try_from(value) {
        Ok(wire::SetKind::Net) => Ok(SetKind::Net),
        Ok(wire::SetKind::AddressPort) => Ok(SetKind::AddressPort),
        Ok(wire::SetKind::Unspecified) | Err(_) => Err(unknown("ip_set.kind")),
    }
}

fn ip_set(value: wire::IpSet) -> Result<IpSetRecord, Error> {
    let kind = set_kind(value.kind)?;
    Ok(IpSetRecord { kind, members: unpack(kind, &value.members.unwrap_or_default())? })
}

/// Ports and port sets that rules share.
type PortList = (Arc<[PortRange]>, Arc<[SetId]>);

fn policy(value: wire::Policy) -> Result<PolicyRecord, Error> {
    let list = |list: wire::PortList| Ok((ranges(&list.ports)?, sets(list.port_sets)?));
    let lists = value.port_lists.into_iter().map(list).collect::<Result<Vec<PortList>, Error>>()?;
    let rules = |rules: Vec<wire::Rule>| rules.into_iter().map(|one| rule(one, &lists)).collect::<Result<_, Error>>();
    Ok(PolicyRecord { ingress: rules(value.ingress)?, egress: rules(value.egress)? })
}

fn action(field: &'static str, value: i32) -> Result<Action, Error> {
    match wire::Action::try_from(value) {
        Ok(wire::Action::Allow) => Ok(Action::Allow),
        Ok(wire::Action::Deny) => Ok(Action::Deny),
        Ok(wire::Action::Log) => Ok(Action::Log),
        Ok(wire::Action::Pass) => Ok(Action::Pass),
        Ok(wire::Action::Unspecified) | Err(_) => Err(unknown(field)),
    }
}

fn rule(value: wire::Rule, lists: &[PortList]) -> Result<RuleRecord, Error> {
    let protocol = |field, value: Option<u32>| value.map(|value| byte(field, value).map(Protocol)).transpose();
    Ok(RuleRecord {
        action: action("rule.action", value.action)?,
        ip_version: match value.ip_version {
            0 => None,
            4 => Some(IpVersion::V4),
            6 => Some(IpVersion::V6),
            other => return Err(number("rule.ip_version", other, "0, 4 or 6")),
        },
        protocol: protocol("rule.protocol", value.protocol)?,
        not_protocol: protocol("rule.not_protocol", value.not_protocol)?,
        icmp: value.icmp.as_ref().map(icmp).transpose()?,
        not_icmp: value.not_icmp.as_ref().map(icmp).transpose()?,
        source: side(value.source.unwrap_or_default(), lists)?,
        destination: side(value.destination.unwrap_or_default(), lists)?,
    })
}

fn icmp(value: &wire::Icmp) -> Result<Icmp, Error> {
    let part = |field, value: Option<u32>| value.map(|value| byte(field, value)).transpose();
    Ok(Icmp { kind: part("icmp.type", value.r#type)?, code: part("icmp.code", value.code)? })
}

fn sets<T: FromIterator<SetId>>(sets: Vec<String>) -> Result<T, Error> {
    sets.into_iter().map(set_id).collect()
}

fn ranges<T: FromIterator<PortRange>>(ranges: &[wire::PortRange]) -> Result<T, Error> {
    ranges.iter().map(port_range).collect()
}

fn side(value: wire::Side, lists: &[PortList]) -> Result<SideMatch, Error> {
    let (ports, port_sets) = match value.port_list {
        None => (ranges(&value.ports)?, sets(value.port_sets)?),
        Some(place) => {
            let list = lists.get(place as usize).filter(|_| value.ports.is_empty() && value.port_sets.is_empty());
            list.cloned().ok_or_else(|| number("side.port_list", place, "the lists of the policy, alone"))?
        }
    };
    Ok(SideMatch {
        nets: list("side.nets", &value.nets, RANGE)?,
        not_nets: list("side.not_nets", &value.not_nets, RANGE)?,
        sets: sets(value.sets)?,
        not_sets: sets(value.not_sets)?,
        ports,
        port_sets,
        not_ports: ranges(&value.not_ports)?,
        not_port_sets: sets(value.not_port_sets)?,
        service_set: value.service_set.map(set_id).transpose()?,
    })
}

fn port_range(value: &wire::PortRange) -> Result<PortRange, Error> {
    let range = PortRange { first: port("ports.first", value.first)?, last: port("ports.last", value.last)? };
    if range.first > range.last {
        return Err(number("ports.first", value.first, "0..=last"));
    }
    Ok(range)
}

fn endpoint(value: wire::Endpoint) -> Result<EndpointRecord, Error> {
    Ok(EndpointRecord {
        addresses: list("endpoint.addresses", &value.addresses, ADDRESS)?,
        interface: filled("endpoint.interface", value.interface)?,
        uid: value.uid,
        tiers: tiers(value.tiers)?,
        unmatched: decided("endpoint.unmatched", value.unmatched)?,
    })
}

fn host_endpoint(value: wire::HostEndpoint) -> Result<HostEndpointRecord, Error> {
    use wire::host_endpoint::Interfaces;
    const INTERFACES: &str = "host_endpoint.interfaces";
    Ok(HostEndpointRecord {
        interfaces: match present(INTERFACES, value.interfaces)? {
            Interfaces::All(_) => HostInterfaces::All,
            Interfaces::Named(name) => HostInterfaces::Named(filled(INTERFACES, name)?),
            Interfaces::WithAddress(with) => {
                HostInterfaces::WithAddress(list(INTERFACES, &with.addresses, ADDRESS)?.into_iter().collect())
            }
        },
        normal: tiers(value.normal)?,
        forward: tiers(value.forward)?,
        pre_dnat: tiers(value.pre_dnat)?,
        untracked: tiers(value.untracked)?,
        unmatched: decided("host_endpoint.unmatched", value.unmatched)?,
    })
}

/// `Allow` or `Deny`.
fn decided(field: &'static str, value: i32) -> Result<Action, Error> {
    match action(field, value)? {
        decided @ (Action::Allow | Action::Deny) => Ok(decided),
        Action::Log | Action::Pass => Err(unknown(field)),
    }
}

fn tiers(value: Vec<wire::Tier>) -> Result<Vec<TierBinding>, Error> {
    value.into_iter().map(tier).collect()
}

fn tier(value: wire::Tier) -> Result<TierBinding, Error> {
    let keys = |keys: Vec<wire::PolicyKey>| keys.into_iter().map(policy_key).collect::<Result<_, Error>>();
    let default_action = match action("tier.default_action", value.default_action)? {
        decided @ (Action::Deny | Action::Pass) => decided,
        Action::Allow | Action::Log => return Err(unknown("tier.default_action")),
    };
    Ok(TierBinding {
        name: filled("tier.name", value.name)?,
        default_action,
        ingress: keys(value.ingress)?,
        egress: keys(value.egress)?,
    })
}
