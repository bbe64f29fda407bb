//! The network between nodes: one subnet, or two with a router between them, in a namespace of its own.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use ipnet::{IpNet, Ipv4Net};

use super::node::Node;
use crate::namespace::{Namespace, connect};

/// How nodes are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// All in one subnet.
    Flat,
    /// Every third node is in a subnet of its own kind, behind a router.
    Routed,
}

/// Bridges of the subnets, and the router between them, which is every node's default route.
pub struct Fabric {
    namespace: Namespace,
    topology: Topology,
}

/// Subnets are 172.30.0.0/24 and 172.30.1.0/24.
const SUBNETS: u8 = 2;
/// Last byte of the router's addresses.
const ROUTER: u8 = 254;

impl Fabric {
    /// Bridges without nodes.
    pub fn new(topology: Topology) -> Result<Self> {
        let namespace = Namespace::new()?;
        namespace.command("sysctl", &["-qw", "net.ipv4.ip_forward=1"], "")?;
        for subnet in 0..SUBNETS {
            namespace.ip(&format!("link add br{subnet} type bridge"))?;
            namespace.ip(&format!("addr add {} dev br{subnet}", address(subnet, ROUTER)))?;
            namespace.ip(&format!("link set br{subnet} up"))?;
        }
        Ok(Self { namespace, topology })
    }

    /// A node whose interface is plugged in; its agent does not run yet.
    pub fn join(&self, number: u8) -> Result<Node> {
        let subnet = u8::from(self.topology == Topology::Routed && number.is_multiple_of(3));
        let (host, own) = (Namespace::new()?, address(subnet, number));
        // Nothing is prepared for the agent.
        host.command("sysctl", &["-qw", "net.ipv4.ip_forward=0"], "")?;
        let port = format!("n{number}");
        connect((&host, "eth0", &own.to_string()), (&self.namespace, &port, ""))?;
        self.namespace.ip(&format!("link set {port} master br{subnet}"))?;
        host.ip(&format!("route add default via {}", address(subnet, ROUTER).addr()))?;
        Node::new(format!("n{number}"), host, own)
    }

    /// The network beyond the nodes, where the router's addresses are.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The router's address in the first subnet: something outside the cluster that every node can reach.
    pub fn router(&self) -> IpAddr {
        IpNet::V4(address(0, ROUTER)).addr()
    }
}

fn address(subnet: u8, number: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(172, 30, subnet, number), 24)
}
