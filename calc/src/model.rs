//! Model of the result: the records that a node enforces. `typha` sends exactly these, `node`
//! compiles exactly these.
//!
//! A node's view is a map from [`RecordId`] to [`Record`]. Ids are in dependency order: a record
//! refers only to records with smaller ids, so additions are applied in ascending order and
//! removals in descending order.

mod bgp;

pub use bgp::{BgpMesh, BgpPeerRecord, BgpRecord};

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::network::{Encapsulation, NodeInfo};
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_api::settings::FelixSettings;

/// Identity of a record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordId {
    /// Felix settings of the node. Global.
    Settings,
    /// A pool. Global.
    Pool(IpNet),
    /// A node of the cluster. Global.
    Node(String),
    /// A route to a block or to a borrowed address. Global.
    Route(IpNet),
    /// A set of addresses. Held by nodes with a policy that refers to it.
    IpSet(SetId),
    /// A policy. Held by nodes with an endpoint that it applies to.
    Policy(PolicyKey),
    /// A workload endpoint. Held by its own node only.
    Endpoint(EndpointKey),
    /// A host endpoint by the name of its object. Held by its own node only.
    HostEndpoint(String),
    /// BGP speaker of the node. Held by the nodes that have one, each its own.
    Bgp,
}

impl RecordId {
    /// Returns true if every node holds the record. Global records come first in dependency order.
    pub const fn is_global(&self) -> bool {
        match self {
            Self::Settings | Self::Pool(_) | Self::Node(_) | Self::Route(_) => true,
            Self::IpSet(_)
            | Self::Policy(_)
            | Self::Endpoint(_)
            | Self::HostEndpoint(_)
            | Self::Bgp => false,
        }
    }

    /// Kind of the record, as the debug services name it.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Settings => "settings",
            Self::Pool(_) => "pool",
            Self::Node(_) => "node",
            Self::Route(_) => "route",
            Self::IpSet(_) => "ip-set",
            Self::Policy(_) => "policy",
            Self::Endpoint(_) => "endpoint",
            Self::HostEndpoint(_) => "host-endpoint",
            Self::Bgp => "bgp",
        }
    }

    /// Name of the record within its kind; empty for settings and BGP.
    pub fn name(&self) -> String {
        match self {
            Self::Settings | Self::Bgp => String::new(),
            Self::Pool(range) | Self::Route(range) => range.to_string(),
            Self::Node(name) | Self::HostEndpoint(name) => name.clone(),
            Self::IpSet(set) => set.to_string(),
            Self::Policy(key) => key.to_string(),
            Self::Endpoint(key) => key.to_string(),
        }
    }
}

/// Global records of a view, without visiting the possibly many other ones.
pub fn globals(records: &BTreeMap<RecordId, Record>) -> impl Iterator<Item = (&RecordId, &Record)> {
    records.iter().take_while(|(id, _)| id.is_global())
}

/// Value of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// See [`RecordId::Settings`].
    Settings(FelixSettings),
    /// See [`RecordId::Pool`].
    Pool(PoolRecord),
    /// See [`RecordId::Node`].
    Node(NodeInfo),
    /// See [`RecordId::Route`].
    Route(RouteRecord),
    /// See [`RecordId::IpSet`].
    IpSet(IpSetRecord),
    /// See [`RecordId::Policy`].
    Policy(PolicyRecord),
    /// See [`RecordId::Endpoint`].
    Endpoint(EndpointRecord),
    /// See [`RecordId::HostEndpoint`].
    HostEndpoint(HostEndpointRecord),
    /// See [`RecordId::Bgp`].
    Bgp(Box<BgpRecord>),
}

/// Identity of a set, derived from its content: id of a selector (`s:...`), of a named port
/// (`n:...`), of a selector of nodes (`nodes:...`), of the endpoints of a Service (`svc:...`) or of
/// their addresses (`svcaddr:...`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetId(pub String);

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Properties of a pool that NAT and routing use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolRecord {
    /// Masquerades packets from an address of this pool to destinations outside of all pools.
    pub nat_outgoing: bool,
    /// Encapsulation of packets between nodes.
    pub encapsulation: Encapsulation,
}

/// Next hop of a block or borrowed address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteRecord {
    /// Node that holds the addresses.
    pub node: String,
    /// Encapsulation of the pool; `None` also when no pool covers the block.
    pub encapsulation: Encapsulation,
}

/// Type of the members of a set; fixed for the lifetime of a set id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetKind {
    /// Addresses and ranges.
    Net,
    /// Address, protocol and port together.
    AddressPort,
}

/// One member of a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    /// An address (full prefix length) or range.
    Net(IpNet),
    /// An address with protocol and port.
    AddressPort(IpAddr, Protocol, u16),
}

/// A set of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpSetRecord {
    /// Type of the members.
    pub kind: SetKind,
    /// The members. Ranges may overlap.
    pub members: BTreeSet<Member>,
}

/// Criteria of a rule for one side of a packet. All that are present must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SideMatch {
    /// The address is in one of these; empty matches any.
    pub nets: Vec<IpNet>,
    /// The address is in none of these.
    pub not_nets: Vec<IpNet>,
    /// The address is in every one of these sets (of kind [`SetKind::Net`]).
    pub sets: Vec<SetId>,
    /// The address is in none of these sets.
    pub not_sets: Vec<SetId>,
    /// The port is in one of these ranges, or address, protocol and port are in one of `port_sets`;
    /// both empty match any. Equal lists are shared by the rules of a policy.
    pub ports: Arc<[PortRange]>,
    /// Sets of kind [`SetKind::AddressPort`] for named ports; shared like `ports`.
    pub port_sets: Arc<[SetId]>,
    /// The port is in none of these ranges.
    pub not_ports: Vec<PortRange>,
    /// Address, protocol and port are in none of these sets.
    pub not_port_sets: Vec<SetId>,
    /// Address, protocol and port are in this set: the endpoints of a Service.
    pub service_set: Option<SetId>,
}

/// A rule whose selectors are resolved to sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleRecord {
    /// Action on a match.
    pub action: Action,
    /// Only packets of this IP version.
    pub ip_version: Option<IpVersion>,
    /// Only packets of this protocol.
    pub protocol: Option<Protocol>,
    /// Only packets not of this protocol.
    pub not_protocol: Option<Protocol>,
    /// Only ICMP packets of their own IP version, of this type and code.
    pub icmp: Option<Icmp>,
    /// Excludes such packets. What is not ICMP of its IP version has no type, and matches.
    pub not_icmp: Option<Icmp>,
    /// Criteria for the source.
    pub source: SideMatch,
    /// Criteria for the destination.
    pub destination: SideMatch,
}

/// A policy as a node enforces it. The endpoints that it applies to list it in their
/// [`EndpointRecord`] or [`HostEndpointRecord`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyRecord {
    /// Rules for packets to the endpoint, in order.
    pub ingress: Vec<RuleRecord>,
    /// Rules for packets from the endpoint, in order.
    pub egress: Vec<RuleRecord>,
}

/// The policies of one tier that apply to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierBinding {
    /// Name of the tier.
    pub name: String,
    /// Action at the end of the tier: `Deny` or `Pass`.
    pub default_action: Action,
    /// Enforced policies for packets to the endpoint, in order. Empty: the tier is skipped in this
    /// direction.
    pub ingress: Vec<PolicyKey>,
    /// Enforced policies for packets from the endpoint, in order. Empty: the tier is skipped in
    /// this direction.
    pub egress: Vec<PolicyKey>,
}

/// A workload endpoint as its node enforces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRecord {
    /// Host side interface.
    pub interface: String,
    /// Uid of the pod; empty: not known. The record applies to no other pod of that name.
    pub uid: String,
    /// Addresses that typha knows; may lag behind what the node itself knows.
    pub addresses: Vec<IpAddr>,
    /// Tiers with a policy that applies to it, in order.
    pub tiers: Vec<TierBinding>,
    /// Action for packets that no tier decides: `Allow` by the profile of the pod's namespace,
    /// `Deny` when that is missing.
    pub unmatched: Action,
}

/// A host endpoint as its node enforces it: for packets of the node itself, and forwarded ones, at
/// some of its interfaces.
///
/// Each list has the tiers with a policy of that kind, in order. Packets of established connections
/// skip `normal`, `forward` and `pre_dnat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEndpointRecord {
    /// Interfaces of the node that it covers.
    pub interfaces: HostInterfaces,
    /// For packets of the host itself, after the failsafe ports.
    pub normal: Vec<TierBinding>,
    /// For forwarded packets. They are allowed if no tier decides or no policy applies.
    pub forward: Vec<TierBinding>,
    /// For all incoming packets before DNAT, after the failsafe ports. `Allow` makes a packet skip
    /// `normal` and `forward`; the end of a tier does not drop here, so a packet that no rule
    /// decides continues.
    pub pre_dnat: Vec<TierBinding>,
    /// For all packets before connection tracking, after the failsafe ports. `Allow` makes a packet
    /// skip all other lists and connection tracking; the end of a tier does not drop here, so a
    /// packet that no rule decides continues.
    pub untracked: Vec<TierBinding>,
    /// Action for packets of the host itself that no tier of `normal` decides, from the endpoint's
    /// profiles.
    pub unmatched: Action,
}

/// Interfaces of a node that a host endpoint covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostInterfaces {
    /// All of them.
    All,
    /// The one of this name.
    Named(String),
    /// Those that have one of these addresses.
    WithAddress(BTreeSet<IpAddr>),
}
