//! Reads back what the kernel holds, as a [`Plan`].

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use margay_api::network::{Mac, TunnelKind};
use margay_api::rule::IpVersion;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{
    InfoData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::message;
use super::plan::{GATEWAY_V6, HOST_MAC, Peer, Plan, ROUTE_PROTOCOL, Target};
use super::tunnel::{IPIP_ALIAS, IpipDevice, TunnelDevice, VxlanDevice};
use super::{ethtool, sysctl};
use crate::links::is_workload;
use margay_netlink::route::{NetlinkError, RouteSocket};

/// Link of the network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// MTU.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// MAC address, where it has one.
    pub mac: Option<Mac>,
    /// Whether it is a port of another link, such as a bridge, which then takes its packets.
    pub is_port: bool,
    /// Alias; empty: none.
    pub alias: String,
    /// Settings of a VXLAN device.
    vxlan: Option<Vec<InfoVxlan>>,
}

impl Link {
    fn new(index: u32, up: bool) -> Self {
        Self {
            index,
            mtu: 0,
            up,
            mac: None,
            is_port: false,
            alias: String::new(),
            vxlan: None,
        }
    }

    /// Whether the node gets what a pod sends to its gateway over this link: it has the MAC address
    /// that pods know, and no other link takes its packets.
    fn can_receive(&self) -> bool {
        self.mac == Some(HOST_MAC) && !self.is_port
    }
}

/// Links by name.
pub type LinksByName = BTreeMap<String, Link>;

/// Lists the links.
pub fn list_links(socket: &mut RouteSocket) -> Result<LinksByName, NetlinkError> {
    Ok(socket
        .dump(message::get_links())?
        .into_iter()
        .filter_map(parse_link)
        .collect())
}

/// Name of the link with this index; `None`: there is none.
pub fn find_link_name(
    socket: &mut RouteSocket,
    index: u32,
) -> Result<Option<String>, NetlinkError> {
    match socket.get(message::get_link_at(index), || format!("find link {index}")) {
        Ok(found) => Ok(found.and_then(parse_link).map(|(name, _)| name)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Finds a link by name; the cost does not depend on the number of links.
pub fn find_link(socket: &mut RouteSocket, name: &str) -> Result<Option<Link>, NetlinkError> {
    match socket.get(message::get_link(name), || format!("find {name}")) {
        Ok(found) => Ok(found.and_then(parse_link).map(|(_, link)| link)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lists addresses with the index of their link.
pub fn list_addresses(socket: &mut RouteSocket) -> Result<Vec<(u32, IpNet)>, NetlinkError> {
    let parse = |message| {
        let RouteNetlinkMessage::NewAddress(message) = message else {
            return None;
        };
        let local = |attribute: &AddressAttribute| {
            if let AddressAttribute::Local(address) = attribute {
                Some(*address)
            } else {
                None
            }
        };
        let other = |attribute: &AddressAttribute| {
            if let AddressAttribute::Address(address) = attribute {
                Some(*address)
            } else {
                None
            }
        };
        let address = message
            .attributes
            .iter()
            .find_map(local)
            .or_else(|| message.attributes.iter().find_map(other))?;
        Some((
            message.header.index,
            IpNet::new(address, message.header.prefix_len).ok()?,
        ))
    };
    Ok(socket
        .dump(message::get_addresses())?
        .into_iter()
        .filter_map(parse)
        .collect())
}

/// Reads back everything that could be ours. A route or device in a form that we never create is
/// returned as one that differs from any wanted one, so that it is replaced.
pub fn read_plan(socket: &mut RouteSocket, links: &LinksByName) -> Result<Plan, NetlinkError> {
    let names: BTreeMap<u32, &str> = links
        .iter()
        .map(|(name, link)| (link.index, name.as_str()))
        .collect();
    let mut plan = Plan::default();
    for version in IpVersion::ALL {
        let request = message::get_routes_of(version, ROUTE_PROTOCOL);
        plan.routes
            .extend(socket.dump_map(request, |found| match found {
                RouteNetlinkMessage::NewRoute(message) => parse_route(&message, &names),
                _ => None,
            })?);
    }
    let addresses = list_addresses(socket)?;
    let has_gateway = |link: &Link| {
        addresses
            .iter()
            .any(|(index, net)| *index == link.index && net.addr() == GATEWAY_V6)
    };
    let is_whole = |name: &str, link: &Link| {
        link.up && link.can_receive() && (has_gateway(link) || !sysctl::has_ipv6_on(name))
    };
    let pods = links
        .iter()
        .filter(|(name, link)| is_workload(name) && is_whole(name, link));
    plan.pods = pods.map(|(name, _)| name.clone()).collect();
    for kind in TunnelKind::ALL {
        let name = kind.device_name();
        let Some(link) = links.get(name).filter(|link| is_ours(kind, link)) else {
            continue;
        };
        let own: Vec<IpAddr> = addresses
            .iter()
            .filter(|(index, _)| *index == link.index)
            .map(|(_, net)| net.addr())
            .filter(|address| is_global(kind.version(), *address))
            .collect();
        let device = match kind {
            TunnelKind::Vxlan(version) => {
                plan.peers.extend(list_peers(socket, version, link.index)?);
                let address = own.first().copied();
                TunnelDevice::Vxlan(VxlanDevice {
                    offloads: ethtool::has_checksum_offload(name)?,
                    ..vxlan_device(link, address.unwrap_or(unspecified_address(version)))
                })
            }
            TunnelKind::Ipip => TunnelDevice::Ipip(IpipDevice {
                address: match own[..] {
                    [IpAddr::V4(address)] => address,
                    _ => Ipv4Addr::UNSPECIFIED,
                },
                local: None,
                mtu: link.mtu,
                up: link.up,
            }),
        };
        plan.tunnels.insert(kind, device);
    }
    Ok(plan)
}

/// Whether a link with the name of a tunnel device is one that we have set up.
fn is_ours(kind: TunnelKind, link: &Link) -> bool {
    kind != TunnelKind::Ipip || link.alias == IPIP_ALIAS
}

/// Whether it is an address of that IP version other than the link-local one.
fn is_global(version: IpVersion, address: IpAddr) -> bool {
    let is_of_link = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    IpVersion::of(address) == version && !is_of_link
}

fn unspecified_address(version: IpVersion) -> IpAddr {
    match version {
        IpVersion::V4 => Ipv4Addr::UNSPECIFIED.into(),
        IpVersion::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Gateway of the default route of an IP version over a link, whoever created it.
pub fn find_default_gateway(
    socket: &mut RouteSocket,
    version: IpVersion,
    link: u32,
) -> Result<Option<IpAddr>, NetlinkError> {
    let gateway = |found: RouteNetlinkMessage| {
        let RouteNetlinkMessage::NewRoute(message) = found else {
            return None;
        };
        let leads_out = message.attributes.contains(&RouteAttribute::Oif(link));
        let gateway = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                RouteAttribute::Gateway(address) => message::address_of(address),
                _ => None,
            });
        gateway.filter(|_| leads_out && message.header.destination_prefix_length == 0)
    };
    Ok(socket
        .dump(message::get_routes(message::family_of(version)))?
        .into_iter()
        .find_map(gateway))
}

fn parse_link(message: RouteNetlinkMessage) -> Option<(String, Link)> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let LinkMessage {
        header, attributes, ..
    } = message;
    let up = header.flags.contains(LinkFlags::Up);
    let (mut name, mut found) = (None, Link::new(header.index, up));
    for attribute in attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value),
            LinkAttribute::Mtu(value) => found.mtu = value,
            LinkAttribute::Address(value) => {
                found.mac = <[u8; 6]>::try_from(value.as_slice()).ok().map(Mac)
            }
            LinkAttribute::Controller(index) => found.is_port = index != 0,
            LinkAttribute::IfAlias(value) => found.alias = value,
            LinkAttribute::LinkInfo(infos) => {
                found.vxlan = infos.into_iter().find_map(|info| {
                    if let LinkInfo::Data(InfoData::Vxlan(data)) = info {
                        Some(data)
                    } else {
                        None
                    }
                });
            }
            _ => {}
        }
    }
    Some((name?, found))
}

fn vxlan_device(link: &Link, address: IpAddr) -> VxlanDevice {
    let mut device = VxlanDevice {
        address,
        mac: link.mac.unwrap_or(Mac([0; 6])),
        local: unspecified_address(IpVersion::of(address)),
        vni: 0,
        port: 0,
        mtu: link.mtu,
        underlay: None,
        up: link.up,
        offloads: true,
    };
    for info in link.vxlan.iter().flatten() {
        match info {
            InfoVxlan::Id(vni) => device.vni = *vni,
            InfoVxlan::Local(local) => device.local = IpAddr::V4(*local),
            InfoVxlan::Local6(local) => device.local = IpAddr::V6(*local),
            InfoVxlan::Port(port) => device.port = *port,
            InfoVxlan::Link(index) => device.underlay = Some(*index).filter(|index| *index != 0),
            _ => {}
        }
    }
    device
}

/// Parses a route of ours to destination and target; `None` for other routes.
pub fn parse_route(message: &RouteMessage, names: &BTreeMap<u32, &str>) -> Option<(IpNet, Target)> {
    if message.header.protocol != RouteProtocol::Other(ROUTE_PROTOCOL) {
        return None;
    }
    let (mut destination, mut gateway, mut interface) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = message::address_of(address),
            RouteAttribute::Gateway(address) => gateway = message::address_of(address),
            RouteAttribute::Oif(index) => interface = names.get(index).copied(),
            _ => {}
        }
    }
    let destination = IpNet::new(destination?, message.header.destination_prefix_length).ok()?;
    let target = match (message.header.kind, interface, gateway) {
        (RouteType::BlackHole, ..) => Target::Blackhole,
        (_, name, Some(via)) => {
            let version = IpVersion::of(destination.addr());
            match name.and_then(TunnelKind::of_device) {
                Some(TunnelKind::Ipip) => Target::Ipip { via },
                Some(kind) if kind.version() == version => Target::Vxlan { via },
                _ => Target::Gateway { via },
            }
        }
        (_, interface, None) => Target::Pod {
            interface: interface.unwrap_or_default().to_owned(),
        },
    };
    Some((destination, target))
}

fn list_peers(
    socket: &mut RouteSocket,
    version: IpVersion,
    index: u32,
) -> Result<BTreeMap<IpAddr, Peer>, NetlinkError> {
    let mut forwarding = BTreeMap::new();
    for (address, mac) in list_neighbours(socket, AddressFamily::Bridge, index)? {
        forwarding.insert(mac, address);
    }
    let complete = |(address, mac): (IpAddr, Mac)| {
        forwarding.get(&mac).map(|underlay| {
            (
                address,
                Peer {
                    mac,
                    underlay: *underlay,
                },
            )
        })
    };
    Ok(list_neighbours(socket, message::family_of(version), index)?
        .into_iter()
        .filter_map(complete)
        .collect())
}

fn list_neighbours(
    socket: &mut RouteSocket,
    family: AddressFamily,
    index: u32,
) -> Result<Vec<(IpAddr, Mac)>, NetlinkError> {
    let parse = |found: RouteNetlinkMessage| {
        let RouteNetlinkMessage::NewNeighbour(NeighbourMessage {
            header, attributes, ..
        }) = found
        else {
            return None;
        };
        let address = attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(address) => message::neighbour_address(address),
            _ => None,
        })?;
        let mac = attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac)
            }
            _ => None,
        })?;
        let is_lasting = matches!(
            header.state,
            NeighbourState::Permanent | NeighbourState::Noarp
        );
        (header.ifindex == index && is_lasting).then_some((address, mac))
    };
    Ok(socket
        .dump(message::get_neighbours(family))?
        .into_iter()
        .filter_map(parse)
        .collect())
}
