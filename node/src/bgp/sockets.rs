//! TCP sockets of BGP: what sessions need of them, and libraries do not set.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use margay_bgp::config::{Password, Transport};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// TTL of packets to peers that are checked for their distance (RFC 5082 section 3).
const MAX_TTL: u8 = 255;
/// `struct sockaddr_storage` of linux/socket.h.
const ADDRESS: usize = 128;
/// `struct tcp_md5sig` of linux/tcp.h: address, flags, prefix length, key length, interface, key.
const MD5_SIGNATURE: usize = ADDRESS + 8 + Password::MAX;
/// Option of linux/in6.h that libc does not have.
const IPV6_MINHOPCOUNT: i32 = 73;

/// Listens on an address of one IP version.
///
/// # Errors
/// `EADDRINUSE` if somebody else listens there, `EADDRNOTAVAIL` if the node does not have it,
/// `EAFNOSUPPORT` without that IP version.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    // A peer that checks the distance drops the answer to its SYN otherwise.
    set_ttl(&socket, address.ip())?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Connects to a peer.
///
/// # Errors
/// Those of connecting; and if the kernel has no TCP MD5 signatures, but a password is given.
pub async fn connect(address: SocketAddr, transport: &Transport) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    if let Some(password) = &transport.password {
        set_password(&socket, address.ip(), Some(password))?;
    }
    if let Some(hops) = transport.ttl_security {
        set_ttl(&socket, address.ip())?;
        set_max_hops(&socket, address.ip(), hops)?;
    }
    if let Some(source) = transport.source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Prepares an accepted connection.
///
/// # Errors
/// Those of the kernel.
pub fn prepare(stream: &TcpStream, peer: IpAddr, transport: &Transport) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match transport.ttl_security {
        Some(hops) => set_max_hops(stream, peer, hops),
        None => Ok(()),
    }
}

/// Demands TCP MD5 signatures (RFC 2385) by this key of whoever connects from the address, or is
/// connected to there; none: it demands that there are none.
///
/// # Errors
/// `ENOPROTOOPT` if the kernel has no signatures, `ENOENT` if there is no key to be removed.
pub fn set_password(
    socket: &impl AsFd,
    peer: IpAddr,
    password: Option<&Password>,
) -> io::Result<()> {
    let key = password.map_or("", Password::reveal).as_bytes();
    let length = u8::try_from(key.len()).unwrap_or(u8::MAX);
    let mut value = [0u8; MD5_SIGNATURE];
    match peer {
        IpAddr::V4(address) => {
            value[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            value[4..8].copy_from_slice(&address.octets());
        }
        IpAddr::V6(address) => {
            value[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            value[8..24].copy_from_slice(&address.octets());
        }
    }
    value[ADDRESS + 2..ADDRESS + 4].copy_from_slice(&u16::from(length).to_ne_bytes());
    // A password has at most as many bytes as there is room for.
    value[ADDRESS + 8..ADDRESS + 8 + key.len()].copy_from_slice(key);
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_MD5SIG, &value)
}

fn set_ttl(socket: &impl AsFd, peer: IpAddr) -> io::Result<()> {
    let (level, option) = match peer {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TTL),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    };
    set_option(socket, level, option, &i32::from(MAX_TTL))
}

/// Drops packets from more hops away (RFC 5082 section 3).
fn set_max_hops(socket: &impl AsFd, peer: IpAddr, hops: u8) -> io::Result<()> {
    let least = i32::from(MAX_TTL) + 1 - i32::from(hops.max(1));
    let (level, option) = match peer {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MINTTL),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, IPV6_MINHOPCOUNT),
    };
    set_option(socket, level, option, &least)
}

fn set_option<T>(socket: &impl AsFd, level: i32, option: i32, value: &T) -> io::Result<()> {
    let size = u32::try_from(size_of::<T>()).unwrap_or(u32::MAX);
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads as many bytes of `value` as it has, and keeps no pointer.
    #[expect(unsafe_code, reason = "neither nix nor socket2 has these options")]
    let result = unsafe {
        libc::setsockopt(
            socket,
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
