//! The owner of routes, tunnel devices, neighbours and forwarding entries: caches what the kernel
//! holds, and moves it to the wanted plan.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv6Net};
use margay_api::network::TunnelKind;
use margay_api::rule::IpVersion;
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use super::diff::{RouteOp, diff};
use super::message::{self, Route};
use super::parameters;
use super::plan::{Peer, Plan, Target};
use super::pod;
use super::present::{self, Link, LinksByName};
use super::sysctl::ChangedParameter;
use margay_netlink::route::{NetlinkError, RequestMode, RouteSocket};

/// MTU if no link has the node's address.
const ETHERNET_MTU: u32 = 1500;

/// Part of a plan that can fail alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RoutingPart {
    /// Netlink itself.
    Netlink,
    /// Forwarding of an IP version.
    Forwarding(IpVersion),
    /// A tunnel device.
    Tunnel(TunnelKind),
    /// One of our links: its state or its kernel parameters.
    Link(String),
    /// Another node behind a tunnel, by its tunnel address.
    Peer(IpAddr),
    /// A route.
    Route(IpNet),
}

impl fmt::Display for RoutingPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Netlink => f.write_str("netlink"),
            Self::Forwarding(version) => write!(f, "forwarding of {version:?}"),
            Self::Tunnel(kind) => f.write_str(kind.device_name()),
            Self::Link(name) => write!(f, "link {name}"),
            Self::Peer(address) => write!(f, "peer {address}"),
            Self::Route(destination) => write!(f, "route {destination}"),
        }
    }
}

/// Result of applying a plan.
#[derive(Debug, Default)]
pub struct ApplyOutcome {
    /// Number of operations and kernel parameters that were changed.
    pub done: usize,
    /// Failed parts with the reason; the next apply retries them.
    pub failed: BTreeMap<RoutingPart, String>,
    /// Parameters of the host itself that were changed.
    pub changed: Vec<ChangedParameter>,
}

/// Driver of the node's routing. It blocks, and lives on a thread of its own in the node's network
/// namespace.
pub struct Driver {
    pub(super) socket: RouteSocket,
    pub(super) links: LinksByName,
    /// What the kernel holds, as far as known; `None`: it must be read back.
    present: Option<Plan>,
    /// Links of pods in the last plan that did not exist: their routes wait for them.
    missing: BTreeSet<String>,
}

impl Driver {
    /// Opens a driver in the calling thread's network namespace; it changes nothing yet.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: RouteSocket::open()?,
            links: LinksByName::new(),
            present: None,
            missing: BTreeSet::new(),
        })
    }

    /// Discards the cached kernel state; the next apply reads it back.
    pub fn mark_stale(&mut self) {
        self.present = None;
    }

    /// Links of pods in the last plan that did not exist: their routes wait for them.
    pub const fn missing(&self) -> &BTreeSet<String> {
        &self.missing
    }

    /// Applies a plan of which only these routes to the node's own pods have changed. While the
    /// kernel's state is cached, the cost depends on these pods only.
    pub fn apply_pods(
        &mut self,
        wanted: &Plan,
        changed: &BTreeSet<IpNet>,
    ) -> Result<ApplyOutcome, NetlinkError> {
        let is_forwarding = |known: &Plan| wanted.forwards.is_subset(&known.forwards);
        let Some(mut present) = self.present.take_if(|known| is_forwarding(known)) else {
            return self.apply(wanted);
        };
        self.links = present::list_links(&mut self.socket)?;
        let waiting: BTreeSet<IpNet> = wanted.pods_on_links(&self.missing).collect();
        self.missing = wanted
            .pods
            .iter()
            .filter(|name| !self.links.contains_key(*name))
            .cloned()
            .collect();
        present.pods = wanted.pods.difference(&self.missing).cloned().collect();
        let mut outcome = ApplyOutcome::default();
        for destination in changed.union(&waiting) {
            let target = wanted
                .routes
                .get(destination)
                .filter(|target| self.has_link(target));
            let op = match (present.routes.get(destination), target) {
                (old, Some(target)) if old != Some(target) => {
                    RouteOp::SetRoute(*destination, target.clone())
                }
                (Some(old), None) => RouteOp::RemoveRoute(*destination, old.clone()),
                _ => continue,
            };
            self.exec_into(op, &mut present, &mut outcome);
        }
        self.present = Some(present);
        Ok(outcome)
    }

    /// Whether the link exists that a route needs.
    fn has_link(&self, target: &Target) -> bool {
        match target {
            Target::Pod { interface } => self.links.contains_key(interface),
            _ => true,
        }
    }

    fn exec_into(&mut self, op: RouteOp, present: &mut Plan, outcome: &mut ApplyOutcome) {
        let (part, result) = (part_of(&op), self.exec(&op).map(|()| true));
        if result.is_ok() {
            present.apply_op(op);
        }
        outcome.record(part, result);
    }

    /// Applies a plan. What fails is left to the next call.
    pub fn apply(&mut self, wanted: &Plan) -> Result<ApplyOutcome, NetlinkError> {
        self.links = present::list_links(&mut self.socket)?;
        let wanted = self.resolve(wanted)?;
        let mut outcome = ApplyOutcome::default();
        for version in &wanted.forwards {
            let changed = parameters::set_forwarding(*version).map(|changed| {
                let is_changed = !changed.is_empty();
                outcome.changed.extend(changed);
                is_changed
            });
            outcome.record(RoutingPart::Forwarding(*version), changed);
        }
        let mut present = match self.present.take() {
            // A new link of a pod is as ADD has just set it up.
            Some(known) => Plan {
                pods: wanted.pods.clone(),
                ..known
            },
            None => {
                let (differed, failed) = parameters::set_link_parameters(&wanted);
                outcome.done += differed;
                outcome.failed.extend(
                    failed
                        .into_iter()
                        .map(|(link, error)| (RoutingPart::Link(link), error.to_string())),
                );
                present::read_plan(&mut self.socket, &self.links)?
            }
        };
        present.forwards.clone_from(&wanted.forwards);
        for op in diff(&present, &wanted) {
            self.exec_into(op, &mut present, &mut outcome);
        }
        // After a failure on a link its state is unknown, so the next apply reads back.
        let is_known = outcome.failed.keys().all(|part| {
            matches!(
                part,
                RoutingPart::Peer(_) | RoutingPart::Route(_) | RoutingPart::Forwarding(_)
            )
        });
        self.present = is_known.then_some(present);
        Ok(outcome)
    }

    /// MTU of the link with the node's address, or Ethernet's.
    pub fn underlay_mtu(&mut self, own: IpAddr) -> Result<u32, NetlinkError> {
        Ok(self.find_underlay_mtu(own)?.unwrap_or(ETHERNET_MTU))
    }

    /// MTU of the link with the node's address; `None`: no link has it.
    pub fn find_underlay_mtu(&mut self, own: IpAddr) -> Result<Option<u32>, NetlinkError> {
        self.links = present::list_links(&mut self.socket)?;
        Ok(self.find_underlay(own)?.map(|link| link.mtu))
    }

    /// The node's address with the prefix length of its subnet.
    pub fn find_subnet(&mut self, own: IpAddr) -> Result<Option<IpNet>, NetlinkError> {
        Ok(present::list_addresses(&mut self.socket)?
            .into_iter()
            .map(|(_, net)| net)
            .find(|net| net.addr() == own))
    }

    /// First IPv6 address that others can reach, with its prefix length, on the link with this
    /// address.
    pub fn find_ipv6_beside(&mut self, own: IpAddr) -> Result<Option<Ipv6Net>, NetlinkError> {
        let present = present::list_addresses(&mut self.socket)?;
        let link = present
            .iter()
            .find(|(_, net)| net.addr() == own)
            .map(|(index, _)| *index);
        let beside = present
            .into_iter()
            .filter(|(index, _)| Some(*index) == link);
        Ok(beside
            .filter_map(|(_, net)| {
                if let IpNet::V6(net) = net {
                    Some(net)
                } else {
                    None
                }
            })
            .find(|net| {
                let address = net.addr();
                !address.is_unicast_link_local() && !address.is_loopback()
            }))
    }

    fn find_underlay(&mut self, own: IpAddr) -> Result<Option<&Link>, NetlinkError> {
        let index = present::list_addresses(&mut self.socket)?
            .into_iter()
            .find(|(_, net)| net.addr() == own)
            .map(|(index, _)| index);
        Ok(self.links.values().find(|link| Some(link.index) == index))
    }

    /// Completes a plan with the present links: underlay and MTU of tunnels. Pods without a link
    /// are left out: it is being created, or went with its network namespace.
    fn resolve(&mut self, wanted: &Plan) -> Result<Plan, NetlinkError> {
        let mut wanted = wanted.clone();
        (wanted.unreachable, wanted.base) = Default::default();
        self.missing = wanted
            .pods
            .iter()
            .filter(|name| !self.links.contains_key(*name))
            .cloned()
            .collect();
        if !self.missing.is_empty() {
            wanted.pods.retain(|name| self.links.contains_key(name));
            wanted.routes.retain(|_, target| self.has_link(target));
        }
        for (kind, device) in &mut wanted.tunnels {
            let underlay = match device.local() {
                Some(local) => self.find_underlay(local)?,
                None => None,
            };
            let (index, below) = underlay.map(|link| (link.index, link.mtu)).unzip();
            let present = self.links.get(kind.device_name()).map(|link| link.mtu);
            device.resolve(index, tunnel_mtu(*kind, device.mtu(), below, present));
        }
        Ok(wanted)
    }

    fn exec(&mut self, op: &RouteOp) -> Result<(), NetlinkError> {
        match op {
            RouteOp::RemoveTunnel(TunnelKind::Ipip) => self.release_ipip(),
            RouteOp::RemoveTunnel(kind) => {
                let name = kind.device_name();
                self.exec_removal(message::delete_link(name), || format!("delete {name}"))
            }
            RouteOp::CreateTunnel(kind, device) => self.create_tunnel(*kind, device),
            RouteOp::AdjustTunnel(kind, device) => self.adjust_tunnel(kind.device_name(), device),
            RouteOp::SetPod(name) => {
                let index = self.link_index(name)?;
                pod::restore(&mut self.socket, name, index)
            }
            RouteOp::SetPeer(address, peer) => self.set_peer(*address, peer),
            RouteOp::RemovePeer(address, peer) => self.remove_peer(*address, peer),
            RouteOp::SetRoute(destination, target) => self.set_route(*destination, target),
            RouteOp::RemoveRoute(destination, target) => {
                match self.resolve_route(*destination, target) {
                    Ok(route) => self
                        .exec_removal(RouteNetlinkMessage::DelRoute(route.message()), || {
                            format!("delete route {destination}")
                        }),
                    Err(gone) if gone.is_missing() => Ok(()),
                    Err(error) => Err(error),
                }
            }
        }
    }

    fn set_route(&mut self, destination: IpNet, target: &Target) -> Result<(), NetlinkError> {
        let route = self.resolve_route(destination, target)?;
        let replace = |socket: &mut RouteSocket| {
            socket.exec(
                RouteNetlinkMessage::NewRoute(route.message()),
                RequestMode::Replace,
                || format!("route {destination}"),
            )
        };
        match replace(&mut self.socket) {
            // The kernel validates the gateway by a lookup in the table, where it finds the very
            // route that is to be replaced. Delete that route first.
            Err(NetlinkError::Refused {
                errno: Errno::EINVAL,
                ..
            }) if route.onlink && destination.addr().is_ipv6() => {
                let old = Route {
                    destination,
                    link: None,
                    gateway: None,
                    onlink: false,
                    blackhole: false,
                };
                let request = RouteNetlinkMessage::DelRoute(old.message_of_anybody());
                self.exec_removal(request, || format!("delete route {destination}"))?;
                replace(&mut self.socket)
            }
            result => result,
        }
    }

    pub(super) fn exec_removal(
        &mut self,
        request: RouteNetlinkMessage,
        what: impl FnOnce() -> String,
    ) -> Result<(), NetlinkError> {
        match self.socket.exec(request, RequestMode::Change, what) {
            Err(error) if error.is_missing() => Ok(()),
            result => result,
        }
    }

    fn resolve_route(&self, destination: IpNet, target: &Target) -> Result<Route, NetlinkError> {
        let blank = Route {
            destination,
            link: None,
            gateway: None,
            onlink: false,
            blackhole: false,
        };
        Ok(match target {
            Target::Blackhole => Route {
                blackhole: true,
                ..blank
            },
            Target::Gateway { via } => Route {
                gateway: Some(*via),
                ..blank
            },
            Target::Vxlan { via } | Target::Ipip { via } => {
                let kind = target.tunnel(&destination).map(TunnelKind::device_name);
                Route {
                    link: Some(self.link_index(kind.unwrap_or_default())?),
                    gateway: Some(*via),
                    onlink: true,
                    ..blank
                }
            }
            Target::Pod { interface } => Route::direct(destination, self.link_index(interface)?),
        })
    }

    /// Index of the VXLAN device of a peer.
    fn vxlan_index(&self, peer: IpAddr) -> Result<u32, NetlinkError> {
        self.link_index(TunnelKind::Vxlan(IpVersion::of(peer)).device_name())
    }

    pub(super) fn link_index(&self, name: &str) -> Result<u32, NetlinkError> {
        let missing = || NetlinkError::Refused {
            what: format!("link {name}"),
            errno: Errno::ENODEV,
        };
        self.links
            .get(name)
            .map(|link| link.index)
            .ok_or_else(missing)
    }

    fn set_peer(&mut self, address: IpAddr, peer: &Peer) -> Result<(), NetlinkError> {
        let index = self.vxlan_index(address)?;
        let entry = message::forwarding(index, peer.mac, peer.underlay);
        self.socket.exec(
            RouteNetlinkMessage::NewNeighbour(entry),
            RequestMode::Replace,
            || format!("forwarding entry of {address}"),
        )?;
        let neighbour = message::neighbour(index, address, peer.mac);
        self.socket.exec(
            RouteNetlinkMessage::NewNeighbour(neighbour),
            RequestMode::Replace,
            || format!("neighbour {address}"),
        )
    }

    fn remove_peer(&mut self, address: IpAddr, peer: &Peer) -> Result<(), NetlinkError> {
        let index = self.vxlan_index(address)?;
        let neighbour = message::neighbour(index, address, peer.mac);
        self.exec_removal(RouteNetlinkMessage::DelNeighbour(neighbour), || {
            format!("delete neighbour {address}")
        })?;
        let entry = message::forwarding(index, peer.mac, peer.underlay);
        self.exec_removal(RouteNetlinkMessage::DelNeighbour(entry), || {
            format!("delete forwarding entry of {address}")
        })
    }
}

impl ApplyOutcome {
    fn record(&mut self, part: RoutingPart, result: Result<bool, impl fmt::Display>) {
        match result {
            Ok(changed) => self.done += usize::from(changed),
            Err(error) => drop(self.failed.insert(part, error.to_string())),
        }
    }
}

/// MTU of a tunnel: at most that of its underlay less the overhead, whatever is configured, as the
/// kernel accepts no more. While the underlay is unknown it stays as it is.
pub fn tunnel_mtu(
    kind: TunnelKind,
    configured: u32,
    underlay: Option<u32>,
    present: Option<u32>,
) -> u32 {
    let fits = underlay.map(|mtu| mtu.saturating_sub(kind.overhead()));
    match (configured, fits) {
        (0, Some(fits)) => fits,
        (0, None) => present.unwrap_or(ETHERNET_MTU - kind.overhead()),
        (configured, Some(fits)) => configured.min(fits),
        (configured, None) => present.unwrap_or(configured),
    }
}

fn part_of(op: &RouteOp) -> RoutingPart {
    match op {
        RouteOp::RemoveTunnel(kind)
        | RouteOp::CreateTunnel(kind, _)
        | RouteOp::AdjustTunnel(kind, _) => RoutingPart::Tunnel(*kind),
        RouteOp::SetPod(name) => RoutingPart::Link(name.clone()),
        RouteOp::SetPeer(address, _) | RouteOp::RemovePeer(address, _) => {
            RoutingPart::Peer(*address)
        }
        RouteOp::SetRoute(destination, _) | RouteOp::RemoveRoute(destination, _) => {
            RoutingPart::Route(*destination)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_carries_what_its_underlay_leaves_it() {
        for (configured, underlay, present, mtu) in [
            (0, Some(1500), None, 1450),
            (0, Some(9000), Some(1450), 8950),
            (0, Some(1400), Some(1450), 1350),
            (1300, Some(1500), Some(1450), 1300),
            (8950, Some(1500), None, 1450),
            (0, None, Some(1350), 1350),
            (0, None, None, 1450),
            (1300, None, None, 1300),
        ] {
            assert_eq!(
                tunnel_mtu(
                    TunnelKind::Vxlan(IpVersion::V4),
                    configured,
                    underlay,
                    present
                ),
                mtu,
                "{configured} {underlay:?} {present:?}"
            );
        }
        assert_eq!(
            tunnel_mtu(TunnelKind::Ipip, 0, Some(1500), Some(1400)),
            1480
        );
    }
}
