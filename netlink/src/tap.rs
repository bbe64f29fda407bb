//! A packet socket that hears the frames of one link, in both directions.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recv, recvfrom,
    setsockopt, socket, sockopt,
};

use crate::filter::{Filter, only_link};
use crate::socket::set_option;

/// Room for frames that nobody has read yet.
const ROOM: usize = 4 << 20;

/// The frames of a link. Only [`Tap::wait`] blocks.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Hears a link of the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's: there is no such link, or the process may not open packet sockets.
    pub fn open(link: &str) -> io::Result<Self> {
        let index = if_nametoindex(link)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(
            AddressFamily::Packet,
            SockType::Raw,
            flags,
            SockProtocol::EthAll,
        )?;
        let instructions = only_link(index);
        set_option(
            &fd,
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            Filter::new(&instructions).program(),
        )?;
        // Without the privilege the usual room has to do.
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &ROOM);
        let tap = Self { fd };
        tap.drop_others(index)?;
        Ok(tap)
    }

    /// Reads what came in from other links before there was a filter.
    fn drop_others(&self, index: u32) -> io::Result<()> {
        loop {
            match recvfrom::<LinkAddr>(self.fd.as_raw_fd(), &mut [0; 1]) {
                // A frame of the link: the filter is in force, and one frame more or less at the
                // beginning makes no difference.
                Ok((_, Some(from))) if from.ifindex() == index as usize => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Blocks until there is a frame, or the time is up.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&self, time: Duration) -> io::Result<()> {
        let limit = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)],
            limit,
        ) {
            Err(errno) if errno != Errno::EINTR => Err(errno.into()),
            _ => Ok(()),
        }
    }

    /// Reads the next frame, if there is one, as far as it fits; returns its whole length.
    ///
    /// # Errors
    /// The kernel's, such as `ENETDOWN` when the link goes.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match recv(self.fd.as_raw_fd(), frame, MsgFlags::MSG_TRUNC) {
                Ok(length) => return Ok(Some(length)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
