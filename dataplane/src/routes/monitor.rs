//! Monitors changes by other programs of what is ours or what it depends on: routes, tunnel
//! devices, neighbours on them, links, addresses and kernel parameters.

use std::collections::{BTreeMap, BTreeSet};

use margay_api::network::{Mac, TunnelKind};
use margay_netlink::Subscription;
use margay_netlink::route::{NetlinkError, RouteSocket};
use margay_netlink::wire::messages;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteMessage, RouteProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::hint::Hint;
use super::learned::LEARNED_PROTOCOL;
use super::plan::{HOST_MAC, ROUTE_PROTOCOL};
use super::{message, netconf};
use crate::links::is_workload;

/// Multicast groups as bits: links, neighbours, IPv4 and IPv6 addresses and routes (`RTMGRP_*` of
/// `linux/rtnetlink.h`), and kernel parameters of links (`RTNLGRP_IPV4_NETCONF` and
/// `RTNLGRP_IPV6_NETCONF`).
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x100 | 0x40 | 0x400 | 1 << 23 | 1 << 24;

/// A link as of its last notification.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SeenLink {
    name: String,
    /// Administratively up, and operational (`IFF_UP`, `IFF_LOWER_UP`).
    up: (bool, bool),
    mtu: u32,
    /// Whether it has the MAC address that pods know, and is no port of another link. Of other
    /// links than those of pods it says nothing: the addresses of bridges change with each
    /// container.
    takes_packets: bool,
}

/// Links by index.
type SeenLinks = BTreeMap<u32, SeenLink>;

/// Subscription to routing notifications.
pub struct Monitor {
    subscription: Subscription,
    socket: RouteSocket,
    links: SeenLinks,
}

impl Monitor {
    /// Subscribes and reads the links.
    pub fn open() -> Result<Self, NetlinkError> {
        let (subscription, socket) = (Subscription::open(GROUPS)?, RouteSocket::open()?);
        let mut monitor = Self {
            subscription,
            socket,
            links: SeenLinks::new(),
        };
        monitor.read_links()?;
        Ok(monitor)
    }

    fn read_links(&mut self) -> Result<(), NetlinkError> {
        let found = self.socket.dump(message::get_links())?;
        let seen = |message| {
            if let RouteNetlinkMessage::NewLink(link) = message {
                parse_link(&link)
            } else {
                None
            }
        };
        self.links = found.into_iter().filter_map(seen).collect();
        Ok(())
    }

    /// Blocks until something may have changed. Our own changes are reported too: only the owner
    /// can tell them apart, by its plan.
    pub fn wait(&mut self) -> Result<BTreeSet<Hint>, NetlinkError> {
        loop {
            let Self {
                subscription,
                links,
                ..
            } = self;
            let Some(bytes) = subscription.read()? else {
                self.read_links()?;
                return Ok([Hint::Lost].into());
            };
            let hints = parse_hints(links, bytes);
            if !hints.is_empty() {
                return Ok(hints);
            }
        }
    }
}

/// Parses notifications to hints.
fn parse_hints(links: &mut SeenLinks, bytes: &[u8]) -> BTreeSet<Hint> {
    let mut hints = BTreeSet::new();
    for message in messages(bytes) {
        if message.header.kind == netconf::RTM_NEWNETCONF {
            let name = |index| links.get(&index).map(|seen| seen.name.as_str());
            hints
                .extend(netconf::is_wrong_parameter(message.body, name).then_some(Hint::Parameter));
        } else if let Ok(message) = NetlinkMessage::deserialize(message.bytes)
            && let NetlinkPayload::InnerMessage(message) = message.payload
        {
            hints.extend(parse_hint(links, &message));
        }
    }
    hints
}

fn parse_hint(links: &mut SeenLinks, message: &RouteNetlinkMessage) -> Option<Hint> {
    match message {
        RouteNetlinkMessage::NewLink(link)
            if link.header.interface_family == AddressFamily::Unspec =>
        {
            let (index, now) = parse_link(link)?;
            let before = links.insert(index, now.clone());
            link_change_hint(before.as_ref(), &now)
        }
        RouteNetlinkMessage::DelLink(link)
            if link.header.interface_family == AddressFamily::Unspec =>
        {
            let gone = links.remove(&link.header.index)?;
            Some(link_hint(&gone.name, Hint::Underlay))
        }
        RouteNetlinkMessage::NewAddress(address) => address_hint(links, address, true),
        RouteNetlinkMessage::DelAddress(address) => address_hint(links, address, false),
        RouteNetlinkMessage::NewNeighbour(neighbour) => neighbour_hint(links, neighbour, true),
        RouteNetlinkMessage::DelNeighbour(neighbour) => neighbour_hint(links, neighbour, false),
        RouteNetlinkMessage::NewRoute(route) => route_hint(route, false),
        RouteNetlinkMessage::DelRoute(route) => route_hint(route, true),
        _ => None,
    }
}

/// Hint for a change of a link: that of our kind of link, else `otherwise`.
fn link_hint(name: &str, otherwise: Hint) -> Hint {
    match TunnelKind::of_device(name) {
        Some(kind) => Hint::Tunnel(kind),
        None if is_workload(name) => Hint::PodRemoved(name.to_owned()),
        None => otherwise,
    }
}

fn parse_link(link: &LinkMessage) -> Option<(u32, SeenLink)> {
    let (mut name, mut mtu, mut has_mac, mut is_port) = (None, 0, false, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Address(value) => has_mac = *value == HOST_MAC.0,
            LinkAttribute::Controller(index) => is_port = *index != 0,
            _ => {}
        }
    }
    let name: String = name?;
    let takes_packets = !is_workload(&name) || has_mac && !is_port;
    let up = (
        link.header.flags.contains(LinkFlags::Up),
        link.header.flags.contains(LinkFlags::LowerUp),
    );
    Some((
        link.header.index,
        SeenLink {
            name,
            up,
            mtu,
            takes_packets,
        },
    ))
}

/// Hint for a new or changed link. A tunnel device has settings that are not compared here, so any
/// notification counts.
fn link_change_hint(before: Option<&SeenLink>, now: &SeenLink) -> Option<Hint> {
    if let Some(kind) = TunnelKind::of_device(&now.name) {
        return Some(Hint::Tunnel(kind));
    }
    match before {
        None if is_workload(&now.name) => Some(Hint::PodAdded(now.name.clone())),
        Some(before) if before.name != now.name => Some(link_hint(&before.name, Hint::Underlay)),
        Some(before) if is_workload(&now.name) => {
            let is_worse = before.up.0 && !now.up.0 || before.takes_packets && !now.takes_packets;
            is_worse.then(|| Hint::PodRemoved(now.name.clone()))
        }
        Some(before) if before != now => Some(Hint::Underlay),
        _ => None,
    }
}

fn address_hint(links: &SeenLinks, message: &AddressMessage, is_new: bool) -> Option<Hint> {
    let name = &links.get(&message.header.index)?.name;
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Local(address) | AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })?;
    match is_new {
        true if is_workload(name) => None,
        true => Some(link_hint(name, Hint::AddressAdded(address))),
        false => Some(link_hint(name, Hint::AddressRemoved(address))),
    }
}

fn neighbour_hint(links: &SeenLinks, message: &NeighbourMessage, is_new: bool) -> Option<Hint> {
    let kind = TunnelKind::of_device(&links.get(&message.header.ifindex)?.name)?;
    // IPIP has no peers.
    matches!(kind, TunnelKind::Vxlan(_)).then_some(())?;
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(ip) => address = message::neighbour_address(ip),
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac);
            }
            _ => {}
        }
    }
    if message.header.family == AddressFamily::Bridge {
        return Some(Hint::Forwarding(mac?, address.filter(|_| is_new)));
    }
    let is_lasting = is_new && message.header.state == NeighbourState::Permanent;
    Some(Hint::Neighbour(address?, mac.filter(|_| is_lasting)))
}

/// Hint for a route: only removals of ours matter, and new ones of others, which may have replaced
/// ours, as the protocol does not distinguish routes.
fn route_hint(route: &RouteMessage, is_gone: bool) -> Option<Hint> {
    let ours = [ROUTE_PROTOCOL, LEARNED_PROTOCOL].map(RouteProtocol::Other);
    let is_ours = ours.contains(&route.header.protocol);
    if is_ours != is_gone || route.header.table != message::MAIN_TABLE {
        return None;
    }
    message::destination_of(route).map(Hint::Route)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use margay_api::rule::IpVersion;
    use netlink_packet_core::NetlinkHeader;

    fn mk_link(index: u32, name: &str, flags: LinkFlags, mtu: u32) -> LinkMessage {
        let mut link = LinkMessage::default();
        (link.header.index, link.header.flags) = (index, flags);
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(mtu),
        ];
        link
    }

    fn message(links: &mut SeenLinks, message: RouteNetlinkMessage) -> Vec<Hint> {
        let mut message = NetlinkMessage::new(
            NetlinkHeader::default(),
            NetlinkPayload::InnerMessage(message),
        );
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        parse_hints(links, &bytes).into_iter().collect()
    }

    #[test]
    fn a_change_of_a_link_is_reported_and_an_unchanged_link_is_not() {
        let up = LinkFlags::Up | LinkFlags::LowerUp;
        let mut links = SeenLinks::new();
        let pod = |name: &str| name.to_owned();
        for (link, expected) in [
            (mk_link(2, "eth0", up, 1500), vec![]),
            (mk_link(2, "eth0", up, 1500), vec![]),
            (mk_link(2, "eth0", up, 1400), vec![Hint::Underlay]),
            (
                mk_link(2, "eth0", LinkFlags::empty(), 1400),
                vec![Hint::Underlay],
            ),
            (
                mk_link(3, "cali1", LinkFlags::empty(), 1450),
                vec![Hint::PodAdded(pod("cali1"))],
            ),
            (mk_link(3, "cali1", up, 1450), vec![]),
            (mk_link(3, "cali1", up, 1400), vec![]),
            (
                mk_link(3, "cali1", LinkFlags::empty(), 1400),
                vec![Hint::PodRemoved(pod("cali1"))],
            ),
            (
                mk_link(3, "other", up, 1400),
                vec![Hint::PodRemoved(pod("cali1"))],
            ),
            (
                mk_link(4, "vxlan.calico", up, 1450),
                vec![Hint::Tunnel(TunnelKind::Vxlan(IpVersion::V4))],
            ),
            (
                mk_link(4, "vxlan.calico", up, 1450),
                vec![Hint::Tunnel(TunnelKind::Vxlan(IpVersion::V4))],
            ),
            (
                mk_link(5, "vxlan-v6.calico", up, 1430),
                vec![Hint::Tunnel(TunnelKind::Vxlan(IpVersion::V6))],
            ),
        ] {
            assert_eq!(
                message(&mut links, RouteNetlinkMessage::NewLink(link.clone())),
                expected,
                "{link:?}"
            );
        }
        for (index, expected) in [
            (4, vec![Hint::Tunnel(TunnelKind::Vxlan(IpVersion::V4))]),
            (2, vec![Hint::Underlay]),
            (9, vec![]),
        ] {
            let link = mk_link(index, "", LinkFlags::empty(), 0);
            assert_eq!(
                message(&mut links, RouteNetlinkMessage::DelLink(link)),
                expected,
                "{index}"
            );
        }
    }

    #[test]
    fn a_route_of_ours_that_goes_and_one_of_others_that_comes_may_be_the_same() {
        let route = |protocol, table| {
            let link = message::Route::direct("10.1.2.0/26".parse().expect("a range"), 2);
            let mut message = link.message();
            (message.header.protocol, message.header.table) = (protocol, table);
            message
        };
        let (ours, other) = (RouteProtocol::Other(ROUTE_PROTOCOL), RouteProtocol::Static);
        let hint = || vec![Hint::Route("10.1.2.0/26".parse().expect("a range"))];
        for (protocol, table, when_new, when_gone) in [
            (ours, message::MAIN_TABLE, vec![], hint()),
            (other, message::MAIN_TABLE, hint(), vec![]),
            (ours, 100, vec![], vec![]),
            (other, 100, vec![], vec![]),
        ] {
            let links = &mut SeenLinks::new();
            assert_eq!(
                message(links, RouteNetlinkMessage::NewRoute(route(protocol, table))),
                when_new
            );
            assert_eq!(
                message(links, RouteNetlinkMessage::DelRoute(route(protocol, table))),
                when_gone
            );
        }
    }

    #[test]
    fn neighbours_count_on_tunnels_alone_and_only_while_they_last() {
        let mut links = SeenLinks::new();
        let link = mk_link(4, "vxlan.calico", LinkFlags::Up, 1450);
        message(&mut links, RouteNetlinkMessage::NewLink(link));
        let (address, underlay) = (IpAddr::from([10, 1, 2, 0]), IpAddr::from([172, 30, 0, 2]));
        let mac = Mac([0x66, 0, 0, 0, 0, 2]);
        let mut passing = message::neighbour(4, address, mac);
        passing.header.state = NeighbourState::Stale;
        for (neighbour, when_new, when_gone) in [
            (
                message::neighbour(4, address, mac),
                vec![Hint::Neighbour(address, Some(mac))],
                vec![Hint::Neighbour(address, None)],
            ),
            (
                passing,
                vec![Hint::Neighbour(address, None)],
                vec![Hint::Neighbour(address, None)],
            ),
            (message::neighbour(2, address, mac), vec![], vec![]),
            (
                message::forwarding(4, mac, underlay),
                vec![Hint::Forwarding(mac, Some(underlay))],
                vec![Hint::Forwarding(mac, None)],
            ),
        ] {
            assert_eq!(
                message(
                    &mut links,
                    RouteNetlinkMessage::NewNeighbour(neighbour.clone())
                ),
                when_new
            );
            assert_eq!(
                message(&mut links, RouteNetlinkMessage::DelNeighbour(neighbour)),
                when_gone
            );
        }
    }
}
