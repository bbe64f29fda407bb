//! A socket at a link: whole frames out, past every hook of the sending namespace, and whole frames
//! in, before every hook of the receiving one. The one place of this crate with unsafe code, for
//! the address and the option that no safe wrapper knows.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};

/// Room for frames that nobody has read yet: some ten thousand.
const ROOM: usize = 32 << 20;
/// The longest frame.
const FRAME: usize = 64 << 10;
/// `PACKET_IGNORE_OUTGOING` of linux/if_packet.h.
const IGNORE_OUTGOING: libc::c_int = 23;

/// A socket at a link, or one that sees packets of one protocol that the namespace itself accepted.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// At a link of the calling thread's namespace. It hears what comes in by the link, not what
    /// goes out.
    pub fn open(link: &str) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(
            AddressFamily::Packet,
            SockType::Raw,
            flags,
            SockProtocol::EthAll,
        )
        .context("a packet socket")?;
        setsockopt(&fd, sockopt::RcvBufForce, &ROOM)?;
        setsockopt(&fd, sockopt::SndBufForce, &ROOM)?;
        let index = if_nametoindex(link).with_context(|| format!("link {link}"))?;
        bind_to(&fd, index).with_context(|| format!("bind to {link}"))?;
        Ok(Self { fd })
    }

    /// Hears every packet of a protocol that has passed the input hook of the calling thread's
    /// namespace.
    pub fn accepted(family: AddressFamily, protocol: SockProtocol) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(family, SockType::Raw, flags, protocol).context("a raw socket")?;
        setsockopt(&fd, sockopt::RcvBufForce, &ROOM)?;
        Ok(Self { fd })
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        send(self.fd.as_raw_fd(), frame, MsgFlags::empty()).context("send a frame")?;
        Ok(())
    }

    /// The next frame, if one is there.
    pub fn next(&self) -> Result<Option<Vec<u8>>> {
        let mut frame = vec![0; FRAME];
        match recv(self.fd.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(length) => {
                frame.truncate(length);
                Ok(Some(frame))
            }
            Err(Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno).context("receive a frame"),
        }
    }
}

#[expect(
    unsafe_code,
    reason = "bind and setsockopt take pointers; the values passed are plain and outlive the calls"
)]
fn bind_to(fd: &OwnedFd, index: u32) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let on: libc::c_int = 1;
    let length = |size: usize| size as libc::socklen_t;
    // SAFETY: both point to values of the sizes that are given.
    let results = unsafe {
        [
            libc::bind(
                fd.as_raw_fd(),
                std::ptr::from_ref(&address).cast(),
                length(size_of_val(&address)),
            ),
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_PACKET,
                IGNORE_OUTGOING,
                std::ptr::from_ref(&on).cast(),
                length(size_of_val(&on)),
            ),
        ]
    };
    if results.contains(&-1) {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
