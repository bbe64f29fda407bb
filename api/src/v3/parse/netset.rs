//! Parses network sets.

use std::collections::BTreeMap;

use super::reserved;
use crate::meta::LABEL_NAMESPACE;
use crate::network::{self, parse_net};
use crate::problem::{Problems, Refusal};
use crate::v3::netset::{GlobalNetworkSet, NetworkSet};

type Parsed = Result<network::NetworkSet, Refusal<network::NetworkSet>>;

/// Parses a namespaced set. If a member does not parse, the last valid version stays in force,
/// because rules that deny may use the set as well as rules that allow; without one the members
/// that parse count.
pub fn network_set(set: &NetworkSet) -> Parsed {
    let namespace = set.metadata.namespace.clone().unwrap_or_default();
    parse(&set.metadata.labels, &set.spec.nets, Some(namespace))
}

/// Parses a cluster-wide set, like [`network_set`].
pub fn global_network_set(set: &GlobalNetworkSet) -> Parsed {
    parse(&set.metadata.labels, &set.spec.nets, None)
}

fn parse(
    written: &Option<BTreeMap<String, String>>,
    nets: &[String],
    namespace: Option<String>,
) -> Parsed {
    let mut problems = Problems::default();
    let own: Vec<(&str, &str)> = namespace
        .iter()
        .map(|namespace| (LABEL_NAMESPACE, namespace.as_str()))
        .collect();
    let written = written.clone().unwrap_or_default();
    let mut labels = reserved::without(&mut problems, "metadata.labels", &written, &own);
    labels.extend(namespace.map(|namespace| (LABEL_NAMESPACE.to_owned(), namespace)));
    let mut members = Vec::with_capacity(nets.len());
    for (index, net) in nets.iter().enumerate() {
        match parse_net(net) {
            Some(net) => members.push(net),
            None => problems.add(
                format!("spec.nets[{index}]"),
                net,
                "not an address or range",
                "write it like 10.0.0.0/8, 10.1.2.3, fd00::/8 or fd00::1",
            ),
        }
    }
    let set = network::NetworkSet {
        labels,
        nets: members,
    };
    let lacks_members = set.nets.len() < nets.len();
    problems
        .finish(set, Some)
        .map_err(|refusal| refusal.or_former(lacks_members))
}
