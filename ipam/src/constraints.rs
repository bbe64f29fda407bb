//! Blocks that this node knows, and constraints on assigning an address: reservations, overlaps,
//! cooldown.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use margay_api::ipam::block::Block;
use margay_api::ipam::limits::Limits;
use margay_api::rule::IpVersion;

/// Blocks by range: those of the cluster's map, and this node's own, which the map may lack.
#[derive(Clone, Debug, Default)]
pub(super) struct KnownBlocks {
    /// Node of each block, from the map.
    pub(super) map: Arc<BTreeMap<IpNet, String>>,
    /// Blocks of this node.
    pub(super) own: BTreeSet<IpNet>,
}

impl KnownBlocks {
    /// Returns true when there is a block of that range.
    pub(super) fn contains(&self, cidr: &IpNet) -> bool {
        self.own.contains(cidr) || self.map.contains_key(cidr)
    }

    /// Returns the blocks that overlap the range, other than itself, ascending.
    pub(super) fn overlapping(&self, cidr: IpNet) -> BTreeSet<IpNet> {
        let around = parents(cidr).filter(|parent| self.contains(parent));
        let last = IpNet::from(cidr.broadcast());
        let within = self
            .map
            .range(cidr..=last)
            .map(|(within, _)| within)
            .chain(self.own.range(cidr..=last));
        around
            .chain(within.copied())
            .filter(|other| *other != cidr)
            .collect()
    }

    /// Returns the blocks that contain the address.
    pub(super) fn around(&self, address: IpAddr) -> BTreeSet<IpNet> {
        let whole = IpNet::from(address);
        parents(whole)
            .chain([whole])
            .filter(|cidr| self.contains(cidr))
            .collect()
    }

    /// Returns the blocks of other nodes of an IP version.
    pub(super) fn of_others(&self, node: &str, version: IpVersion) -> impl Iterator<Item = IpNet> {
        let is_other = move |(cidr, owner): &(&IpNet, &String)| {
            owner.as_str() != node && IpVersion::of(cidr.addr()) == version
        };
        self.map.iter().filter(is_other).map(|(cidr, _)| *cidr)
    }

    /// Returns the parts of a block that overlap another one. No address there is assigned, because
    /// its node is ambiguous.
    fn shared(&self, cidr: IpNet) -> BTreeSet<IpNet> {
        let smaller = |other: IpNet| if other.contains(&cidr) { cidr } else { other };
        self.overlapping(cidr).into_iter().map(smaller).collect()
    }
}

/// Returns the ranges that contain a range, the largest first.
pub(super) fn parents(cidr: IpNet) -> impl Iterator<Item = IpNet> {
    (0..cidr.prefix_len())
        .filter_map(move |length| IpNet::new(cidr.addr(), length).ok())
        .map(|parent| parent.trunc())
}

/// Constraints on assigning addresses of a block.
#[derive(Clone, Debug)]
pub(super) struct Constraints {
    /// Limits and reservations of the cluster.
    pub(super) limits: Arc<Limits>,
    /// Parts of the block that overlap another one.
    pub(super) shared: BTreeSet<IpNet>,
    /// The time, in RFC 3339.
    pub(super) now: String,
}

impl Constraints {
    /// Constraints on a block among those that are known.
    pub(super) fn new(limits: Arc<Limits>, known: &KnownBlocks, cidr: IpNet, now: String) -> Self {
        Self {
            limits,
            shared: known.shared(cidr),
            now,
        }
    }

    /// Returns true when the address is assigned only to a pod that names it.
    pub(super) fn is_reserved(&self, address: IpAddr) -> bool {
        self.limits.is_reserved(address) || self.is_shared(address)
    }

    /// Returns true when the address is in two blocks.
    pub(super) fn is_shared(&self, address: IpAddr) -> bool {
        self.shared.iter().any(|range| range.contains(&address))
    }

    /// Returns true when the cooldown of an address released at that time is over. A time that
    /// cannot be read is over, because nobody would ever end it.
    pub(super) fn is_over(&self, released_at: &str) -> bool {
        let cooldown = SignedDuration::from_secs(self.limits.cooldown.into());
        let times = released_at
            .parse::<Timestamp>()
            .ok()
            .zip(self.now.parse::<Timestamp>().ok());
        times.is_none_or(|(released, now)| now.duration_since(released) >= cooldown)
    }

    /// Number of addresses of the block that can be assigned.
    pub(super) fn room(&self, block: &Block) -> usize {
        let free = match (self.limits.reserved.is_empty(), self.shared.is_empty()) {
            (true, true) => block.free(),
            _ => block.available(|address| self.is_reserved(address)),
        };
        let rested = block
            .cooling_down()
            .filter(|(address, since)| self.is_over(since) && !self.is_reserved(*address));
        free + rested.count()
    }

    /// Returns true when no address of the block is assigned or in cooldown.
    pub(super) fn is_empty(&self, block: &Block) -> bool {
        block.allocated().all(|(_, attribute)| {
            attribute
                .released_at
                .as_deref()
                .is_some_and(|since| self.is_over(since))
        })
    }

    /// Number of addresses of the block in cooldown.
    pub(super) fn resting(&self, block: &Block) -> usize {
        block
            .cooling_down()
            .filter(|(_, since)| !self.is_over(since))
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a range")
    }

    fn ranges() -> impl Strategy<Value = BTreeSet<IpNet>> {
        let range = (0..64_u8, 24..=32_u8).prop_map(|(host, length)| {
            IpNet::new([10, 0, 0, host].into(), length)
                .expect("a length of IPv4")
                .trunc()
        });
        proptest::collection::btree_set(range, 0..12)
    }

    proptest! {
        /// Few lookups find what a scan of all blocks finds.
        #[test]
        fn overlaps_are_found_whoever_knows_of_them(
            map in ranges(),
            own in ranges(),
            asked in ranges(),
        ) {
            let all: BTreeSet<IpNet> = map.union(&own).copied().collect();
            let known = KnownBlocks {
                map: Arc::new(map.into_iter().map(|cidr| (cidr, "n1".to_owned())).collect()),
                own,
            };
            for cidr in asked {
                let meets = |other: &&IpNet| {
                    **other != cidr && (other.contains(&cidr) || cidr.contains(*other))
                };
                prop_assert_eq!(
                    known.overlapping(cidr),
                    all.iter().filter(meets).copied().collect::<BTreeSet<_>>(),
                );
                let address = cidr.network();
                prop_assert_eq!(
                    known.around(address),
                    all
                        .iter()
                        .filter(|other| other.contains(&address))
                        .copied().collect::<BTreeSet<_>>(),
                );
            }
        }
    }

    #[test]
    fn what_is_in_two_blocks_and_what_rests_is_no_room() {
        let map = [("10.0.0.0/28", "n1"), ("10.0.0.8/30", "n2")]
            .map(|(cidr, node)| (net(cidr), node.to_owned()));
        let known = KnownBlocks {
            map: Arc::new(map.into()),
            own: BTreeSet::new(),
        };
        let mut block = Block::new(net("10.0.0.0/28"), "n1", String::new());
        let limits = Arc::new(Limits {
            cooldown: 60,
            ..Limits::default()
        });
        let constraints =
            |now: &str| Constraints::new(limits.clone(), &known, block.cidr(), now.to_owned());
        let early = constraints("2026-01-01T00:00:59Z");
        assert_eq!(early.room(&block), 12);
        let late = constraints("2026-01-01T00:01:00Z");
        let attribute = margay_api::v3::ipam::AllocationAttribute {
            handle_id: Some("h".to_owned()),
            ..Default::default()
        };
        block.assign(&attribute, |_| false).expect("room");
        block.start_cooldown("h", "2026-01-01T00:00:00Z");
        assert_eq!((early.room(&block), early.resting(&block)), (11, 1));
        assert_eq!((late.room(&block), late.resting(&block)), (12, 0));
        assert_eq!(
            (early.is_empty(&block), late.is_empty(&block)),
            (false, true)
        );
        assert!(
            early.is_over("yesterday"),
            "what cannot be read ends some time"
        );
        let small = Constraints::new(limits.clone(), &known, net("10.0.0.8/30"), String::new());
        assert_eq!(
            small.room(&Block::new(net("10.0.0.8/30"), "n2", String::new())),
            0
        );
    }
}
