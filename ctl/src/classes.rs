//! Pods that no policy tells apart: what is true for one of them is true for all.
//!
//! Two pods are of one class if the same policies apply to both, the same sets and ranges that
//! rules name hold them, and they have addresses of the same IP versions, before and after a
//! change.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_calc::model::{Member, PolicyRecord, Record, RecordId, RuleRecord};

use crate::cluster::Cluster;

/// Records of one state, by id.
pub type RecordMap = BTreeMap<RecordId, Record>;

/// A class of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Its pods, in order; never empty.
    pub pods: Vec<EndpointKey>,
}

impl Class {
    /// The pod that stands for all.
    pub fn first(&self) -> &EndpointKey {
        &self.pods[0]
    }
}

/// What tells pods apart.
#[derive(Default, PartialEq, Eq, PartialOrd, Ord)]
struct Signature {
    /// Policies that apply, and what happens without any, in each state.
    bindings: Vec<String>,
    /// Sets and ranges that hold it, in each state.
    facts: Vec<BTreeSet<Fact>>,
}

/// Something that holds an address. Sets are numbered in order of their ids.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fact {
    Version(bool),
    Set(usize),
    Port(usize, u8, u16),
    Net(IpNet),
}

/// Copies all records of a state.
pub fn records(cluster: &Cluster) -> RecordMap {
    let ids = cluster.graph.ids().into_iter();
    ids.filter_map(|id| {
        cluster
            .graph
            .record(&id)
            .map(|record| record.into_owned())
            .map(|record| (id, record))
    })
    .collect()
}

/// Divides the pods that exist in every state into classes, in order of their first pods.
pub fn divide(states: &[&RecordMap]) -> Vec<Class> {
    let mut signatures: BTreeMap<EndpointKey, Signature> = BTreeMap::new();
    for state in states {
        for (key, binding, facts) in facts(state) {
            let signature = signatures.entry(key).or_default();
            signature.bindings.push(binding);
            signature.facts.push(facts);
        }
    }
    signatures.retain(|_, signature| signature.facts.len() == states.len());
    let mut classes: BTreeMap<Signature, Vec<EndpointKey>> = BTreeMap::new();
    for (key, signature) in signatures {
        classes.entry(signature).or_default().push(key);
    }
    let mut classes: Vec<Class> = classes.into_values().map(|pods| Class { pods }).collect();
    classes.sort_by(|a, b| a.first().cmp(b.first()));
    classes
}

/// Bindings and facts of every pod with an address.
fn facts(records: &RecordMap) -> Vec<(EndpointKey, String, BTreeSet<Fact>)> {
    let mut holders: BTreeMap<IpAddr, BTreeSet<Fact>> = BTreeMap::new();
    for record in records.values() {
        if let Record::Endpoint(endpoint) = record {
            holders.extend(
                endpoint
                    .addresses
                    .iter()
                    .map(|address| (*address, BTreeSet::new())),
            );
        }
    }
    add_sets(records, &mut holders);
    for net in nets(records) {
        add_net(&mut holders, net, || Fact::Net(net));
    }
    let pods = records
        .iter()
        .filter_map(|(id, record)| match (id, record) {
            (RecordId::Endpoint(key), Record::Endpoint(endpoint))
                if !endpoint.addresses.is_empty() =>
            {
                Some((key, endpoint))
            }
            _ => None,
        });
    pods.map(|(key, endpoint)| {
        let mut facts = BTreeSet::new();
        for address in &endpoint.addresses {
            facts.insert(Fact::Version(address.is_ipv4()));
            facts.extend(holders.get(address).into_iter().flatten().copied());
        }
        (
            key.clone(),
            format!("{:?} {:?}", endpoint.tiers, endpoint.unmatched),
            facts,
        )
    })
    .collect()
}

fn add_sets(records: &RecordMap, holders: &mut BTreeMap<IpAddr, BTreeSet<Fact>>) {
    let sets = records.values().filter_map(|record| match record {
        Record::IpSet(set) => Some(set),
        _ => None,
    });
    for (number, set) in sets.enumerate() {
        for member in &set.members {
            match member {
                Member::Net(net) => add_net(holders, *net, || Fact::Set(number)),
                Member::AddressPort(address, protocol, port) => {
                    if let Some(facts) = holders.get_mut(address) {
                        facts.insert(Fact::Port(number, protocol.0, *port));
                    }
                }
            }
        }
    }
}

/// Adds a fact about all addresses within the range.
fn add_net(holders: &mut BTreeMap<IpAddr, BTreeSet<Fact>>, net: IpNet, fact: impl Fn() -> Fact) {
    // Addresses of one IP version are in numerical order.
    holders
        .range_mut(net.network()..=net.broadcast())
        .for_each(|(_, facts)| {
            facts.insert(fact());
        });
}

/// Ranges that rules name.
fn nets(records: &RecordMap) -> BTreeSet<IpNet> {
    let rules = records.values().filter_map(|record| match record {
        Record::Policy(policy) => Some(rules(policy)),
        _ => None,
    });
    let sides = rules
        .flatten()
        .flat_map(|rule| [&rule.source, &rule.destination]);
    sides
        .flat_map(|side| side.nets.iter().chain(&side.not_nets).copied())
        .collect()
}

fn rules(policy: &PolicyRecord) -> impl Iterator<Item = &RuleRecord> {
    policy.ingress.iter().chain(&policy.egress)
}
