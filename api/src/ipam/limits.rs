//! Limits of IPAM beside pools: IPAMConfiguration, IPReservations, and the lock of the datastore.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::rule::IpVersion;
use crate::v3::cluster::ClusterInformationSpec;
use crate::v3::ipam::{IPAMConfigurationSpec, IPReservationSpec};

/// Default of `maxBlocksPerHost`: blocks of one IP version per node (libcalico-go's ipam.go).
const MAX_BLOCKS: u32 = 20;

/// Limits that apply to every node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Writes are not allowed: the datastore is being migrated or repaired
    /// (`datastoreReady: false`).
    pub is_locked: bool,
    /// `strictAffinity`: a node assigns addresses from its own blocks only.
    pub strict_affinity: bool,
    /// `autoAllocateBlocks`: a node claims another block when it needs one.
    pub may_claim: bool,
    /// `maxBlocksPerHost`: maximum number of blocks of one IP version per node.
    pub max_blocks: u32,
    /// Ranges of IPReservations: their addresses are assigned only by explicit request.
    pub reserved: Vec<IpNet>,
    /// `ipCooldownSeconds`: time before a released address is assigned again, in seconds.
    pub cooldown: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self::new(None, &BTreeMap::new(), None).0
    }
}

impl Limits {
    /// Reads the objects, and lists what is invalid in them. A reservation that does not parse
    /// reserves nothing.
    pub fn new(
        configuration: Option<&IPAMConfigurationSpec>,
        reservations: &BTreeMap<String, IPReservationSpec>,
        information: Option<&ClusterInformationSpec>,
    ) -> (Self, Vec<String>) {
        let configuration = configuration.cloned().unwrap_or_default();
        let mut problems = Vec::new();
        let mut reserved = Vec::new();
        for (name, spec) in reservations {
            for text in &spec.reserved_cidrs {
                match range(text) {
                    Some(range) => reserved.push(range),
                    None => problems.push(format!(
                        "IPReservation {name}: spec.reservedCIDRs: {text:?}: neither an address \
                         nor a range; write it like 10.244.0.7 or 10.244.0.0/28"
                    )),
                }
            }
        }
        let limits = Self {
            is_locked: information.and_then(|information| information.datastore_ready)
                == Some(false),
            strict_affinity: configuration.strict_affinity,
            may_claim: configuration.auto_allocate_blocks,
            max_blocks: match configuration.max_blocks_per_host {
                0 => MAX_BLOCKS,
                most => most,
            },
            reserved,
            cooldown: configuration.ip_cooldown_seconds.unwrap_or_default(),
        };
        (limits, problems)
    }

    /// Returns true when the address is assigned only by explicit request.
    pub fn is_reserved(&self, address: IpAddr) -> bool {
        self.reserved.iter().any(|range| range.contains(&address))
    }

    /// Reason why a node that has `blocks` blocks of an IP version may not claim another one; none
    /// if it may.
    pub fn refuse_claim(&self, node: &str, blocks: usize) -> Option<String> {
        if !self.may_claim {
            return Some(format!(
                "node {node} claims no block, because IPAMConfiguration default has \
                 autoAllocateBlocks false; set it to true, or free addresses of this node"
            ));
        }
        let is_full = u32::try_from(blocks).is_ok_and(|blocks| blocks >= self.max_blocks);
        is_full.then(|| {
            format!(
                "node {node} claims no other block, because it has {blocks} blocks of the {} that \
                 maxBlocksPerHost of IPAMConfiguration default allows; raise that, or free \
                 addresses of this node",
                self.max_blocks
            )
        })
    }

    /// Reason why a node that has `blocks` blocks of the IP version exceeds `maxBlocksPerHost`;
    /// none if it does not.
    pub fn excess(&self, node: &str, version: IpVersion, blocks: usize) -> Option<String> {
        let most = usize::try_from(self.max_blocks)
            .ok()
            .filter(|most| blocks > *most)?;
        let of = match version {
            IpVersion::V4 => "IPv4",
            IpVersion::V6 => "IPv6",
        };
        Some(format!(
            "node {node} has {blocks} blocks of {of}, and maxBlocksPerHost of IPAMConfiguration \
             default allows {most}: it claims no other, and releases those without addresses; \
             raise the limit, or recreate pods on other nodes"
        ))
    }
}

/// Parses a range, or an address as the range that holds it alone.
fn range(text: &str) -> Option<IpNet> {
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    text.parse::<IpNet>()
        .ok()
        .map(|range| range.trunc())
        .or_else(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_objects_calicos_defaults_apply() {
        let wanted = Limits {
            is_locked: false,
            strict_affinity: false,
            may_claim: true,
            max_blocks: MAX_BLOCKS,
            reserved: Vec::new(),
            cooldown: 0,
        };
        assert_eq!(Limits::default(), wanted);
        let information = |ready| ClusterInformationSpec {
            datastore_ready: ready,
            ..Default::default()
        };
        for (ready, locked) in [(None, false), (Some(true), false), (Some(false), true)] {
            assert_eq!(
                Limits::new(None, &BTreeMap::new(), Some(&information(ready)))
                    .0
                    .is_locked,
                locked,
                "{ready:?}"
            );
        }
    }

    #[test]
    fn reservations_are_addresses_and_ranges_and_a_wrong_one_hurts_only_itself() {
        let spec = |cidrs: &[&str]| IPReservationSpec {
            reserved_cidrs: cidrs.iter().map(|c| (*c).to_owned()).collect(),
        };
        let reservations = BTreeMap::from([
            (
                "a".to_owned(),
                spec(&["10.0.0.9/30", "10.0.0.x", "fd00::7"]),
            ),
            ("b".to_owned(), spec(&["10.0.1.1"])),
        ]);
        let (limits, problems) = Limits::new(None, &reservations, None);
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].contains("IPReservation a") && problems[0].contains("10.0.0.x"),
            "{problems:?}"
        );
        for (address, reserved) in [
            ("10.0.0.8", true),
            ("10.0.0.12", false),
            ("fd00::7", true),
            ("fd00::8", false),
            ("10.0.1.1", true),
        ] {
            assert_eq!(
                limits.is_reserved(address.parse().expect("an address")),
                reserved,
                "{address}"
            );
        }
    }

    #[test]
    fn a_claim_that_is_refused_names_the_setting() {
        let limits = |change: fn(&mut IPAMConfigurationSpec)| {
            let mut spec = IPAMConfigurationSpec::default();
            change(&mut spec);
            Limits::new(Some(&spec), &BTreeMap::new(), None).0
        };
        assert_eq!(Limits::default().refuse_claim("n1", 19), None);
        assert!(
            Limits::default()
                .refuse_claim("n1", 20)
                .is_some_and(|text| text.contains("maxBlocksPerHost"))
        );
        let two = limits(|spec| spec.max_blocks_per_host = 2);
        assert_eq!(two.refuse_claim("n1", 1), None);
        assert!(
            two.refuse_claim("n1", 2)
                .is_some_and(|text| text.contains("2 blocks of the 2"))
        );
        let never = limits(|spec| spec.auto_allocate_blocks = false);
        assert!(
            never
                .refuse_claim("n1", 0)
                .is_some_and(|text| text.contains("autoAllocateBlocks"))
        );
    }
}
