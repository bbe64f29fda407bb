//! System calls on netlink sockets: the one place of this module with unsafe code, for socket options that no safe
//! wrapper knows.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname, recv, send, setsockopt,
    socket, sockopt,
};

use super::constants::NFNLGRP_NFTABLES;

/// Room for a datagram from the kernel: it fills at most 32 KiB when listing, and one notification has at most a
/// 64 KiB attribute.
const RECEIVE: usize = 128 << 10;

/// A bound netlink socket of netfilter.
#[derive(Debug)]
pub struct NetlinkSocket {
    fd: OwnedFd,
    port: u32,
    buffer: Vec<u8>,
}

impl NetlinkSocket {
    /// Opens a socket in the network namespace of the calling thread, with room for this many bytes each way.
    pub fn open(send_room: usize, receive_room: usize) -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, sockopt::SndBufForce, &send_room)?;
        setsockopt(&fd, sockopt::RcvBufForce, &receive_room)?;
        set_netlink_option(&fd, libc::NETLINK_EXT_ACK, 1)?;
        set_netlink_option(&fd, libc::NETLINK_CAP_ACK, 1)?;
        let port = getsockname::<NetlinkAddr>(fd.as_raw_fd())?.pid();
        Ok(Self { fd, port, buffer: vec![0; RECEIVE] })
    }

    /// The port by which the kernel names this socket as the cause of a change.
    pub const fn port(&self) -> u32 {
        self.port
    }

    /// Receives notifications about every table of the namespace from now on, except those that one of these ports
    /// caused: the kernel drops them before they wake anyone.
    pub fn subscribe(&self, except: &[u32]) -> io::Result<()> {
        set_option(&self.fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &Filter::new(&port_filter(except)).program)?;
        set_netlink_option(&self.fd, libc::NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
    }

    /// Sends to the kernel, which has done the work when this returns.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match send(self.fd.as_raw_fd(), bytes, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The next datagram; `None` if there is none yet.
    pub fn receive(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => return Ok(Some(&self.buffer[..length])),
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for NetlinkSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A classic packet filter, which points at its own instructions.
struct Filter<'a> {
    program: libc::sock_fprog,
    _instructions: std::marker::PhantomData<&'a [libc::sock_filter]>,
}

impl<'a> Filter<'a> {
    fn new(instructions: &'a [libc::sock_filter]) -> Self {
        let len = u16::try_from(instructions.len()).expect("a handful of instructions");
        let program = libc::sock_fprog { len, filter: instructions.as_ptr().cast_mut() };
        Self { program, _instructions: std::marker::PhantomData }
    }
}

/// Drops datagrams whose first message was caused by one of these ports; all messages of a datagram have one cause.
fn port_filter(ports: &[u32]) -> Vec<libc::sock_filter> {
    /// Offset of the port in a message header.
    const PORT: u32 = 12;
    let instruction = |code: u32, jt: usize, k: u32| libc::sock_filter { code: code as u16, jt: jt as u8, jf: 0, k };
    let mut program = vec![instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, PORT)];
    for (index, port) in ports.iter().enumerate() {
        // The filter loads in network order what the kernel wrote in its own; a match jumps to the last instruction.
        let to_drop = ports.len() - index;
        program.push(instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, to_drop, port.to_be()));
    }
    program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, u32::MAX));
    program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, 0));
    program
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
