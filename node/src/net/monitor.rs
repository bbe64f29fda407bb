//! Notices when somebody else removes what is ours: routes with our protocol number, our tunnel devices, neighbours on them.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::RouteProtocol;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
};

use super::netlink::{NetlinkError, parse};
use super::plan::{ROUTE_PROTOCOL, VERSIONS, vxlan_device_name};

/// Multicast groups as bits: links, neighbours, IPv4 and IPv6 routes (`linux/rtnetlink.h`, `RTMGRP_*`).
const GROUPS: u32 = 0x1 | 0x4 | 0x40 | 0x400;

/// A subscription to the kernel's notifications in the namespace of the thread that opened it.
pub(super) struct Subscription {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl Subscription {
    /// Subscribes to these groups.
    pub(super) fn open(groups: u32) -> Result<Self, NetlinkError> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
            .map_err(io::Error::from)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups)).map_err(io::Error::from)?;
        setsockopt(&fd, sockopt::RcvBuf, &(1 << 20)).map_err(io::Error::from)?;
        Ok(Self { fd, buffer: vec![0; 64 * 1024] })
    }

    /// Blocks until a notification comes that matters. Lost ones do.
    pub(super) fn wait(
        &mut self,
        matters: impl Fn(&NetlinkPayload<RouteNetlinkMessage>) -> bool,
    ) -> Result<(), NetlinkError> {
        loop {
            let read = match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(read) => read,
                Err(Errno::ENOBUFS) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(io::Error::from(error).into()),
            };
            if parse(&self.buffer[..read])?.iter().any(|message| matters(&message.payload)) {
                return Ok(());
            }
        }
    }
}

/// Notices removals.
pub struct Monitor(Subscription);

impl Monitor {
    /// Subscribes.
    pub fn open() -> Result<Self, NetlinkError> {
        Subscription::open(GROUPS).map(Self)
    }

    /// Blocks until something of ours may have gone. Our own removals are reported too: only the owner can tell them apart, by what it wants.
    pub fn wait(&mut self) -> Result<(), NetlinkError> {
        self.0.wait(|payload| matches!(payload, NetlinkPayload::InnerMessage(message) if is_removal(message)))
    }
}

fn is_removal(message: &RouteNetlinkMessage) -> bool {
    match message {
        RouteNetlinkMessage::DelRoute(route) => route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL),
        RouteNetlinkMessage::DelLink(link) => {
            let is_tunnel = |name: &String| VERSIONS.iter().any(|version| vxlan_device_name(*version) == name);
            link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::IfName(name) if is_tunnel(name)))
        }
        RouteNetlinkMessage::DelNeighbour(_) => true,
        _ => false,
    }
}
