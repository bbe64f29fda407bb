//! Kernel parameters under `/proc/sys/net`, of the calling thread's network namespace.

use std::fs;
use std::io;
use std::path::Path;

use margay_api::rule::IpVersion;

use super::plan::vxlan_device_name;

const ROOT: &str = "/proc/sys/net";

/// Writes a parameter if its value differs; returns whether it did. The error names the parameter.
pub fn set(parameter: &str, value: &str) -> io::Result<bool> {
    if get(parameter)? == value {
        return Ok(false);
    }
    let path = Path::new(ROOT).join(parameter);
    fs::write(&path, value).map_err(|error| named(&path, &error))?;
    Ok(true)
}

fn get(parameter: &str) -> io::Result<String> {
    let path = Path::new(ROOT).join(parameter);
    let text = fs::read_to_string(&path).map_err(|error| named(&path, &error))?;
    Ok(text.trim().to_owned())
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Whether the kernel has IPv6 at all: booted without it, nothing can be set.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Links that are ours begin with these: no router speaks on them.
const OWN: [&str; 3] = ["cali", vxlan_device_name(IpVersion::V4), vxlan_device_name(IpVersion::V6)];

/// Lets the node forward IPv6. A link that has taken router advertisements so far goes on to: a forwarding node would ignore them, and lose its own
/// default route when the last one expires. Returns whether it did not forward.
pub fn forward_ipv6() -> io::Result<bool> {
    const FORWARDING: &str = "ipv6/conf/all/forwarding";
    if get(FORWARDING)? == "1" {
        return Ok(false);
    }
    for entry in fs::read_dir("/proc/sys/net/ipv6/conf")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let parameter = format!("ipv6/conf/{name}/accept_ra");
        if !OWN.iter().any(|prefix| name.starts_with(prefix)) && !["all", "default", "lo"].contains(&name.as_str()) {
            match get(&parameter) {
                Ok(value) if value == "1" => drop(set(&parameter, "2")?),
                Ok(_) => {}
                // The link went meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    set(FORWARDING, "1")
}
