//! Names in the table. Names of sets and class chains derive from their content, so they survive a
//! restart of the agent.

use data_encoding::HEXLOWER;
use margay_calc::model::SetId;
use sha2::{Digest, Sha256};

use crate::links::WORKLOAD_PREFIX;
use margay_nft::{ChainName, Family, IfName, SetName, TableName};

/// Name of the table, which only Margay uses.
pub fn table() -> TableName {
    TableName::new("margay").expect("a constant name is valid")
}

/// Name of a chain.
pub(super) fn chain(name: &str) -> ChainName {
    ChainName::new(name).expect("constant names, and hexadecimal digits behind a letter, are valid")
}

/// Name of a set.
pub(super) fn set(name: &str) -> SetName {
    SetName::new(name).expect("constant names, and hexadecimal digits behind a letter, are valid")
}

/// Prefix of the host-side interface of every pod.
pub(super) fn workload_prefix() -> IfName {
    IfName::new(WORKLOAD_PREFIX).expect("a constant name is valid")
}

/// Base chain of source address validation.
pub(super) const GUARD: &str = "guard";
/// Base chain of packets to the node itself.
pub(super) const TO_HOST: &str = "to-host";
/// Base chain of egress policy.
pub(super) const FROM_WORKLOAD: &str = "from-workload";
/// Base chain of ingress policy.
pub(super) const TO_WORKLOAD: &str = "to-workload";
/// Base chain of outgoing NAT.
pub(super) const MASQUERADE: &str = "masquerade";
/// Map from family and interface to the chain of the sender's egress class.
pub(super) const SENDERS: &str = "senders";
/// Map from family and interface to the chain of the receiver's ingress class.
pub(super) const RECEIVERS: &str = "receivers";

/// Digit of the family in names.
pub(super) const fn digit(family: Family) -> char {
    match family {
        Family::Ipv4 => '4',
        Family::Ipv6 => '6',
    }
}

/// Elements that one kernel set of a set of the view holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holds {
    /// Single addresses, in a hash.
    Addresses,
    /// Ranges, as intervals.
    Ranges,
    /// Address, protocol and port.
    Ports,
}

/// Name of a kernel set for a set of the view.
pub(super) fn ip_set(id: &SetId, holds: Holds, family: Family) -> SetName {
    let letter = match holds {
        Holds::Addresses => 's',
        Holds::Ranges => 'n',
        Holds::Ports => 'p',
    };
    set(&format!(
        "{letter}{}-{}",
        digit(family),
        hash(id.0.as_bytes())
    ))
}

/// Hash as 20 hexadecimal digits: a collision is likely only among 2^40 names.
pub(super) fn hash(bytes: &[u8]) -> String {
    HEXLOWER.encode(&Sha256::digest(bytes)[..10])
}

/// Hash as a number, the same on every machine.
pub(super) fn spread(bytes: &[u8]) -> usize {
    let digest = Sha256::digest(bytes);
    usize::from(u16::from_be_bytes([digest[0], digest[1]]))
}
