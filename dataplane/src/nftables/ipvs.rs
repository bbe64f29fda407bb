//! Policy for packets that IPVS forwards, where kube-proxy is in IPVS mode.
//!
//! Addresses of Services are then addresses of the node, on `kube-ipvs0`. A packet to one goes to
//! the input hook, where IPVS (at 98 and 99) rewrites it to a backend's address and sends it
//! through the output hook: it is never forwarded. Its final destination is known only on output,
//! and its sender is known there by its address, which the guard has verified. A mark bit
//! distinguishes it from packets of the node's own processes.
//!
//! ```text
//!  input  50   ipvs-arrived  marks packets that arrived over a link
//!  input  110  ipvs-left     egress policy, for packets that IPVS left to the node
//!  output 0    ipvs-from     egress policy of the sender
//!  output 1    ipvs-to       ingress policy of the receiver
//! ```
//!
//! Policies of host endpoints see such a packet as one to the node and as one from the node.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::base::{self, Inputs, Section};
use super::elements;
use super::names;
use crate::Links;
use crate::links::IPVS_INTERFACE;
use margay_nft::{
    ChainType, CmpOp, Datum, Family, Hook, IfName, Key, MarkSet, Match, Rule, Selector, Set,
    SetKind, SetName, Statement, Value, Verdict,
};

/// Mark bit: arrived over a link, so not sent by the node itself.
const ARRIVED: u32 = 0x0008_0000;
/// Set of the addresses of Services.
const SERVICES: &str = "ipvs-services";
/// Map from a pod's address to the chain of its egress class.
const SENDERS: &str = "ipvs-senders";
/// Before and after IPVS on the input hook (`NF_IP_PRI_NAT_SRC` - 2 and - 1 in
/// `net/netfilter/ipvs/ip_vs_core.c`).
const BEFORE_IPVS: i32 = 50;
const AFTER_IPVS: i32 = 110;

/// Hint for the operator of a node in IPVS mode; `None` in other modes.
pub fn ipvs_advice(links: &Links) -> Option<&'static str> {
    const ADVICE: &str = "kube-proxy is in IPVS mode (link kube-ipvs0 exists): policies of pods \
                          are enforced on packets that IPVS forwards, but policies of host \
                          endpoints see them as packets to and from the node; if you use host \
                          endpoints, switch kube-proxy to mode nftables or iptables";
    links.contains_key(IPVS_INTERFACE).then_some(ADVICE)
}

/// Name of the map from a pod's address to its egress class.
pub(super) fn senders_map_name(family: Family) -> SetName {
    names::set(&format!("{SENDERS}-{}", names::digit(family)))
}

/// Renders that map.
pub(super) fn render_senders_map(family: Family, entries: &BTreeMap<IpAddr, [Verdict; 2]>) -> Set {
    let mut map = Set::new(SetKind::of(family.address_type()).with_verdicts());
    for (address, verdicts) in entries
        .iter()
        .filter(|(address, _)| elements::family(**address) == family)
    {
        let [v4, v6] = verdicts;
        let verdict = if address.is_ipv4() { v4 } else { v6 };
        map.elements.insert(
            Key::from(Datum::from(*address)),
            Value::Verdict(verdict.clone()),
        );
    }
    map
}

impl Inputs {
    /// Accepts packets of pods to IPVS Services: policy decides once the backend is chosen.
    pub(super) fn accept_ipvs_services(&self, families: &[Family]) -> Vec<Rule> {
        let rule = |family: &Family| {
            Rule::new()
                .when(Match::in_set(
                    base::destination(*family),
                    &services_set(*family),
                ))
                .accept()
        };
        if self.services().is_some() {
            families.iter().map(rule).collect()
        } else {
            Vec::new()
        }
    }

    /// Adds the chains drawn above, in IPVS mode.
    pub(super) fn add_ipvs(&self, families: &[Family], section: &mut Section) {
        let Some(services) = self.services() else {
            return;
        };
        for family in families {
            let addresses = services
                .iter()
                .copied()
                .filter(|address| elements::family(*address) == *family);
            section.add_set(
                &services_set(*family),
                SetKind::of(family.address_type()),
                addresses.map(Key::from),
            );
        }
        let filter = |hook, priority| base::base_chain(ChainType::Filter, hook, priority);
        section.add_chain(
            "ipvs-arrived",
            filter(Hook::Input, BEFORE_IPVS),
            vec![mark_arrived()],
        );
        section.add_chain(
            "ipvs-left",
            filter(Hook::Input, AFTER_IPVS),
            self.rules_after_ipvs(families),
        );
        let mut from = vec![accept_own(), base::accept_tracked()];
        from.extend(self.drop_invalid());
        from.extend(
            families
                .iter()
                .map(|family| Rule::new().vmap(base::source(*family), &senders_map_name(*family))),
        );
        section.add_chain("ipvs-from", filter(Hook::Output, 0), from);

        let elsewhere = Match::NamePrefix(Selector::Oifname, CmpOp::Ne, names::workload_prefix());
        let mut to = vec![
            accept_own(),
            base::accept_tracked(),
            Rule::new().when(elsewhere).accept(),
        ];
        to.extend(self.drop_invalid());
        to.push(Rule::new().vmap(
            vec![Selector::Nfproto, Selector::Oifname],
            &names::set(names::RECEIVERS),
        ));
        to.push(Rule::new().counter().drop());
        section.add_chain("ipvs-to", filter(Hook::Output, 1), to);
    }

    /// Rules for packets to Service addresses that IPVS did not take, or whose backend is a process
    /// of this node.
    fn rules_after_ipvs(&self, families: &[Family]) -> Vec<Rule> {
        let mut rules = vec![base::accept_not_from_workload(), base::accept_tracked()];
        if families.contains(&Family::Ipv6) {
            rules.push(Rule::new().when(base::neighbour_discovery_types()).accept());
        }
        if !self.drops_to_host() {
            rules.push(Rule::new().vmap(
                vec![Selector::Nfproto, Selector::Iifname],
                &names::set(names::SENDERS),
            ));
        }
        rules.push(Rule::new().counter().drop());
        rules
    }
}

fn services_set(family: Family) -> SetName {
    names::set(&format!("{SERVICES}-{}", names::digit(family)))
}

fn mark_arrived() -> Rule {
    let loopback = IfName::new("lo").expect("a constant name");
    let mark = Statement::MarkSet(MarkSet {
        mask: ARRIVED,
        value: ARRIVED,
    });
    Rule::new()
        .when(Match::not(Selector::Iifname, loopback))
        .then(mark)
}

/// Accepts packets of the node's own processes.
fn accept_own() -> Rule {
    Rule::new()
        .when(Match::MarkBits {
            mask: ARRIVED,
            op: CmpOp::Ne,
            value: ARRIVED,
        })
        .accept()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::links::ipvs_services;

    #[test]
    fn ipvs_is_found_by_its_link_and_reported() {
        let links = |name: &str| Links::from([(name.to_owned(), BTreeSet::new())]);
        assert_eq!(ipvs_advice(&links("eth0")), None);
        assert!(
            ipvs_advice(&links("kube-ipvs0"))
                .is_some_and(|advice| advice.len() <= 512 && advice.contains("host endpoints"))
        );
        assert_eq!(ipvs_services(&links("eth0")), None);
        assert_eq!(ipvs_services(&links("kube-ipvs0")), Some(BTreeSet::new()));
    }
}
