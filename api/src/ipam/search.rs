//! Order in which a node looks for blocks to claim: the ranges of a pool from a start that depends
//! on the node's name, so that nodes that start together do not race for the same block.

use std::net::IpAddr;

use ipnet::IpNet;
use sha2::{Digest, Sha256};

/// Returns the block-sized ranges of a pool, from a start that depends on the node's name and
/// wrapping around.
pub fn candidates(pool: IpNet, block_size: u8, node: &str) -> impl Iterator<Item = IpNet> {
    let bits = u32::from(block_size.saturating_sub(pool.prefix_len())).min(63);
    let count = 1u64 << bits;
    let hash = Sha256::digest(node.as_bytes());
    let start = hash[..8]
        .iter()
        .fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        % count;
    (0..count).filter_map(move |step| subnet(pool, block_size, (start + step) % count))
}

/// Returns blocks in an order that depends on `seed` alone: nodes that borrow spread over the
/// blocks of others, and a node that retries begins at the same one.
pub fn shuffled(blocks: impl IntoIterator<Item = IpNet>, seed: &str) -> Vec<IpNet> {
    let key = |block: &IpNet| Sha256::digest(format!("{seed} {block}"));
    let mut keyed: Vec<_> = blocks
        .into_iter()
        .map(|block| (key(&block), block))
        .collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, block)| block).collect()
}

fn subnet(pool: IpNet, block_size: u8, number: u64) -> Option<IpNet> {
    let shift = u32::from(pool.max_prefix_len() - block_size);
    let address = match pool.network() {
        IpAddr::V4(first) => IpAddr::V4((u32::from(first) + ((number as u32) << shift)).into()),
        IpAddr::V6(first) => IpAddr::V6((u128::from(first) + (u128::from(number) << shift)).into()),
    };
    IpNet::new(address, block_size).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_block_of_the_pool_comes_once_and_nodes_differ() {
        let pool: IpNet = "10.244.0.0/20".parse().expect("a range");
        let order = |node: &str| candidates(pool, 26, node).collect::<Vec<_>>();
        let one = order("n1");
        assert_eq!(one.len(), 64);
        assert_eq!(one.iter().collect::<BTreeSet<_>>().len(), 64);
        assert!(one.iter().all(|block| pool.contains(block)));
        assert_ne!(one[0], order("n2")[0]);
        assert_eq!(candidates(pool, 20, "n1").collect::<Vec<_>>(), [pool]);
    }

    #[test]
    fn seeds_give_different_orders_of_the_same_blocks() {
        let pool: IpNet = "10.244.0.0/22".parse().expect("a range");
        let order = |seed: &str| shuffled(candidates(pool, 26, "n1"), seed);
        assert_eq!(
            order("n1"),
            shuffled(candidates(pool, 26, "n2"), "n1"),
            "the order of the input does not matter"
        );
        assert_eq!(
            order("n1").into_iter().collect::<BTreeSet<_>>(),
            candidates(pool, 26, "n1").collect()
        );
        let first: BTreeSet<IpNet> = (0..20).map(|n| order(&format!("n{n}"))[0]).collect();
        assert!(first.len() > 5, "{first:?}");
    }

    #[test]
    fn ipv6_pools_are_searched_lazily() {
        let pool: IpNet = "fd00::/48".parse().expect("a range");
        let first = candidates(pool, 122, "n1").next().expect("a block");
        assert!(pool.contains(&first) && first.prefix_len() == 122);
    }
}
