//! Names of IPAM objects. They encode ranges and must never change: every reader computes them.

use std::collections::BTreeMap;

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use ipnet::IpNet;
use sha2::{Digest, Sha256};
use sha3::Sha3_256;

/// Maximum length of an object's name (Kubernetes, DNS subdomain).
const MAX_NAME: usize = 253;
/// Length of the hash that replaces the end of a name that is too long.
const HASH_DIGITS: usize = 11;

/// Name of a block: its range with `.`, `:` and `/` as `-`.
pub fn block(cidr: IpNet) -> String {
    cidr.to_string().replace(['.', ':', '/'], "-")
}

/// Returns the range of the block of that name, if it is one.
pub fn block_range(name: &str) -> Option<IpNet> {
    let (address, length) = name.rsplit_once('-')?;
    let v4 = format!("{}/{length}", address.replace('-', ".")).parse();
    let range: IpNet = v4
        .or_else(|_| format!("{}/{length}", address.replace('-', ":")).parse())
        .ok()?;
    (block(range) == name).then_some(range)
}

/// Name of a node's affinity to a block. If it would be too long, the node's name is cut and a hash
/// of the whole is appended.
pub fn affinity(node: &str, cidr: IpNet) -> String {
    let block = block(cidr);
    let name = format!("{node}-{block}");
    if name.len() < MAX_NAME {
        return name;
    }
    let kept = &node[..MAX_NAME - 1 - block.len() - HASH_DIGITS - 2];
    format!("{kept}-{block}-{}", short_hash(&format!("{node}+{block}")))
}

/// Labels of a node's affinity to a block, by which a node finds its own without listing all. Names
/// of nodes can be longer than label values, so the label holds a hash.
pub fn affinity_labels(node: &str, cidr: IpNet) -> BTreeMap<String, String> {
    let version = match cidr {
        IpNet::V4(_) => "4",
        IpNet::V6(_) => "6",
    };
    let labels = [
        (LABEL_HOSTNAME_HASH, hostname_hash(node)),
        (LABEL_AFFINITY_TYPE, "host".to_owned()),
        (LABEL_IP_VERSION, version.to_owned()),
    ];
    labels
        .map(|(label, value)| (label.to_owned(), value))
        .into()
}

/// Label of affinities: the node, from [`hostname_hash`].
pub const LABEL_HOSTNAME_HASH: &str = "projectcalico.org/hostname-hash";
/// Label of affinities: `host` or `virtual`.
pub const LABEL_AFFINITY_TYPE: &str = "projectcalico.org/affinity-type";
/// Label of affinities: `4` or `6`.
pub const LABEL_IP_VERSION: &str = "projectcalico.org/ip-version";

/// SHA3-256 of a node's name in base 32 without padding: 52 characters, so it fits a label value.
pub fn hostname_hash(node: &str) -> String {
    BASE32_NOPAD.encode(&Sha3_256::digest(node))
}

/// Annotation of a handle: the node that wrote it. Calico ignores it, and handles written by Calico
/// have none.
pub const ANNOTATION_HANDLE_NODE: &str = "margay.io/node";

/// Name of a handle: in lower case, as object names must be.
pub fn handle(id: &str) -> String {
    limit(id.to_lowercase())
}

fn limit(name: String) -> String {
    if name.len() <= MAX_NAME {
        return name;
    }
    let mut kept = MAX_NAME - HASH_DIGITS - 1;
    while !name.is_char_boundary(kept) {
        kept -= 1;
    }
    format!("{}-{}", &name[..kept], short_hash(&name))
}

fn short_hash(text: &str) -> String {
    let mut digits = HEXLOWER.encode(&Sha256::digest(text));
    digits.truncate(HASH_DIGITS);
    digits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_encode_ranges() {
        let cidr = |text: &str| text.parse::<IpNet>().expect("a range");
        assert_eq!(block(cidr("10.244.1.0/26")), "10-244-1-0-26");
        assert_eq!(block(cidr("fd00::40/122")), "fd00--40-122");
        assert_eq!(affinity("n1", cidr("10.244.1.0/26")), "n1-10-244-1-0-26");
        assert_eq!(handle("k8s-pod-network.AB"), "k8s-pod-network.ab");
        for text in [
            "10.244.1.0/26",
            "0.0.0.0/0",
            "fd00::40/122",
            "fd00::/64",
            "::/0",
            "1:2:3:4:5:6:7:8/128",
        ] {
            assert_eq!(block_range(&block(cidr(text))), Some(cidr(text)), "{text}");
        }
        for name in [
            "",
            "x",
            "10-244-1-26",
            "10-244-1-0-33",
            "010-244-1-0-26",
            "n1-10-244-1-0-26",
        ] {
            assert_eq!(block_range(name), None, "{name}");
        }
    }

    #[test]
    fn long_names_stay_legal_and_different() {
        let (one, other) = (handle(&"a".repeat(300)), handle(&"a".repeat(301)));
        assert_eq!((one.len(), other.len()), (MAX_NAME, MAX_NAME));
        assert_ne!(one, other);
    }

    #[test]
    fn long_affinities_keep_the_range_readable() {
        let cidr: IpNet = "10.244.1.0/26".parse().expect("a range");
        let name = affinity(&"n".repeat(250), cidr);
        assert_eq!(name.len(), MAX_NAME - 1);
        assert!(name.contains("n-10-244-1-0-26-"));
        assert_ne!(name, affinity(&"n".repeat(251), cidr));
        let longest_whole = "n".repeat(MAX_NAME - 1 - "-10-244-1-0-26".len());
        assert_eq!(
            affinity(&longest_whole, cidr),
            format!("{longest_whole}-10-244-1-0-26")
        );
    }

    #[test]
    fn affinities_are_found_by_the_hash_of_the_node() {
        let labels = affinity_labels("n1", "10.244.1.0/26".parse().expect("a range"));
        let shown: Vec<String> = labels
            .iter()
            .map(|(label, value)| format!("{label}={value}"))
            .collect();
        assert_eq!(
            shown,
            [
                "projectcalico.org/affinity-type=host",
                "projectcalico.org/hostname-hash=DM7EHBDU4L3ELKRER4A46T6QMKAGARQI4CVWBO26S4I2IDAAW6CA",
                "projectcalico.org/ip-version=4",
            ]
        );
    }
}
