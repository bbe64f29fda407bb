//! Servers: TCP and UDP echo, and SCTP as far as an association, or as an INIT-ACK where the kernel
//! has no sockets for it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::Protocol;
use super::sctp::{self, Chunk, Packet};

/// Open ports. They belong to the network namespace in which they were opened, whichever thread
/// serves them.
#[derive(Debug, Default)]
pub struct Ports {
    tcp: Vec<std::net::TcpListener>,
    udp: Vec<std::net::UdpSocket>,
    /// Associations, which std has no type for.
    associations: Vec<std::net::TcpListener>,
    /// Raw sockets: what they take and give are datagrams too.
    sctp: Vec<std::net::UdpSocket>,
    /// Ports that SCTP is served on; a raw socket receives for all of them.
    served: Arc<[u16]>,
}

impl Ports {
    /// Opens ports in the network namespace of the calling thread, for both families where there
    /// are both.
    pub fn open(ports: &[(Protocol, u16)]) -> io::Result<Self> {
        let of = |wanted: Protocol| {
            ports
                .iter()
                .filter(move |port| port.0 == wanted)
                .map(|port| port.1)
        };
        let raw = if sctp::has_sockets() {
            Arc::default()
        } else {
            of(Protocol::Sctp).collect()
        };
        let mut opened = Self {
            served: raw,
            ..Self::default()
        };
        for family in [
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        ] {
            match opened.open_family(family, ports) {
                // A machine without IPv6.
                Err(error)
                    if family.is_ipv6() && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                outcome => outcome?,
            }
        }
        Ok(opened)
    }

    fn open_family(&mut self, family: IpAddr, ports: &[(Protocol, u16)]) -> io::Result<()> {
        for (protocol, port) in ports {
            let address = SocketAddr::new(family, *port);
            match protocol {
                Protocol::Tcp => {
                    let socket = bound(address, Type::STREAM, None)?;
                    socket.listen(1024)?;
                    self.tcp.push(socket.into());
                }
                Protocol::Udp => self.udp.push(bound(address, Type::DGRAM, None)?.into()),
                Protocol::Sctp if self.served.is_empty() => {
                    let socket = bound(address, Type::STREAM, Some(sctp::PROTOCOL))?;
                    socket.listen(1024)?;
                    self.associations.push(socket.into());
                }
                Protocol::Sctp | Protocol::Icmp => {}
            }
        }
        if !self.served.is_empty() {
            let socket = Socket::new(
                Domain::for_address((family, 0).into()),
                Type::RAW,
                Some(sctp::PROTOCOL.into()),
            )?;
            socket.set_nonblocking(true)?;
            self.sctp.push(socket.into());
        }
        Ok(())
    }

    /// Serves until the runtime of the caller ends.
    pub fn serve(self) -> io::Result<()> {
        for listener in self.tcp {
            let listener = TcpListener::from_std(listener)?;
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(echo(stream));
                }
            });
        }
        for listener in self.associations {
            let listener = TcpListener::from_std(listener)?;
            // The established connection is the answer.
            tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        }
        for socket in self.udp {
            let socket = UdpSocket::from_std(socket)?;
            tokio::spawn(async move {
                let mut buffer = vec![0; 2048];
                loop {
                    // An error here is about an earlier datagram, whose sender has gone.
                    if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                        let _ = socket.send_to(&buffer[..length], from).await;
                    }
                }
            });
        }
        for socket in self.sctp {
            tokio::spawn(acknowledge(
                UdpSocket::from_std(socket)?,
                self.served.clone(),
            ));
        }
        Ok(())
    }
}

fn bound(address: SocketAddr, kind: Type, protocol: Option<i32>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, protocol.map(Into::into))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

async fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// Answers every INIT: to a port that is served with an INIT-ACK, to any other with an ABORT.
async fn acknowledge(socket: UdpSocket, served: Arc<[u16]>) {
    let mut buffer = vec![0; 2048];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let Some(asked) = sctp::payload(&buffer[..length], from.is_ipv4()).and_then(Packet::decode)
        else {
            continue;
        };
        let Chunk::Init(tag) = asked.chunk else {
            continue;
        };
        let is_served = served.contains(&asked.destination);
        let chunk = if is_served {
            Chunk::InitAck(!tag | 1)
        } else {
            Chunk::Abort
        };
        let answer = Packet {
            source: asked.destination,
            destination: asked.source,
            tag,
            chunk,
        };
        // The client retries.
        let _ = socket.send_to(&answer.encode(), from).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::namespace::Namespace;
    use crate::probe::prober::Prober;
    use crate::probe::{Place, Target, Verdict};

    #[test]
    fn what_is_served_answers_and_what_is_not_refuses() {
        let namespace = Namespace::new().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let ports = namespace
            .run(|| Ports::open(&protocols.map(|protocol| (protocol, 80))))
            .unwrap();
        runtime.block_on(async { ports.serve() }).unwrap();
        let prober = Prober::start(&Place::of_namespace(&namespace).unwrap()).unwrap();
        for address in [
            IpAddr::from(Ipv4Addr::LOCALHOST),
            IpAddr::from(Ipv6Addr::LOCALHOST),
        ] {
            let to = |port| protocols.map(|protocol| Target::new(protocol, address, port));
            let targets = [to(80), to(81)].concat();
            prober.ask(targets, Duration::from_secs(5)).unwrap();
            let verdicts = prober.answers().unwrap();
            assert_eq!(
                verdicts,
                [[Verdict::Answered; 3], [Verdict::Refused; 3]].concat(),
                "{address}"
            );
        }
    }
}
