//! Notifications of rtnetlink's multicast groups.

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;

use crate::route::{NetlinkError, parse};
use crate::socket::{Buffers, Protocol, Socket};

/// Notifications that wait to be read: a few thousand links and their addresses.
const RECEIVE: usize = 1 << 20;

/// A subscription to the kernel's notifications in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Subscription {
    socket: Socket,
}

impl Subscription {
    /// Subscribes to these groups (`RTMGRP_*`, or bit N-1 for group N).
    pub fn open(groups: u32) -> Result<Self, NetlinkError> {
        Ok(Self { socket: Socket::open(Protocol::Route, groups, Buffers { send: None, receive: RECEIVE })? })
    }

    /// Blocks until notifications come. `None` says that some were lost: whatever they told must be read anew.
    pub fn read(&mut self) -> Result<Option<&[u8]>, NetlinkError> {
        match self.socket.receive() {
            Ok(datagram) => Ok(Some(datagram)),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Blocks until a notification comes that matters. Lost and unreadable ones do.
    pub fn wait(&mut self, matters: impl Fn(&NetlinkPayload<RouteNetlinkMessage>) -> bool) -> Result<(), NetlinkError> {
        loop {
            let Some(bytes) = self.read()? else { return Ok(()) };
            if parse(bytes).map_or(true, |found| found.iter().any(|message| matters(&message.payload))) {
                return Ok(());
            }
        }
    }
}
