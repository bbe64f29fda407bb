//! The network between nodes: one subnet, or two with a router between them, in a namespace of its
//! own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use ipnet::IpNet;
use margay_api::rule::IpVersion;

use super::node::Node;
use crate::namespace::{Namespace, connect};

/// Topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// All in one subnet.
    Flat,
    /// Every third node is in the second subnet, behind a router.
    Routed,
}

/// Bridges of the subnets, and the router between them, which is every node's default route.
pub struct Fabric {
    namespace: Namespace,
    topology: Topology,
    version: IpVersion,
}

/// Subnets are 172.30.0.0/24 and 172.30.1.0/24, or fd30:0:0:0::/64 and fd30:0:0:1::/64.
const SUBNETS: u8 = 2;
/// Last byte of the router's addresses.
const ROUTER: u8 = 254;

impl Fabric {
    /// Bridges without nodes; addresses are of this IP version alone.
    pub fn new(topology: Topology, version: IpVersion) -> Result<Self> {
        let namespace = Namespace::new()?;
        namespace.command(
            "sysctl",
            &["-qw", &format!("{}=1", forwarding(version))],
            "",
        )?;
        for subnet in 0..SUBNETS {
            namespace.ip(&format!("link add br{subnet} type bridge"))?;
            namespace.ip(&format!(
                "addr add {} dev br{subnet}",
                assigned(address(version, subnet, ROUTER))
            ))?;
            namespace.ip(&format!("link set br{subnet} up"))?;
        }
        Ok(Self {
            namespace,
            topology,
            version,
        })
    }

    /// A node whose interface is plugged in; its agent does not run yet.
    pub fn join(&self, number: u8) -> Result<Node> {
        let subnet = u8::from(self.topology == Topology::Routed && number.is_multiple_of(3));
        let (host, own) = (Namespace::new()?, address(self.version, subnet, number));
        // Nothing is prepared for the agent.
        host.command(
            "sysctl",
            &["-qw", &format!("{}=0", forwarding(self.version))],
            "",
        )?;
        let port = format!("n{number}");
        connect(
            (&host, "eth0", &assigned(own)),
            (&self.namespace, &port, ""),
        )?;
        self.namespace
            .ip(&format!("link set {port} master br{subnet}"))?;
        host.ip(&format!(
            "route add default via {}",
            address(self.version, subnet, ROUTER).addr()
        ))?;
        Node::new(format!("n{number}"), host, own)
    }

    /// The network beyond the nodes, where the router's addresses are.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The router's address in the first subnet: something outside the cluster that every node can
    /// reach.
    pub fn router(&self) -> IpAddr {
        address(self.version, 0, ROUTER).addr()
    }
}

fn address(version: IpVersion, subnet: u8, number: u8) -> IpNet {
    match version {
        IpVersion::V4 => IpNet::new_assert(Ipv4Addr::new(172, 30, subnet, number).into(), 24),
        IpVersion::V6 => IpNet::new_assert(
            Ipv6Addr::new(0xfd30, 0, 0, subnet.into(), 0, 0, 0, number.into()).into(),
            64,
        ),
    }
}

/// The address as `ip address add` takes it: in use at once, as nobody else can have it.
fn assigned(address: IpNet) -> String {
    if address.addr().is_ipv6() {
        format!("{address} nodad")
    } else {
        address.to_string()
    }
}

fn forwarding(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "net.ipv4.ip_forward",
        IpVersion::V6 => "net.ipv6.conf.all.forwarding",
    }
}
