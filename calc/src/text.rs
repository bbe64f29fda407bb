//! Records as text for people: golden tests, dumps of a node's view, messages of failing tests.
//!
//! A record is one line, or a line with indented parts below it. Absent criteria and settings that
//! have their default are not printed.

mod bgp;

use std::fmt::{self, Display, Write};

use margay_api::network::{Encapsulation, NodeInfo};
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_api::settings::{EndpointToHostAction, Failsafe, FelixSettings, SettingValue};

use crate::evaluate::{Step, Verdict};
use crate::flush::{Audience, Change, Flush};
use crate::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, Member, PolicyRecord, Record, RecordId,
    RuleRecord, SetKind, SideMatch, TierBinding,
};

/// A record with its id, ending in a line break.
pub fn record(id: &RecordId, record: &Record) -> String {
    let mut text = id_text(id);
    match record {
        Record::Settings(settings) => text += &settings_text(settings),
        Record::Pool(pool) => {
            text += encapsulation(pool.encapsulation);
            text += if pool.nat_outgoing { " nat" } else { "" };
        }
        Record::Node(node) => text += &node_text(node),
        Record::Route(route) => {
            text += &format!(" via {}{}", route.node, encapsulation(route.encapsulation));
        }
        Record::IpSet(set) => {
            text += match set.kind {
                SetKind::Net => " net",
                SetKind::AddressPort => " address-port",
            };
            text += &format!(" [{}]", joined(set.members.iter().map(member), ", "));
        }
        Record::Policy(policy) => text += &policy_text(policy),
        Record::Endpoint(endpoint) => text += &endpoint_text(endpoint),
        Record::HostEndpoint(endpoint) => text += &host_endpoint_text(endpoint),
        Record::Bgp(record) => text += &bgp::bgp_text(record),
    }
    text + "\n"
}

/// A flush, one line per record.
pub fn flush(flush: &Flush) -> String {
    let mut text = String::new();
    for (id, change) in &flush.records {
        text += &id_text(id);
        let what = match &change.change {
            Change::Same => String::from("same"),
            Change::Value => String::from("value"),
            Change::Members(delta) => {
                let added = delta
                    .added
                    .iter()
                    .map(|added| format!("+{}", member(added)));
                let removed = delta
                    .removed
                    .iter()
                    .map(|removed| format!("-{}", member(removed)));
                joined(added.chain(removed), " ")
            }
        };
        let parts = [
            ("gained", &change.gained, String::new()),
            ("kept", &change.kept, format!(" ({what})")),
            ("lost", &change.lost, String::new()),
        ];
        for (name, audience, what) in parts
            .into_iter()
            .filter(|(_, audience, _)| !audience.is_empty())
        {
            text += &format!(" {name} by {}{what}", audience_text(audience));
        }
        text += "\n";
    }
    text
}

/// A verdict, one line per step.
pub fn verdict(verdict: &Verdict) -> String {
    let steps = verdict.trace.iter().map(|step| match step {
        Step::Rule {
            tier,
            policy,
            rule,
            action,
        } => {
            format!(
                "tier {tier}: {policy} rule {rule}: {}\n",
                action_text(*action)
            )
        }
        Step::TierEnd { tier, action } => format!("tier {tier}: end: {}\n", action_text(*action)),
        Step::Failsafe(action) => format!("failsafe port: {}\n", action_text(*action)),
        Step::Unmatched(action) => format!("no tier decided: {}\n", action_text(*action)),
        Step::Missing(id) => format!("{} is missing: deny\n", id_text(id)),
    });
    steps.collect()
}

/// An id: kind and name.
pub fn id_text(id: &RecordId) -> String {
    match id {
        RecordId::Settings => String::from("settings"),
        RecordId::Pool(net) => format!("pool {net}"),
        RecordId::Node(name) => format!("node {name}"),
        RecordId::Route(net) => format!("route {net}"),
        RecordId::IpSet(set) => format!("set {set}"),
        RecordId::Policy(key) => format!("policy {key}"),
        RecordId::Endpoint(key) => format!("endpoint {key}"),
        RecordId::HostEndpoint(name) => format!("host-endpoint {name}"),
        RecordId::Bgp => String::from("bgp"),
    }
}

fn joined(parts: impl Iterator<Item = impl Display>, separator: &str) -> String {
    let mut text = String::new();
    for part in parts {
        if !text.is_empty() {
            text += separator;
        }
        // Writing to a string cannot fail.
        let _ = write!(text, "{part}");
    }
    text
}

fn audience_text(audience: &Audience) -> String {
    match audience {
        Audience::All => String::from("all"),
        Audience::Nodes(nodes) => joined(nodes.iter(), ","),
    }
}

fn action_text(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Deny => "deny",
        Action::Log => "log",
        Action::Pass => "pass",
    }
}

fn encapsulation(encapsulation: Encapsulation) -> &'static str {
    match encapsulation {
        Encapsulation::None => "",
        Encapsulation::Vxlan => " vxlan",
        Encapsulation::VxlanCrossSubnet => " vxlan-cross-subnet",
        Encapsulation::Ipip => " ipip",
        Encapsulation::IpipCrossSubnet => " ipip-cross-subnet",
    }
}

/// Settings that differ from their defaults.
fn settings_text(settings: &FelixSettings) -> String {
    let settings = settings.fields();
    let other = settings.iter().filter(|setting| !setting.is_default);
    other
        .map(|setting| format!(" {} {}", setting.name, setting_text(setting.value)))
        .collect()
}

fn setting_text(value: SettingValue<'_>) -> String {
    match value {
        SettingValue::Number(number) => number.to_string(),
        SettingValue::Flag(is_set) => is_set.to_string(),
        SettingValue::Text(text) => format!("{text:?}"),
        SettingValue::ToHost(EndpointToHostAction::Drop) => String::from("drop"),
        SettingValue::ToHost(EndpointToHostAction::Accept) => String::from("accept"),
        SettingValue::ToHost(EndpointToHostAction::Return) => String::from("return"),
        SettingValue::Rate(rate) => rate.map_or(String::from("none"), |rate| rate.to_string()),
        SettingValue::Failsafes(ports) => format!("[{}]", joined(ports.iter().map(failsafe), ", ")),
    }
}

fn failsafe(failsafe: &Failsafe) -> String {
    let Failsafe {
        protocol,
        port,
        net,
    } = failsafe;
    let net = net.map(|net| format!(" {net}")).unwrap_or_default();
    format!("{}:{port}{net}", protocol_text(*protocol))
}

fn node_text(node: &NodeInfo) -> String {
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
    } = node;
    let mut text = String::new();
    ipv4.iter().for_each(|net| text += &format!(" {net}"));
    ipv6.iter().for_each(|net| text += &format!(" {net}"));
    vtep.iter()
        .for_each(|vtep| text += &format!(" vtep {} {}", vtep.address, vtep.mac));
    vtep6
        .iter()
        .for_each(|vtep| text += &format!(" vtep {} {}", vtep.address, vtep.mac));
    if let Some(bgp) = bgp {
        text += &format!(" as {} port {}", bgp.asn, bgp.listen_port);
        let cluster = bgp.cluster_id.map(|cluster| format!(" cluster {cluster}"));
        text += &cluster.unwrap_or_default();
    }
    ipip.iter()
        .for_each(|address| text += &format!(" ipip {address}"));
    labels
        .iter()
        .for_each(|(key, value)| text += &format!(" {key}={value}"));
    text
}

fn member(member: &Member) -> String {
    match member {
        Member::Net(net) if net.prefix_len() == net.max_prefix_len() => net.addr().to_string(),
        Member::Net(net) => net.to_string(),
        Member::AddressPort(address, protocol, port) => {
            format!("{address}:{}:{port}", protocol_text(*protocol))
        }
    }
}

fn protocol_text(protocol: Protocol) -> String {
    match protocol {
        Protocol::TCP => String::from("tcp"),
        Protocol::UDP => String::from("udp"),
        Protocol::ICMP => String::from("icmp"),
        Protocol::ICMPV6 => String::from("icmpv6"),
        Protocol::SCTP => String::from("sctp"),
        Protocol::UDPLITE => String::from("udplite"),
        Protocol(number) => number.to_string(),
    }
}

fn policy_text(policy: &PolicyRecord) -> String {
    let PolicyRecord { ingress, egress } = policy;
    let ingress = ingress.iter().map(|rule| ("in", rule));
    let egress = egress.iter().map(|rule| ("out", rule));
    let rules = ingress
        .chain(egress)
        .map(|(direction, rule)| format!("\n  {direction} {}", RuleText(rule)));
    rules.collect()
}

fn endpoint_text(endpoint: &EndpointRecord) -> String {
    let EndpointRecord {
        interface,
        uid,
        addresses,
        tiers,
        unmatched,
    } = endpoint;
    let mut text = format!(
        " {interface} [{}] else {}",
        joined(addresses.iter(), ", "),
        action_text(*unmatched)
    );
    if !uid.is_empty() {
        text += &format!(" uid {uid}");
    }
    tiers
        .iter()
        .for_each(|tier| text += &tier_text("", tier, true));
    text
}

fn host_endpoint_text(endpoint: &HostEndpointRecord) -> String {
    let HostEndpointRecord {
        interfaces,
        normal,
        forward,
        pre_dnat,
        untracked,
        unmatched,
    } = endpoint;
    let interfaces = match interfaces {
        HostInterfaces::All => String::from("*"),
        HostInterfaces::Named(name) => name.clone(),
        HostInterfaces::WithAddress(addresses) => format!("[{}]", joined(addresses.iter(), ", ")),
    };
    let mut text = format!(" {interfaces} else {}", action_text(*unmatched));
    let kinds = [
        ("untracked ", untracked, false),
        ("pre-dnat ", pre_dnat, false),
        ("", normal, true),
        ("forward ", forward, true),
    ];
    for (kind, tiers, has_end) in kinds {
        tiers
            .iter()
            .for_each(|tier| text += &tier_text(kind, tier, has_end));
    }
    text
}

/// A tier with its policies; `has_end` is true if its end decides.
fn tier_text(kind: &str, tier: &TierBinding, has_end: bool) -> String {
    let mut text = format!("\n  {kind}tier {}", tier.name);
    if has_end {
        text += &format!(" else {}", action_text(tier.default_action));
    }
    let lists: [(&str, &[PolicyKey]); 2] = [("in", &tier.ingress), ("out", &tier.egress)];
    for (direction, policies) in lists
        .into_iter()
        .filter(|(_, policies)| !policies.is_empty())
    {
        text += &format!("\n    {direction} {}", joined(policies.iter(), ", "));
    }
    text
}

/// A rule: its action, then its criteria.
struct RuleText<'a>(&'a RuleRecord);

impl Display for RuleText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RuleRecord {
            action,
            ip_version,
            protocol,
            not_protocol,
            icmp,
            not_icmp,
            source,
            destination,
        } = self.0;
        f.write_str(action_text(*action))?;
        match ip_version {
            Some(IpVersion::V4) => f.write_str(" ip4")?,
            Some(IpVersion::V6) => f.write_str(" ip6")?,
            None => {}
        }
        protocol.map_or(Ok(()), |protocol| write!(f, " {}", protocol_text(protocol)))?;
        not_protocol.map_or(Ok(()), |protocol| {
            write!(f, " !{}", protocol_text(protocol))
        })?;
        icmp.map_or(Ok(()), |icmp| write!(f, " icmp-type {}", icmp_text(icmp)))?;
        not_icmp.map_or(Ok(()), |icmp| write!(f, " !icmp-type {}", icmp_text(icmp)))?;
        side(f, "from", source)?;
        side(f, "to", destination)
    }
}

fn icmp_text(icmp: Icmp) -> String {
    let part = |part: Option<u8>| part.map_or(String::from("any"), |part| part.to_string());
    format!("{}/{}", part(icmp.kind), part(icmp.code))
}

fn side(f: &mut fmt::Formatter<'_>, name: &str, side: &SideMatch) -> fmt::Result {
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
    } = side;
    let both = |ranges: &[PortRange], sets: &[crate::model::SetId]| {
        let ranges = ranges.iter().map(|range| match range.first == range.last {
            true => range.first.to_string(),
            false => format!("{}-{}", range.first, range.last),
        });
        joined(ranges.chain(sets.iter().map(ToString::to_string)), ",")
    };
    let parts = [
        ("net", joined(nets.iter(), ",")),
        ("!net", joined(not_nets.iter(), ",")),
        ("set", joined(sets.iter(), "&")),
        ("!set", joined(not_sets.iter(), ",")),
        ("port", both(ports, port_sets)),
        ("!port", both(not_ports, not_port_sets)),
        ("service", joined(service_set.iter(), ",")),
    ];
    let mut parts = parts.iter().filter(|(_, what)| !what.is_empty()).peekable();
    if parts.peek().is_some() {
        write!(f, " {name}")?;
    }
    parts.try_for_each(|(criterion, what)| write!(f, " {criterion} {what}"))
}
