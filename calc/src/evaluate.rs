//! Reference evaluator: the verdict on a packet, from records alone. Every compiled form must agree
//! with it.
//!
//! A failed lookup denies: an endpoint without a record, or a policy or set that is referred to and
//! missing.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, Icmp, IpVersion, Protocol};
use margay_api::settings::{Failsafe, FelixSettings};

use crate::model::{
    EndpointRecord, HostEndpointRecord, IpSetRecord, Member, PolicyRecord, Record, RecordId,
    RuleRecord, SetId, SideMatch, TierBinding,
};

/// First packet of a connection, or one that belongs to none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address; of the same IP version.
    pub destination: IpAddr,
    /// IP protocol.
    pub protocol: Protocol,
    /// Source port; ignored for protocols without ports.
    pub source_port: u16,
    /// Destination port; ignored for protocols without ports.
    pub destination_port: u16,
    /// ICMP type and code; ignored for other protocols.
    pub icmp: (u8, u8),
}

/// Stages at which a host endpoint's policies see a packet, in the order in which it passes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostStage {
    /// Before connection tracking.
    Untracked,
    /// Before DNAT; incoming packets only.
    PreDnat,
    /// Packets from or to the host itself.
    Normal,
    /// Forwarded packets.
    Forward,
}

/// Direction of a packet as seen from its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the endpoint.
    Ingress,
    /// From the endpoint.
    Egress,
}

/// One step of an evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A rule that matched.
    Rule {
        /// Tier of the policy.
        tier: String,
        /// The policy.
        policy: PolicyKey,
        /// Position of the rule among those of its direction, from 0.
        rule: usize,
        /// Action of the rule.
        action: Action,
    },
    /// The tier has policies for the packet, and none of them decided.
    TierEnd {
        /// The tier.
        tier: String,
        /// Default action of the tier.
        action: Action,
    },
    /// A failsafe port, which no policy applies to.
    Failsafe(Action),
    /// No tier decided.
    Unmatched(Action),
    /// A record that is referred to does not exist.
    Missing(RecordId),
}

/// Verdict on a packet, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `Allow` or `Deny`; at a stage that precedes others also `Pass`: the packet continues to
    /// them.
    pub action: Action,
    /// Steps of the evaluation; the last one decided.
    pub trace: Vec<Step>,
}

/// Verdicts on a connection between two endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Verdict at the source.
    pub egress: Verdict,
    /// Verdict at the destination.
    pub ingress: Verdict,
}

impl Connection {
    /// Returns true if both ends allow it.
    pub fn is_allowed(&self) -> bool {
        self.egress.action == Action::Allow && self.ingress.action == Action::Allow
    }
}

/// Source of records.
pub trait Records {
    /// The value of a record.
    fn record(&self, id: &RecordId) -> Option<Cow<'_, Record>>;
}

impl Records for BTreeMap<RecordId, Record> {
    fn record(&self, id: &RecordId) -> Option<Cow<'_, Record>> {
        self.get(id).map(Cow::Borrowed)
    }
}

/// Verdict of an endpoint's policies on a packet that passes it.
pub fn evaluate(
    records: &impl Records,
    endpoint: &EndpointKey,
    direction: Direction,
    packet: &Packet,
) -> Verdict {
    let mut trace = Vec::new();
    let action =
        decide(records, endpoint, direction, packet, &mut trace).unwrap_or_else(|missing| {
            trace.push(Step::Missing(missing));
            Action::Deny
        });
    Verdict { action, trace }
}

/// Verdict of a host endpoint on a packet at one stage; `Ingress` is to the node.
pub fn evaluate_host(
    records: &impl Records,
    endpoint: &str,
    stage: HostStage,
    direction: Direction,
    packet: &Packet,
) -> Verdict {
    if is_failsafe(records, stage, direction, packet) {
        let action = if stage == HostStage::Normal {
            Action::Allow
        } else {
            Action::Pass
        };
        return Verdict {
            action,
            trace: vec![Step::Failsafe(action)],
        };
    }
    let mut trace = Vec::new();
    let action = decide_host(records, endpoint, stage, direction, packet, &mut trace)
        .unwrap_or_else(|missing| {
            trace.push(Step::Missing(missing));
            Action::Deny
        });
    Verdict { action, trace }
}

/// Verdict on a connection between two endpoints, by their first addresses of a common IP version.
/// `None` if there is none, or an endpoint is missing.
pub fn connect(
    records: &impl Records,
    source: &EndpointKey,
    destination: &EndpointKey,
    protocol: Protocol,
    port: u16,
) -> Option<Connection> {
    let addresses = |key: &EndpointKey| {
        endpoint_record(records, key)
            .ok()
            .map(|endpoint| endpoint.into_owned().addresses)
    };
    let (from, to) = (addresses(source)?, addresses(destination)?);
    let pairs = from
        .iter()
        .flat_map(|from| to.iter().map(move |to| (*from, *to)));
    let (from, to) = { pairs }.find(|(from, to)| from.is_ipv4() == to.is_ipv4())?;
    let packet = Packet {
        source: from,
        destination: to,
        protocol,
        // First port of the dynamic range (RFC 6335, section 6), as a client would use.
        source_port: 49_152,
        destination_port: port,
        icmp: (8, 0),
    };
    Some(Connection {
        egress: evaluate(records, source, Direction::Egress, &packet),
        ingress: evaluate(records, destination, Direction::Ingress, &packet),
    })
}

type MissingRecord = RecordId;

fn decide(
    records: &impl Records,
    endpoint: &EndpointKey,
    direction: Direction,
    packet: &Packet,
    trace: &mut Vec<Step>,
) -> Result<Action, MissingRecord> {
    let endpoint = endpoint_record(records, endpoint)?;
    for tier in &endpoint.tiers {
        match in_tier(records, tier, tier.default_action, direction, packet, trace)? {
            Action::Pass | Action::Log => {}
            decided => return Ok(decided),
        }
    }
    trace.push(Step::Unmatched(endpoint.unmatched));
    Ok(endpoint.unmatched)
}

fn decide_host(
    records: &impl Records,
    endpoint: &str,
    stage: HostStage,
    direction: Direction,
    packet: &Packet,
    trace: &mut Vec<Step>,
) -> Result<Action, MissingRecord> {
    let endpoint = host_record(records, endpoint)?;
    let (tiers, unmatched) = match stage {
        HostStage::Untracked => (&endpoint.untracked, Action::Pass),
        HostStage::PreDnat => (&endpoint.pre_dnat, Action::Pass),
        HostStage::Normal => (&endpoint.normal, endpoint.unmatched),
        HostStage::Forward => (&endpoint.forward, Action::Allow),
    };
    for tier in tiers {
        let end = if unmatched == Action::Pass {
            Action::Pass
        } else {
            tier.default_action
        };
        match in_tier(records, tier, end, direction, packet, trace)? {
            Action::Pass | Action::Log => {}
            decided => return Ok(decided),
        }
    }
    trace.push(Step::Unmatched(unmatched));
    Ok(unmatched)
}

/// Returns true for failsafe ports. Before connection tracking replies cannot be recognised, so
/// both directions are exempt there.
fn is_failsafe(
    records: &impl Records,
    stage: HostStage,
    direction: Direction,
    packet: &Packet,
) -> bool {
    let settings = records.record(&RecordId::Settings);
    let built_in = FelixSettings::default();
    let settings = match settings.as_deref() {
        Some(Record::Settings(settings)) => settings,
        _ => &built_in,
    };
    let spares = |failsafes: &[Failsafe], port: u16, other: IpAddr| {
        failsafes.iter().any(
            |Failsafe {
                 protocol,
                 port: spared,
                 net,
             }| {
                *protocol == packet.protocol
                    && *spared == port
                    && net.is_none_or(|net| net.contains(&other))
            },
        )
    };
    let (inbound, outbound) = (&settings.failsafe_inbound, &settings.failsafe_outbound);
    let (asked, answered, other) = match direction {
        Direction::Ingress => (inbound, outbound, packet.source),
        Direction::Egress => (outbound, inbound, packet.destination),
    };
    match stage {
        HostStage::Forward => false,
        HostStage::PreDnat | HostStage::Normal => spares(asked, packet.destination_port, other),
        HostStage::Untracked => {
            spares(asked, packet.destination_port, other)
                || spares(answered, packet.source_port, other)
        }
    }
}

/// Returns `Allow`, `Deny`, or `Pass` to the next tier. `end` is the action at the end of the tier.
fn in_tier(
    records: &impl Records,
    tier: &TierBinding,
    end: Action,
    direction: Direction,
    packet: &Packet,
    trace: &mut Vec<Step>,
) -> Result<Action, MissingRecord> {
    let policies = match direction {
        Direction::Ingress => &tier.ingress,
        Direction::Egress => &tier.egress,
    };
    if policies.is_empty() {
        return Ok(Action::Pass);
    }
    for key in policies {
        let policy = policy_record(records, key)?;
        let rules = match direction {
            Direction::Ingress => &policy.ingress,
            Direction::Egress => &policy.egress,
        };
        for (position, rule) in rules.iter().enumerate() {
            if !matches_rule(records, rule, packet)? {
                continue;
            }
            trace.push(Step::Rule {
                tier: tier.name.clone(),
                policy: key.clone(),
                rule: position,
                action: rule.action,
            });
            if rule.action != Action::Log {
                return Ok(rule.action);
            }
        }
    }
    trace.push(Step::TierEnd {
        tier: tier.name.clone(),
        action: end,
    });
    Ok(end)
}

fn matches_rule(
    records: &impl Records,
    rule: &RuleRecord,
    packet: &Packet,
) -> Result<bool, MissingRecord> {
    let version = match packet.destination {
        IpAddr::V4(_) => IpVersion::V4,
        IpAddr::V6(_) => IpVersion::V6,
    };
    let is_icmp = |icmp: Icmp| {
        packet.protocol == Protocol::icmp_of(version)
            && icmp.kind.is_none_or(|kind| kind == packet.icmp.0)
            && icmp.code.is_none_or(|code| code == packet.icmp.1)
    };
    let header = rule.ip_version.is_none_or(|wanted| wanted == version)
        && rule.protocol.is_none_or(|wanted| wanted == packet.protocol)
        && rule
            .not_protocol
            .is_none_or(|unwanted| unwanted != packet.protocol)
        && rule.icmp.is_none_or(is_icmp)
        && !rule.not_icmp.is_some_and(is_icmp);
    let source = PacketSide {
        address: packet.source,
        port: packet.source_port,
        protocol: packet.protocol,
    };
    let destination = PacketSide {
        address: packet.destination,
        port: packet.destination_port,
        protocol: packet.protocol,
    };
    Ok(header
        && source.matches(records, &rule.source)?
        && destination.matches(records, &rule.destination)?)
}

/// One side of a packet.
struct PacketSide {
    address: IpAddr,
    port: u16,
    protocol: Protocol,
}

impl PacketSide {
    fn matches(&self, records: &impl Records, side: &SideMatch) -> Result<bool, MissingRecord> {
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
        let is_within = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&self.address));
        let has_port = |ports: &[margay_api::rule::PortRange]| {
            self.protocol.has_ports() && ports.iter().any(|range| range.contains(self.port))
        };
        let mut met = (nets.is_empty() || is_within(nets)) && !is_within(not_nets);
        for set in sets {
            met &= self.is_in(records, set)?;
        }
        for set in not_sets {
            met &= !self.is_in(records, set)?;
        }
        let mut wanted = (ports.is_empty() && port_sets.is_empty()) || has_port(ports);
        for set in port_sets.iter() {
            wanted |= self.is_in(records, set)?;
        }
        let mut unwanted = has_port(not_ports);
        for set in not_port_sets {
            unwanted |= self.is_in(records, set)?;
        }
        if let Some(set) = service_set {
            met &= self.is_in(records, set)?;
        }
        Ok(met && wanted && !unwanted)
    }

    /// Returns true if the set contains the address, or address, protocol and port.
    fn is_in(&self, records: &impl Records, id: &SetId) -> Result<bool, MissingRecord> {
        let id = RecordId::IpSet(id.clone());
        let record = records.record(&id);
        let Some(Record::IpSet(IpSetRecord { kind: _, members })) = record.as_deref() else {
            return Err(id);
        };
        let with_port = Member::AddressPort(self.address, self.protocol, self.port);
        // Sets contain ranges, so the address is looked up with every prefix length.
        let mut around = IpNet::from(self.address);
        loop {
            if members.contains(&Member::Net(around)) {
                return Ok(true);
            }
            match around.supernet() {
                Some(wider) => around = wider,
                None => return Ok(self.protocol.has_ports() && members.contains(&with_port)),
            }
        }
    }
}

fn endpoint_record<'a>(
    records: &'a impl Records,
    key: &EndpointKey,
) -> Result<Cow<'a, EndpointRecord>, MissingRecord> {
    let id = RecordId::Endpoint(key.clone());
    match records.record(&id) {
        Some(Cow::Borrowed(Record::Endpoint(endpoint))) => Ok(Cow::Borrowed(endpoint)),
        Some(Cow::Owned(Record::Endpoint(endpoint))) => Ok(Cow::Owned(endpoint)),
        _ => Err(id),
    }
}

fn host_record<'a>(
    records: &'a impl Records,
    name: &str,
) -> Result<Cow<'a, HostEndpointRecord>, MissingRecord> {
    let id = RecordId::HostEndpoint(name.to_owned());
    match records.record(&id) {
        Some(Cow::Borrowed(Record::HostEndpoint(endpoint))) => Ok(Cow::Borrowed(endpoint)),
        Some(Cow::Owned(Record::HostEndpoint(endpoint))) => Ok(Cow::Owned(endpoint)),
        _ => Err(id),
    }
}

fn policy_record<'a>(
    records: &'a impl Records,
    key: &PolicyKey,
) -> Result<Cow<'a, PolicyRecord>, MissingRecord> {
    let id = RecordId::Policy(key.clone());
    match records.record(&id) {
        Some(Cow::Borrowed(Record::Policy(policy))) => Ok(Cow::Borrowed(policy)),
        Some(Cow::Owned(Record::Policy(policy))) => Ok(Cow::Owned(policy)),
        _ => Err(id),
    }
}
