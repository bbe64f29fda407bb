//! Builds rtnetlink messages for links, addresses, routes, neighbours and forwarding entries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;

use ipnet::IpNet;
use margay_api::network::{Mac, TunnelKind};
use margay_api::rule::IpVersion;
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
    LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
    RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::plan::ROUTE_PROTOCOL;
use super::tunnel::VxlanDevice;

/// A veth pair to be created in one request: the host side here, the other end in the pod's network
/// namespace.
pub struct VethPair<'a> {
    /// Name of the host side.
    pub host: &'a str,
    /// Name of the pod's side.
    pub pod: &'a str,
    /// The pod's network namespace.
    pub namespace: RawFd,
    /// MAC address of the host side.
    pub host_mac: Mac,
    /// MAC address of the pod's side.
    pub mac: Mac,
    /// MTU of both.
    pub mtu: u32,
}

/// Creates a veth pair, both ends down.
pub fn new_veth(pair: &VethPair<'_>) -> RouteNetlinkMessage {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(pair.pod.to_owned()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::Address(pair.mac.0.to_vec()),
        LinkAttribute::NetNsFd(pair.namespace),
    ];
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(pair.host.to_owned()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::Address(pair.host_mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    RouteNetlinkMessage::NewLink(link)
}

/// Creates a VXLAN device, down. `underlay` is the link of the outer packets.
pub fn new_vxlan(device: &VxlanDevice, underlay: u32) -> RouteNetlinkMessage {
    let local = match device.local {
        IpAddr::V4(address) => InfoVxlan::Local(address),
        IpAddr::V6(address) => InfoVxlan::Local6(address),
    };
    let name = TunnelKind::Vxlan(IpVersion::of(device.address)).device_name();
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(device.mtu),
        LinkAttribute::Address(device.mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::Id(device.vni),
                InfoVxlan::Link(underlay),
                local,
                InfoVxlan::Port(device.port),
                InfoVxlan::Learning(false),
            ])),
        ]),
    ];
    RouteNetlinkMessage::NewLink(link)
}

/// Creates the IPIP device, down, without ends: each route names the other one. The kernel loads
/// the module for it, and then has a device of this name already.
pub fn new_ipip() -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(TunnelKind::Ipip.device_name().to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::IpIp)]),
    ];
    RouteNetlinkMessage::NewLink(link)
}

/// Sets the alias of a link; empty: none.
pub fn set_alias(index: u32, alias: &str) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::IfAlias(alias.to_owned())];
    RouteNetlinkMessage::SetLink(link)
}

/// Brings a link down.
pub fn set_down(index: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.change_mask = LinkFlags::Up;
    RouteNetlinkMessage::SetLink(link)
}

/// Removes an address from a link.
pub fn delete_address(index: u32, net: IpNet) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(net.addr()),
        AddressAttribute::Address(net.addr()),
    ];
    RouteNetlinkMessage::DelAddress(message)
}

/// Brings a link up.
pub fn set_up(index: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    RouteNetlinkMessage::SetLink(link)
}

/// Sets the MAC address of a link, and takes it from the link that it is a port of.
pub fn set_alone(index: u32, mac: Mac) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![
        LinkAttribute::Controller(0),
        LinkAttribute::Address(mac.0.to_vec()),
    ];
    RouteNetlinkMessage::SetLink(link)
}

/// Sets the MTU of a link.
pub fn set_mtu(index: u32, mtu: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::Mtu(mtu)];
    RouteNetlinkMessage::SetLink(link)
}

/// Reference to a link in a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkRef {
    /// By name, whichever link has it.
    Name(String),
    /// By index, which no other link gets.
    Index(u32),
}

impl LinkRef {
    fn message(&self) -> LinkMessage {
        let mut link = LinkMessage::default();
        match self {
            Self::Name(name) => link.attributes.push(LinkAttribute::IfName(name.clone())),
            Self::Index(index) => link.header.index = *index,
        }
        link
    }
}

impl std::fmt::Display for LinkRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Index(index) => write!(f, "link {index}"),
        }
    }
}

/// Deletes a link.
pub fn delete(link: &LinkRef) -> RouteNetlinkMessage {
    RouteNetlinkMessage::DelLink(link.message())
}

/// Deletes a link by name.
pub fn delete_link(name: &str) -> RouteNetlinkMessage {
    delete(&LinkRef::Name(name.to_owned()))
}

/// Moves a link to a group.
pub fn set_group(link: &LinkRef, group: u32) -> RouteNetlinkMessage {
    let mut message = link.message();
    message.attributes.push(LinkAttribute::Group(group));
    RouteNetlinkMessage::SetLink(message)
}

/// Deletes every link of a group.
pub fn delete_group(group: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::Group(group)];
    RouteNetlinkMessage::DelLink(link)
}

/// Lists links, without their counters, which make up most of the response.
pub fn get_links() -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    RouteNetlinkMessage::GetLink(link)
}

/// Requests one link by name.
pub fn get_link(name: &str) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
    ];
    RouteNetlinkMessage::GetLink(link)
}

/// Requests one link by index.
pub fn get_link_at(index: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    RouteNetlinkMessage::GetLink(link)
}

/// Adds a host address to a link.
pub fn new_host_address(index: u32, address: IpAddr) -> RouteNetlinkMessage {
    new_address(index, IpNet::from(address), AddressScope::Universe)
}

/// Adds a link-scoped address to a link, with its prefix.
pub fn new_link_address(index: u32, address: IpNet) -> RouteNetlinkMessage {
    new_address(index, address, AddressScope::Link)
}

/// Adds an address. An IPv6 address is usable at once: it is known to be unique, and duplicate
/// address detection would take a second.
fn new_address(index: u32, net: IpNet, scope: AddressScope) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.scope = scope;
    message.header.index = index;
    if net.addr().is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes = vec![
        AddressAttribute::Local(net.addr()),
        AddressAttribute::Address(net.addr()),
    ];
    RouteNetlinkMessage::NewAddress(message)
}

/// Lists addresses of both families.
pub fn get_addresses() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetAddress(AddressMessage::default())
}

/// A route in the main table with our protocol number.
pub struct Route {
    /// Destination.
    pub destination: IpNet,
    /// Outgoing link.
    pub link: Option<u32>,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Whether the next hop is on the link even without an address in its subnet.
    pub onlink: bool,
    /// Whether packets are discarded.
    pub blackhole: bool,
}

impl Route {
    /// A route to a destination directly on a link.
    pub fn direct(destination: IpNet, link: u32) -> Self {
        Self {
            destination,
            link: Some(link),
            gateway: None,
            onlink: false,
            blackhole: false,
        }
    }

    /// Message body of a new, delete or get request.
    pub fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family(self.destination.addr());
        message.header.destination_prefix_length = self.destination.prefix_len();
        message.header.table = MAIN_TABLE;
        message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
        message.header.scope = if self.gateway.is_none() && !self.blackhole {
            RouteScope::Link
        } else {
            RouteScope::Universe
        };
        message.header.kind = if self.blackhole {
            RouteType::BlackHole
        } else {
            RouteType::Unicast
        };
        if self.onlink {
            message.header.flags = RouteFlags::Onlink;
        }
        message.attributes.extend(destination(&self.destination));
        message.attributes.extend(
            self.gateway
                .map(|gateway| RouteAttribute::Gateway(RouteAddress::from(gateway))),
        );
        message
            .attributes
            .extend(self.link.map(RouteAttribute::Oif));
        message
    }

    /// Message body of a request that deletes whatever is in the place of this IPv6 route, whoever
    /// set it.
    pub fn message_of_anybody(&self) -> RouteMessage {
        let mut message = self.message();
        message.header.protocol = RouteProtocol::Unspec;
        message.attributes.push(RouteAttribute::Priority(METRIC_V6));
        message
    }
}

/// Metric of IPv6 routes without one (`IP6_RT_PRIO_USER` in `linux/ipv6_route.h`).
const METRIC_V6: u32 = 1024;

/// Main routing table (`RT_TABLE_MAIN` in `linux/rtnetlink.h`).
pub const MAIN_TABLE: u8 = 254;

/// Lists routes of one family.
pub fn get_routes(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    RouteNetlinkMessage::GetRoute(message)
}

/// Lists routes of one IP version with a protocol number. A kernel that checks dumps strictly sends
/// no others; from an older one they have to be filtered.
pub fn get_routes_of(version: IpVersion, protocol: u8) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(version);
    message.header.protocol = RouteProtocol::Other(protocol);
    RouteNetlinkMessage::GetRoute(message)
}

/// Requests the route by which an address is reached, as it is in the table.
pub fn get_route_to(address: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = IpNet::from(address).prefix_len();
    message.header.flags = RouteFlags::FibMatch;
    message.attributes = vec![RouteAttribute::Destination(RouteAddress::from(address))];
    RouteNetlinkMessage::GetRoute(message)
}

/// Destination as an attribute of a route; a default route has none.
pub fn destination(net: &IpNet) -> Option<RouteAttribute> {
    let is_default = net.prefix_len() == 0;
    (!is_default).then(|| RouteAttribute::Destination(RouteAddress::from(net.addr())))
}

/// Gateway and link of a route or of one of its next hops.
pub fn way_of(attributes: &[RouteAttribute]) -> (Option<IpAddr>, Option<u32>) {
    let (mut via, mut link) = (None, None);
    for attribute in attributes {
        match attribute {
            RouteAttribute::Gateway(address) => via = address_of(address),
            RouteAttribute::Via(RouteVia::Inet6(address)) => via = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet(address)) => via = Some((*address).into()),
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    (via, link)
}

/// Destination of a route.
pub fn destination_of(message: &RouteMessage) -> Option<IpNet> {
    let length = message.header.destination_prefix_length;
    let found = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(address) => address_of(address),
            _ => None,
        });
    let address = match (found, message.header.address_family) {
        (Some(address), _) => address,
        (None, AddressFamily::Inet) if length == 0 => Ipv4Addr::UNSPECIFIED.into(),
        (None, AddressFamily::Inet6) if length == 0 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    IpNet::new(address, length).ok()
}

/// IP address in a route.
pub fn address_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// Address family of an IP version.
pub const fn family_of(version: IpVersion) -> AddressFamily {
    match version {
        IpVersion::V4 => AddressFamily::Inet,
        IpVersion::V6 => AddressFamily::Inet6,
    }
}

/// A permanent neighbour: the MAC address behind an IP address on a link.
pub fn neighbour(index: u32, address: IpAddr, mac: Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::from(address)),
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
    ];
    message
}

/// A permanent forwarding entry of a VXLAN device: the node's address behind a MAC address.
pub fn forwarding(index: u32, mac: Mac, underlay: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        NeighbourAttribute::Destination(NeighbourAddress::from(underlay)),
    ];
    message
}

/// Address of a neighbour or forwarding entry. The IP version of a forwarding entry shows only in
/// the length of its address.
pub fn neighbour_address(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(address) => Some(IpAddr::V4(*address)),
        NeighbourAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        NeighbourAddress::Other(bytes) => {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from))
                .ok()
        }
        _ => None,
    }
}

/// Lists neighbours of one family; [`AddressFamily::Bridge`] lists forwarding entries.
pub fn get_neighbours(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    RouteNetlinkMessage::GetNeighbour(message)
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}
