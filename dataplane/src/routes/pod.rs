//! A pod's link: a veth pair, addresses and routes in the pod, and kernel parameters of the host
//! side, as in Calico's CNI plugin.
//!
//! The pod's default route leads to 169.254.1.1, which no interface has: the node routes whatever
//! is sent there. The pod has a permanent neighbour entry with the MAC address of the host side.
//! Where that was lost, and in pods that another network has set up, the host side answers by proxy
//! ARP; the kernel does so only if it has a route to the address, which a node without a default
//! route has not. For IPv6 the default route leads to the host side's link-local address.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use margay_api::network::Mac;
use margay_api::rule::IpVersion;
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use super::message::{self, LinkRef, Route, VethPair};
use super::parameters;
use super::plan::{GATEWAY_V6, HOST_MAC, Target};
use super::present::{self, LinksByName};
use super::sysctl;
use margay_netlink::namespace;
use margay_netlink::route::{NetlinkError, RequestMode, RouteSocket};

/// IPv4 gateway of every pod, as in Calico's CNI plugin.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Length of the link-local prefix of a link (RFC 4291).
const LINK_LOCAL: u8 = 64;

/// Link group for links to be deleted together; nothing else is ever moved to it. It reads `cali`
/// in ASCII.
const DELETE_GROUP: u32 = 0x6361_6c69;

/// Wanted link of a pod.
pub struct PodLink<'a> {
    /// Host-side interface.
    pub host: &'a str,
    /// Interface in the pod.
    pub pod: &'a str,
    /// The pod's network namespace.
    pub namespace: &'a File,
    /// MTU of both ends.
    pub mtu: u32,
    /// MAC address of the interface in the pod.
    pub mac: Mac,
}

/// Error of setting up or checking a pod's link.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// A request was refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A kernel parameter or the namespace could not be used.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// CHECK found a difference.
    #[error("{0}")]
    Missing(String),
}

/// Creates the veth pair and sets up its host side. An existing link of the same name is a leftover
/// of the pod's former sandbox and is deleted.
pub fn create_link(socket: &mut RouteSocket, link: &PodLink<'_>) -> Result<u32, PodError> {
    let pair = VethPair {
        host: link.host,
        pod: link.pod,
        namespace: link.namespace.as_raw_fd(),
        host_mac: HOST_MAC,
        mac: link.mac,
        mtu: link.mtu,
    };
    match socket.exec(message::new_veth(&pair), RequestMode::Create, || {
        format!("create {}", link.host)
    }) {
        Err(error) if error.is_existing() => {
            remove_link(socket, link.host)?;
            socket.exec(message::new_veth(&pair), RequestMode::Create, || {
                format!("create {} with {} in the pod", link.host, link.pod)
            })?;
        }
        result => result?,
    }
    let index = present::find_link(socket, link.host)?
        .map(|found| found.index)
        .ok_or_else(|| missing_error(link.host, "link"))?;
    parameters::set_pod_parameters(link.host)?;
    bring_up(socket, link.host, index)?;
    Ok(index)
}

/// Brings the host side up and adds the pods' IPv6 gateway, which the kernel removes whenever the
/// link goes down.
pub fn bring_up(socket: &mut RouteSocket, host: &str, index: u32) -> Result<(), NetlinkError> {
    socket.exec(message::set_up(index), RequestMode::Change, || {
        format!("bring {host} up")
    })?;
    if sysctl::has_ipv6_on(host) {
        let gateway = gateway_v6();
        socket.exec(
            message::new_link_address(index, gateway),
            RequestMode::Replace,
            || format!("address {gateway}"),
        )?;
    }
    Ok(())
}

/// Brings the host side up after others have changed it: with the MAC address that the pod knows,
/// and as a port of no other link.
pub fn restore(socket: &mut RouteSocket, host: &str, index: u32) -> Result<(), NetlinkError> {
    let what = || format!("MAC address of {host}, and no bridge around it");
    socket.exec(
        message::set_alone(index, HOST_MAC),
        RequestMode::Change,
        what,
    )?;
    bring_up(socket, host, index)
}

/// Lowers the MTU of both ends of a pod's link and returns whether any was larger; a missing end
/// needs none. The pod's end comes first, because the other end drops packets larger than its own
/// MTU.
pub fn lower_mtu(socket: &mut RouteSocket, link: &PodLink<'_>) -> Result<bool, PodError> {
    let inside = namespace::within(link.namespace, || {
        lower_end(&mut RouteSocket::open()?, link.pod, link.mtu)
    })??;
    Ok(lower_end(socket, link.host, link.mtu)? || inside)
}

fn lower_end(socket: &mut RouteSocket, name: &str, mtu: u32) -> Result<bool, NetlinkError> {
    let Some(found) = present::find_link(socket, name)?.filter(|found| found.mtu > mtu) else {
        return Ok(false);
    };
    socket.exec(
        message::set_mtu(found.index, mtu),
        RequestMode::Change,
        || format!("MTU of {name}"),
    )?;
    Ok(true)
}

/// MAC address of a sandbox's interface: a locally administered address derived from its identity,
/// so that it is known before the link exists.
pub fn pod_mac(container: &str, ifname: &str) -> Mac {
    use sha1::{Digest, Sha1};
    let hash = Sha1::digest(format!("{container}/{ifname}"));
    Mac([
        hash[0] & 0xfc | 0x02,
        hash[1],
        hash[2],
        hash[3],
        hash[4],
        hash[5],
    ])
}

/// Gateway of a pod for the IP version of this address.
pub fn pod_gateway(address: IpAddr) -> IpAddr {
    if address.is_ipv4() {
        IpAddr::V4(GATEWAY)
    } else {
        IpAddr::V6(GATEWAY_V6)
    }
}

fn gateway_v6() -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(GATEWAY_V6, LINK_LOCAL))
}

/// Adds routes from the node to the pod's addresses.
pub fn add_routes(
    socket: &mut RouteSocket,
    index: u32,
    addresses: &[IpNet],
) -> Result<(), PodError> {
    for address in addresses {
        let route = Route::direct(IpNet::from(address.addr()), index);
        socket.exec(
            RouteNetlinkMessage::NewRoute(route.message()),
            RequestMode::Replace,
            || format!("route {}", address.addr()),
        )?;
    }
    Ok(())
}

/// Configures the pod's side: addresses, gateway route, default route, and both links up. Returns
/// the MAC address of the pod's interface.
pub fn configure_pod(link: &PodLink<'_>, addresses: &[IpNet]) -> Result<Mac, PodError> {
    if link.mtu < sysctl::IPV6_MTU && addresses.iter().any(|address| address.addr().is_ipv6()) {
        let (mtu, least) = (link.mtu, sysctl::IPV6_MTU);
        let why = format!(
            "MTU {mtu} is less than {least}, the minimum of IPv6; configure a larger MTU on the \
             node's link, or give the pod no IPv6 address"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why).into());
    }
    namespace::within(link.namespace, || configure_inside(link.pod, addresses))?
}

fn configure_inside(name: &str, addresses: &[IpNet]) -> Result<Mac, PodError> {
    let mut socket = RouteSocket::open()?;
    let links = present::list_links(&mut socket)?;
    let pod = links
        .get(name)
        .ok_or_else(|| missing_error(name, "link in the pod"))?;
    if let Some(loopback) = links.get("lo") {
        socket.exec(message::set_up(loopback.index), RequestMode::Change, || {
            "bring lo up".to_owned()
        })?;
    }
    let has = |v6: bool| {
        addresses
            .iter()
            .any(|address| address.addr().is_ipv6() == v6)
    };
    if has(true) {
        // Runtimes disable IPv6 in a new network namespace. A pod gets its routes from its node
        // only, never from router advertisements.
        for parameter in [
            "all/disable_ipv6",
            "default/disable_ipv6",
            "lo/disable_ipv6",
        ] {
            sysctl::set_value(&format!("ipv6/conf/{parameter}"), "0")?;
        }
        for parameter in ["disable_ipv6", "accept_ra", "accept_dad"] {
            sysctl::set_value(&format!("ipv6/conf/{name}/{parameter}"), "0")?;
        }
    }
    socket.exec(message::set_up(pod.index), RequestMode::Change, || {
        format!("bring {name} up")
    })?;
    for address in addresses {
        let address = address.addr();
        socket.exec(
            message::new_host_address(pod.index, address),
            RequestMode::Replace,
            || format!("address {address}"),
        )?;
    }
    if has(false) {
        let gateway = Route::direct(IpNet::from(IpAddr::V4(GATEWAY)), pod.index);
        socket.exec(
            RouteNetlinkMessage::NewRoute(gateway.message()),
            RequestMode::Replace,
            || format!("route {GATEWAY}"),
        )?;
        let default = Route {
            gateway: Some(IpAddr::V4(GATEWAY)),
            ..Route::direct(IpNet::V4(Ipv4Net::default()), pod.index)
        };
        socket.exec(
            RouteNetlinkMessage::NewRoute(default.message()),
            RequestMode::Replace,
            || "default route".to_owned(),
        )?;
        let neighbour = message::neighbour(pod.index, IpAddr::V4(GATEWAY), HOST_MAC);
        socket.exec(
            RouteNetlinkMessage::NewNeighbour(neighbour),
            RequestMode::Replace,
            || format!("neighbour {GATEWAY}"),
        )?;
    }
    if has(true) {
        let default = Route {
            gateway: Some(IpAddr::V6(GATEWAY_V6)),
            ..Route::direct(IpNet::V6(Ipv6Net::default()), pod.index)
        };
        socket.exec(
            RouteNetlinkMessage::NewRoute(default.message()),
            RequestMode::Replace,
            || "default route of IPv6".to_owned(),
        )?;
    }
    pod.mac.ok_or_else(|| missing_error(name, "MAC address of"))
}

/// Deletes a link by its host side; a missing link is a success.
pub fn remove_link(socket: &mut RouteSocket, host: &str) -> Result<(), NetlinkError> {
    remove_link_ref(socket, &LinkRef::Name(host.to_owned()))
}

fn remove_link_ref(socket: &mut RouteSocket, link: &LinkRef) -> Result<(), NetlinkError> {
    exec_deletion(socket, message::delete(link), || format!("delete {link}"))
}

fn exec_deletion(
    socket: &mut RouteSocket,
    request: RouteNetlinkMessage,
    what: impl FnOnce() -> String,
) -> Result<(), NetlinkError> {
    match socket.exec(request, RequestMode::Change, what) {
        Err(error) if error.is_missing() => Ok(()),
        result => result,
    }
}

/// Deletes links by their host sides and returns the results in the same order. Several are deleted
/// as one group, because the kernel waits for an RCU grace period once per request and not once per
/// link.
pub fn remove_links(socket: &mut RouteSocket, hosts: &[LinkRef]) -> Vec<Result<(), NetlinkError>> {
    if hosts.len() > 1 && remove_group(socket, hosts).is_ok() {
        return hosts.iter().map(|_| Ok(())).collect();
    }
    hosts
        .iter()
        .map(|host| remove_link_ref(socket, host))
        .collect()
}

/// Deletes links as a group. After an error the caller deletes them one by one.
fn remove_group(socket: &mut RouteSocket, hosts: &[LinkRef]) -> Result<(), NetlinkError> {
    let requests = hosts
        .iter()
        .map(|host| (message::set_group(host, DELETE_GROUP), RequestMode::Change))
        .collect();
    let refused = socket.exec_all(requests)?;
    if let Some((position, errno)) = refused.iter().find(|(_, errno)| *errno != Errno::ENODEV) {
        return Err(NetlinkError::Refused {
            what: format!("group of {}", hosts[*position]),
            errno: *errno,
        });
    }
    exec_deletion(socket, message::delete_group(DELETE_GROUP), || {
        format!("delete links of group {DELETE_GROUP}")
    })
}

/// Checks a link; the error names the first difference. Returns its MTU, which may differ from that
/// of new links.
pub fn check_link(
    socket: &mut RouteSocket,
    link: &PodLink<'_>,
    addresses: &[IpNet],
) -> Result<u32, PodError> {
    let links = present::list_links(socket)?;
    let host = links.get(link.host).filter(|found| found.up);
    let mtu = host
        .ok_or_else(|| missing_error(link.host, "host side link that is up:"))?
        .mtu;
    let routes = present::read_plan(socket, &links)?.routes;
    for address in addresses {
        let wanted = Target::Pod {
            interface: link.host.to_owned(),
        };
        if routes.get(&IpNet::from(address.addr())) != Some(&wanted) {
            return Err(PodError::Missing(format!(
                "route {} dev {} is missing on the node",
                address.addr(),
                link.host
            )));
        }
    }
    namespace::within(link.namespace, || check_inside(link.pod, addresses))??;
    Ok(mtu)
}

fn check_inside(name: &str, addresses: &[IpNet]) -> Result<(), PodError> {
    let mut socket = RouteSocket::open()?;
    let links: LinksByName = present::list_links(&mut socket)?;
    let pod = links
        .get(name)
        .filter(|found| found.up)
        .ok_or_else(|| missing_error(name, "link in the pod that is up:"))?;
    let present = present::list_addresses(&mut socket)?;
    for address in addresses {
        if !present
            .iter()
            .any(|(index, net)| *index == pod.index && net.addr() == address.addr())
        {
            return Err(PodError::Missing(format!(
                "address {} is missing on {name} in the pod",
                address.addr()
            )));
        }
        let gateway = pod_gateway(address.addr());
        if present::find_default_gateway(&mut socket, IpVersion::of(gateway), pod.index)?
            != Some(gateway)
        {
            return Err(PodError::Missing(format!(
                "default route via {gateway} dev {name} is missing in the pod"
            )));
        }
    }
    Ok(())
}

fn missing_error(name: &str, what: &str) -> PodError {
    PodError::Missing(format!("{what} {name} is missing"))
}
