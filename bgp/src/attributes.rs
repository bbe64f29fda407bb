//! Path attributes of a route (RFC 4271 section 5, 1997, 4360, 4456, 8092, 9234).

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
pub use margay_api::bgp::{Community, CommunityValue, LargeCommunity};

/// Most AS numbers of one segment (RFC 4271 section 4.3: its length is one octet).
const MAX_SEGMENT: usize = 255;

/// Local preference where a route has none (RFC 4271 section 9.1.1 leaves it open; every daemon
/// takes 100).
pub const DEFAULT_LOCAL_PREF: u32 = 100;

/// Routes with this community go to no other speaker (RFC 1997).
pub const NO_ADVERTISE: Community = Community(0xffff_ff02);
/// Routes with this community stay in the autonomous system (RFC 1997).
pub const NO_EXPORT: Community = Community(0xffff_ff01);
/// As [`NO_EXPORT`] where there are no confederations (RFC 1997).
pub const NO_EXPORT_SUBCONFED: Community = Community(0xffff_ff03);

/// Address family of unicast routes (RFC 4760; SAFI 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4 unicast, AFI 1.
    Ipv4,
    /// IPv6 unicast, AFI 2.
    Ipv6,
}

impl Family {
    /// Both families, IPv4 first.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// Family of a prefix.
    pub fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::Ipv4,
            IpNet::V6(_) => Self::Ipv6,
        }
    }

    /// Family of an address.
    pub fn of_address(address: &IpAddr) -> Self {
        if address.is_ipv4() {
            Self::Ipv4
        } else {
            Self::Ipv6
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// ORIGIN (RFC 4271 section 5.1.1), the most preferred first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Origin {
    /// Interior to the originating autonomous system.
    #[default]
    Igp,
    /// Learnt by the protocol EGP.
    Egp,
    /// Learnt by other means.
    Incomplete,
}

/// Segment of an AS path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Segment {
    /// AS_SEQUENCE: in the order passed, the latest first.
    Sequence(Vec<u32>),
    /// AS_SET: in no order, counts as one.
    Set(Vec<u32>),
}

impl Segment {
    fn asns(&self) -> &[u32] {
        match self {
            Self::Sequence(asns) | Self::Set(asns) => asns,
        }
    }
}

/// AS_PATH (RFC 4271 section 5.1.2), always of four-octet numbers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct AsPath(pub Vec<Segment>);

impl AsPath {
    /// A path of one sequence.
    pub fn sequence(asns: &[u32]) -> Self {
        Self(
            asns.chunks(MAX_SEGMENT)
                .map(|chunk| Segment::Sequence(chunk.to_vec()))
                .collect(),
        )
    }

    /// Length in the sense of best path selection: a set counts as one (RFC 4271 section 9.1.2.2).
    pub fn length(&self) -> usize {
        let length = |segment: &Segment| match segment {
            Segment::Sequence(asns) => asns.len(),
            Segment::Set(_) => 1,
        };
        self.0.iter().map(length).sum()
    }

    /// Every AS number in order.
    pub fn asns(&self) -> impl Iterator<Item = u32> + '_ {
        self.0
            .iter()
            .flat_map(|segment| segment.asns().iter().copied())
    }

    /// How often an AS number is in the path.
    pub fn count(&self, asn: u32) -> usize {
        self.asns().filter(|each| *each == asn).count()
    }

    /// The neighbouring AS from which the route came: the first number, if it is of a sequence.
    /// MULTI_EXIT_DISC is compared among routes of one such AS.
    pub fn neighbor(&self) -> Option<u32> {
        match self.0.first() {
            Some(Segment::Sequence(asns)) => asns.first().copied(),
            _ => None,
        }
    }

    /// The path begins with these numbers, as sequences.
    pub fn starts_with(&self, prefix: &[u32]) -> bool {
        let sequences = self.0.iter().map_while(|segment| match segment {
            Segment::Sequence(asns) => Some(asns.iter().copied()),
            Segment::Set(_) => None,
        });
        let mut asns = sequences.flatten();
        prefix.iter().all(|asn| asns.next() == Some(*asn))
    }

    /// Puts numbers in front, in their order.
    pub fn prepend(&mut self, asns: &[u32]) {
        for asn in asns.iter().rev() {
            match self.0.first_mut() {
                Some(Segment::Sequence(first)) if first.len() < MAX_SEGMENT => {
                    first.insert(0, *asn)
                }
                _ => self.0.insert(0, Segment::Sequence(vec![*asn])),
            }
        }
    }
}

impl fmt::Display for AsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join = |asns: &[u32]| {
            asns.iter()
                .map(u32::to_string)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let segments = self.0.iter().map(|segment| match segment {
            Segment::Sequence(asns) => join(asns),
            Segment::Set(asns) => format!("{{{}}}", join(asns)),
        });
        f.write_str(&segments.collect::<Vec<_>>().join(" "))
    }
}

/// Where packets of a route go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextHop {
    /// The address. For IPv4 routes it may be one of IPv6 (RFC 8950).
    pub address: IpAddr,
    /// The link-local address beside a global one of IPv6 (RFC 2545).
    pub link_local: Option<Ipv6Addr>,
}

impl From<IpAddr> for NextHop {
    fn from(address: IpAddr) -> Self {
        Self {
            address,
            link_local: None,
        }
    }
}

/// AGGREGATOR (RFC 4271 section 5.1.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Aggregator {
    /// Its AS number.
    pub asn: u32,
    /// Its BGP identifier.
    pub router_id: Ipv4Addr,
}

/// An optional transitive attribute that we do not know and pass on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnknownAttribute {
    /// Flags octet as received.
    pub flags: u8,
    /// Type code.
    pub code: u8,
    /// Value.
    pub value: Vec<u8>,
}

/// Path attributes with their next hop, shared by all routes that came with them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attributes {
    /// ORIGIN.
    pub origin: Origin,
    /// AS_PATH.
    pub as_path: AsPath,
    /// NEXT_HOP, or that of MP_REACH_NLRI.
    pub next_hop: NextHop,
    /// MULTI_EXIT_DISC.
    pub med: Option<u32>,
    /// LOCAL_PREF; absent on routes of other autonomous systems.
    pub local_pref: Option<u32>,
    /// ATOMIC_AGGREGATE.
    pub atomic_aggregate: bool,
    /// AGGREGATOR.
    pub aggregator: Option<Aggregator>,
    /// COMMUNITIES.
    pub communities: BTreeSet<Community>,
    /// EXTENDED_COMMUNITIES, passed on as they are.
    pub extended_communities: BTreeSet<u64>,
    /// LARGE_COMMUNITIES.
    pub large_communities: BTreeSet<LargeCommunity>,
    /// ORIGINATOR_ID (RFC 4456).
    pub originator_id: Option<Ipv4Addr>,
    /// CLUSTER_LIST (RFC 4456), the latest cluster first.
    pub cluster_list: Vec<Ipv4Addr>,
    /// ONLY_TO_CUSTOMER (RFC 9234).
    pub only_to_customer: Option<u32>,
    /// Others that are optional and transitive.
    pub unknown: Vec<UnknownAttribute>,
}

impl Attributes {
    /// Attributes of a route that begins here: origin IGP, an empty path.
    pub fn local(next_hop: IpAddr) -> Self {
        Self {
            origin: Origin::Igp,
            as_path: AsPath::default(),
            next_hop: next_hop.into(),
            med: None,
            local_pref: None,
            atomic_aggregate: false,
            aggregator: None,
            communities: BTreeSet::new(),
            extended_communities: BTreeSet::new(),
            large_communities: BTreeSet::new(),
            originator_id: None,
            cluster_list: Vec::new(),
            only_to_customer: None,
            unknown: Vec::new(),
        }
    }

    /// The route has this community.
    pub fn has_community(&self, community: CommunityValue) -> bool {
        match community {
            CommunityValue::Standard(community) => self.communities.contains(&community),
            CommunityValue::Large(community) => self.large_communities.contains(&community),
        }
    }

    /// Adds a community; one that is there already stays as it is.
    pub fn add_community(&mut self, community: CommunityValue) {
        match community {
            CommunityValue::Standard(community) => self.communities.insert(community),
            CommunityValue::Large(community) => self.large_communities.insert(community),
        };
    }

    /// Bytes of memory that they take, about: what limits of a peer count.
    pub fn weight(&self) -> usize {
        let path: usize = self
            .as_path
            .0
            .iter()
            .map(|segment| 24 + 4 * segment.asns().len())
            .sum();
        let unknown: usize = self.unknown.iter().map(|each| 32 + each.value.len()).sum();
        let communities = 4 * self.communities.len()
            + 8 * self.extended_communities.len()
            + 12 * self.large_communities.len();
        size_of::<Self>() + path + unknown + communities + 4 * self.cluster_list.len()
    }
}

/// Attributes in use, each once: routes of an UPDATE share them, and so do equal ones of peers.
#[derive(Debug, Default)]
pub(crate) struct AttributeStore {
    known: BTreeSet<Arc<Attributes>>,
    sweep_at: usize,
}

impl AttributeStore {
    const FIRST_SWEEP: usize = 1024;

    /// The shared value that equals these.
    pub(crate) fn intern(&mut self, attributes: Attributes) -> Arc<Attributes> {
        if let Some(known) = self.known.get(&attributes) {
            return known.clone();
        }
        if self.known.len() >= self.sweep_at {
            self.known.retain(|each| Arc::strong_count(each) > 1);
            // Twice what is left: a sweep costs as much as what has been interned since the last.
            self.sweep_at = (2 * self.known.len()).max(Self::FIRST_SWEEP);
        }
        let shared = Arc::new(attributes);
        self.known.insert(shared.clone());
        shared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_counts_sets_once_and_splits_long_sequences() {
        let mut path = AsPath(vec![
            Segment::Sequence(vec![1; 254]),
            Segment::Set(vec![7, 8, 9]),
        ]);
        assert_eq!((path.length(), path.neighbor()), (255, Some(1)));
        path.prepend(&[2, 3]);
        assert_eq!(path.0.len(), 3);
        assert!(path.starts_with(&[2, 3, 1]) && !path.starts_with(&[3]));
        assert_eq!((path.length(), path.count(8)), (257, 1));
        assert_eq!(AsPath(vec![Segment::Set(vec![1])]).neighbor(), None);
        assert!(AsPath::default().starts_with(&[]));
    }

    #[test]
    fn equal_attributes_are_shared_and_unused_ones_go() {
        let mut store = AttributeStore::default();
        let address = |last: u32| IpAddr::from(Ipv4Addr::from(last));
        let one = store.intern(Attributes::local(address(0)));
        assert!(Arc::ptr_eq(
            &one,
            &store.intern(Attributes::local(address(0)))
        ));
        for last in 1..5000 {
            store.intern(Attributes::local(address(last)));
        }
        assert!(
            store.known.len() <= AttributeStore::FIRST_SWEEP + 1,
            "{}",
            store.known.len()
        );
        assert!(Arc::ptr_eq(
            &one,
            &store.intern(Attributes::local(address(0)))
        ));
    }
}
