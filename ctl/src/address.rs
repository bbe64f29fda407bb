//! Addresses for pods that have none yet.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_calc::update::Update;

/// Range for pods where there is no pool: reserved for benchmarks of network devices (RFC 2544,
/// appendix C.2.2), so no policy is likely to name it.
const RESERVED: &str = "198.18.0.0/15";

/// Addresses that are free, out of at most one pool of each IP version.
pub struct Addresses {
    ranges: Vec<Range>,
    used: BTreeSet<IpAddr>,
}

/// Addresses of a pool, in order.
struct Range {
    net: IpNet,
    hosts: ipnet::IpAddrRange,
}

impl Addresses {
    /// Addresses out of the first pools by name, without those in use.
    pub fn new(updates: &[Update], used: impl Iterator<Item = IpAddr>) -> Self {
        let pools = updates.iter().filter_map(|update| match update {
            Update::Pool(_, Some(pool)) => Some(pool.cidr),
            _ => None,
        });
        let pools: Vec<IpNet> = pools.collect();
        let first = |is_ipv4: bool| {
            pools
                .iter()
                .copied()
                .find(|net| net.addr().is_ipv4() == is_ipv4)
        };
        let mut nets: Vec<IpNet> = [first(true), first(false)].into_iter().flatten().collect();
        if nets.is_empty() {
            nets.extend(RESERVED.parse::<IpNet>());
        }
        let firsts: Vec<IpAddr> = nets.iter().map(IpNet::network).collect();
        let ranges = nets
            .into_iter()
            .map(|net| Range {
                net,
                hosts: net.hosts(),
            })
            .collect();
        // The first address of an IPv6 subnet is that of its routers (RFC 4291, section 2.6.1).
        Self {
            ranges,
            used: used.chain(firsts).collect(),
        }
    }

    /// Returns an address of each range; fewer if ranges are full.
    pub fn assign(&mut self) -> Vec<IpAddr> {
        let Self { ranges, used } = self;
        ranges
            .iter_mut()
            .filter_map(|range| range.hosts.by_ref().find(|address| !used.contains(address)))
            .collect()
    }

    /// The ranges, for people.
    pub fn source(&self) -> String {
        let nets: Vec<String> = self
            .ranges
            .iter()
            .map(|range| range.net.to_string())
            .collect();
        nets.join(" and ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_api::network::{Encapsulation, Pool};

    fn pool(name: &str, cidr: &str) -> Update {
        let cidr = cidr.parse().expect("a range");
        let pool = Pool {
            cidr,
            encapsulation: Encapsulation::None,
            nat_outgoing: false,
            block_size: 26,
            is_exported: true,
            created: 0,
        };
        Update::Pool(name.to_owned(), Some(pool))
    }

    #[test]
    fn addresses_come_from_the_first_pool_of_each_version_and_are_free() {
        let used = ["10.0.0.1", "fd00::2"].map(|text| text.parse::<IpAddr>().expect("an address"));
        let pools = [
            pool("a", "10.0.0.0/29"),
            pool("b", "10.1.0.0/16"),
            pool("c", "fd00::/120"),
        ];
        let mut addresses = Addresses::new(&pools, used.into_iter());
        let mut assign = || {
            addresses
                .assign()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(assign(), ["10.0.0.2", "fd00::1"]);
        assert_eq!(assign(), ["10.0.0.3", "fd00::3"]);
        (0..3).for_each(|_| drop(assign()));
        assert_eq!(assign().len(), 1, "the smaller pool is full");
        assert_eq!(
            Addresses::new(&[], std::iter::empty()).assign(),
            ["198.18.0.1".parse::<IpAddr>().expect("an address")]
        );
    }
}
