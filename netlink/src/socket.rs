//! A bound netlink socket: the one place with unsafe code, for socket options that no safe wrapper knows.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname, recv, send, setsockopt,
    socket, sockopt,
};

use crate::filter::{Filter, drop_ports};

/// Room for one datagram from the kernel: part of a list fills at most 32 KiB (`NLMSG_GOODSIZE`), and one notification has at most a 64 KiB attribute.
const DATAGRAM: usize = 128 << 10;

/// Which part of the kernel is spoken to.
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

/// Sizes of a socket's buffers in bytes, beyond the system's limits if the caller has CAP_NET_ADMIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// Longest batch that can be sent in one call; `None` leaves the system's default.
    pub send: Option<usize>,
    /// Answers and notifications that wait to be read.
    pub receive: usize,
}

/// A bound netlink socket in the network namespace of the thread that opened it; it stays there.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    port: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket that hears the multicast groups of this mask (`RTMGRP_*`, or bit N-1 for group N up to 32).
    ///
    /// # Errors
    /// The kernel's, when the protocol is not there or a limit of the process is reached.
    pub fn open(protocol: Protocol, groups: u32, buffers: Buffers) -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::from(protocol))?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        if let Some(send) = buffers.send {
            allowed(setsockopt(&fd, sockopt::SndBufForce, &send), || setsockopt(&fd, sockopt::SndBuf, &send))?;
        }
        let receive = buffers.receive;
        allowed(setsockopt(&fd, sockopt::RcvBufForce, &receive), || setsockopt(&fd, sockopt::RcvBuf, &receive))?;
        set_netlink_option(&fd, libc::NETLINK_EXT_ACK, 1)?;
        set_netlink_option(&fd, libc::NETLINK_CAP_ACK, 1)?;
        let port = getsockname::<NetlinkAddr>(fd.as_raw_fd())?.pid();
        Ok(Self { fd, port, buffer: vec![0; DATAGRAM] })
    }

    /// The port by which the kernel names this socket as the cause of a change.
    pub const fn port(&self) -> u32 {
        self.port
    }

    /// Receives the notifications of a group from now on, except those that one of these ports caused: the kernel
    /// drops them before they wake anyone.
    pub fn subscribe(&self, group: u32, except: &[u32]) -> io::Result<()> {
        let instructions = drop_ports(except);
        set_option(&self.fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, Filter::new(&instructions).program())?;
        set_netlink_option(&self.fd, libc::NETLINK_ADD_MEMBERSHIP, group)
    }

    /// A handle to the subscription to a group, for another thread.
    pub fn membership(&self, group: u32) -> io::Result<Membership> {
        Ok(Membership { fd: self.fd.try_clone()?, group })
    }

    /// Sends to the kernel, which has done the work when this returns.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        uninterrupted(|| send(self.fd.as_raw_fd(), bytes, MsgFlags::empty()))?;
        Ok(())
    }

    /// The next datagram; blocks until there is one. `ENOBUFS` says that notifications were lost.
    pub fn receive(&mut self) -> io::Result<&[u8]> {
        let length = self.read(MsgFlags::empty())?;
        Ok(&self.buffer[..length])
    }

    /// The next datagram; `None` if there is none yet.
    pub fn try_receive(&mut self) -> io::Result<Option<&[u8]>> {
        match self.read(MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(Some(&self.buffer[..length])),
            Err(Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn read(&mut self, flags: MsgFlags) -> nix::Result<usize> {
        let (fd, buffer) = (self.fd.as_raw_fd(), &mut self.buffer);
        uninterrupted(|| recv(fd, buffer, flags))
    }
}

/// By which another thread than the one that reads a socket leaves a group, and joins it again.
#[derive(Debug)]
pub struct Membership {
    fd: OwnedFd,
    group: u32,
}

impl Membership {
    /// Receives notifications from now on.
    pub fn join(&self) -> io::Result<()> {
        set_netlink_option(&self.fd, libc::NETLINK_ADD_MEMBERSHIP, self.group)
    }

    /// Receives none from now on; what has come stays to be read.
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

/// Does with less what only the privileged may do: the system's limit then applies.
fn allowed(forced: nix::Result<()>, limited: impl FnOnce() -> nix::Result<()>) -> nix::Result<()> {
    if forced == Err(Errno::EPERM) { limited() } else { forced }
}

/// Repeats a call that a signal interrupted.
fn uninterrupted(mut call: impl FnMut() -> nix::Result<usize>) -> nix::Result<usize> {
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

#[expect(unsafe_code, reason = "setsockopt takes a pointer; the values passed are plain and outlive the call")]
fn set_option<T>(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointer and length describe one `T`, which the kernel only reads; a filter's instructions are
    // borrowed by the value that describes them.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
