//! How many addresses of pools and blocks are in use, as calicoctl counts them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::v3::ipam::AllocationAttribute;

use crate::calico::table::framed;

/// Significant digits of a number.
const DIGITS: usize = 5;

/// Numbers of addresses of a range.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Usage {
    total: f64,
    in_use: f64,
    reserved: f64,
    /// In use and reserved: assigned before it was reserved.
    both: f64,
    cooling: f64,
}

impl Usage {
    fn of<'a>(range: IpNet, reserved: &[IpNet], blocks: impl Iterator<Item = &'a Block>) -> Self {
        let within = reserved
            .iter()
            .filter_map(|net| intersection(*net, range))
            .collect();
        let within = IpNet::aggregate(&within);
        let is_reserved = |address: &IpAddr| within.iter().any(|net| net.contains(address));
        // The sum of no numbers at all would be minus zero.
        let reserved = within
            .iter()
            .copied()
            .map(size)
            .fold(0.0, |sum, size| sum + size);
        let mut usage = Self {
            total: size(range),
            reserved,
            ..Self::default()
        };
        for (address, attribute) in blocks.flat_map(Block::allocated) {
            usage.in_use += 1.0;
            usage.both += f64::from(u8::from(is_reserved(&address)));
            usage.cooling += f64::from(u8::from(attribute.released_at.is_some()));
        }
        usage
    }

    fn row(self, grouping: &str, range: IpNet) -> Vec<String> {
        let free = self.total - self.reserved - self.in_use + self.both;
        let part = |number: f64| format!("{} ({:.0}%)", short(number), 100.0 * number / self.total);
        let parts = [self.in_use, self.reserved, free, self.cooling].map(part);
        let head = [grouping.to_owned(), range.to_string(), short(self.total)];
        head.into_iter().chain(parts).collect()
    }
}

/// The smaller one of two ranges of which one holds the other.
fn intersection(a: IpNet, b: IpNet) -> Option<IpNet> {
    match (a.contains(&b), b.contains(&a)) {
        (true, _) => Some(b),
        (_, true) => Some(a),
        (false, false) => None,
    }
}

fn size(range: IpNet) -> f64 {
    2f64.powi(i32::from(range.max_prefix_len() - range.prefix_len()))
}

/// A number with at most five significant digits, as C's `%.5g` has it.
fn short(number: f64) -> String {
    if number < 10f64.powi(DIGITS as i32) {
        return number.to_string();
    }
    let text = format!("{number:.*e}", DIGITS - 1);
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
    format!("{mantissa}e+{exponent:0>2}")
}

/// The table of pools, with their blocks if these are asked for. Blocks of no pool come last.
pub fn utilisation(
    pools: &BTreeMap<String, IpNet>,
    reserved: &[IpNet],
    blocks: &[Block],
    shows_blocks: bool,
) -> String {
    const HEADER: [&str; 7] = [
        "GROUPING",
        "CIDR",
        "IPS TOTAL",
        "IPS IN USE",
        "IPS RESERVED",
        "IPS FREE",
        "IPS COOLING",
    ];
    let live = || blocks.iter().filter(|block| !block.spec().deleted);
    let row = |block: &Block| {
        Usage::of(block.cidr(), reserved, std::iter::once(block)).row("Block", block.cidr())
    };
    let mut rows = Vec::new();
    for range in pools.values() {
        let own = || live().filter(|block| range.contains(&block.cidr()));
        rows.push(Usage::of(*range, reserved, own()).row("IP Pool", *range));
        rows.extend(own().filter(|_| shows_blocks).map(row));
    }
    let is_pooled = |block: &Block| pools.values().any(|range| range.contains(&block.cidr()));
    rows.extend(
        live()
            .filter(|block| shows_blocks && !is_pooled(block))
            .map(row),
    );
    framed(&HEADER, &rows, 2)
}

/// The table of addresses that a node has from the block of another one, or of none.
pub fn borrowed(blocks: &[Block]) -> String {
    const HEADER: [&str; 6] = [
        "IP",
        "BORROWING-NODE",
        "BLOCK",
        "BLOCK OWNER",
        "TYPE",
        "ALLOCATED-TO",
    ];
    let mut rows = Vec::new();
    for block in blocks {
        let owner = block.node().unwrap_or_default();
        for (address, attribute) in block.allocated() {
            let of = |key: &str| attribute.secondary.as_ref()?.get(key).cloned();
            let Some(node) = of("node").filter(|node| node != owner) else {
                continue;
            };
            let pod = of("pod").map(|pod| format!("{}/{pod}", of("namespace").unwrap_or_default()));
            let kind = if pod.is_some() {
                "pod".to_owned()
            } else {
                of("type").unwrap_or_default()
            };
            rows.push(vec![
                address.to_string(),
                node,
                block.cidr().to_string(),
                owner.to_owned(),
                kind,
                pod.unwrap_or_default(),
            ]);
        }
    }
    framed(&HEADER, &rows, HEADER.len())
}

/// What an address is used for, in a few words.
pub fn owner(attribute: &AllocationAttribute) -> String {
    let of = |key: &str| attribute.secondary.as_ref()?.get(key).cloned();
    if let Some(released) = &attribute.released_at {
        return format!("nobody since {released}: it rests");
    }
    let node = of("node")
        .map(|node| format!(" on node {node}"))
        .unwrap_or_default();
    match (of("namespace"), of("pod"), of("type")) {
        (Some(namespace), Some(pod), _) => format!("pod {namespace}/{pod}{node}"),
        (_, _, Some(kind)) => format!("{kind}{node}"),
        _ => format!(
            "handle {}{node}",
            attribute.handle_id.as_deref().unwrap_or("<none>")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let table = [
            (0.0, "0"),
            (256.0, "256"),
            (65_536.0, "65536"),
            (1_048_576.0, "1.0486e+06"),
            (2f64.powi(80), "1.2089e+24"),
        ];
        for (number, wanted) in table {
            assert_eq!(short(number), wanted);
        }
    }

    #[test]
    fn reservations_and_addresses_are_counted_once() {
        let mut block = Block::new("10.0.0.0/28".parse().expect("a range"), "n1", String::new());
        for _ in 0..3 {
            block
                .assign(&AllocationAttribute::default(), |_| false)
                .expect("an address");
        }
        let reserved = ["10.0.0.0/30", "10.0.0.2/32", "10.9.0.0/16"]
            .map(|text| text.parse().expect("a range"));
        let usage = Usage::of(block.cidr(), &reserved, std::iter::once(&block));
        assert_eq!(
            usage,
            Usage {
                total: 16.0,
                in_use: 3.0,
                reserved: 4.0,
                both: 3.0,
                cooling: 0.0
            }
        );
        let row = usage.row("Block", block.cidr());
        assert_eq!(
            row,
            [
                "Block",
                "10.0.0.0/28",
                "16",
                "3 (19%)",
                "4 (25%)",
                "12 (75%)",
                "0 (0%)"
            ]
        );
    }
}
