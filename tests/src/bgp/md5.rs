//! TCP MD5 signatures (RFC 2385), which no library here sets.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

/// `struct sockaddr_storage` of linux/socket.h.
const ADDRESS: usize = 128;
/// `struct tcp_md5sig` of linux/tcp.h: address, flags, prefix length, key length, interface, key.
const SIZE: usize = ADDRESS + 8 + KEY;
/// TCP_MD5SIG_MAXKEYLEN.
const KEY: usize = 80;

/// Demands signatures with this key of whoever connects from the address, or is connected to there.
pub(super) fn set_key(socket: &impl AsFd, peer: IpAddr, key: &str) -> io::Result<()> {
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "a key has at most 80 bytes");
    let length = u16::try_from(key.len())
        .ok()
        .filter(|_| key.len() <= KEY)
        .ok_or_else(too_long)?;
    let mut value = [0u8; SIZE];
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
    value[ADDRESS + 2..ADDRESS + 4].copy_from_slice(&length.to_ne_bytes());
    value[ADDRESS + 8..ADDRESS + 8 + key.len()].copy_from_slice(key.as_bytes());
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads as many bytes of `value` as it has, and keeps no pointer.
    #[expect(unsafe_code, reason = "neither nix nor socket2 has this option")]
    let result = unsafe {
        libc::setsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_MD5SIG,
            value.as_ptr().cast(),
            SIZE as u32,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
