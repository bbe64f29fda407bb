//! The one owner of routes, tunnel device, neighbours and forwarding entries: keeps what the kernel holds and moves it to the wanted plan.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use super::diff::{Op, diff};
use super::message::{self, Route};
use super::netlink::{NetlinkError, Socket, Verb};
use super::plan::{Peer, Plan, Target, VXLAN_DEVICE, VXLAN_OVERHEAD, VxlanDevice};
use super::present::{self, Link, Links};
use super::sysctl;

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

    /// Smallest MTU of the links that carry the node's own address, or that of Ethernet.
    pub fn underlay_mtu(&mut self, own: Ipv4Addr) -> Result<u32, NetlinkError> {
        self.links = present::links(&mut self.socket)?;
        Ok(self.underlay(own)?.map_or(1500, |link| link.mtu))
    }

    /// The node's own address on the link that has it, with the prefix length of its subnet.
    pub fn subnet_of(&mut self, own: IpAddr) -> Result<Option<IpNet>, NetlinkError> {
        Ok(present::addresses(&mut self.socket)?.into_iter().map(|(_, net)| net).find(|net| net.addr() == own))
    }

    fn underlay(&mut self, own: Ipv4Addr) -> Result<Option<&Link>, NetlinkError> {
        let index = present::addresses(&mut self.socket)?
            .into_iter()
            .find(|(_, net)| net.addr() == IpAddr::V4(own))
            .map(|(index, _)| index);
        Ok(self.links.values().find(|link| Some(link.index) == index))
    }

    fn resolve(&mut self, wanted: &Plan) -> Result<Plan, NetlinkError> {
        let mut wanted = wanted.clone();
        wanted.unreachable.clear();
        if let Some(device) = wanted.vxlan.as_mut().filter(|device| device.mtu == 0) {
            device.mtu = self.underlay(device.local)?.map_or(1500, |link| link.mtu) - VXLAN_OVERHEAD;
        }
        Ok(wanted)
    }

    fn exec(&mut self, op: &Op) -> Result<(), NetlinkError> {
        match op {
            Op::RemoveVxlan => self.remove(message::delete_link(VXLAN_DEVICE), || format!("delete {VXLAN_DEVICE}")),
            Op::CreateVxlan(device) => self.create_vxlan(device),
            Op::SetPeer(address, peer) => self.set_peer(*address, peer),
            Op::RemovePeer(address, peer) => self.remove_peer(*address, peer),
            Op::SetRoute(destination, target) => {
                let route = self.route(*destination, target)?;
                self.socket.exec(RouteNetlinkMessage::NewRoute(route.message()), Verb::Replace, || {
                    format!("route {destination}")
                })
            }
            Op::RemoveRoute(destination, target) => match self.route(*destination, target) {
                Ok(route) => self
                    .remove(RouteNetlinkMessage::DelRoute(route.message()), || format!("delete route {destination}")),
                Err(gone) if gone.is_missing() => Ok(()),
                Err(error) => Err(error),
            },
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
                Route { link: Some(self.index(VXLAN_DEVICE)?), gateway: Some(IpAddr::V4(*via)), onlink: true, ..blank }
            }
            Target::Pod { interface } => Route::direct(destination, self.index(interface)?),
        })
    }

    fn index(&self, name: &str) -> Result<u32, NetlinkError> {
        let missing = || NetlinkError::Refused { what: format!("link {name}"), errno: Errno::ENODEV };
        self.links.get(name).map(|link| link.index).ok_or_else(missing)
    }

    fn create_vxlan(&mut self, device: &VxlanDevice) -> Result<(), NetlinkError> {
        let underlay = self.underlay(device.local)?.map(|link| link.index).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("no link has the node's address {}; is NODE_IP right?", device.local),
            )
        })?;
        self.socket.exec(message::new_vxlan(device, device.mtu, underlay), Verb::Create, || {
            format!("create {VXLAN_DEVICE}")
        })?;
        self.links = present::links(&mut self.socket)?;
        let index = self.index(VXLAN_DEVICE)?;
        self.socket.exec(message::new_host_address(index, IpAddr::V4(device.address)), Verb::Replace, || {
            format!("address of {VXLAN_DEVICE}")
        })?;
        for (parameter, value) in [("proxy_arp", "0"), ("rp_filter", "0")] {
            sysctl::set(&format!("ipv4/conf/{VXLAN_DEVICE}/{parameter}"), value)?;
        }
        self.socket.exec(message::set_up(index), Verb::Change, || format!("bring {VXLAN_DEVICE} up"))
    }

    fn set_peer(&mut self, address: Ipv4Addr, peer: &Peer) -> Result<(), NetlinkError> {
        let index = self.index(VXLAN_DEVICE)?;
        let entry = message::forwarding(index, peer.mac, peer.underlay);
        self.socket.exec(RouteNetlinkMessage::NewNeighbour(entry), Verb::Replace, || {
            format!("forwarding entry of {address}")
        })?;
        let neighbour = message::neighbour(index, IpAddr::V4(address), peer.mac);
        self.socket.exec(RouteNetlinkMessage::NewNeighbour(neighbour), Verb::Replace, || format!("neighbour {address}"))
    }

    fn remove_peer(&mut self, address: Ipv4Addr, peer: &Peer) -> Result<(), NetlinkError> {
        let index = self.index(VXLAN_DEVICE)?;
        let neighbour = message::neighbour(index, IpAddr::V4(address), peer.mac);
        self.remove(RouteNetlinkMessage::DelNeighbour(neighbour), || format!("delete neighbour {address}"))?;
        let entry = message::forwarding(index, peer.mac, peer.underlay);
        self.remove(RouteNetlinkMessage::DelNeighbour(entry), || format!("delete forwarding entry of {address}"))
    }
}

fn describe(op: &Op) -> String {
    match op {
        Op::RemoveVxlan | Op::CreateVxlan(_) => VXLAN_DEVICE.to_owned(),
        Op::SetPeer(address, _) | Op::RemovePeer(address, _) => format!("peer {address}"),
        Op::SetRoute(destination, _) | Op::RemoveRoute(destination, _) => {
            format!("route {destination}")
        }
    }
}
