use proptest::prelude::*;

use super::*;
use margay_api::network::Encapsulation;

fn mk_pool(cidr: &str, block_size: u8, created: i64) -> Pool {
    let cidr = cidr.parse().expect("a range");
    Pool {
        cidr,
        encapsulation: Encapsulation::Vxlan,
        nat_outgoing: false,
        block_size,
        is_exported: true,
        created,
    }
}

fn mk_block(node: &str, created: i64) -> BlockInfo {
    BlockInfo {
        node: Some(node.to_owned()),
        created,
        ..BlockInfo::default()
    }
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a range")
}

/// Refusals of a block made at second 20, beside the pool 10.0.0.0/16 of second 10 and the block
/// 10.0.0.0/26 of second 15.
#[test]
fn a_block_is_accepted_if_a_pool_is_divided_into_it_and_no_older_one_overlaps() {
    let mut blocks = Blocks::default();
    blocks.set_pool("main".to_owned(), Some(mk_pool("10.0.0.0/16", 26, 10)));
    blocks.set_block(net("10.0.0.0/26"), Some(mk_block("n1", 15)));
    let size = || {
        Some(BlockRefusal::Size {
            wanted: 26,
            pool: "main".to_owned(),
        })
    };
    let table = [
        ("10.0.0.64/26", 20, None),
        ("10.0.0.5/32", 20, size()),
        ("10.0.0.0/25", 20, size()),
        ("10.0.0.0/16", 20, size()),
        ("10.0.1.0/27", 5, None),
        ("10.0.0.32/27", 5, None),
        ("0.0.0.0/0", 20, Some(BlockRefusal::Unpooled)),
        ("8.8.8.8/32", 20, Some(BlockRefusal::Unpooled)),
        ("fd00::/122", 20, Some(BlockRefusal::Unpooled)),
    ];
    for (range, created, wanted) in table {
        let range = net(range);
        blocks.set_block(range, Some(mk_block("n9", created)));
        let refused: BTreeMap<IpNet, BlockRefusal> = blocks
            .refused()
            .map(|(range, _, why)| (range, why))
            .collect();
        assert_eq!(refused.get(&range), wanted.as_ref(), "{range}");
        // The older block loses only to one that is older still.
        assert_eq!(
            refused.contains_key(&net("10.0.0.0/26")),
            range == net("10.0.0.32/27"),
            "{range}"
        );
        blocks.set_block(range, None);
    }
    blocks.set_pool("main".to_owned(), None);
    assert_eq!(blocks.get(&net("10.0.0.0/26")), None, "its pool is gone");
}

fn range() -> impl Strategy<Value = IpNet> {
    let v4 = (0..32_u8, 26..=32_u8)
        .prop_map(|(host, length)| IpNet::new([10, 0, 0, host].into(), length));
    let v6 = (0..32_u16, 122..=128_u8)
        .prop_map(|(host, length)| IpNet::new([0xfd00, 0, 0, 0, 0, 0, 0, host].into(), length));
    prop_oneof![v4, v6].prop_map(|range| range.expect("a length of its family").trunc())
}

/// A block of one of two nodes, with addresses borrowed by both.
fn info(range: IpNet) -> impl Strategy<Value = BlockInfo> {
    let borrowed = proptest::collection::btree_map(0..4_usize, 0..2_u8, 0..3);
    (0..2_u8, 0..4_i64, borrowed).prop_map(move |(node, created, borrowed)| {
        let loan = |(nth, node): (usize, u8)| Some((range.hosts().nth(nth)?, format!("n{node}")));
        let borrowed = borrowed.into_iter().filter_map(loan).collect();
        BlockInfo {
            borrowed,
            ..mk_block(&format!("n{node}"), created)
        }
    })
}

fn step() -> impl Strategy<Value = (IpNet, Option<BlockInfo>)> {
    range().prop_flat_map(|range| (Just(range), proptest::option::of(info(range))))
}

/// Accepted blocks of these in pools of /28 and /124 made at second 2, computed from all of them.
fn accepted_blocks(all: &BTreeMap<IpNet, BlockInfo>, most: usize) -> BTreeMap<IpNet, BlockInfo> {
    let is_v4 = |range: &IpNet| range.addr().is_ipv4();
    let fits = |range: &IpNet, info: &BlockInfo| {
        info.created < 2 || range.prefix_len() == if is_v4(range) { 28 } else { 124 }
    };
    let is_within = |range: &IpNet, info: &BlockInfo| {
        let own = all
            .iter()
            .filter(|(other, them)| them.node == info.node && is_v4(other) == is_v4(range));
        own.filter(|(other, them)| (them.created, *other) < (info.created, range))
            .count()
            < most
    };
    let overlap = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
    let may = |range: &IpNet, info: &BlockInfo| fits(range, info) && is_within(range, info);
    let is_first = |range: &IpNet, info: &BlockInfo| {
        let others = all
            .iter()
            .filter(|(other, them)| overlap(range, other) && may(other, them));
        others
            .filter(|(other, them)| (them.created, *other) < (info.created, range))
            .count()
            == 0
    };
    let loans = |node: &str, range: &IpNet| {
        let blocks = all.iter().filter(|(other, _)| is_v4(other) == is_v4(range));
        let mut loans: Vec<(IpNet, IpAddr)> = blocks
            .flat_map(|(block, info)| {
                info.borrowed
                    .iter()
                    .map(move |(address, by)| (*block, *address, by))
            })
            .filter(|(_, _, by)| *by == node)
            .map(|(block, address, _)| (block, address))
            .collect();
        loans.sort();
        loans.truncate(most);
        loans
    };
    let good = all
        .iter()
        .filter(|(range, info)| may(range, info) && is_first(range, info));
    good.map(|(range, info)| {
        let mut info = info.clone();
        info.borrowed
            .retain(|(address, node)| loans(node, range).contains(&(*range, *address)));
        (*range, info)
    })
    .collect()
}

proptest! {
    /// After any sequence of changes the accepted blocks equal those that a check of all blocks
    /// finds, and every block whose state changed is returned.
    #[test]
    fn every_change_is_returned(
        steps in proptest::collection::vec(step(), 0..40),
        most in 1..6_usize,
    ) {
        let mut blocks = Blocks::new(most);
        blocks.set_pool("a".to_owned(), Some(mk_pool("10.0.0.0/24", 28, 2)));
        blocks.set_pool("b".to_owned(), Some(mk_pool("fd00::/112", 124, 2)));
        let mut all: BTreeMap<IpNet, BlockInfo> = BTreeMap::new();
        for (range, info) in steps {
            let before = accepted_blocks(&all, most);
            match info.clone() {
                Some(info) => all.insert(range, info),
                None => all.remove(&range),
            };
            let touched = blocks.set_block(range, info);
            let after = accepted_blocks(&all, most);
            for other in before.keys().chain(after.keys()) {
                let is_same = before.get(other) == after.get(other);
                prop_assert!(is_same || touched.contains(other), "{} is not returned", other);
            }
            for range in all.keys() {
                prop_assert_eq!(blocks.get(range), after.get(range).cloned(), "{}", range);
            }
            let found: BTreeSet<_> = blocks
                .containing(range.addr())
                .map(|info| (&info.node, info.created))
                .collect();
            let around = after.iter().filter(|(around, _)| around.contains(&range.addr()));
            let wanted: BTreeSet<_> = around.map(|(_, info)| (&info.node, info.created)).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}

#[test]
fn blocks_and_borrowed_addresses_of_a_node_are_limited_and_the_rest_is_reported() {
    let mut blocks = Blocks::new(2);
    blocks.set_pool("main".to_owned(), Some(mk_pool("10.0.0.0/16", 28, 0)));
    let lent = |by: &str, addresses: [&str; 3]| BlockInfo {
        borrowed: addresses
            .map(|address| (address.parse().expect("an address"), by.to_owned()))
            .into(),
        ..mk_block("n1", 1)
    };
    blocks.set_block(
        net("10.0.1.0/28"),
        Some(lent("n9", ["10.0.1.3", "10.0.1.1", "10.0.1.2"])),
    );
    for (range, created) in [("10.0.0.0/28", 7), ("10.0.0.16/28", 9), ("10.0.0.32/28", 8)] {
        blocks.set_block(net(range), Some(mk_block("n9", created)));
    }
    assert!(blocks.get(&net("10.0.0.32/28")).is_some());
    assert_eq!(blocks.get(&net("10.0.0.16/28")), None, "it is the youngest");
    assert_eq!(blocks.refused().count(), 0, "refused for its quota only");
    let borrowed = blocks.get(&net("10.0.1.0/28")).expect("accepted").borrowed;
    assert_eq!(
        borrowed
            .iter()
            .map(|(address, _)| address.to_string())
            .collect::<Vec<_>>(),
        ["10.0.1.1", "10.0.1.2"]
    );
    let excess = |is_borrowed| Excess {
        node: "n9".to_owned(),
        version: IpVersion::V4,
        is_borrowed,
        count: 3,
    };
    assert_eq!(
        blocks.excesses().collect::<Vec<_>>(),
        [excess(false), excess(true)]
    );
    let touched = blocks.set_block(net("10.0.0.0/28"), None);
    assert!(touched.contains(&net("10.0.0.16/28")) && blocks.get(&net("10.0.0.16/28")).is_some());
    assert_eq!(blocks.excesses().collect::<Vec<_>>(), [excess(true)]);
}
