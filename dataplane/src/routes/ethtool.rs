//! Reads and disables TX checksum offload of a link (`linux/ethtool.h`).

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// `SIOCETHTOOL`, of `linux/sockios.h`.
const SIOCETHTOOL: libc::Ioctl = 0x8946;
/// `ETHTOOL_GTXCSUM`.
const GET: u32 = 0x16;
/// `ETHTOOL_STXCSUM`.
const SET: u32 = 0x17;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Whether checksum offload is on. A link that is gone, or of a kind without the setting, has none.
pub(super) fn has_checksum_offload(link: &str) -> io::Result<bool> {
    match ethtool_ioctl(
        link,
        Value {
            command: GET,
            data: 0,
        },
    ) {
        Err(Errno::ENODEV | Errno::EOPNOTSUPP) => Ok(false),
        result => Ok(result? != 0),
    }
}

/// Turns checksum offload off, as `ethtool -K LINK tx off` does.
pub(super) fn turn_checksum_offload_off(link: &str) -> io::Result<()> {
    let set = ethtool_ioctl(
        link,
        Value {
            command: SET,
            data: 0,
        },
    );
    set.map_err(|errno| {
        io::Error::new(
            io::Error::from(errno).kind(),
            format!("checksum offload of {link}: {errno}"),
        )
    })?;
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "the request holds a pointer to the value, which outlives the call"
)]
fn ethtool_ioctl(link: &str, mut value: Value) -> Result<u32, Errno> {
    let fd = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all zeroes are a valid value of this plain struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    if link.len() > room {
        return Err(Errno::ENODEV);
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(link.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut value).cast();
    // SAFETY: the kernel reads and writes the request and the value behind it, both of which
    // outlive the call.
    Errno::result(unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            SIOCETHTOOL,
            std::ptr::from_mut(&mut request),
        )
    })?;
    Ok(value.data)
}
