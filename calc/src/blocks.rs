//! Which blocks of addresses count. A block is an object that the agent of a node writes, so it is believed only as far as it does not contradict what
//! administrators and other nodes have said before: it is one of the blocks that a pool is divided into, and overlaps none that was there before it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::{BlockInfo, Pool};

/// Why a block does not count.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refused {
    /// No pool has its range.
    Unpooled,
    /// The pool around it is divided in another way, and was when the block was made.
    Size {
        /// Prefix length of the pool's blocks.
        wanted: u8,
        /// Name of the pool.
        pool: String,
    },
    /// It overlaps another one, which was there before.
    Overlaps(IpNet),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unpooled => {
                f.write_str("no IPPool has this range, so other nodes have no route to it; create such a pool, or delete the block once nobody uses it")
            }
            Self::Size { wanted, pool } => write!(
                f,
                "IPPool {pool} is divided into blocks of /{wanted}, so this is none of them and gets no route; delete it, and find out who has made it"
            ),
            Self::Overlaps(other) => write!(
                f,
                "it overlaps block {other}, which was there before, so that it gets no route; delete it, and make its pods anew"
            ),
        }
    }
}

/// All pools and blocks, and which of the blocks count.
#[derive(Debug, Default)]
pub struct Blocks {
    pools: BTreeMap<String, Pool>,
    infos: BTreeMap<IpNet, BlockInfo>,
    /// How many blocks there are of each prefix length, of IPv4 (true) and IPv6: a cluster has few lengths.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl Blocks {
    /// The pool of that name is this one now, or none. Answers with the blocks of which it may depend whether they count.
    pub fn set_pool(&mut self, name: String, pool: Option<Pool>) -> BTreeSet<IpNet> {
        let former = match pool.clone() {
            Some(pool) => self.pools.insert(name, pool),
            None => self.pools.remove(&name),
        };
        let ranges: Vec<IpNet> = former.iter().chain(&pool).map(|pool| pool.cidr.trunc()).collect();
        ranges.into_iter().flat_map(|range| self.within(range)).collect()
    }

    /// The block of the range is this one now, or none. Answers with the blocks of which it may depend whether they count.
    pub fn set_block(&mut self, range: IpNet, info: Option<BlockInfo>) -> BTreeSet<IpNet> {
        let range = range.trunc();
        let is_there = info.is_some();
        let former = match info {
            Some(info) => self.infos.insert(range, info),
            None => self.infos.remove(&range),
        };
        self.count(range, former.is_some(), is_there);
        let around = self.lookup(range).map(|(other, _)| other).collect::<Vec<_>>();
        self.within(range).into_iter().chain(around).chain([range]).collect()
    }

    fn count(&mut self, range: IpNet, was_there: bool, is_there: bool) {
        let length = (range.addr().is_ipv4(), range.prefix_len());
        match (was_there, is_there) {
            (false, true) => *self.lengths.entry(length).or_default() += 1,
            (true, false) => {
                let count = self.lengths.remove(&length).unwrap_or_default();
                if count > 1 {
                    self.lengths.insert(length, count - 1);
                }
            }
            _ => {}
        }
    }

    /// The pools by name.
    pub fn pools(&self) -> &BTreeMap<String, Pool> {
        &self.pools
    }

    /// The block of that range, if it counts.
    pub fn get(&self, range: &IpNet) -> Option<&BlockInfo> {
        let info = self.infos.get(range)?;
        self.check(*range, info).is_ok().then_some(info)
    }

    /// The blocks that the address is in, and that count.
    pub fn around(&self, address: IpAddr) -> impl Iterator<Item = &BlockInfo> {
        let blocks = self.lookup(IpNet::from(address));
        blocks.filter(move |(range, info)| self.check(*range, info).is_ok()).map(|(_, info)| info)
    }

    /// The blocks that do not count, with the reason.
    pub fn refused(&self) -> impl Iterator<Item = (IpNet, &BlockInfo, Refused)> {
        self.infos.iter().filter_map(move |(range, info)| Some((*range, info, self.check(*range, info).err()?)))
    }

    fn check(&self, range: IpNet, info: &BlockInfo) -> Result<(), Refused> {
        self.in_pool(range, info)?;
        let rank = |range: IpNet, info: &BlockInfo| (info.created, range);
        let own = rank(range, info);
        let within = self.within(range).into_iter().filter_map(|other| self.infos.get_key_value(&other));
        let others = self.lookup(range).chain(within.map(|(range, info)| (*range, info)));
        let earlier = others.filter(|(other, _)| *other != range);
        let earlier = earlier.filter(|(other, info)| rank(*other, info) < own && self.in_pool(*other, info).is_ok());
        match earlier.map(|(other, _)| other).min() {
            Some(other) => Err(Refused::Overlaps(other)),
            None => Ok(()),
        }
    }

    /// A block that is older than the pool is of an earlier pool of that range, which may have been divided in another way: its pods run on.
    fn in_pool(&self, range: IpNet, info: &BlockInfo) -> Result<(), Refused> {
        let around = || self.pools.iter().filter(move |(_, pool)| pool.cidr.contains(&range));
        let fits = |pool: &Pool| pool.block_size == range.prefix_len() || info.created < pool.created;
        if around().any(|(_, pool)| fits(pool)) {
            return Ok(());
        }
        match around().next() {
            Some((name, pool)) => Err(Refused::Size { wanted: pool.block_size, pool: name.clone() }),
            None => Err(Refused::Unpooled),
        }
    }

    /// Blocks that hold the range, itself included.
    fn lookup(&self, range: IpNet) -> impl Iterator<Item = (IpNet, &BlockInfo)> {
        let is_wider =
            move |(is_v4, length): &&(bool, u8)| *is_v4 == range.addr().is_ipv4() && *length <= range.prefix_len();
        self.lengths.keys().filter(is_wider).filter_map(move |(_, length)| {
            let wider = IpNet::new(range.addr(), *length).ok()?.trunc();
            self.infos.get(&wider).map(|info| (wider, info))
        })
    }

    /// Blocks in the range, itself included. Ranges are in the order of their first addresses.
    fn within(&self, range: IpNet) -> Vec<IpNet> {
        let first = IpNet::new(range.network(), 0).unwrap_or(range);
        let blocks = self.infos.range(first..=IpNet::from(range.broadcast()));
        blocks.map(|(block, _)| *block).filter(|block| range.contains(block)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use margay_api::network::Encapsulation;

    fn mk_pool(cidr: &str, block_size: u8, created: i64) -> Pool {
        let cidr = cidr.parse().expect("a range");
        Pool { cidr, encapsulation: Encapsulation::Vxlan, nat_outgoing: false, block_size, created }
    }

    fn mk_block(node: &str, created: i64) -> BlockInfo {
        BlockInfo { node: Some(node.to_owned()), created, ..BlockInfo::default() }
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a range")
    }

    /// What a block made in second 20 is told beside the pool 10.0.0.0/16 of second 10 and the block 10.0.0.0/26 of second 15.
    #[test]
    fn a_block_counts_as_one_of_a_pool_that_overlaps_none_before_it() {
        let mut blocks = Blocks::default();
        blocks.set_pool("main".to_owned(), Some(mk_pool("10.0.0.0/16", 26, 10)));
        blocks.set_block(net("10.0.0.0/26"), Some(mk_block("n1", 15)));
        let size = || Some(Refused::Size { wanted: 26, pool: "main".to_owned() });
        let table = [
            ("10.0.0.64/26", 20, None),
            ("10.0.0.5/32", 20, size()),
            ("10.0.0.0/25", 20, size()),
            ("10.0.0.0/16", 20, size()),
            ("10.0.1.0/27", 5, None),
            ("10.0.0.32/27", 5, None),
            ("0.0.0.0/0", 20, Some(Refused::Unpooled)),
            ("8.8.8.8/32", 20, Some(Refused::Unpooled)),
            ("fd00::/122", 20, Some(Refused::Unpooled)),
        ];
        for (range, created, wanted) in table {
            let range = net(range);
            blocks.set_block(range, Some(mk_block("n9", created)));
            let refused: BTreeMap<IpNet, Refused> = blocks.refused().map(|(range, _, why)| (range, why)).collect();
            assert_eq!(refused.get(&range), wanted.as_ref(), "{range}");
            // The one that was there before loses to one that was there earlier still, and to no other.
            assert_eq!(refused.contains_key(&net("10.0.0.0/26")), range == net("10.0.0.32/27"), "{range}");
            blocks.set_block(range, None);
        }
        blocks.set_pool("main".to_owned(), None);
        assert_eq!(blocks.get(&net("10.0.0.0/26")), None, "its pool is gone");
    }

    fn range() -> impl Strategy<Value = IpNet> {
        let v4 = (0..32_u8, 26..=32_u8).prop_map(|(host, length)| IpNet::new([10, 0, 0, host].into(), length));
        let v6 = (0..32_u16, 122..=128_u8)
            .prop_map(|(host, length)| IpNet::new([0xfd00, 0, 0, 0, 0, 0, 0, host].into(), length));
        prop_oneof![v4, v6].prop_map(|range| range.expect("a length of its family").trunc())
    }

    proptest! {
        /// Whatever was set in which order: the same blocks as a look at all finds, and whoever's standing changed is named.
        #[test]
        fn none_is_overlooked(steps in proptest::collection::vec((range(), 0..4_i64, any::<bool>()), 0..40)) {
            let mut blocks = Blocks::default();
            blocks.set_pool("a".to_owned(), Some(mk_pool("10.0.0.0/24", 28, 2)));
            blocks.set_pool("b".to_owned(), Some(mk_pool("fd00::/112", 124, 2)));
            let mut all: BTreeMap<IpNet, BlockInfo> = BTreeMap::new();
            let counts = |all: &BTreeMap<IpNet, BlockInfo>| -> BTreeSet<IpNet> {
                let fits = |range: &IpNet, info: &BlockInfo| {
                    info.created < 2 || range.prefix_len() == if range.addr().is_ipv4() { 28 } else { 124 }
                };
                let overlap = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
                let earlier = |(range, info): &(&IpNet, &BlockInfo)| all.iter().any(|(other, them)| {
                    overlap(range, other) && fits(other, them) && (them.created, other) < (info.created, range)
                });
                let good = all.iter().filter(|(range, info)| fits(range, info));
                good.filter(|one| !earlier(one)).map(|(range, _)| *range).collect()
            };
            for (range, created, is_there) in steps {
                let before = counts(&all);
                let info = is_there.then(|| mk_block(&range.to_string(), created));
                match info.clone() {
                    Some(info) => all.insert(range, info),
                    None => all.remove(&range),
                };
                let touched = blocks.set_block(range, info);
                let after = counts(&all);
                for changed in before.symmetric_difference(&after) {
                    prop_assert!(touched.contains(changed), "{} is not named", changed);
                }
                for range in all.keys() {
                    prop_assert_eq!(blocks.get(range).is_some(), after.contains(range), "{}", range);
                }
                let mut found: Vec<_> = blocks.around(range.addr()).filter_map(|info| info.node.clone()).collect();
                found.sort();
                let mut wanted: Vec<_> =
                    after.iter().filter(|around| around.contains(&range.addr())).map(ToString::to_string).collect();
                wanted.sort();
                prop_assert_eq!(found, wanted);
            }
        }
    }
}
