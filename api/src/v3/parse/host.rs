//! Parses host endpoints.

use std::net::IpAddr;

use super::reserved;
use super::rule::{is_port_name, port_protocol, text};
use crate::endpoint::{HostEndpoint, HostInterface, NamedPort, Profile};
use crate::meta::NamespacedName;
use crate::problem::{Problems, Refusal};
use crate::v3::host::{self, EndpointPortSpec};

type Parsed = Result<HostEndpoint, Refusal<HostEndpoint>>;

/// Name of the profile that allows everything (Calico).
const ALLOW: &str = "projectcalico-default-allow";

/// Parses a host endpoint. Ports and, of a named interface, addresses that do not parse are left
/// out and reported; a profile that cannot exist denies and is reported. If the interface is not
/// known, the last valid version stays in force; without one the endpoint applies to every
/// interface of the node that has no other endpoint, so that one that was to be closed is not open.
/// Without a node it applies to nothing.
pub fn host_endpoint(endpoint: &host::HostEndpoint) -> Parsed {
    let spec = &endpoint.spec;
    let mut problems = Problems::default();
    let labels = endpoint.metadata.labels.clone().unwrap_or_default();
    let labels = reserved::without(&mut problems, "metadata.labels", &labels, &[]);
    let node = spec.node.clone();
    if node.is_empty() {
        problems.add(
            "spec.node",
            "",
            "a host endpoint belongs to one node",
            "write the name of the node",
        );
    }
    let interface = interface(
        &mut problems,
        spec.interface_name.as_deref().unwrap_or_default(),
    );
    let known = problems.len();
    let addresses = addresses(&mut problems, &spec.expected_ips);
    let has_bad_address = problems.len() > known;
    if interface == Some(HostInterface::ByAddress) && spec.expected_ips.is_empty() {
        let remedy = "write interfaceName, * for all interfaces, or expectedIPs";
        problems.add(
            "spec.interfaceName",
            "",
            "neither the interface nor its addresses are set",
            remedy,
        );
    }
    let ports = spec.ports.iter().enumerate();
    let ports = ports.filter_map(|(index, port)| {
        named_port(&mut problems, &format!("spec.ports[{index}]"), port)
    });
    let ports = ports.collect();
    let profiles = profiles(&mut problems, &spec.profiles);
    let is_by_address = interface == Some(HostInterface::ByAddress);
    // The interface that has only the invalid address would be left without an endpoint.
    let may_be_any = interface.is_none() || is_by_address && has_bad_address;
    let is_nobodys = node.is_empty() || is_by_address && spec.expected_ips.is_empty();
    let interface = interface.unwrap_or(HostInterface::ByAddress);
    let parsed = HostEndpoint {
        node,
        labels,
        interface,
        addresses,
        ports,
        profiles,
    };
    let closed = |parsed| match may_be_any {
        true => Some(HostEndpoint {
            interface: HostInterface::All,
            ..parsed
        })
        .filter(|_| !is_nobodys),
        false => Some(parsed).filter(|_| !is_nobodys),
    };
    problems
        .finish(parsed, closed)
        .map_err(|refusal| refusal.or_former(may_be_any || is_nobodys))
}

fn interface(problems: &mut Problems, name: &str) -> Option<HostInterface> {
    let is_name = name.len() <= 15
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    match name {
        "" => Some(HostInterface::ByAddress),
        "*" => Some(HostInterface::All),
        name if is_name => Some(HostInterface::Named(name.to_owned())),
        name => {
            let rule = "an interface has a name of at most 15 letters, digits, '_', '.' and '-'";
            problems.add(
                "spec.interfaceName",
                name,
                rule,
                "write the name of the interface on the node, or * for all interfaces",
            );
            None
        }
    }
}

/// Returns them in order, each once: their order has no meaning.
fn addresses(problems: &mut Problems, written: &[String]) -> Vec<IpAddr> {
    let mut addresses = Vec::with_capacity(written.len());
    for (index, address) in written.iter().enumerate() {
        match address.parse() {
            Ok(address) => addresses.push(address),
            Err(_) => {
                let remedy = "write it like 192.0.2.1 or 2001:db8::1, without a prefix length";
                problems.add(
                    format!("spec.expectedIPs[{index}]"),
                    address,
                    "not an address",
                    remedy,
                );
            }
        }
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn named_port(problems: &mut Problems, at: &str, port: &EndpointPortSpec) -> Option<NamedPort> {
    let is_name = is_port_name(&port.name);
    if !is_name {
        let rule =
            "must have at most 128 letters, digits, '_', '.' and '-', and at least one letter";
        problems.add(format!("{at}.name"), &port.name, rule, "rename the port");
    }
    let protocol = port_protocol(problems, format!("{at}.protocol"), &text(&port.protocol));
    let number = u16::try_from(port.port).ok().filter(|number| *number > 0);
    if number.is_none() {
        problems.add(
            format!("{at}.port"),
            port.port,
            "not from 1 to 65535",
            "use a number in that range",
        );
    }
    Some(NamedPort {
        name: port.name.clone(),
        protocol: protocol?,
        port: number?,
    })
    .filter(|_| is_name)
}

fn profiles(problems: &mut Problems, names: &[String]) -> Vec<Profile> {
    let mut profiles: Vec<Profile> = Vec::with_capacity(names.len());
    for (index, name) in names.iter().enumerate() {
        let profile = profile(name);
        if profile == Profile::Unknown {
            let remedy =
                "use kns.NAMESPACE, ksa.NAMESPACE.SERVICEACCOUNT or projectcalico-default-allow";
            problems.add(
                format!("spec.profiles[{index}]"),
                name,
                "there is no such profile, which denies",
                remedy,
            );
        }
        if !profiles.contains(&profile) {
            profiles.push(profile);
        }
    }
    profiles
}

/// Parses the name of a profile. Names of namespaces have no dot, those of service accounts may.
fn profile(name: &str) -> Profile {
    let account = || name.strip_prefix("ksa.")?.split_once('.');
    match (name.strip_prefix("kns."), account()) {
        _ if name == ALLOW => Profile::Allow,
        (Some(namespace), _) if !namespace.is_empty() => Profile::Namespace(namespace.to_owned()),
        (_, Some((namespace, account))) if !namespace.is_empty() && !account.is_empty() => {
            Profile::ServiceAccount(NamespacedName::new(namespace, account))
        }
        _ => Profile::Unknown,
    }
}
