//! Ports that rules tell apart: ranges within which all ports have the same verdict.

use std::collections::BTreeSet;
use std::net::IpAddr;

use margay_api::rule::{PortRange, Protocol};
use margay_calc::model::{Member, PolicyRecord, Record, RecordId, RuleRecord, SetId};

use crate::classes::RecordMap;

/// First port of each range but the first one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cuts(BTreeSet<u16>);

impl Cuts {
    /// Cuts at both ends of a range.
    fn add(&mut self, range: PortRange) {
        self.0.insert(range.first);
        self.0.extend(range.last.checked_add(1));
    }

    /// Cuts where a rule of these policies has another answer for packets of the protocol to one of
    /// the addresses.
    pub fn add_rules(
        &mut self,
        records: &RecordMap,
        rules: &[RuleRecord],
        protocol: Protocol,
        addresses: &[IpAddr],
    ) {
        for rule in rules
            .iter()
            .filter(|rule| rule.protocol.is_none_or(|wanted| wanted == protocol))
        {
            let side = &rule.destination;
            side.ports
                .iter()
                .chain(&side.not_ports)
                .for_each(|range| self.add(*range));
            let sets = side
                .port_sets
                .iter()
                .chain(&side.not_port_sets)
                .chain(&side.service_set);
            sets.for_each(|set| self.add_set(records, set, protocol, addresses));
        }
    }

    fn add_set(
        &mut self,
        records: &RecordMap,
        set: &SetId,
        protocol: Protocol,
        addresses: &[IpAddr],
    ) {
        let Some(Record::IpSet(set)) = records.get(&RecordId::IpSet(set.clone())) else {
            return;
        };
        for address in addresses {
            let all = Member::AddressPort(*address, protocol, 0)
                ..=Member::AddressPort(*address, protocol, u16::MAX);
            for member in set.members.range(all) {
                if let Member::AddressPort(_, _, port) = member {
                    self.add(PortRange::single(*port));
                }
            }
        }
    }

    /// The ranges from port 1 on, in order.
    pub fn ranges(&self) -> Vec<PortRange> {
        let starts = std::iter::once(1).chain(self.0.iter().copied().filter(|port| *port > 1));
        let starts: Vec<u16> = starts.collect();
        let ends = starts.iter().skip(1).map(|next| next - 1).chain([u16::MAX]);
        starts
            .iter()
            .zip(ends)
            .map(|(first, last)| PortRange {
                first: *first,
                last,
            })
            .collect()
    }
}

/// Rules of a policy in one direction.
pub fn rules(policy: &PolicyRecord, is_ingress: bool) -> &[RuleRecord] {
    if is_ingress {
        &policy.ingress
    } else {
        &policy.egress
    }
}

/// Joins ranges that touch; they are in order.
pub fn join(ranges: &[PortRange]) -> Vec<PortRange> {
    let mut joined: Vec<PortRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.last.checked_add(1) == Some(range.first) => last.last = range.last,
            _ => joined.push(*range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_divided_where_rules_differ() {
        let range = |first, last| PortRange { first, last };
        let mut cuts = Cuts::default();
        assert_eq!(cuts.ranges(), [range(1, u16::MAX)]);
        for cut in [
            range(80, 80),
            range(8000, 9000),
            range(60_000, u16::MAX),
            range(1, 5),
        ] {
            cuts.add(cut);
        }
        let wanted = [
            (1, 5),
            (6, 79),
            (80, 80),
            (81, 7999),
            (8000, 9000),
            (9001, 59_999),
            (60_000, u16::MAX),
        ]
        .map(|(a, b)| range(a, b));
        assert_eq!(cuts.ranges(), wanted);
        assert_eq!(join(&wanted), [range(1, u16::MAX)]);
        assert_eq!(
            join(&[range(1, 5), range(7, 8), range(9, 9)]),
            [range(1, 5), range(7, 9)]
        );
    }
}
