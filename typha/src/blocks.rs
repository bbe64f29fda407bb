//! Blocks of addresses by what they cover: which of them an address is in, without looking at all.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::BlockInfo;

/// See the module.
#[derive(Debug, Default)]
pub struct Blocks {
    infos: BTreeMap<IpNet, BlockInfo>,
    /// How many blocks there are of each prefix length, of IPv4 (true) and IPv6: a cluster has few lengths.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl Blocks {
    /// The block of the range is this one now, or none.
    pub fn set(&mut self, range: IpNet, info: Option<BlockInfo>) {
        let range = range.trunc();
        let length = (range.addr().is_ipv4(), range.prefix_len());
        let is_there = info.is_some();
        let former = match info {
            Some(info) => self.infos.insert(range, info),
            None => self.infos.remove(&range),
        };
        match (former.is_some(), is_there) {
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

    /// The blocks that the address is in.
    pub fn around(&self, address: IpAddr) -> impl Iterator<Item = &BlockInfo> {
        let of_family = self.lengths.keys().filter(move |(is_v4, _)| *is_v4 == address.is_ipv4());
        of_family.filter_map(move |(_, length)| {
            let range = IpNet::new(address, *length).ok()?.trunc();
            self.infos.get(&range)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range() -> impl Strategy<Value = IpNet> {
        let v4 = (0..32_u8, 26..=32_u8).prop_map(|(host, length)| IpNet::new([10, 0, 0, host].into(), length));
        let v6 = (0..32_u16, 122..=128_u8)
            .prop_map(|(host, length)| IpNet::new([0xfd00, 0, 0, 0, 0, 0, 0, host].into(), length));
        prop_oneof![v4, v6].prop_map(|range| range.expect("a length of its family"))
    }

    proptest! {
        /// Whatever was set in which order: the same blocks as a look at all finds.
        #[test]
        fn none_is_overlooked(steps in proptest::collection::vec((range(), any::<bool>()), 0..60)) {
            let mut blocks = Blocks::default();
            let mut all: BTreeMap<IpNet, String> = BTreeMap::new();
            for (range, is_there) in steps {
                let owner = range.trunc().to_string();
                blocks.set(range, is_there.then(|| BlockInfo { node: Some(owner.clone()), borrowed: Vec::new() }));
                match is_there {
                    true => all.insert(range.trunc(), owner),
                    false => all.remove(&range.trunc()),
                };
                let mut found: Vec<_> = blocks.around(range.addr()).filter_map(|info| info.node.clone()).collect();
                found.sort();
                let mut wanted: Vec<_> =
                    all.iter().filter(|(around, _)| around.contains(&range.addr())).map(|(_, owner)| owner.clone()).collect();
                wanted.sort();
                prop_assert_eq!(found, wanted);
            }
            prop_assert_eq!(blocks.lengths.values().sum::<usize>(), all.len());
        }
    }
}
