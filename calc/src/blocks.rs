//! IPAM blocks that are accepted. Agents write block objects, so one is accepted only as far as it
//! does not contradict administrators and other nodes: it must be one of the blocks that a pool is
//! divided into, and overlap none that is older. The number of accepted blocks and borrowed
//! addresses per node is limited, because every node has a route to each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::{BlockInfo, Pool};
use margay_api::rule::IpVersion;

use crate::quota::Quota;

/// Maximal number of accepted blocks of a node per IP version, and of addresses that it borrows:
/// far more than a node has pods, whatever the size of blocks. The API server cannot count a node's
/// objects when it writes one.
pub const MAX_PER_NODE: usize = 1024;

/// A node and an IP version.
type Holder = (String, IpVersion);

/// Reason why a block is refused.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BlockRefusal {
    /// It is in no pool.
    Unpooled,
    /// The pool around it is divided into blocks of another size, and was when the block was made.
    Size {
        /// Prefix length of the pool's blocks.
        wanted: u8,
        /// Name of the pool.
        pool: String,
    },
    /// It overlaps an older block.
    Overlaps(IpNet),
}

impl fmt::Display for BlockRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unpooled => f.write_str(
                "no IPPool has this range, so other nodes have no route to it; create such a pool, \
                 or delete the block once no pod uses it",
            ),
            Self::Size { wanted, pool } => write!(
                f,
                "IPPool {pool} is divided into blocks of /{wanted}, and this is not one of them, \
                 so it gets no route; delete it, and find out what created it"
            ),
            Self::Overlaps(other) => write!(
                f,
                "it overlaps the older block {other}, so it gets no route; delete it, and recreate \
                 its pods"
            ),
        }
    }
}

/// A node exceeds its quota.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Excess {
    /// The node.
    pub node: String,
    /// IP version.
    pub version: IpVersion,
    /// True for borrowed addresses, false for blocks.
    pub is_borrowed: bool,
    /// The actual number.
    pub count: usize,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            is_borrowed, count, ..
        } = self;
        let version = match self.version {
            IpVersion::V4 => "IPv4",
            IpVersion::V6 => "IPv6",
        };
        match is_borrowed {
            false => write!(
                f,
                "it has {count} IPAMBlocks of {version}, of which the {MAX_PER_NODE} oldest are \
                 accepted and the others get no routes; delete unused ones, and find out what \
                 created them"
            ),
            true => write!(
                f,
                "it has {count} addresses of {version} in IPAMBlocks of other nodes, of which the \
                 first {MAX_PER_NODE} are accepted and the others get no routes; release unused \
                 ones, and find out what took them"
            ),
        }
    }
}

/// All pools and blocks, and which of the blocks are accepted.
#[derive(Debug)]
pub struct Blocks {
    pools: BTreeMap<String, Pool>,
    infos: BTreeMap<IpNet, BlockInfo>,
    /// Number of blocks per prefix length, of IPv4 (true) and IPv6: a cluster has few different
    /// lengths.
    lengths: BTreeMap<(bool, u8), usize>,
    /// Blocks of each node, oldest first.
    owned: Quota<Holder, (i64, IpNet)>,
    /// Addresses that each node borrows, by block.
    borrowed: Quota<Holder, (IpNet, IpAddr)>,
}

impl Default for Blocks {
    fn default() -> Self {
        Self::new(MAX_PER_NODE)
    }
}

impl Blocks {
    fn new(most: usize) -> Self {
        let (pools, infos, lengths) = Default::default();
        Self {
            pools,
            infos,
            lengths,
            owned: Quota::new(most),
            borrowed: Quota::new(most),
        }
    }

    /// Sets or removes a pool. Returns the blocks that may become accepted or refused by that.
    pub fn set_pool(&mut self, name: String, pool: Option<Pool>) -> BTreeSet<IpNet> {
        let former = match pool.clone() {
            Some(pool) => self.pools.insert(name, pool),
            None => self.pools.remove(&name),
        };
        let ranges: Vec<IpNet> = former
            .iter()
            .chain(&pool)
            .map(|pool| pool.cidr.trunc())
            .collect();
        ranges
            .into_iter()
            .flat_map(|range| self.within(range))
            .collect()
    }

    /// Sets or removes a block. Returns the blocks that may become accepted or refused by that, or
    /// whose accepted borrowed addresses may change.
    pub fn set_block(&mut self, range: IpNet, info: Option<BlockInfo>) -> BTreeSet<IpNet> {
        let range = range.trunc();
        let is_there = info.is_some();
        let former = match info {
            Some(info) => self.infos.insert(range, info),
            None => self.infos.remove(&range),
        };
        self.count_length(range, former.is_some(), is_there);
        let (moved, lent) = self.charge(range, former.as_ref());
        let mut touched = lent;
        for range in moved.into_iter().chain([range]) {
            touched.insert(range);
            touched.extend(self.blocks_around(range).map(|(other, _)| other));
            touched.extend(self.within(range));
        }
        touched
    }

    /// Charges the block to its node, and borrowed addresses to their nodes, instead of the former
    /// value. Returns other blocks that moved into or out of a quota, and blocks with borrowed
    /// addresses that did.
    fn charge(
        &mut self,
        range: IpNet,
        former: Option<&BlockInfo>,
    ) -> (BTreeSet<IpNet>, BTreeSet<IpNet>) {
        let Self {
            infos,
            owned,
            borrowed,
            ..
        } = self;
        let (before, after) = (
            former.map(Charges::new),
            infos.get(&range).map(Charges::new),
        );
        let version = IpVersion::of(range.addr());
        let mut moved = BTreeSet::new();
        let [had, has] =
            [&before, &after].map(|charges| charges.as_ref().and_then(|charges| charges.owner));
        if had != has {
            let had = had.and_then(|(node, created)| {
                owned.remove(&(node.to_owned(), version), &(created, range))
            });
            let has = has.and_then(|(node, created)| {
                owned.add((node.to_owned(), version), (created, range))
            });
            moved.extend(had.into_iter().chain(has).map(|(_, range)| range));
        }
        let mut lent = BTreeSet::new();
        let [had, has] = [before, after]
            .map(|charges| charges.map(|charges| charges.borrowed).unwrap_or_default());
        for (address, node) in had.difference(&has) {
            let next = borrowed.remove(&((*node).to_owned(), version), &(range, *address));
            lent.extend(next.map(|(block, _)| block));
        }
        for (address, node) in has.difference(&had) {
            let last = borrowed.add(((*node).to_owned(), version), (range, *address));
            lent.extend(last.map(|(block, _)| block));
        }
        (moved, lent)
    }

    fn count_length(&mut self, range: IpNet, was_there: bool, is_there: bool) {
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

    /// Pools by name.
    pub fn pools(&self) -> &BTreeMap<String, Pool> {
        &self.pools
    }

    /// The block with this range, if it is accepted, with the accepted borrowed addresses.
    pub fn get(&self, range: &IpNet) -> Option<BlockInfo> {
        let info = self.infos.get(range)?;
        if !self.is_accepted(*range, info) {
            return None;
        }
        let mut info = info.clone();
        let holder = |node: &String| (node.clone(), IpVersion::of(range.addr()));
        info.borrowed
            .retain(|(address, node)| self.borrowed.is_within(&holder(node), &(*range, *address)));
        Some(info)
    }

    /// Accepted blocks that contain the address.
    pub fn containing(&self, address: IpAddr) -> impl Iterator<Item = &BlockInfo> {
        let blocks = self.blocks_around(IpNet::from(address));
        blocks
            .filter(move |(range, info)| self.is_accepted(*range, info))
            .map(|(_, info)| info)
    }

    /// Nodes that exceed their quota.
    pub fn excesses(&self) -> impl Iterator<Item = Excess> {
        let excess = |is_borrowed: bool| {
            move |((node, version), count): (&Holder, usize)| Excess {
                node: node.clone(),
                version: *version,
                is_borrowed,
                count,
            }
        };
        self.owned
            .exceeded()
            .map(excess(false))
            .chain(self.borrowed.exceeded().map(excess(true)))
    }

    /// Blocks that are refused for reasons other than the quota, with the reason.
    pub fn refused(&self) -> impl Iterator<Item = (IpNet, &BlockInfo, BlockRefusal)> {
        self.infos
            .iter()
            .filter_map(move |(range, info)| Some((*range, info, self.check(*range, info).err()?)))
    }

    fn is_accepted(&self, range: IpNet, info: &BlockInfo) -> bool {
        self.is_within(range, info) && self.check(range, info).is_ok()
    }

    /// Returns true if the block is within its node's quota.
    fn is_within(&self, range: IpNet, info: &BlockInfo) -> bool {
        let holder = info
            .node
            .clone()
            .map(|node| (node, IpVersion::of(range.addr())));
        holder.is_none_or(|holder| self.owned.is_within(&holder, &(info.created, range)))
    }

    fn check(&self, range: IpNet, info: &BlockInfo) -> Result<(), BlockRefusal> {
        self.in_pool(range, info)?;
        // Ties are broken by range, so that every replica refuses the same block.
        let rank = |range: IpNet, info: &BlockInfo| (info.created, range);
        let own = rank(range, info);
        let within = self
            .within(range)
            .into_iter()
            .filter_map(|other| self.infos.get_key_value(&other));
        let others = self
            .blocks_around(range)
            .chain(within.map(|(range, info)| (*range, info)));
        let earlier = others.filter(|(other, _)| *other != range);
        let may_be_accepted = |other: IpNet, info: &BlockInfo| {
            self.in_pool(other, info).is_ok() && self.is_within(other, info)
        };
        let earlier = earlier
            .filter(|(other, info)| rank(*other, info) < own && may_be_accepted(*other, info));
        match earlier.map(|(other, _)| other).min() {
            Some(other) => Err(BlockRefusal::Overlaps(other)),
            None => Ok(()),
        }
    }

    /// A block older than the pool belongs to an earlier pool of that range, which may have been
    /// divided differently: its pods keep their routes.
    fn in_pool(&self, range: IpNet, info: &BlockInfo) -> Result<(), BlockRefusal> {
        let around = || {
            self.pools
                .iter()
                .filter(move |(_, pool)| pool.cidr.contains(&range))
        };
        let fits =
            |pool: &Pool| pool.block_size == range.prefix_len() || info.created < pool.created;
        if around().any(|(_, pool)| fits(pool)) {
            return Ok(());
        }
        match around().next() {
            Some((name, pool)) => Err(BlockRefusal::Size {
                wanted: pool.block_size,
                pool: name.clone(),
            }),
            None => Err(BlockRefusal::Unpooled),
        }
    }

    /// Blocks that contain the range, including itself.
    fn blocks_around(&self, range: IpNet) -> impl Iterator<Item = (IpNet, &BlockInfo)> {
        let is_wider = move |(is_v4, length): &&(bool, u8)| {
            *is_v4 == range.addr().is_ipv4() && *length <= range.prefix_len()
        };
        self.lengths
            .keys()
            .filter(is_wider)
            .filter_map(move |(_, length)| {
                let wider = IpNet::new(range.addr(), *length).ok()?.trunc();
                self.infos.get(&wider).map(|info| (wider, info))
            })
    }

    /// Blocks within the range, including itself. Ranges are ordered by their first address.
    fn within(&self, range: IpNet) -> Vec<IpNet> {
        let first = IpNet::new(range.network(), 0).unwrap_or(range);
        let blocks = self.infos.range(first..=IpNet::from(range.broadcast()));
        blocks
            .map(|(block, _)| *block)
            .filter(|block| range.contains(block))
            .collect()
    }
}

/// Use of quotas by a block: of its node, and of the nodes that borrow from it.
struct Charges<'a> {
    owner: Option<(&'a str, i64)>,
    borrowed: BTreeSet<(IpAddr, &'a str)>,
}

impl<'a> Charges<'a> {
    fn new(info: &'a BlockInfo) -> Self {
        Self {
            owner: info.node.as_deref().map(|node| (node, info.created)),
            borrowed: info
                .borrowed
                .iter()
                .map(|(address, node)| (*address, node.as_str()))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests;
