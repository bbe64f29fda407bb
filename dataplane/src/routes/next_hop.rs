//! How this node reaches the next hops of learnt routes, by the kernel's own table.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use nix::errno::Errno;

use super::learned::{LEARNED_PROTOCOL, LearnedHop};
use super::message;
use super::plan::ROUTE_PROTOCOL;
use super::present;
use margay_netlink::route::{NetlinkError, RouteSocket};

/// The way to a next hop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHopWay {
    /// The next hop itself, or the gateway to it.
    pub hop: LearnedHop,
    /// Name of the link.
    pub interface: String,
    /// Whether the next hop is on that link.
    pub is_on_link: bool,
}

/// Looks next hops up. It blocks for some microseconds per address.
pub struct NextHopLookup {
    socket: RouteSocket,
}

impl NextHopLookup {
    /// Opens a lookup in the calling thread's network namespace.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: RouteSocket::open()?,
        })
    }

    /// The way to an address; `None`: there is none by which packets could be sent on. An address
    /// of this node is no next hop, nor is one that only a route of ours leads to: it would lead to
    /// itself. A link-local address is on every link.
    ///
    /// # Errors
    /// A failure of the socket.
    pub fn find(&mut self, address: IpAddr) -> Result<Option<NextHopWay>, NetlinkError> {
        let is_link_local = match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        if is_link_local {
            return Ok(None);
        }
        let request = message::get_route_to(address);
        let found = match self.socket.get(request, || format!("find {address}")) {
            Ok(found) => found,
            Err(NetlinkError::Refused { errno, .. }) if is_unreachable(errno) => None,
            Err(error) => return Err(error),
        };
        let Some(RouteNetlinkMessage::NewRoute(route)) = found else {
            return Ok(None);
        };
        let Some((hop, is_on_link)) = way_of(&route, address) else {
            return Ok(None);
        };
        let name = present::find_link_name(&mut self.socket, hop.link)?;
        Ok(name.map(|interface| NextHopWay {
            hop,
            interface,
            is_on_link,
        }))
    }
}

/// What a lookup says if no route leads there, or a route that discards packets.
fn is_unreachable(errno: Errno) -> bool {
    use Errno::{EACCES, EAGAIN, EHOSTUNREACH, EINVAL, ENETDOWN, ENETUNREACH, ENODEV, ESRCH};
    matches!(
        errno,
        ENETUNREACH | EHOSTUNREACH | EACCES | EINVAL | EAGAIN | ENETDOWN | ENODEV | ESRCH
    )
}

/// The first hop of a route to an address, and whether it is the address itself.
fn way_of(route: &RouteMessage, address: IpAddr) -> Option<(LearnedHop, bool)> {
    let ours = [ROUTE_PROTOCOL, LEARNED_PROTOCOL].map(RouteProtocol::Other);
    if route.header.kind != RouteType::Unicast || ours.contains(&route.header.protocol) {
        return None;
    }
    let first = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::MultiPath(hops) => hops.first(),
            _ => None,
        });
    let attributes = first.map_or(&route.attributes, |hop| &hop.attributes);
    let (via, link) = message::way_of(attributes);
    let hop = LearnedHop {
        via: via.unwrap_or(address),
        link: link.or(first.map(|hop| hop.interface_index))?,
    };
    Some((hop, via.is_none()))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn ip(words: &str) {
        let output = Command::new("ip").args(words.split(' ')).output();
        let output = output.expect("ip is installed");
        let reason = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {words}: {reason}");
    }

    /// Addresses of both families: on the link, behind a gateway, behind a route of ours, our own,
    /// discarded, unknown.
    fn look_up_every_kind() {
        unshare(CloneFlags::CLONE_NEWNET)
            .expect("these tests make network namespaces: run them as root");
        for words in [
            "link set lo up",
            "link add eth0 type veth peer name other",
            "link set eth0 up",
            "link set other up",
            "address add 172.30.0.1/24 dev eth0",
            "address add fd01::1/64 dev eth0 nodad",
            "route add 10.1.0.0/16 via 172.30.0.9",
            "route add 10.2.0.0/16 via 172.30.0.9 proto 83",
            "route add 10.3.0.0/16 via 172.30.0.9 proto 82",
            "route add blackhole 10.4.0.0/16",
            "route add 10.5.0.0/16 nexthop via 172.30.0.7 nexthop via 172.30.0.8",
            "-6 route add fd02::/64 via fd01::9",
            "-6 route add fd03::/64 via fd01::9 proto 83",
        ] {
            ip(words);
        }
        let mut lookup = NextHopLookup::open().expect("a socket");
        for (address, way) in [
            ("172.30.0.2", Some(("172.30.0.2", true))),
            ("10.1.2.3", Some(("172.30.0.9", false))),
            ("10.2.2.3", None),
            ("10.3.2.3", None),
            ("10.4.2.3", None),
            ("10.5.2.3", Some(("172.30.0.7", false))),
            ("172.30.0.1", None),
            ("192.0.2.1", None),
            ("169.254.1.1", None),
            ("fd01::2", Some(("fd01::2", true))),
            ("fd02::2", Some(("fd01::9", false))),
            ("fd03::2", None),
            ("fd01::1", None),
            ("fd09::1", None),
            ("fe80::1", None),
        ] {
            let parse = |text: &str| text.parse::<IpAddr>().expect("an address");
            let found = lookup.find(parse(address)).expect("an answer");
            let found = found.map(|way| (way.hop.via, way.is_on_link, way.interface));
            let wanted = way.map(|(via, on_link)| (parse(via), on_link, "eth0".to_owned()));
            assert_eq!(found, wanted, "{address}");
        }
    }

    #[test]
    fn a_next_hop_is_reached_by_the_routes_of_others() {
        let thread = thread::spawn(look_up_every_kind);
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}
