//! One question to one target, judged by its own start.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::str::FromStr;
use std::time::Instant;

use anyhow::bail;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, connect, setsockopt, socket, sockopt,
};

use super::Target;

/// A transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Answered when the connection stands.
    Tcp,
    /// Answered when a datagram comes back.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl FromStr for Protocol {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        Ok(match text {
            "tcp" => Self::Tcp,
            "udp" => Self::Udp,
            _ => bail!("`{text}` is neither tcp nor udp"),
        })
    }
}

/// What became of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// The target answered.
    Answered,
    /// Nothing came back in time: the packet, or its answer, was dropped.
    Silent,
    /// Somebody said no: a reset, or an ICMP message.
    Refused,
    /// The question could not even be asked.
    Broken,
}

/// A question under way.
#[derive(Debug)]
pub struct Attempt {
    /// When it was asked.
    pub start: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    Tcp(TcpStream),
    Udp(UdpSocket),
    Failed(Verdict),
}

impl Attempt {
    /// Asks, in the network namespace of the calling thread.
    pub fn start(to: Target) -> Self {
        let start = Instant::now();
        let begun = match to.protocol {
            Protocol::Tcp => connecting(to.address).map(State::Tcp),
            Protocol::Udp => sent(to.address).map(State::Udp),
        };
        let state = begun.unwrap_or_else(|error| State::Failed(judge(&error)));
        Self { start, state }
    }

    /// The verdict, if it is known by now. An answer is taken out, so that a second look does not see it.
    pub fn look(&self) -> Option<Verdict> {
        match &self.state {
            State::Failed(verdict) => Some(*verdict),
            State::Tcp(stream) => match stream.take_error() {
                Ok(None) => stream.peer_addr().is_ok().then_some(Verdict::Answered),
                Ok(Some(error)) | Err(error) => Some(judge(&error)),
            },
            State::Udp(socket) => match socket.recv(&mut [0; 64]) {
                Ok(_) => Some(Verdict::Answered),
                Err(error) if error.kind() == ErrorKind::WouldBlock => None,
                Err(error) => Some(judge(&error)),
            },
        }
    }
}

/// A connection being made. Closing it sends a reset: neither end keeps an entry for it, so that many questions do not use up the ports.
fn connecting(to: SocketAddr) -> io::Result<TcpStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, flags, None)?;
    let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&socket, sockopt::Linger, &at_once)?;
    let begun = match to {
        SocketAddr::V4(to) => connect(socket.as_raw_fd(), &SockaddrIn::from(to)),
        SocketAddr::V6(to) => connect(socket.as_raw_fd(), &SockaddrIn6::from(to)),
    };
    match begun {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}

fn sent(to: SocketAddr) -> io::Result<UdpSocket> {
    let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    socket.connect(to)?;
    socket.send(b"who is there")?;
    Ok(socket)
}

fn judge(error: &io::Error) -> Verdict {
    match error.kind() {
        ErrorKind::ConnectionRefused
        | ErrorKind::ConnectionReset
        | ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable => Verdict::Refused,
        _ => Verdict::Broken,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;

    fn verdict(target: Target) -> Verdict {
        let attempt = Attempt::start(target);
        while attempt.start.elapsed() < Duration::from_secs(2) {
            if let Some(verdict) = attempt.look() {
                return verdict;
            }
            std::thread::yield_now();
        }
        Verdict::Silent
    }

    #[test]
    fn a_listener_answers_and_a_free_port_refuses() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = Target::new(Protocol::Tcp, Ipv4Addr::LOCALHOST, port);
        assert_eq!(verdict(target), Verdict::Answered);
        drop(listener);
        assert_eq!(verdict(target), Verdict::Refused);
    }

    #[test]
    fn a_datagram_counts_when_it_comes_back() {
        let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = echo.local_addr().unwrap().port();
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 64];
            let (length, from) = echo.recv_from(&mut buffer).unwrap();
            echo.send_to(&buffer[..length], from).unwrap();
        });
        let target = Target::new(Protocol::Udp, Ipv4Addr::LOCALHOST, port);
        assert_eq!(verdict(target), Verdict::Answered);
        thread.join().unwrap();
        assert_eq!(verdict(target), Verdict::Refused);
    }
}
