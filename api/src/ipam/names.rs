//! Names of IPAM objects. They encode ranges and can never change: every reader computes them.

use ipnet::IpNet;
use sha2::{Digest, Sha256};

/// The longest name of a Kubernetes object.
const MAX_NAME: usize = 253;
/// Hex digits of the hash that replaces the end of a name that is too long.
const HASH_DIGITS: usize = 11;

/// Name of a block: its range with `.`, `:` and `/` as `-`.
pub fn block(cidr: IpNet) -> String {
    cidr.to_string().replace(['.', ':', '/'], "-")
}

/// Name of a node's claim on a block.
pub fn affinity(node: &str, cidr: IpNet) -> String {
    limit(format!("{node}-{}", block(cidr)))
}

/// Name of a handle: in lower case, as object names must be.
pub fn handle(id: &str) -> String {
    limit(id.to_lowercase())
}

fn limit(name: String) -> String {
    if name.len() <= MAX_NAME {
        return name;
    }
    let hash: String = Sha256::digest(&name)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut kept = MAX_NAME - HASH_DIGITS - 1;
    while !name.is_char_boundary(kept) {
        kept -= 1;
    }
    format!("{}-{}", &name[..kept], &hash[..HASH_DIGITS])
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
    }

    #[test]
    fn long_names_stay_legal_and_different() {
        let (one, other) = (handle(&"a".repeat(300)), handle(&"a".repeat(301)));
        assert_eq!((one.len(), other.len()), (MAX_NAME, MAX_NAME));
        assert_ne!(one, other);
    }
}
