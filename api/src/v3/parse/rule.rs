//! Parses rules: every criterion is checked by itself and against the others, selectors are
//! rewritten to effective labels.

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::limits::Budget;
use crate::meta::{NamespacedName, is_qualified_name};
use crate::problem::Problems;
use crate::rule::{Action, EntityMatch, Icmp, IpVersion, Port, PortRange, Protocol, Rule};
use crate::selector::{Node, Selector};
use crate::v3::rule::{EntityRule, IcmpSpec, RuleMetadata, RuleSpec, ServiceMatch};

use super::scope;

/// The list of a policy that a rule belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// Names of protocols, in any case.
const PROTOCOLS: [(&str, Protocol); 6] = [
    ("TCP", Protocol::TCP),
    ("UDP", Protocol::UDP),
    ("ICMP", Protocol::ICMP),
    ("ICMPv6", Protocol::ICMPV6),
    ("SCTP", Protocol::SCTP),
    ("UDPLite", Protocol::UDPLITE),
];

/// Limit of the keys and values of a rule's annotations together, in bytes.
const MAX_NOTES: usize = 256 * 1024;

/// Reads the rules of one direction of one policy.
pub(super) struct RuleReader<'a> {
    namespace: Option<&'a str>,
    direction: Direction,
    budget: &'a mut Budget,
    problems: &'a mut Problems,
}

impl<'a> RuleReader<'a> {
    /// `namespace` is that of the policy; none for cluster-wide ones. `budget` is shared by both
    /// directions.
    pub(super) fn new(
        namespace: Option<&'a str>,
        direction: Direction,
        budget: &'a mut Budget,
        problems: &'a mut Problems,
    ) -> Self {
        Self {
            namespace,
            direction,
            budget,
            problems,
        }
    }

    /// Parses a rule; `None` with the problems recorded.
    pub(super) fn read(&mut self, index: usize, spec: &RuleSpec) -> Option<Rule> {
        let known = self.problems.len();
        let at = format!("spec.{}[{index}]", self.direction.as_str());
        for field in spec.unknown.keys() {
            self.report_unknown(&at, field);
        }
        if spec.http.is_some() {
            self.problems.add(
                format!("{at}.http"),
                "http",
                "HTTP rules are not supported",
                "remove http, or match by port",
            );
        }
        self.check_annotations(&at, spec.metadata.as_ref());
        let action = self.parse_action(&at, &spec.action);
        let protocol = self.parse_protocol(format!("{at}.protocol"), spec.protocol.as_ref());
        let rule = Rule {
            action: action?,
            ip_version: self.parse_ip_version(&at, spec.ip_version),
            protocol,
            not_protocol: self
                .parse_protocol(format!("{at}.notProtocol"), spec.not_protocol.as_ref()),
            icmp: self.parse_icmp(format!("{at}.icmp"), spec.icmp.as_ref()),
            not_icmp: self.parse_icmp(format!("{at}.notICMP"), spec.not_icmp.as_ref()),
            source: self.parse_entity(&at, Direction::Ingress, spec.source.as_ref(), protocol),
            destination: self.parse_entity(
                &at,
                Direction::Egress,
                spec.destination.as_ref(),
                protocol,
            ),
        };
        self.check_icmp(&at, &rule);
        self.check_families(&at, &rule);
        self.budget.charge_rule(self.problems, &at, &rule);
        (self.problems.len() == known).then_some(rule)
    }

    /// Checks the annotations of a rule. They do not affect enforcement, but are bounded like those
    /// of an object.
    fn check_annotations(&mut self, at: &str, metadata: Option<&RuleMetadata>) {
        let Some(metadata) = metadata else { return };
        for key in metadata
            .annotations
            .keys()
            .filter(|key| !is_qualified_name(&key.to_ascii_lowercase()))
        {
            self.problems.add(
                format!("{at}.metadata.annotations"),
                key,
                "not a name of an annotation",
                "use letters, digits, '-', '_' and '.', at most 63, with a DNS name and '/' before \
                 them if need be",
            );
        }
        let size: usize = metadata
            .annotations
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum();
        if size > MAX_NOTES {
            self.problems.add(
                format!("{at}.metadata.annotations"),
                format!("{size} bytes"),
                format!("more than {MAX_NOTES} bytes in all"),
                "remove or shorten annotations",
            );
        }
    }

    fn report_unknown(&mut self, at: &str, field: &str) {
        self.problems.add(
            format!("{at}.{field}"),
            field,
            "not a known field, and ignoring it could widen the rule",
            "remove the field or correct its name",
        );
    }

    fn parse_action(&mut self, at: &str, action: &str) -> Option<Action> {
        match action {
            "Allow" => Some(Action::Allow),
            "Deny" => Some(Action::Deny),
            "Log" => Some(Action::Log),
            "Pass" => Some(Action::Pass),
            _ => {
                self.problems.add(
                    format!("{at}.action"),
                    action,
                    "not an action",
                    "use Allow, Deny, Log or Pass",
                );
                None
            }
        }
    }

    fn parse_ip_version(&mut self, at: &str, version: Option<i32>) -> Option<IpVersion> {
        match version? {
            4 => Some(IpVersion::V4),
            6 => Some(IpVersion::V6),
            other => {
                self.problems.add(
                    format!("{at}.ipVersion"),
                    other,
                    "not an IP version",
                    "use 4 or 6",
                );
                None
            }
        }
    }

    fn parse_protocol(&mut self, field: String, value: Option<&IntOrString>) -> Option<Protocol> {
        let value = value?;
        let protocol = protocol(value);
        if protocol.is_none() {
            self.problems.add(
                field,
                text(value),
                "not a protocol",
                "use TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite or a number from 1 to 255",
            );
        }
        protocol
    }

    fn parse_icmp(&mut self, field: String, spec: Option<&IcmpSpec>) -> Option<Icmp> {
        let spec = spec?;
        let byte = |number: i32, last: u8| u8::try_from(number).ok().filter(|byte| *byte <= last);
        let kind = spec.kind.map(|kind| byte(kind, 254));
        let code = spec.code.map(|code| byte(code, 255));
        if kind == Some(None) {
            let value = spec.kind.unwrap_or_default();
            self.problems.add(
                format!("{field}.type"),
                value,
                "not an ICMP type",
                "use a number from 0 to 254",
            );
        }
        if code == Some(None) {
            let value = spec.code.unwrap_or_default();
            self.problems.add(
                format!("{field}.code"),
                value,
                "not an ICMP code",
                "use a number from 0 to 255",
            );
        }
        if let (Some(code), None) = (spec.code, spec.kind) {
            self.problems.add(
                format!("{field}.code"),
                code,
                "an ICMP code needs an ICMP type",
                "set the type, too",
            );
        }
        Some(Icmp {
            kind: kind.flatten(),
            code: code.flatten(),
        })
    }

    /// `side` is Ingress for the source and Egress for the destination: rules of that direction may
    /// have a Service on this side.
    fn parse_entity(
        &mut self,
        at: &str,
        side: Direction,
        spec: Option<&EntityRule>,
        protocol: Option<Protocol>,
    ) -> EntityMatch {
        let Some(spec) = spec else {
            return EntityMatch::default();
        };
        let at = match side {
            Direction::Ingress => format!("{at}.source"),
            Direction::Egress => format!("{at}.destination"),
        };
        for field in spec.unknown.keys() {
            self.report_unknown(&at, field);
        }
        let service = spec
            .services
            .as_ref()
            .and_then(|service| self.parse_service(&at, side, spec, service));
        EntityMatch {
            nets: self.parse_nets(&format!("{at}.nets"), &spec.nets),
            not_nets: self.parse_not_nets(&format!("{at}.notNets"), &spec.not_nets),
            selector: self.parse_selector(&at, spec),
            not_selector: self.parse_own_selector(&format!("{at}.notSelector"), &spec.not_selector),
            ports: self
                .parse_ports(&format!("{at}.ports"), &spec.ports, protocol)
                .into(),
            not_ports: self.parse_ports(&format!("{at}.notPorts"), &spec.not_ports, protocol),
            nodes: None,
            service,
        }
    }

    fn parse_nets(&mut self, field: &str, nets: &[String]) -> Vec<IpNet> {
        let mut parsed = Vec::with_capacity(nets.len());
        for (index, net) in nets.iter().enumerate() {
            match crate::network::parse_net(net) {
                Some(net) => parsed.push(net),
                None => self.problems.add(
                    format!("{field}[{index}]"),
                    net,
                    "not an address or range",
                    "write it like 10.0.0.0/8, 10.1.2.3, fd00::/8 or fd00::1",
                ),
            }
        }
        parsed
    }

    fn parse_not_nets(&mut self, field: &str, nets: &[String]) -> Vec<IpNet> {
        let parsed = self.parse_nets(field, nets);
        if let Some(all) = parsed.iter().find(|net| net.prefix_len() == 0) {
            self.problems.add(
                field,
                all,
                "leaves no address to match",
                "remove the rule, or name smaller ranges",
            );
        }
        parsed
    }

    /// Parses a selector over the peer's own labels, in which `global()` is not allowed.
    fn parse_own_selector(&mut self, field: &str, text: &Option<String>) -> Option<Selector> {
        let text = text.as_deref().filter(|text| !text.is_empty())?;
        let selector = self.problems.selector(field, text)?;
        if selector.root.uses_global() {
            self.problems.add(
                field,
                text,
                "global() is only for namespace selectors",
                "use it alone in namespaceSelector",
            );
        }
        Some(selector)
    }

    fn parse_selector(&mut self, at: &str, spec: &EntityRule) -> Option<Selector> {
        let mut parts = Vec::new();
        if let Some(accounts) = &spec.service_accounts {
            let field = format!("{at}.serviceAccounts.selector");
            let selector = self.parse_own_selector(&field, &accounts.selector);
            parts.extend(selector.as_ref().map(scope::of_accounts));
            if !accounts.names.is_empty() {
                parts.push(scope::under_accounts(&accounts.names));
            }
        }
        parts.extend(self.parse_own_selector(&format!("{at}.selector"), &spec.selector));
        let is_used = !parts.is_empty() || is_given(&spec.not_selector);
        match spec.namespace_selector.as_deref() {
            Some(text) if !text.is_empty() => {
                let field = format!("{at}.namespaceSelector");
                let namespaces = self.problems.selector(&field, text)?;
                if namespaces.root != Node::Global && namespaces.root.uses_global() {
                    self.problems.add(
                        field,
                        text,
                        "global() combined with something else",
                        "use global() alone",
                    );
                }
                parts.insert(0, scope::of_namespaces(&namespaces));
            }
            _ => {
                if let Some(namespace) = self.namespace.filter(|_| is_used) {
                    parts.insert(0, scope::in_namespace(namespace));
                }
            }
        }
        (!parts.is_empty()).then(|| Selector::and(parts))
    }

    fn parse_ports(
        &mut self,
        field: &str,
        ports: &[IntOrString],
        protocol: Option<Protocol>,
    ) -> Vec<Port> {
        let carries = |protocol| [Protocol::TCP, Protocol::UDP, Protocol::SCTP].contains(&protocol);
        let mut parsed = Vec::with_capacity(ports.len());
        for (index, value) in ports.iter().enumerate() {
            let at = format!("{field}[{index}]");
            let Some(port) = port(value) else {
                self.problems.add(
                    at,
                    text(value),
                    "not a port",
                    "use a number from 0 to 65535, a range like 8000:8080, or a port name",
                );
                continue;
            };
            let fits = match (&port, protocol) {
                (_, Some(protocol)) => carries(protocol),
                (Port::Named(_), None) => true,
                (Port::Range(_), None) => false,
            };
            if !fits {
                self.problems.add(
                    at,
                    text(value),
                    "ports need a protocol that has them",
                    "set protocol to TCP, UDP or SCTP",
                );
            }
            parsed.push(port);
        }
        parsed
    }

    fn parse_service(
        &mut self,
        at: &str,
        side: Direction,
        spec: &EntityRule,
        service: &ServiceMatch,
    ) -> Option<NamespacedName> {
        let field = format!("{at}.services");
        let name = service.name.as_deref().unwrap_or_default();
        if side != self.direction {
            self.problems.add(
                &field,
                name,
                "not allowed on this side of the rule",
                "use Services in the source of ingress rules and the destination of egress rules",
            );
        }
        let others = !spec.nets.is_empty()
            || !spec.not_nets.is_empty()
            || is_given(&spec.selector)
            || is_given(&spec.not_selector)
            || is_given(&spec.namespace_selector)
            || spec.service_accounts.is_some();
        if others {
            self.problems.add(
                &field,
                name,
                "combined with selectors, serviceAccounts, nets or notNets",
                "put them in a rule of their own",
            );
        }
        if side == Direction::Egress && !(spec.ports.is_empty() && spec.not_ports.is_empty()) {
            self.problems.add(
                &field,
                name,
                "combined with ports, which the Service determines",
                "remove ports and notPorts",
            );
        }
        if name.is_empty() {
            self.problems.add(
                format!("{field}.name"),
                name,
                "empty",
                "give the name of the Service",
            );
        }
        match (service.namespace.as_deref(), self.namespace) {
            (Some(namespace), _) if !namespace.is_empty() => {
                Some(NamespacedName::new(namespace, name))
            }
            (_, Some(own)) => Some(NamespacedName::new(own, name)),
            (_, None) => {
                self.problems.add(
                    format!("{field}.namespace"),
                    "",
                    "needed in a cluster-wide policy",
                    "give the namespace of the Service",
                );
                None
            }
        }
    }

    fn check_icmp(&mut self, at: &str, rule: &Rule) {
        let family = match rule.protocol {
            Some(Protocol::ICMP) => Some(IpVersion::V4),
            Some(Protocol::ICMPV6) => Some(IpVersion::V6),
            _ => None,
        };
        if (rule.icmp.is_some() || rule.not_icmp.is_some()) && family.is_none() {
            self.problems.add(
                format!("{at}.icmp"),
                "icmp",
                "ICMP types need the protocol",
                "set protocol to ICMP or ICMPv6",
            );
        }
        if let (Some(family), Some(version)) = (family, rule.ip_version)
            && family != version
        {
            self.problems.add(
                format!("{at}.ipVersion"),
                number(version),
                "does not go with the protocol",
                "ICMP is for ipVersion 4, ICMPv6 for 6; leave ipVersion out",
            );
        }
    }

    fn check_families(&mut self, at: &str, rule: &Rule) {
        let sides = [&rule.source, &rule.destination];
        let mut nets = sides
            .iter()
            .flat_map(|side| side.nets.iter().chain(&side.not_nets));
        let Some(first) = nets.next() else { return };
        let family = |net: &IpNet| match net {
            IpNet::V4(_) => IpVersion::V4,
            IpNet::V6(_) => IpVersion::V6,
        };
        if let Some(other) = nets.find(|net| family(net) != family(first)) {
            self.problems.add(
                at,
                format!("{first} and {other}"),
                "IPv4 and IPv6 in one rule",
                "write one rule for each",
            );
        } else if let Some(version) = rule.ip_version.filter(|version| *version != family(first)) {
            self.problems.add(
                format!("{at}.ipVersion"),
                number(version),
                format!("does not go with {first}"),
                "leave ipVersion out",
            );
        }
    }
}

fn is_given(text: &Option<String>) -> bool {
    text.as_deref().is_some_and(|text| !text.is_empty())
}

fn number(version: IpVersion) -> u8 {
    match version {
        IpVersion::V4 => 4,
        IpVersion::V6 => 6,
    }
}

pub(super) fn text(value: &IntOrString) -> String {
    match value {
        IntOrString::Int(number) => number.to_string(),
        IntOrString::String(text) => text.clone(),
    }
}

/// Parses a protocol that has ports.
pub(super) fn port_protocol(
    problems: &mut Problems,
    field: String,
    name: &str,
) -> Option<Protocol> {
    let protocol =
        protocol(&IntOrString::String(name.to_owned())).filter(|protocol| protocol.has_ports());
    if protocol.is_none() {
        problems.add(
            field,
            name,
            "not a protocol that has ports",
            "use TCP, UDP, SCTP or UDPLite",
        );
    }
    protocol
}

fn protocol(value: &IntOrString) -> Option<Protocol> {
    let text = text(value);
    let by_name = PROTOCOLS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(&text))
        .map(|(_, protocol)| *protocol);
    by_name.or_else(|| text.parse().ok().filter(|number| *number > 0).map(Protocol))
}

fn port(value: &IntOrString) -> Option<Port> {
    let text = text(value);
    if let Ok(port) = text.parse() {
        return Some(Port::Range(PortRange::single(port)));
    }
    if let Some((first, last)) = text.split_once(':') {
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        return (first <= last).then_some(Port::Range(PortRange { first, last }));
    }
    is_port_name(&text).then_some(Port::Named(text))
}

/// Returns true when a port can have the name.
pub(super) fn is_port_name(text: &str) -> bool {
    text.len() <= 128
        && text.contains(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}
