//! The one owner of routes, tunnel devices, neighbours and forwarding entries: keeps what the kernel holds and moves it to the wanted plan.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv6Net};
use margay_api::rule::IpVersion;
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use super::diff::{Op, diff};
use super::message::{self, Route};
use super::netlink::{NetlinkError, Socket, Verb};
use super::plan::{Peer, Plan, Target, VxlanDevice, version_of, vxlan_device_name, vxlan_overhead};
use super::present::{self, Link, Links};
use super::sysctl;

/// MTU where no link says otherwise.
const ETHERNET_MTU: u32 = 1500;

/// What an apply did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Operations that succeeded.
    pub done: usize,
    /// Operations that failed, by what they were about; they are tried again at the next apply.
    pub failed: BTreeMap<String, String>,
}

/// See the module. Blocking; lives on a thread of its own in the node's network namespace.
pub struct Driver {
    socket: Socket,
    links: Links,
    /// What the kernel holds, as far as we know; `None` when it has to be read.
    present: Option<Plan>,
}

impl Driver {
    /// A driver for the namespace of the calling thread; touches nothing yet.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self { socket: Socket::open()?, links: Links::new(), present: None })
    }

    /// Makes the kernel forget nothing and ourselves everything: the next apply reads back first.
    pub fn mark_stale(&mut self) {
        self.present = None;
    }

    /// Moves the kernel to the wanted plan. What fails is left for the next call, which reads the kernel's state anew.
    pub fn apply(&mut self, wanted: &Plan) -> Result<Outcome, NetlinkError> {
        self.links = present::links(&mut self.socket)?;
        let wanted = self.resolve(wanted)?;
        let present = match self.present.take() {
            Some(known) => known,
            None => present::present(&mut self.socket, &self.links)?,
        };
        let mut outcome = Outcome::default();
        if wanted.has(IpVersion::V6)
            && let Err(error) = sysctl::forward_ipv6()
        {
            outcome.failed.insert("IPv6 forwarding".to_owned(), error.to_string());
        }
        let ops = diff(&present, &wanted);
        for op in ops {
            match self.exec(&op) {
                Ok(()) => outcome.done += 1,
                Err(error) => {
                    outcome.failed.insert(describe(&op), error.to_string());
                }
            }
        }
        if outcome.failed.is_empty() {
            self.present = Some(wanted);
        }
        Ok(outcome)
    }

    /// Whether the kernel lacks, or has otherwise, something of this plan.
    pub fn lacks(&mut self, wanted: &Plan) -> Result<bool, NetlinkError> {
        self.links = present::links(&mut self.socket)?;
        let wanted = self.resolve(wanted)?;
        Ok(present::present(&mut self.socket, &self.links)? != wanted)
    }

    /// MTU of the link that has the node's own address, or that of Ethernet.
    pub fn underlay_mtu(&mut self, own: IpAddr) -> Result<u32, NetlinkError> {
        self.links = present::links(&mut self.socket)?;
        Ok(self.underlay(own)?.map_or(ETHERNET_MTU, |link| link.mtu))
    }

    /// The node's own address on the link that has it, with the prefix length of its subnet.
    pub fn subnet_of(&mut self, own: IpAddr) -> Result<Option<IpNet>, NetlinkError> {
        Ok(present::addresses(&mut self.socket)?.into_iter().map(|(_, net)| net).find(|net| net.addr() == own))
    }

    /// The first IPv6 address, with the prefix length of its subnet, that others can reach on the link that has this address.
    pub fn ipv6_beside(&mut self, own: IpAddr) -> Result<Option<Ipv6Net>, NetlinkError> {
        let present = present::addresses(&mut self.socket)?;
        let link = present.iter().find(|(_, net)| net.addr() == own).map(|(index, _)| *index);
        let beside = present.into_iter().filter(|(index, _)| Some(*index) == link);
        Ok(beside.filter_map(|(_, net)| if let IpNet::V6(net) = net { Some(net) } else { None }).find(|net| {
            let address = net.addr();
            !address.is_unicast_link_local() && !address.is_loopback()
        }))
    }

    fn underlay(&mut self, own: IpAddr) -> Result<Option<&Link>, NetlinkError> {
        let index = present::addresses(&mut self.socket)?
            .into_iter()
            .find(|(_, net)| net.addr() == own)
            .map(|(index, _)| index);
        Ok(self.links.values().find(|link| Some(link.index) == index))
    }

    fn resolve(&mut self, wanted: &Plan) -> Result<Plan, NetlinkError> {
        let mut wanted = wanted.clone();
        wanted.unreachable.clear();
        for (version, device) in wanted.tunnels.iter_mut().filter(|(_, device)| device.mtu == 0) {
            let underlay = self.underlay(device.local)?.map_or(ETHERNET_MTU, |link| link.mtu);
            device.mtu = underlay.saturating_sub(vxlan_overhead(*version));
        }
        Ok(wanted)
    }

    fn exec(&mut self, op: &Op) -> Result<(), NetlinkError> {
        match op {
            Op::RemoveVxlan(version) => {
                let name = vxlan_device_name(*version);
                self.remove(message::delete_link(name), || format!("delete {name}"))
            }
            Op::CreateVxlan(version, device) => self.create_vxlan(vxlan_device_name(*version), device),
            Op::SetPeer(address, peer) => self.set_peer(*address, peer),
            Op::RemovePeer(address, peer) => self.remove_peer(*address, peer),
            Op::SetRoute(destination, target) => self.set_route(*destination, target),
            Op::RemoveRoute(destination, target) => match self.route(*destination, target) {
                Ok(route) => self
                    .remove(RouteNetlinkMessage::DelRoute(route.message()), || format!("delete route {destination}")),
                Err(gone) if gone.is_missing() => Ok(()),
                Err(error) => Err(error),
            },
        }
    }

    fn set_route(&mut self, destination: IpNet, target: &Target) -> Result<(), NetlinkError> {
        let route = self.route(destination, target)?;
        let replace = |socket: &mut Socket| {
            socket
                .exec(RouteNetlinkMessage::NewRoute(route.message()), Verb::Replace, || format!("route {destination}"))
        };
        match replace(&mut self.socket) {
            // The kernel looks a gateway on another link up in the table, where it finds the very route that is to be replaced.
            Err(NetlinkError::Refused { errno: Errno::EINVAL, .. }) if route.onlink && destination.addr().is_ipv6() => {
                let old = Route { destination, link: None, gateway: None, onlink: false, blackhole: false };
                let request = RouteNetlinkMessage::DelRoute(old.message());
                self.remove(request, || format!("delete route {destination}"))?;
                replace(&mut self.socket)
            }
            result => result,
        }
    }

    fn remove(&mut self, request: RouteNetlinkMessage, what: impl FnOnce() -> String) -> Result<(), NetlinkError> {
        match self.socket.exec(request, Verb::Change, what) {
            Err(error) if error.is_missing() => Ok(()),
            result => result,
        }
    }

    fn route(&self, destination: IpNet, target: &Target) -> Result<Route, NetlinkError> {
        let blank = Route { destination, link: None, gateway: None, onlink: false, blackhole: false };
        Ok(match target {
            Target::Blackhole => Route { blackhole: true, ..blank },
            Target::Gateway { via } => Route { gateway: Some(*via), ..blank },
            Target::Vxlan { via } => {
                let link = self.index(vxlan_device_name(version_of(*via)))?;
                Route { link: Some(link), gateway: Some(*via), onlink: true, ..blank }
            }
            Target::Pod { interface } => Route::direct(destination, self.index(interface)?),
        })
    }

    fn index(&self, name: &str) -> Result<u32, NetlinkError> {
        let missing = || NetlinkError::Refused { what: format!("link {name}"), errno: Errno::ENODEV };
        self.links.get(name).map(|link| link.index).ok_or_else(missing)
    }

    fn create_vxlan(&mut self, name: &str, device: &VxlanDevice) -> Result<(), NetlinkError> {
        let underlay = self.underlay(device.local)?.map(|link| link.index).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("no link has the node's address {}; is NODE_IP right?", device.local),
            )
        })?;
        self.socket
            .exec(message::new_vxlan(device, device.mtu, underlay), Verb::Create, || format!("create {name}"))?;
        self.links = present::links(&mut self.socket)?;
        let index = self.index(name)?;
        match version_of(device.address) {
            IpVersion::V4 => {
                for (parameter, value) in [("proxy_arp", "0"), ("rp_filter", "0")] {
                    sysctl::set(&format!("ipv4/conf/{name}/{parameter}"), value)?;
                }
            }
            IpVersion::V6 => sysctl::set(&format!("ipv6/conf/{name}/accept_ra"), "0")?,
        }
        self.socket.exec(message::set_up(index), Verb::Change, || format!("bring {name} up"))?;
        // An IPv6 address that is there before its link is up goes away with it.
        self.socket
            .exec(message::new_host_address(index, device.address), Verb::Replace, || format!("address of {name}"))
    }

    fn set_peer(&mut self, address: IpAddr, peer: &Peer) -> Result<(), NetlinkError> {
        let index = self.index(vxlan_device_name(version_of(address)))?;
        let entry = message::forwarding(index, peer.mac, peer.underlay);
        self.socket.exec(RouteNetlinkMessage::NewNeighbour(entry), Verb::Replace, || {
            format!("forwarding entry of {address}")
        })?;
        let neighbour = message::neighbour(index, address, peer.mac);
        self.socket.exec(RouteNetlinkMessage::NewNeighbour(neighbour), Verb::Replace, || format!("neighbour {address}"))
    }

    fn remove_peer(&mut self, address: IpAddr, peer: &Peer) -> Result<(), NetlinkError> {
        let index = self.index(vxlan_device_name(version_of(address)))?;
        let neighbour = message::neighbour(index, address, peer.mac);
        self.remove(RouteNetlinkMessage::DelNeighbour(neighbour), || format!("delete neighbour {address}"))?;
        let entry = message::forwarding(index, peer.mac, peer.underlay);
        self.remove(RouteNetlinkMessage::DelNeighbour(entry), || format!("delete forwarding entry of {address}"))
    }
}

fn describe(op: &Op) -> String {
    match op {
        Op::RemoveVxlan(version) | Op::CreateVxlan(version, _) => vxlan_device_name(*version).to_owned(),
        Op::SetPeer(address, _) | Op::RemovePeer(address, _) => format!("peer {address}"),
        Op::SetRoute(destination, _) | Op::RemoveRoute(destination, _) => {
            format!("route {destination}")
        }
    }
}
