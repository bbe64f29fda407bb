//! Multicast notifications of rtnetlink.

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;

use crate::route::{NetlinkError, parse};
use crate::socket::{Buffers, Protocol, Socket};

/// Receive buffer: room for unread notifications of a few thousand links and their addresses.
const RECEIVE_BUFFER: usize = 1 << 20;

/// A subscription to notifications in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Subscription {
    socket: Socket,
}

impl Subscription {
    /// Subscribes to multicast groups, given as a mask (`RTMGRP_*`, or bit N-1 for group N).
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn open(groups: u32) -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: Socket::open(
                Protocol::Route,
                groups,
                Buffers {
                    send: None,
                    receive: RECEIVE_BUFFER,
                },
            )?,
        })
    }

    /// Blocks until notifications arrive and returns one datagram of them. `None` if some were lost
    /// (`ENOBUFS`): the caller must dump what it follows again.
    ///
    /// # Errors
    /// The socket's.
    pub fn read(&mut self) -> Result<Option<&[u8]>, NetlinkError> {
        match self.socket.receive() {
            Ok(datagram) => Ok(Some(datagram)),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Blocks until a notification arrives that matters. Those that were lost or are malformed
    /// always do.
    ///
    /// # Errors
    /// The socket's.
    pub fn wait(
        &mut self,
        matters: impl Fn(&NetlinkPayload<RouteNetlinkMessage>) -> bool,
    ) -> Result<(), NetlinkError> {
        loop {
            let Some(bytes) = self.read()? else {
                return Ok(());
            };
            if parse(bytes).map_or(true, |found| {
                found.iter().any(|message| matters(&message.payload))
            }) {
                return Ok(());
            }
        }
    }
}
