//! Verdicts straight from the objects: slow, simple, and independent of the code under test.

use std::net::IpAddr;

use crate::reference::{Objects, Owner, order, tie};
use margay_api::endpoint::EndpointKey;
use margay_api::policy::{Policy, PolicyKey, Traffic};
use margay_api::rule::{Action, EntityMatch, IpVersion, Port, Protocol, Rule};
use margay_api::selector::Selector;
use margay_calc::evaluate::{Direction, Packet};

/// One side of a packet.
#[derive(Clone, Copy)]
struct Side<'a> {
    address: IpAddr,
    port: u16,
    protocol: Protocol,
    is_destination: bool,
    /// Protocol of the rule, if it has one.
    limit: Option<Protocol>,
    /// The policy's selector, if this is the side of its own endpoint.
    subject: Option<&'a Selector>,
}

/// Computes verdicts from objects, without sets, records or indexes.
pub struct Naive<'a>(pub &'a Objects);

impl Naive<'_> {
    /// Verdict on a packet that passes the endpoint.
    pub fn verdict(&self, key: &EndpointKey, direction: Direction, packet: &Packet) -> Action {
        let Some(endpoint) = self
            .0
            .endpoints
            .get(key)
            .filter(|endpoint| !endpoint.node.is_empty())
        else {
            return Action::Deny;
        };
        let labels = self.0.labels(key, endpoint);
        let is_for_workloads =
            |policy: &Policy| matches!(policy.traffic, Traffic::Normal | Traffic::Forwarded);
        let policies = self.0.policies.iter().filter(|(_, policy)| {
            is_for_workloads(policy)
                && applies(policy, direction)
                && policy.selector.matches(&labels)
        });
        match self.by_tiers(policies.collect(), direction, packet, true) {
            Some(action) => action,
            None if self.0.namespaces.contains_key(&key.namespace) => Action::Allow,
            None => Action::Deny,
        }
    }

    /// Verdict of the tiers; `has_end` is true if the end of a tier decides.
    pub fn by_tiers(
        &self,
        mut policies: Vec<(&PolicyKey, &Policy)>,
        direction: Direction,
        packet: &Packet,
        has_end: bool,
    ) -> Option<Action> {
        policies.sort_by_key(|(key, policy)| (order(policy.order), tie(key)));
        let mut existing: Vec<_> = self.0.tiers.iter().collect();
        existing.sort_by_key(|(name, tier)| (order(tier.order), *name));
        let mut tiers: Vec<(&str, Action)> = existing
            .into_iter()
            .map(|(name, tier)| (name.as_str(), tier.default_action))
            .collect();
        for name in ["default", "early", "late"] {
            if !self.0.tiers.contains_key(name) {
                tiers.push((name, Action::Deny));
            }
        }
        for (tier, default_action) in tiers {
            let mut policies = policies
                .iter()
                .filter(|(_, policy)| policy.tier == tier)
                .peekable();
            if policies.peek().is_none() {
                continue;
            }
            let rules = policies.flat_map(|(_, policy)| {
                let rules = match direction {
                    Direction::Ingress => &policy.ingress,
                    Direction::Egress => &policy.egress,
                };
                rules.iter().map(move |rule| (policy, rule))
            });
            let decided = rules
                .filter(|(_, rule)| rule.action != Action::Log)
                .find(|(policy, rule)| self.matches(rule, (direction, &policy.selector), packet));
            let end = if has_end {
                default_action
            } else {
                Action::Pass
            };
            match decided.map_or(end, |(_, rule)| rule.action) {
                Action::Pass => {}
                action => return Some(action),
            }
        }
        None
    }

    fn matches(&self, rule: &Rule, local: (Direction, &Selector), packet: &Packet) -> bool {
        let version = match packet.source {
            IpAddr::V4(_) => IpVersion::V4,
            IpAddr::V6(_) => IpVersion::V6,
        };
        let is_icmp = packet.protocol
            == if packet.source.is_ipv4() {
                Protocol(1)
            } else {
                Protocol(58)
            };
        let icmp = |icmp: margay_api::rule::Icmp| {
            is_icmp
                && icmp.kind.unwrap_or(packet.icmp.0) == packet.icmp.0
                && icmp.code.unwrap_or(packet.icmp.1) == packet.icmp.1
        };
        let (direction, subject) = local;
        let source = Side {
            address: packet.source,
            port: packet.source_port,
            protocol: packet.protocol,
            is_destination: false,
            limit: rule.protocol,
            subject: (direction == Direction::Egress).then_some(subject),
        };
        let destination = Side {
            address: packet.destination,
            port: packet.destination_port,
            is_destination: true,
            subject: (direction == Direction::Ingress).then_some(subject),
            ..source
        };
        let criteria = [
            rule.ip_version.unwrap_or(version) == version,
            rule.protocol.unwrap_or(packet.protocol) == packet.protocol,
            rule.not_protocol != Some(packet.protocol),
            rule.icmp.is_none_or(icmp),
            !rule.not_icmp.is_some_and(icmp),
            self.meets(&rule.source, source),
            self.meets(&rule.destination, destination),
        ];
        criteria.into_iter().all(|met| met)
    }

    fn meets(&self, entity: &EntityMatch, side: Side<'_>) -> bool {
        let Side {
            address,
            port,
            protocol,
            is_destination,
            limit,
            subject,
        } = side;
        let in_nets = |nets: &[ipnet::IpNet]| nets.iter().any(|net| net.contains(&address));
        let port_matches = |wanted: &Port| {
            protocol.has_ports()
                && match wanted {
                    Port::Range(range) => range.contains(port),
                    Port::Named(name) => self.owners(address).any(|owner| {
                        let selector = entity.selector.as_ref().or(subject);
                        selector.is_none_or(|selector| selector.matches(&owner.labels))
                            && limit.is_none_or(|limit| limit == protocol)
                            && owner.ports.iter().any(|declared| {
                                declared.name == *name
                                    && declared.port == port
                                    && declared.protocol == protocol
                            })
                    }),
                }
        };
        let service = entity.service.as_ref().is_none_or(|service| {
            let backends = self.0.services.get(service).into_iter().flatten();
            { backends }.any(|backend| {
                backend.address == address
                    && (!is_destination
                        || protocol.has_ports()
                            && (backend.protocol, backend.port) == (protocol, port))
            })
        });
        (entity.nets.is_empty() || in_nets(&entity.nets))
            && !in_nets(&entity.not_nets)
            && entity
                .selector
                .as_ref()
                .is_none_or(|selector| self.selects(selector, address))
            && !entity
                .not_selector
                .as_ref()
                .is_some_and(|selector| self.selects(selector, address))
            && (entity.ports.is_empty() || entity.ports.iter().any(port_matches))
            && !entity.not_ports.iter().any(port_matches)
            && entity
                .nodes
                .as_ref()
                .is_none_or(|selector| self.is_node(selector, address))
            && service
    }

    fn is_node(&self, selector: &Selector, address: IpAddr) -> bool {
        let selected = self
            .0
            .nodes
            .iter()
            .filter(|(_, node)| selector.matches(&node.labels));
        { selected }
            .map(|(name, node)| self.0.believed(name, node))
            .any(|node| {
                node.ipv4
                    .is_some_and(|net| IpAddr::V4(net.addr()) == address)
                    || node
                        .ipv6
                        .is_some_and(|net| IpAddr::V6(net.addr()) == address)
            })
    }

    fn selects(&self, selector: &Selector, address: IpAddr) -> bool {
        let endpoint = self
            .owners(address)
            .any(|owner| selector.matches(&owner.labels));
        let mut sets = self.0.network_sets.iter();
        endpoint
            || sets.any(|(key, set)| {
                set.nets.iter().any(|net| net.contains(&address))
                    && selector.matches(&self.0.set_labels(key, set))
            })
    }

    fn owners(&self, address: IpAddr) -> impl Iterator<Item = Owner<'_>> {
        self.0
            .owners()
            .into_iter()
            .filter(move |owner| owner.addresses.contains(&address))
    }
}

/// Returns true if the policy applies to packets in that direction.
pub fn applies(policy: &Policy, direction: Direction) -> bool {
    match direction {
        Direction::Ingress => policy.applies_ingress,
        Direction::Egress => policy.applies_egress,
    }
}
