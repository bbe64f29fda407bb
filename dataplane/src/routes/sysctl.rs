//! Kernel parameters under `/proc/sys/net`, of the calling thread's network namespace.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use margay_api::rule::IpVersion;

use super::plan::vxlan_device_name;

const ROOT: &str = "/proc/sys/net";
/// Bytes of a value that are read: all that are used here are numbers.
const VALUE: usize = 64;

/// A parameter that had another value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Its name, below `/proc/sys/net`.
    pub parameter: String,
    /// The value that it had.
    pub former: String,
    /// The value that it has.
    pub now: String,
}

/// Writes a parameter if its value differs; returns whether it did. The error names the parameter.
pub fn set(parameter: &str, value: &str) -> io::Result<bool> {
    change(parameter, value).map(|changed| changed.is_some())
}

/// The same; returns what it changed.
fn change(parameter: &str, value: &str) -> io::Result<Option<Changed>> {
    let former = get(parameter)?;
    if former == value {
        return Ok(None);
    }
    let path = Path::new(ROOT).join(parameter);
    fs::write(&path, value).map_err(|error| named(&path, &error))?;
    Ok(Some(Changed { parameter: parameter.to_owned(), former, now: value.to_owned() }))
}

/// Whether a parameter has this value. The error names the parameter.
pub fn is(parameter: &str, value: &str) -> io::Result<bool> {
    Ok(get(parameter)? == value)
}

fn get(parameter: &str) -> io::Result<String> {
    let path = Path::new(ROOT).join(parameter);
    // One read is enough for a number, and all pods' parameters are read again and again.
    let mut value = [0; VALUE];
    let read = File::open(&path).and_then(|mut file| file.read(&mut value)).map_err(|error| named(&path, &error))?;
    Ok(String::from_utf8_lossy(&value[..read]).trim().to_owned())
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Whether the kernel has IPv6 at all: booted without it, nothing can be set.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Whether the kernel has IPv6 on this link: not on one whose MTU is below [`IPV6_MTU`].
pub fn has_ipv6_on(link: &str) -> bool {
    Path::new("/proc/sys/net/ipv6/conf").join(link).exists()
}

/// The smallest MTU with which a link has IPv6 (RFC 8200, `IPV6_MIN_MTU`).
pub const IPV6_MTU: u32 = 1280;

/// Links that are ours begin with these: no router speaks on them.
const OWN: [&str; 3] = ["cali", vxlan_device_name(IpVersion::V4), vxlan_device_name(IpVersion::V6)];

/// Where forwarding is turned on and off.
pub const FORWARDING: &str = "ipv4/ip_forward";
/// The same of IPv6.
pub const FORWARDING_V6: &str = "ipv6/conf/all/forwarding";

/// Lets the node forward IPv4. Returns what that took.
pub fn forward_ipv4() -> io::Result<Vec<Changed>> {
    Ok(change(FORWARDING, "1")?.into_iter().collect())
}

/// Lets the node forward IPv6. A link that has taken router advertisements so far goes on to: a forwarding node would ignore them, and lose its own
/// default route when the last one expires. Returns what that took.
pub fn forward_ipv6() -> io::Result<Vec<Changed>> {
    let mut changed = Vec::new();
    if is(FORWARDING_V6, "1")? {
        return Ok(changed);
    }
    for entry in fs::read_dir("/proc/sys/net/ipv6/conf")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let parameter = format!("ipv6/conf/{name}/accept_ra");
        if !OWN.iter().any(|prefix| name.starts_with(prefix)) && !["all", "default", "lo"].contains(&name.as_str()) {
            match get(&parameter) {
                Ok(value) if value == "1" => changed.extend(change(&parameter, "2")?),
                Ok(_) => {}
                // The link went meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    changed.extend(change(FORWARDING_V6, "1")?);
    Ok(changed)
}
