//! Names and addresses of a cluster: which machine is where. Pure; nothing here exists until the fabric makes it.
//!
//! ```text
//!      subnet A 172.30.0.0/24                    subnet B 172.30.1.0/24
//!   cp .2   n1 .11   n2 .12                         n3 .13
//!     └───────┴────────┴── br-a ─ .1 router .1 ─ br-b ─┘
//! ```
//!
//! Bridges and router are one network namespace, the fabric; it touches nothing of the machine, so clusters side by
//! side use the same addresses and differ in name only.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Addresses of Services.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// The Service address of the API server: the first of [`SERVICE_CIDR`].
pub const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// Where the API server listens.
pub const API_PORT: u16 = 6443;
/// An address behind the router that belongs to no subnet and knows no way to pods: the world outside.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// How the nodes are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Topology {
    /// The first two nodes in one subnet, all others in a second one behind a router.
    Routed,
    /// All nodes in one subnet.
    Flat,
}

/// One of the two subnets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Subnet {
    /// 172.30.0.0/24: the control plane and the first nodes.
    A,
    /// 172.30.1.0/24: the nodes across the router.
    B,
}

impl Subnet {
    /// Both.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// The address `host` of the subnet, which is a /24.
    pub fn address(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, self as u8, host)
    }

    /// The router's address in the subnet, everybody's default gateway.
    pub fn gateway(self) -> Ipv4Addr {
        self.address(1)
    }

    /// The bridge, in the fabric.
    pub fn bridge(self) -> &'static str {
        match self {
            Self::A => "br-a",
            Self::B => "br-b",
        }
    }
}

/// A machine on the fabric: the control plane or a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `cp`, `n1`, `n2`, ...
    pub name: String,
    /// Where it is attached.
    pub subnet: Subnet,
    /// Its address on eth0.
    pub address: Ipv4Addr,
}

/// All machines of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The cluster's name, the prefix of its namespaces and control groups.
    pub name: String,
    /// Its nodes, `n1` first.
    pub nodes: Vec<Host>,
}

impl Layout {
    /// Places `nodes` nodes.
    pub fn new(name: &str, nodes: u8, topology: Topology) -> Result<Self> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let good = !name.is_empty() && name.len() <= 20 && name.bytes().all(plain) && !name.starts_with('-');
        ensure!(good, "cluster name `{name}`: 1 to 20 lower-case letters, digits and dashes, not a dash first");
        ensure!((1..=200).contains(&nodes), "{nodes} nodes: between 1 and 200 can be addressed");
        let place = |index: u8| match topology {
            Topology::Routed if index > 2 => Subnet::B,
            Topology::Routed | Topology::Flat => Subnet::A,
        };
        let host = |index: u8| Host {
            name: format!("n{index}"),
            subnet: place(index),
            address: place(index).address(10 + index),
        };
        Ok(Self { name: name.to_owned(), nodes: (1..=nodes).map(host).collect() })
    }

    /// The machine of the API server.
    pub fn control_plane(&self) -> Host {
        Host { name: "cp".into(), subnet: Subnet::A, address: Subnet::A.address(2) }
    }

    /// Control plane and nodes.
    pub fn hosts(&self) -> Vec<Host> {
        std::iter::once(self.control_plane()).chain(self.nodes.iter().cloned()).collect()
    }

    /// Name of the network namespace of a machine, or of the `fabric`.
    pub fn netns(&self, host: &str) -> String {
        format!("{}-{host}", self.name)
    }

    /// File that holds that network namespace.
    pub fn netns_path(&self, host: &str) -> PathBuf {
        PathBuf::from("/run/netns").join(self.netns(host))
    }

    /// The API server as machines of the cluster see it.
    pub fn server(&self) -> String {
        format!("https://{}:{API_PORT}", self.control_plane().address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(nodes: u8, topology: Topology) -> Vec<String> {
        let layout = Layout::new("demo", nodes, topology).unwrap();
        layout.hosts().iter().map(|host| format!("{} {}", host.name, host.address)).collect()
    }

    #[test]
    fn the_third_node_is_across_the_router() {
        assert_eq!(
            addresses(3, Topology::Routed),
            ["cp 172.30.0.2", "n1 172.30.0.11", "n2 172.30.0.12", "n3 172.30.1.13"]
        );
        assert_eq!(addresses(3, Topology::Flat)[3], "n3 172.30.0.13");
    }

    #[test]
    fn names_that_cannot_name_a_namespace_are_refused() {
        for name in ["", "Upper", "a/b", "-first", "far-too-long-for-a-name"] {
            assert!(Layout::new(name, 3, Topology::Flat).is_err(), "{name}");
        }
        assert!(Layout::new("demo", 0, Topology::Flat).is_err());
    }
}
