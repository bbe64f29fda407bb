//! A bound netlink socket. The only module with unsafe code, for socket options that nix does not
//! wrap.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname,
    recv, send, setsockopt, socket, sockopt,
};

use crate::filter::{Filter, drop_ports};

/// Buffer for one datagram. Part of a dump fills at most 32 KiB (`netlink_dump` in
/// net/netlink/af_netlink.c), and a notification has attributes of at most 64 KiB.
const DATAGRAM: usize = 128 << 10;

/// Option of `linux/netlink.h` that libc does not have.
const NETLINK_GET_STRICT_CHK: i32 = 12;

/// A netlink protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// `NETLINK_ROUTE`: links, addresses, routes, neighbours.
    Route,
    /// `NETLINK_NETFILTER`: nf_tables, connection tracking, logs.
    Netfilter,
}

impl From<Protocol> for SockProtocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Route => Self::NetlinkRoute,
            Protocol::Netfilter => Self::NetlinkNetFilter,
        }
    }
}

/// Sizes of a socket's buffers in bytes. With CAP_NET_ADMIN they may exceed the system's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// Send buffer, which limits a batch sent in one call; `None` for the system's default.
    pub send: Option<usize>,
    /// Receive buffer, for unread replies and notifications.
    pub receive: usize,
}

/// A bound netlink socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    port: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket that joins the multicast groups of a mask (`RTMGRP_*`, or bit N-1 for group N
    /// up to 32).
    ///
    /// # Errors
    /// If the kernel lacks the protocol, or the process has no file descriptor left.
    pub fn open(protocol: Protocol, groups: u32, buffers: Buffers) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::from(protocol),
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        if let Some(send) = buffers.send {
            or_limited(setsockopt(&fd, sockopt::SndBufForce, &send), || {
                setsockopt(&fd, sockopt::SndBuf, &send)
            })?;
        }
        let receive = buffers.receive;
        or_limited(setsockopt(&fd, sockopt::RcvBufForce, &receive), || {
            setsockopt(&fd, sockopt::RcvBuf, &receive)
        })?;
        set_netlink_option(&fd, libc::NETLINK_EXT_ACK, 1)?;
        set_netlink_option(&fd, libc::NETLINK_CAP_ACK, 1)?;
        let port = getsockname::<NetlinkAddr>(fd.as_raw_fd())?.pid();
        Ok(Self {
            fd,
            port,
            buffer: vec![0; DATAGRAM],
        })
    }

    /// Opens a socket in no group, whose dumps the kernel filters by what their request says; one
    /// before Linux 4.20 sends everything.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_strict(protocol: Protocol, buffers: Buffers) -> io::Result<Self> {
        let socket = Self::open(protocol, 0, buffers)?;
        match set_netlink_option(&socket.fd, NETLINK_GET_STRICT_CHK, 1) {
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
            result => result?,
        }
        Ok(socket)
    }

    /// The netlink port ID, by which notifications name this socket as the origin of a change.
    pub const fn port(&self) -> u32 {
        self.port
    }

    /// Joins a multicast group, except for notifications of changes through these ports: the kernel
    /// drops them before they wake the reader.
    ///
    /// # Errors
    /// The kernel's, if it refuses the filter or the group.
    pub fn subscribe(&self, group: u32, except: &[u32]) -> io::Result<()> {
        let instructions = drop_ports(except);
        set_option(
            &self.fd,
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            Filter::new(&instructions).program(),
        )?;
        set_netlink_option(&self.fd, libc::NETLINK_ADD_MEMBERSHIP, group)
    }

    /// A handle to leave and rejoin a multicast group, usable from another thread.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn membership(&self, group: u32) -> io::Result<Membership> {
        Ok(Membership {
            fd: self.fd.try_clone()?,
            group,
        })
    }

    /// Sends messages to the kernel, which has processed them when this returns.
    ///
    /// # Errors
    /// The kernel's; `EMSGSIZE` if they exceed the send buffer.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        retry_on_eintr(|| send(self.fd.as_raw_fd(), bytes, MsgFlags::empty()))?;
        Ok(())
    }

    /// Reads the next datagram, and blocks until there is one.
    ///
    /// # Errors
    /// The kernel's; `ENOBUFS` if notifications were lost.
    pub fn receive(&mut self) -> io::Result<&[u8]> {
        let length = self.read(MsgFlags::empty())?;
        Ok(&self.buffer[..length])
    }

    /// Reads the next datagram; `None` if there is none yet.
    ///
    /// # Errors
    /// The kernel's; `ENOBUFS` if notifications were lost.
    pub fn try_receive(&mut self) -> io::Result<Option<&[u8]>> {
        match self.read(MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(Some(&self.buffer[..length])),
            Err(Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn read(&mut self, flags: MsgFlags) -> nix::Result<usize> {
        let (fd, buffer) = (self.fd.as_raw_fd(), &mut self.buffer);
        retry_on_eintr(|| recv(fd, buffer, flags))
    }
}

/// A socket's membership of a multicast group, which may be left and rejoined from another thread
/// than the reader's.
#[derive(Debug)]
pub struct Membership {
    fd: OwnedFd,
    group: u32,
}

impl Membership {
    /// Joins the group.
    ///
    /// # Errors
    /// The kernel's.
    pub fn join(&self) -> io::Result<()> {
        set_netlink_option(&self.fd, libc::NETLINK_ADD_MEMBERSHIP, self.group)
    }

    /// Leaves the group. Notifications that have arrived can still be read.
    ///
    /// # Errors
    /// The kernel's.
    pub fn leave(&self) -> io::Result<()> {
        set_netlink_option(&self.fd, libc::NETLINK_DROP_MEMBERSHIP, self.group)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Falls back to a buffer within the system's limit if the caller may not exceed it.
fn or_limited(
    forced: nix::Result<()>,
    limited: impl FnOnce() -> nix::Result<()>,
) -> nix::Result<()> {
    if forced == Err(Errno::EPERM) {
        limited()
    } else {
        forced
    }
}

/// Repeats a call while signals interrupt it.
fn retry_on_eintr(mut call: impl FnMut() -> nix::Result<usize>) -> nix::Result<usize> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

fn set_netlink_option(fd: &OwnedFd, option: libc::c_int, value: u32) -> io::Result<()> {
    set_option(fd, libc::SOL_NETLINK, option, &value)
}

#[expect(
    unsafe_code,
    reason = "setsockopt takes a pointer to a plain value that outlives the call"
)]
pub(crate) fn set_option<T>(
    fd: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: pointer and length describe one `T`, which the kernel only reads. A `sock_fprog`
    // points to instructions that `Filter` borrows for at least as long as the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
