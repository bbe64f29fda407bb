//! Reads and writes kernel parameters under `/proc/sys/net` of the calling thread's network
//! namespace.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use margay_api::network::TunnelKind;
use margay_api::rule::IpVersion;

const ROOT: &str = "/proc/sys/net";
/// Maximal length of a value; all that are used here are numbers.
const MAX_VALUE: usize = 64;

/// A changed parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedParameter {
    /// Its path under `/proc/sys/net`.
    pub parameter: String,
    /// Former value.
    pub former: String,
    /// New value.
    pub now: String,
}

/// Writes a parameter if its value differs; returns whether it did. Errors name the parameter.
pub fn set_value(parameter: &str, value: &str) -> io::Result<bool> {
    change_value(parameter, value).map(|changed| changed.is_some())
}

/// Writes a parameter if its value differs; returns the change.
fn change_value(parameter: &str, value: &str) -> io::Result<Option<ChangedParameter>> {
    let former = read_value(parameter)?;
    if former == value {
        return Ok(None);
    }
    let path = Path::new(ROOT).join(parameter);
    fs::write(&path, value).map_err(|error| path_error(&path, &error))?;
    Ok(Some(ChangedParameter {
        parameter: parameter.to_owned(),
        former,
        now: value.to_owned(),
    }))
}

/// Whether a parameter has this value. Errors name the parameter.
pub fn has_value(parameter: &str, value: &str) -> io::Result<bool> {
    Ok(read_value(parameter)? == value)
}

fn read_value(parameter: &str) -> io::Result<String> {
    let path = Path::new(ROOT).join(parameter);
    // A single read is enough for a number, and the parameters of all pods are read again and
    // again.
    let mut value = [0; MAX_VALUE];
    let read = File::open(&path)
        .and_then(|mut file| file.read(&mut value))
        .map_err(|error| path_error(&path, &error))?;
    Ok(String::from_utf8_lossy(&value[..read]).trim().to_owned())
}

fn path_error(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Whether the kernel has IPv6; booted with `ipv6.disable=1` it has not.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Whether a link has IPv6: not if its MTU is below [`IPV6_MTU`].
pub fn has_ipv6_on(link: &str) -> bool {
    Path::new("/proc/sys/net/ipv6/conf").join(link).exists()
}

/// Smallest MTU of a link with IPv6 (RFC 8200, section 5; `IPV6_MIN_MTU`).
pub const IPV6_MTU: u32 = 1280;

/// Name prefixes of our links, on which there is no router.
const OWN_PREFIXES: [&str; 4] = [
    "cali",
    TunnelKind::Vxlan(IpVersion::V4).device_name(),
    TunnelKind::Vxlan(IpVersion::V6).device_name(),
    TunnelKind::Ipip.device_name(),
];

/// Parameter that enables IPv4 forwarding.
pub const FORWARDING: &str = "ipv4/ip_forward";
/// Parameter that enables IPv6 forwarding.
pub const FORWARDING_V6: &str = "ipv6/conf/all/forwarding";

/// Enables IPv4 forwarding and returns the changes.
pub fn enable_ipv4_forwarding() -> io::Result<Vec<ChangedParameter>> {
    Ok(change_value(FORWARDING, "1")?.into_iter().collect())
}

/// Enables IPv6 forwarding and returns the changes. Links that accept router advertisements keep
/// accepting them (`accept_ra` 2): otherwise a forwarding node ignores them and loses its default
/// route when the last one expires.
pub fn enable_ipv6_forwarding() -> io::Result<Vec<ChangedParameter>> {
    let mut changed = Vec::new();
    if has_value(FORWARDING_V6, "1")? {
        return Ok(changed);
    }
    for entry in fs::read_dir("/proc/sys/net/ipv6/conf")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let parameter = format!("ipv6/conf/{name}/accept_ra");
        if !OWN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
            && !["all", "default", "lo"].contains(&name.as_str())
        {
            match read_value(&parameter) {
                Ok(value) if value == "1" => changed.extend(change_value(&parameter, "2")?),
                Ok(_) => {}
                // The link was removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    changed.extend(change_value(FORWARDING_V6, "1")?);
    Ok(changed)
}
