//! The vocabulary of the result: the records that a node enforces. `typha` sends exactly these, `node` compiles exactly these.
//!
//! A node's view is a map from [`RecordId`] to [`Record`]. The order of the ids is the order of dependency: a record only refers to
//! records with smaller ids, so additions are applied in ascending order and removals in descending order.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::network::{Encapsulation, FelixSettings, NodeInfo};
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};

/// Identity of a record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordId {
    /// Settings for the node. Global.
    Settings,
    /// A pool. Global.
    Pool(IpNet),
    /// A node of the cluster. Global.
    Node(String),
    /// A route to a block or to a borrowed address. Global.
    Route(IpNet),
    /// A set of addresses. For the nodes that have a policy that refers to it.
    IpSet(SetId),
    /// A policy. For the nodes that have an endpoint that it applies to.
    Policy(PolicyKey),
    /// A workload endpoint. For its own node only.
    Endpoint(EndpointKey),
    /// A host endpoint by the name of its object. For its own node only.
    HostEndpoint(String),
}

impl RecordId {
    /// Whether every node has the record. Those come before all others in the order of dependency.
    pub const fn is_global(&self) -> bool {
        match self {
            Self::Settings | Self::Pool(_) | Self::Node(_) | Self::Route(_) => true,
            Self::IpSet(_) | Self::Policy(_) | Self::Endpoint(_) | Self::HostEndpoint(_) => false,
        }
    }
}

/// The global records of a view; what it has of policy, which may be much more, is not looked at.
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
}

/// Identity of a set, derived from what it holds: the selector's id (`s:...`), the id of a named port set (`n:...`), of the nodes of a selector
/// (`nodes:...`), of a Service's endpoints (`svc:...`) or of its addresses (`svcaddr:...`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetId(pub String);

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What NAT needs to know of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolRecord {
    /// Masquerade packets that leave the pools from an address of this one.
    pub nat_outgoing: bool,
    /// How packets of the pool travel between nodes.
    pub encapsulation: Encapsulation,
}

/// Where the addresses of a block are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteRecord {
    /// Node that holds them.
    pub node: String,
    /// How to get there, from the pool; `None` also when no pool covers the block.
    pub encapsulation: Encapsulation,
}

/// What the members of a set are; fixed for the life of a set id.
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
    /// What the members are.
    pub kind: SetKind,
    /// The members. Ranges may overlap.
    pub members: BTreeSet<Member>,
}

/// What a rule demands of one side of a packet. All criteria that are present must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SideMatch {
    /// The address is in one of these; empty means any.
    pub nets: Vec<IpNet>,
    /// The address is in none of these.
    pub not_nets: Vec<IpNet>,
    /// The address is in every one of these sets (of kind [`SetKind::Net`]).
    pub sets: Vec<SetId>,
    /// The address is in none of these sets.
    pub not_sets: Vec<SetId>,
    /// The port is in one of these ranges, or address, protocol and port are in one of `port_sets`; both empty means any.
    /// Rules of a policy share lists that are the same.
    pub ports: Arc<[PortRange]>,
    /// Sets of kind [`SetKind::AddressPort`] for named ports; shared as `ports` are.
    pub port_sets: Arc<[SetId]>,
    /// The port is in none of these ranges.
    pub not_ports: Vec<PortRange>,
    /// Address, protocol and port are in none of these sets.
    pub not_port_sets: Vec<SetId>,
    /// Address, protocol and port are in this set: the endpoints of a Service.
    pub service_set: Option<SetId>,
}

/// A rule whose selectors have become sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleRecord {
    /// What to do.
    pub action: Action,
    /// Only packets of this IP version.
    pub ip_version: Option<IpVersion>,
    /// Only packets of this protocol.
    pub protocol: Option<Protocol>,
    /// Only packets not of this protocol.
    pub not_protocol: Option<Protocol>,
    /// Only packets that are ICMP of their own IP version, of this type and code.
    pub icmp: Option<Icmp>,
    /// Only packets that are not; what is no ICMP of its version has no type, and passes.
    pub not_icmp: Option<Icmp>,
    /// Where the packet comes from.
    pub source: SideMatch,
    /// Where the packet goes to.
    pub destination: SideMatch,
}

/// A policy as a node enforces it. Which endpoints it applies to is in their [`EndpointRecord`] or [`HostEndpointRecord`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyRecord {
    /// Rules for packets that come to the endpoint, in order.
    pub ingress: Vec<RuleRecord>,
    /// Rules for packets that leave the endpoint, in order.
    pub egress: Vec<RuleRecord>,
}

/// The policies of one tier that apply to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierBinding {
    /// Name of the tier.
    pub name: String,
    /// What happens at the end of the tier: `Deny` or `Pass`.
    pub default_action: Action,
    /// Enforced policies that apply to packets to the endpoint, in order. Empty: the tier is skipped in this direction.
    pub ingress: Vec<PolicyKey>,
    /// Enforced policies that apply to packets from the endpoint, in order. Empty: the tier is skipped in this direction.
    pub egress: Vec<PolicyKey>,
}

/// A workload endpoint as its node enforces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRecord {
    /// Host side interface.
    pub interface: String,
    /// The pod's uid; empty: not known. It decides for no other pod of that name.
    pub uid: String,
    /// Addresses that typha knows of; may lag behind the node's own knowledge.
    pub addresses: Vec<IpAddr>,
    /// Tiers that have a policy for it, in order.
    pub tiers: Vec<TierBinding>,
    /// What happens to a packet that no tier decided: `Allow` by the profile of the pod's namespace, `Deny` when that is missing.
    pub unmatched: Action,
}

/// A host endpoint as its node enforces it: packets of the node itself, and those that it forwards, at some of its interfaces.
///
/// Each list has the tiers with a policy of that kind, in order. Packets of established connections are past `normal`, `forward` and
/// `pre_dnat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEndpointRecord {
    /// Which interfaces of the node.
    pub interfaces: HostInterfaces,
    /// For packets of the host itself, behind the failsafe ports.
    pub normal: Vec<TierBinding>,
    /// For packets that the host forwards. What no tier decides is allowed, and so is what no policy applies to.
    pub forward: Vec<TierBinding>,
    /// For all packets that come in, before their destination is translated, behind the failsafe ports. `Allow` spares the packet `normal`
    /// and `forward`; what no rule decides goes on, as the end of a tier decides nothing here.
    pub pre_dnat: Vec<TierBinding>,
    /// For all packets, before connections are tracked, behind the failsafe ports. `Allow` spares the packet all of the others, and being
    /// tracked; what no rule decides goes on, as the end of a tier decides nothing here.
    pub untracked: Vec<TierBinding>,
    /// What happens to a packet of the host itself that no tier of `normal` decided: by the profiles of the endpoint.
    pub unmatched: Action,
}

/// Which interfaces of a node a host endpoint stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostInterfaces {
    /// All of them.
    All,
    /// The one of this name.
    Named(String),
    /// Those that have one of these addresses.
    WithAddress(BTreeSet<IpAddr>),
}
