//! One question to one target, decided by its own timeout.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use nix::poll::PollFlags;
use socket2::{Domain, Socket, Type};

use super::Target;
use super::icmp::Question;
use super::sctp::{self, Chunk, Packet};

/// A transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Answered when the connection stands.
    Tcp,
    /// Answered when a datagram comes back.
    Udp,
    /// Answered when the association stands; where the kernel has no sockets for it, when an INIT
    /// is acknowledged, see [`sctp`].
    Sctp,
    /// Answered when the reply comes back; the port is the type, see [`icmp`](super::icmp).
    Icmp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
            Self::Icmp => "icmp",
        })
    }
}

impl FromStr for Protocol {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        Ok(match text {
            "tcp" => Self::Tcp,
            "udp" => Self::Udp,
            "sctp" => Self::Sctp,
            "icmp" => Self::Icmp,
            _ => bail!("`{text}` is none of tcp, udp, sctp, icmp"),
        })
    }
}

/// Result of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// The target answered.
    Answered,
    /// Nothing came back in time: the packet, or its answer, was dropped.
    Silent,
    /// It was refused: by a reset, an ABORT, or an ICMP message.
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
    /// A connection, or an association of SCTP, which std has no type for.
    Stream(TcpStream),
    Udp(UdpSocket),
    Sctp(Init),
    Icmp(Question),
    Failed(Verdict),
}

/// An INIT that waits for its answer.
#[derive(Debug)]
struct Init {
    socket: Socket,
    sent: Packet,
    is_ipv4: bool,
}

impl Attempt {
    /// Asks, in the network namespace of the calling thread, from a port that the kernel chooses.
    pub fn start(to: Target) -> Self {
        Self::start_from(to, 0)
    }

    /// The same from this source port. A tuple that was used recently may still be tracked, and
    /// tracked packets are established: callers that test policy and ask often must choose unused
    /// ports.
    pub fn start_from(to: Target, port: u16) -> Self {
        let start = Instant::now();
        let begun = match to.protocol {
            Protocol::Tcp => connecting(to.address, port, None).map(State::Stream),
            Protocol::Udp => sent(to.address, port).map(State::Udp),
            Protocol::Sctp if sctp::has_sockets() => {
                connecting(to.address, port, Some(sctp::PROTOCOL)).map(State::Stream)
            }
            Protocol::Sctp => Init::send(to.address, port).map(State::Sctp),
            Protocol::Icmp => Question::send(to.address).map(State::Icmp),
        };
        let state = begun.unwrap_or_else(|error| State::Failed(verdict_of_error(&error)));
        Self { start, state }
    }

    /// Returns whether the question could be asked. Unlike a look it takes no answer, which may be
    /// there already.
    pub fn is_asked(&self) -> bool {
        !matches!(self.state, State::Failed(Verdict::Broken))
    }

    /// The verdict, if it is known by now. An answer is taken out, so that a second look does not
    /// see it.
    pub fn look(&self) -> Option<Verdict> {
        match &self.state {
            State::Failed(verdict) => Some(*verdict),
            State::Stream(stream) => match stream.take_error() {
                Ok(None) => stream.peer_addr().is_ok().then_some(Verdict::Answered),
                Ok(Some(error)) | Err(error) => Some(verdict_of_error(&error)),
            },
            State::Udp(socket) => match socket.recv(&mut [0; 64]) {
                Ok(_) => Some(Verdict::Answered),
                Err(error) if error.kind() == ErrorKind::WouldBlock => None,
                Err(error) => Some(verdict_of_error(&error)),
            },
            State::Sctp(init) => init.look(),
            State::Icmp(question) => match question.look() {
                Ok(answered) => answered.then_some(Verdict::Answered),
                Err(error) => Some(verdict_of_error(&error)),
            },
        }
    }

    /// What to wait for before the next poll; none when the verdict is known already.
    pub fn readiness(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.state {
            State::Failed(_) => None,
            State::Stream(stream) => Some((stream.as_fd(), PollFlags::POLLOUT)),
            State::Udp(socket) => Some((socket.as_fd(), PollFlags::POLLIN)),
            State::Sctp(init) => Some((init.socket.as_fd(), PollFlags::POLLIN)),
            State::Icmp(question) => Some((question.as_fd(), PollFlags::POLLIN)),
        }
    }
}

impl Init {
    fn send(to: SocketAddr, port: u16) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::for_address(to),
            Type::RAW,
            Some(sctp::PROTOCOL.into()),
        )?;
        socket.set_nonblocking(true)?;
        // Only what comes from there is received. The port of a raw socket is a protocol number or
        // nothing.
        socket.connect(&SocketAddr::new(to.ip(), 0).into())?;
        let number = tag();
        let port = if port == 0 {
            1024 + (number % 60_000) as u16
        } else {
            port
        };
        let sent = Packet {
            source: port,
            destination: to.port(),
            tag: 0,
            chunk: Chunk::Init(number),
        };
        socket.send(&sent.encode())?;
        Ok(Self {
            socket,
            sent,
            is_ipv4: to.is_ipv4(),
        })
    }

    fn look(&self) -> Option<Verdict> {
        let mut buffer = [0; 256];
        loop {
            let length = match io::Read::read(&mut &self.socket, &mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) => return Some(verdict_of_error(&error)),
            };
            let answer = sctp::payload(&buffer[..length], self.is_ipv4).and_then(Packet::decode);
            if let Some(verdict) = answer.and_then(|answer| self.verdict_of(answer)) {
                return Some(verdict);
            }
        }
    }

    /// None: it answers somebody else, or asks.
    fn verdict_of(&self, answer: Packet) -> Option<Verdict> {
        let Chunk::Init(own) = self.sent.chunk else {
            return None;
        };
        if (answer.source, answer.destination, answer.tag)
            != (self.sent.destination, self.sent.source, own)
        {
            return None;
        }
        match answer.chunk {
            Chunk::InitAck(theirs) => {
                // Connection tracking forgets the association at once; it does no harm that no
                // socket receives it.
                let abort = Packet {
                    tag: theirs,
                    chunk: Chunk::Abort,
                    ..self.sent
                };
                let _ = self.socket.send(&abort.encode());
                Some(Verdict::Answered)
            }
            Chunk::Abort => Some(Verdict::Refused),
            Chunk::Init(_) => None,
        }
    }
}

/// A tag that no other association of this process has; zero is none.
fn tag() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    LAST.fetch_add(1, Ordering::Relaxed)
        .wrapping_mul(0x9e37_79b1)
        | 1
}

/// A connection being made. Closing it sends a reset: neither end keeps an entry for it, so that
/// many questions do not use up the ports.
fn connecting(to: SocketAddr, port: u16, protocol: Option<i32>) -> io::Result<TcpStream> {
    let socket = Socket::new(
        Domain::for_address(to),
        Type::STREAM,
        protocol.map(Into::into),
    )?;
    socket.set_nonblocking(true)?;
    socket.set_linger(Some(Duration::ZERO))?;
    if port != 0 {
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(any(to), port).into())?;
    }
    match socket.connect(&to.into()) {
        Ok(()) => Ok(socket.into()),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error),
    }
}

fn sent(to: SocketAddr, port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((any(to), port))?;
    socket.set_nonblocking(true)?;
    socket.connect(to)?;
    socket.send(b"who is there")?;
    Ok(socket)
}

fn any(to: SocketAddr) -> IpAddr {
    if to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    }
}

fn verdict_of_error(error: &io::Error) -> Verdict {
    match error.kind() {
        ErrorKind::ConnectionRefused
        | ErrorKind::ConnectionReset
        | ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable => Verdict::Refused,
        _ if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Verdict::Refused,
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
