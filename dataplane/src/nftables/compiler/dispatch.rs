//! What depends on the attached pods alone: the maps that lead to their classes, the addresses that
//! they may send from, and their host ports.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::Compiler;
use super::delta::TableDelta;
use crate::nftables::stage::Direction;
use crate::nftables::{base, elements, host_ports, ipvs, names};
use margay_nft::{Family, Field, IfName, Key, Set, SetName, Value, Verdict};

impl Compiler {
    /// Updates the maps from interface to class and the addresses from which each interface may
    /// send.
    pub(super) fn update_dispatch(&mut self, delta: &mut TableDelta) {
        let mut maps =
            [Direction::Ingress, Direction::Egress].map(|_| Set::new(base::dispatch_kind()));
        let mut pods: BTreeMap<Family, Set> = self
            .families
            .iter()
            .map(|family| (*family, Set::new(base::pods_kind(*family))))
            .collect();
        let has_ipvs = self.inputs.services().is_some();
        let mut by_address: BTreeMap<IpAddr, [Verdict; 2]> = BTreeMap::new();
        for (interface, pod) in &self.attached {
            let Some(interface) = IfName::new(interface) else {
                continue;
            };
            if has_ipvs {
                let egress = self.classes_of(pod).map(|[_, egress]| egress.entry.clone());
                let egress = egress.unwrap_or([Verdict::Drop, Verdict::Drop]);
                by_address.extend(
                    pod.addresses
                        .iter()
                        .map(|address| (*address, egress.clone())),
                );
            }
            for address in &pod.addresses {
                if let Some(set) = pods.get_mut(&elements::family(*address)) {
                    set.elements.insert(
                        Key::from([
                            Field::from(interface),
                            Field::from(margay_nft::Datum::from(*address)),
                        ]),
                        Value::Member,
                    );
                }
            }
            let Some(classes) = self.classes_of(pod) else {
                continue;
            };
            for (map, bound) in maps.iter_mut().zip(classes) {
                let entries = Family::ALL.into_iter().zip(&bound.entry);
                for (family, entry) in entries.filter(|(family, _)| self.families.contains(family))
                {
                    map.elements.insert(
                        base::dispatch_key(family, interface),
                        Value::Verdict(entry.clone()),
                    );
                }
            }
        }
        let [receivers, senders] = maps;
        self.put_set(names::set(names::RECEIVERS), Some(receivers), delta);
        self.put_set(names::set(names::SENDERS), Some(senders), delta);
        for family in Family::ALL {
            self.put_set(base::pods_set(family), pods.remove(&family), delta);
            let has_map = has_ipvs && self.families.contains(&family);
            let map = has_map.then(|| ipvs::render_senders_map(family, &by_address));
            self.put_set(ipvs::senders_map_name(family), map, delta);
        }
        self.update_host_ports(delta);
    }

    fn update_host_ports(&mut self, delta: &mut TableDelta) {
        let section = host_ports::render(&self.inputs, &self.attached, &self.families);
        self.replace_section(
            section,
            |name, _| host_ports::is_host_port(name.as_str()),
            |name| host_ports::is_host_port(name.as_str()),
            delta,
        );
    }
}

/// Whether [`Compiler::update_dispatch`] owns the set.
pub(super) fn is_dispatch_set(name: &SetName) -> bool {
    [names::SENDERS, names::RECEIVERS].contains(&name.as_str())
        || Family::ALL
            .iter()
            .any(|family| [base::pods_set(*family), ipvs::senders_map_name(*family)].contains(name))
}
