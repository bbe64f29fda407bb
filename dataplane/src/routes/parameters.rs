//! Kernel parameters that pods need: of the node, of pods' links and of tunnel devices. A host may
//! have other values, and its own programs (`sysctl.d`, udev) set them for every new link, so they
//! are compared and restored like routes. The kernel notifies few of them (`netconf`), so
//! all are read every few seconds.

use std::io;

use margay_api::network::TunnelKind;
use margay_api::rule::IpVersion;

use super::plan::Plan;
use super::sysctl::{self, ChangedParameter};

/// Parameters of the host side of a pod's link under `ipv4/`; `{}` is the link.
const POD: [(&str, &str); 8] = [
    ("conf/{}/proxy_arp", "1"),
    ("neigh/{}/proxy_delay", "0"),
    ("conf/{}/forwarding", "1"),
    ("conf/{}/route_localnet", "1"),
    ("conf/{}/rp_filter", "1"),
    ("conf/{}/accept_redirects", "0"),
    ("conf/{}/accept_source_route", "0"),
    ("conf/{}/arp_accept", "0"),
];

/// Parameters of the host side of a pod's link under `ipv6/`. The host side has only the addresses
/// that it is given, without delay; `addr_gen_mode` 1 is `none`. It accepts no routes, prefixes and
/// redirects from a pod. Parameters that turn IPv6 on apply to this link only.
const POD_V6: [(&str, &str); 8] = [
    ("conf/{}/disable_ipv6", "0"),
    ("conf/{}/addr_gen_mode", "1"),
    ("conf/{}/accept_ra", "0"),
    ("conf/{}/accept_redirects", "0"),
    ("conf/{}/accept_source_route", "0"),
    ("conf/{}/autoconf", "0"),
    ("conf/{}/accept_dad", "0"),
    ("conf/{}/proxy_ndp", "1"),
];

/// Set only if the node forwards IPv6: each write, to whichever link, removes advertised default
/// routes from all links (Linux 6.18, `addrconf_fixup_forwarding`), which a node without IPv6 pods
/// may depend on.
const FORWARDING_POD_V6: [(&str, &str); 1] = [("conf/{}/forwarding", "1")];

/// Parameters of a tunnel device of IPv4 under `ipv4/`. Tunnel packets are accepted from nodes
/// only, so it needs no reverse path filter.
const TUNNEL: [(&str, &str); 3] = [
    ("conf/{}/forwarding", "1"),
    ("conf/{}/proxy_arp", "0"),
    ("conf/{}/rp_filter", "0"),
];

/// Parameters of the IPv6 tunnel device under `ipv6/`.
const TUNNEL_V6: [(&str, &str); 2] = [("conf/{}/disable_ipv6", "0"), ("conf/{}/accept_ra", "0")];

/// Sets the parameters of the host side of a pod's link. Returns whether any differed.
pub fn set_pod_parameters(link: &str) -> io::Result<bool> {
    let mut differed = set_parameters(link, "ipv4", &POD)?;
    if sysctl::has_ipv6_on(link) {
        differed |= set_parameters(link, "ipv6", &POD_V6)?;
        if sysctl::has_value(sysctl::FORWARDING_V6, "1")? {
            differed |= set_parameters(link, "ipv6", &FORWARDING_POD_V6)?;
        }
    }
    Ok(differed)
}

/// Sets the parameters of a tunnel device. Returns whether any differed.
pub fn set_tunnel_parameters(kind: TunnelKind) -> io::Result<bool> {
    match kind.version() {
        IpVersion::V4 => set_parameters(kind.device_name(), "ipv4", &TUNNEL),
        IpVersion::V6 => set_parameters(kind.device_name(), "ipv6", &TUNNEL_V6),
    }
}

fn set_parameters(link: &str, family: &str, parameters: &[(&str, &str)]) -> io::Result<bool> {
    let mut differed = false;
    for (parameter, value) in parameters {
        differed |= sysctl::set_value(
            &format!("{family}/{}", parameter.replace("{}", link)),
            value,
        )?;
    }
    Ok(differed)
}

/// Enables forwarding of an IP version. Returns the parameters of the host that were changed.
pub fn set_forwarding(version: IpVersion) -> io::Result<Vec<ChangedParameter>> {
    match version {
        IpVersion::V4 => sysctl::enable_ipv4_forwarding(),
        IpVersion::V6 => sysctl::enable_ipv6_forwarding(),
    }
}

/// Whether any parameter of the plan differs or cannot be read. A missing link needs none.
pub fn any_differs(plan: &Plan) -> bool {
    let forwarding = plan.forwards.iter().map(|version| match version {
        IpVersion::V4 => sysctl::has_value(sysctl::FORWARDING, "1"),
        IpVersion::V6 => sysctl::has_value(sysctl::FORWARDING_V6, "1"),
    });
    let is_pods = |link: &String| -> io::Result<bool> {
        let is_forwarding = || -> io::Result<bool> {
            Ok(!plan.forwards.contains(&IpVersion::V6)
                || has_parameters(link, "ipv6", &FORWARDING_POD_V6)?)
        };
        let is_v6 = || -> io::Result<bool> {
            Ok(has_parameters(link, "ipv6", &POD_V6)? && is_forwarding()?)
        };
        Ok(has_parameters(link, "ipv4", &POD)? && (!sysctl::has_ipv6_on(link) || is_v6()?))
    };
    let are_tunnels = |kind: &TunnelKind| match kind.version() {
        IpVersion::V4 => has_parameters(kind.device_name(), "ipv4", &TUNNEL),
        IpVersion::V6 => has_parameters(kind.device_name(), "ipv6", &TUNNEL_V6),
    };
    let mut all = forwarding
        .chain(plan.pods.iter().map(is_pods))
        .chain(plan.tunnels.keys().map(are_tunnels));
    all.any(|is_so| match is_so {
        Ok(is_so) => !is_so,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    })
}

fn has_parameters(link: &str, family: &str, parameters: &[(&str, &str)]) -> io::Result<bool> {
    for (parameter, value) in parameters {
        if !sysctl::has_value(
            &format!("{family}/{}", parameter.replace("{}", link)),
            value,
        )? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Sets the parameters of all links of the plan; returns how many links differed, and the failures
/// by link. A link that is removed meanwhile needs none.
pub fn set_link_parameters(plan: &Plan) -> (usize, Vec<(String, io::Error)>) {
    let (mut differed, mut failed) = (0, Vec::new());
    let pods = plan
        .pods
        .iter()
        .map(|link| (link.as_str(), set_pod_parameters(link)));
    let tunnels = plan
        .tunnels
        .keys()
        .map(|kind| (kind.device_name(), set_tunnel_parameters(*kind)));
    for (link, result) in pods.chain(tunnels) {
        match result {
            Ok(was_other) => differed += usize::from(was_other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failed.push((link.to_owned(), error)),
        }
    }
    (differed, failed)
}

/// Notified parameter, by its attribute in `linux/netconf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notified {
    /// `NETCONFA_FORWARDING`.
    Forwarding,
    /// `NETCONFA_RP_FILTER`.
    RpFilter,
    /// `NETCONFA_PROXY_NEIGH`: `proxy_arp` or `proxy_ndp`.
    ProxyNeigh,
}

/// Value that the kernel should notify for a parameter of our link; `None`: any.
pub fn expected_value(version: IpVersion, is_pod: bool, what: Notified) -> Option<i32> {
    match (version, is_pod, what) {
        (IpVersion::V4, _, Notified::Forwarding) | (IpVersion::V6, true, Notified::Forwarding) => {
            Some(1)
        }
        (IpVersion::V4, true, Notified::RpFilter) | (_, true, Notified::ProxyNeigh) => Some(1),
        (IpVersion::V4, false, Notified::RpFilter | Notified::ProxyNeigh) => Some(0),
        (IpVersion::V6, ..) => None,
    }
}
