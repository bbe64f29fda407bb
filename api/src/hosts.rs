//! Automatic host endpoints in parsed form, and the interfaces that agents report in an annotation
//! of their Node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use regex::bytes::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use crate::meta::Labels;
use crate::selector::Selector;

/// Label of an automatic host endpoint: the controller that created it.
pub const LABEL_CREATED_BY: &str = "projectcalico.org/created-by";
/// Value of [`LABEL_CREATED_BY`]: Calico's, so that automatic host endpoints of a cluster that is
/// taken over are ours.
pub const CREATED_BY: &str = "calico-kube-controllers";

/// Automatic host endpoints to create.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AutoHostEndpoints {
    /// One for each node that covers all of its interfaces.
    pub default: bool,
    /// Further ones, by template.
    pub templates: Vec<Template>,
}

/// Host endpoints for some interfaces of some nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Name of the template, which becomes part of the host endpoints' names.
    pub name: String,
    /// Ranges of the interfaces' addresses; empty is any.
    pub nets: Vec<IpNet>,
    /// Names of interfaces, each of which gets a host endpoint of its own; none: one for all
    /// addresses.
    pub interfaces: Option<InterfacePattern>,
    /// Labels added to those of the node; these win.
    pub labels: Labels,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Nodes that get one, by their labels.
    pub nodes: Selector,
}

/// Limit of the memory of a compiled pattern, in bytes.
const PATTERN_SIZE: usize = 1 << 20;

/// Regular expression over names of interfaces. As in Calico it may match anywhere in a name, and
/// its classes are those of ASCII.
#[derive(Clone, Debug)]
pub struct InterfacePattern(Regex);

impl InterfacePattern {
    /// Compiles the pattern; the error is one line of text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let compiled = RegexBuilder::new(text)
            .unicode(false)
            .size_limit(PATTERN_SIZE)
            .build();
        // The regex crate draws a syntax error over many lines, of which the last has the message.
        compiled.map(Self).map_err(|error| {
            let text = error.to_string();
            let last = text.lines().last().unwrap_or_default().trim();
            last.strip_prefix("error: ").unwrap_or(last).to_owned()
        })
    }

    /// Returns true when the pattern matches the name.
    pub fn matches(&self, interface: &str) -> bool {
        self.0.is_match(interface.as_bytes())
    }
}

impl PartialEq for InterfacePattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for InterfacePattern {}

/// An interface of a node in Calico's form, as the node's agent reports it in
/// [`ANNOTATION_NODE_INTERFACES`](crate::meta::ANNOTATION_NODE_INTERFACES).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInterface {
    /// Name of the interface.
    pub name: String,
    /// Addresses of the interface, in order.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub addresses: BTreeSet<IpAddr>,
}

/// Prefixes of the names of interfaces that are not reported, because they lead to workloads of the
/// node or belong to the network itself. From Calico v3.32 (default of autodetection's exclusions).
const INNER: [&str; 17] = [
    "cali",
    "cbr",
    "cni",
    "docker",
    "dummy",
    "flannel",
    "kube-ipvs",
    "lo",
    "lxcbr",
    "nodelocaldns",
    "tunl",
    "veth",
    "virbr",
    "vxlan-v6.calico",
    "vxlan.calico",
    "wg-v6.cali",
    "wireguard.cali",
];

/// Returns the interfaces to report: those that lead out of the node.
pub fn node_interfaces(all: &BTreeMap<String, BTreeSet<IpAddr>>) -> Vec<NodeInterface> {
    let outer = all
        .iter()
        .filter(|(name, _)| !INNER.iter().any(|inner| name.starts_with(inner)));
    outer
        .map(|(name, addresses)| NodeInterface {
            name: name.clone(),
            addresses: addresses.clone(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_a_part_of_a_name_unless_it_is_anchored() {
        let table = [
            ("eth0|eth1", "eth1", true),
            ("eth0|eth1", "eth10", true),
            ("^(eth0|eth1)$", "eth10", false),
            ("th", "eth0", true),
            (r"^ens\d+", "ens5", true),
            (r"^\w+$", "bond0.100", false),
            (".*", "wlan0", true),
            ("ETH", "eth0", false),
            ("(?i)ETH", "eth0", true),
        ];
        for (pattern, name, matches) in table {
            assert_eq!(
                InterfacePattern::parse(pattern).map(|pattern| pattern.matches(name)),
                Ok(matches),
                "{pattern} {name}"
            );
        }
    }

    #[test]
    fn the_error_of_a_pattern_is_one_line() {
        for (pattern, wanted) in [
            ("eth(", "unclosed group"),
            ("*", "repetition operator missing expression"),
            (
                &"(a{1000}){1000}".repeat(2),
                "Compiled regex exceeds size limit of 1048576 bytes.",
            ),
        ] {
            assert_eq!(InterfacePattern::parse(pattern), Err(wanted.to_owned()));
        }
    }

    #[test]
    fn interfaces_that_lead_out_of_a_node_are_reported_in_calicos_form() {
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let mut all: BTreeMap<String, BTreeSet<IpAddr>> = INNER
            .iter()
            .map(|inner| (format!("{inner}0"), BTreeSet::from([address("192.0.2.9")])))
            .collect();
        all.insert(
            "wlan0".to_owned(),
            [address("2001:db8::1"), address("192.0.2.1")].into(),
        );
        all.insert("eth1".to_owned(), BTreeSet::new());
        let reported = node_interfaces(&all);
        let text = serde_json::to_string(&reported).expect("JSON");
        assert_eq!(
            text,
            r#"[{"name":"eth1"},{"name":"wlan0","addresses":["192.0.2.1","2001:db8::1"]}]"#
        );
        let read: Vec<NodeInterface> = serde_json::from_str(&text).expect("what was written");
        assert_eq!(read, reported);
    }
}
