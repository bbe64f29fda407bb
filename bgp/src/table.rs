//! Values by prefix, and which prefixes contain another one.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

/// A map by prefix, without host bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetMap<T> {
    values: BTreeMap<IpNet, T>,
    /// How many prefixes there are of each length, by IP version: only those are looked for.
    lengths: [BTreeMap<u8, usize>; 2],
}

/// A set of prefixes.
pub type NetSet = NetMap<()>;

impl<T> Default for NetMap<T> {
    fn default() -> Self {
        Self {
            values: BTreeMap::new(),
            lengths: Default::default(),
        }
    }
}

impl<T> NetMap<T> {
    /// Sets the value of a prefix, and returns the former one.
    pub fn insert(&mut self, net: IpNet, value: T) -> Option<T> {
        let net = net.trunc();
        let former = self.values.insert(net, value);
        if former.is_none() {
            *self.lengths[version(net.addr())]
                .entry(net.prefix_len())
                .or_default() += 1;
        }
        former
    }

    /// Removes a prefix, and returns its value.
    pub fn remove(&mut self, net: &IpNet) -> Option<T> {
        let former = self.values.remove(net)?;
        let lengths = &mut self.lengths[version(net.addr())];
        if let Some(count) = lengths.get_mut(&net.prefix_len()) {
            *count -= 1;
            if *count == 0 {
                lengths.remove(&net.prefix_len());
            }
        }
        Some(former)
    }

    /// The value of exactly this prefix.
    pub fn get(&self, net: &IpNet) -> Option<&T> {
        self.values.get(net)
    }

    /// Prefixes that are or contain this one, the shortest first.
    pub fn containing(&self, net: &IpNet) -> impl Iterator<Item = (IpNet, &T)> {
        let (address, length) = (net.addr(), net.prefix_len());
        let lengths = self.lengths[version(address)]
            .range(..=length)
            .map(|(length, _)| *length);
        lengths.filter_map(move |length| {
            let around = IpNet::new(address, length).ok()?.trunc();
            Some((around, self.values.get(&around)?))
        })
    }

    /// Every prefix with its value, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&IpNet, &T)> {
        self.values.iter()
    }

    /// How many prefixes there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

impl<T> FromIterator<(IpNet, T)> for NetMap<T> {
    fn from_iter<I: IntoIterator<Item = (IpNet, T)>>(items: I) -> Self {
        let mut map = Self::default();
        for (net, value) in items {
            map.insert(net, value);
        }
        map
    }
}

fn version(address: IpAddr) -> usize {
    usize::from(address.is_ipv6())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The same as asking every prefix, after any insertions and removals.
        #[test]
        fn what_contains_a_prefix_is_found(
            changes in prop::collection::vec((any::<u8>(), 0u8..=32, any::<bool>()), 0..60),
            asked in (any::<u8>(), 0u8..=32),
        ) {
            let net = |(byte, length): (u8, u8)| {
                IpNet::new(IpAddr::from([10, byte & 3, byte >> 6, byte]), length).unwrap().trunc()
            };
            let mut map = NetMap::default();
            let mut plain: BTreeMap<IpNet, u8> = BTreeMap::new();
            for (byte, length, is_added) in changes {
                let net = net((byte, length));
                if is_added {
                    prop_assert_eq!(map.insert(net, byte), plain.insert(net, byte));
                } else {
                    prop_assert_eq!(map.remove(&net), plain.remove(&net));
                }
            }
            let asked = net(asked);
            let mut expected: Vec<(IpNet, u8)> =
                plain
                    .iter()
                    .filter(|(net, _)| net.contains(&asked))
                    .map(|(n, v)| (*n, *v))
                    .collect();
            expected.sort_by_key(|(net, _)| net.prefix_len());
            let found: Vec<(IpNet, u8)> = map
                .containing(&asked)
                .map(|(net, value)| (net, *value))
                .collect();
            prop_assert_eq!(found, expected);
            prop_assert_eq!(map.len(), plain.len());
        }
    }
}
