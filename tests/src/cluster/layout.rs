//! Names and addresses of a cluster: which machine is where. Pure; nothing here exists until the
//! fabric makes it.
//!
//! ```text
//!      subnet A 172.30.0.0/24                    subnet B 172.30.1.0/24
//!   cp .2   n1 .11   n2 .12                         n3 .13
//!     └───────┴────────┴── br-a ─ .1 router .1 ─ br-b ─┘
//! ```
//!
//! A dual-stack cluster has `fd30:0:0:N::/64` beside `172.30.N.0/24`, with the same numbers of
//! machines. Bridges and router are one network namespace, the fabric; it touches nothing of the
//! machine, so clusters side by side use the same addresses and differ in name only.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Addresses of Services.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// Addresses of Services of a dual-stack cluster, beside [`SERVICE_CIDR`].
pub const SERVICE_CIDR_V6: &str = "fd96::/112";
/// The Service address of the API server: the first of [`SERVICE_CIDR`].
pub const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// Port of the API server.
pub const API_PORT: u16 = 6443;
/// An address behind the router that is in no subnet and has no route to pods: the outside world.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// [`OUTSIDE`] of a dual-stack cluster, by IPv6.
pub const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 1);

/// Topology of the nodes.
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

    /// The IPv6 address `host` of the subnet, which is a /64.
    pub fn address_v6(self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd30, 0, 0, self as u16, 0, 0, 0, u16::from(host))
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
    /// Its subnet.
    pub subnet: Subnet,
    /// Its address on eth0.
    pub address: Ipv4Addr,
    /// Its IPv6 address on eth0, in a dual-stack cluster.
    #[serde(default)]
    pub address_v6: Option<Ipv6Addr>,
}

impl Host {
    /// Its addresses with commas between them, IPv4 first, as kubelet takes them.
    pub fn addresses(&self) -> String {
        match self.address_v6 {
            Some(second) => format!("{},{second}", self.address),
            None => self.address.to_string(),
        }
    }
}

/// All machines of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The cluster's name, the prefix of its namespaces and control groups.
    pub name: String,
    /// Its nodes, `n1` first.
    pub nodes: Vec<Host>,
    /// True if machines, Services and pods have IPv6 addresses too.
    #[serde(default)]
    pub dual_stack: bool,
}

impl Layout {
    /// Places `nodes` nodes.
    pub fn new(name: &str, nodes: u8, topology: Topology) -> Result<Self> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let good = !name.is_empty()
            && name.len() <= 20
            && name.bytes().all(plain)
            && !name.starts_with('-');
        ensure!(
            good,
            "cluster name `{name}`: 1 to 20 lower-case letters, digits and dashes, not a dash first"
        );
        ensure!(
            (1..=200).contains(&nodes),
            "{nodes} nodes: between 1 and 200 can be addressed"
        );
        let place = |index: u8| match topology {
            Topology::Routed if index > 2 => Subnet::B,
            Topology::Routed | Topology::Flat => Subnet::A,
        };
        let host = |index: u8| Host {
            name: format!("n{index}"),
            subnet: place(index),
            address: place(index).address(10 + index),
            address_v6: None,
        };
        Ok(Self {
            name: name.to_owned(),
            nodes: (1..=nodes).map(host).collect(),
            dual_stack: false,
        })
    }

    /// The same with IPv6 beside IPv4.
    pub fn with_ipv6(mut self) -> Self {
        self.dual_stack = true;
        for (host, number) in self.nodes.iter_mut().zip(11..) {
            host.address_v6 = Some(host.subnet.address_v6(number));
        }
        self
    }

    /// The addresses of Services, as Kubernetes takes them.
    pub fn service_cidrs(&self) -> String {
        if self.dual_stack {
            format!("{SERVICE_CIDR},{SERVICE_CIDR_V6}")
        } else {
            SERVICE_CIDR.to_owned()
        }
    }

    /// The machine of the API server.
    pub fn control_plane(&self) -> Host {
        let address_v6 = self.dual_stack.then(|| Subnet::A.address_v6(2));
        Host {
            name: "cp".into(),
            subnet: Subnet::A,
            address: Subnet::A.address(2),
            address_v6,
        }
    }

    /// Control plane and nodes.
    pub fn hosts(&self) -> Vec<Host> {
        std::iter::once(self.control_plane())
            .chain(self.nodes.iter().cloned())
            .collect()
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
        layout
            .hosts()
            .iter()
            .map(|host| format!("{} {}", host.name, host.address))
            .collect()
    }

    #[test]
    fn the_third_node_is_across_the_router() {
        assert_eq!(
            addresses(3, Topology::Routed),
            [
                "cp 172.30.0.2",
                "n1 172.30.0.11",
                "n2 172.30.0.12",
                "n3 172.30.1.13"
            ]
        );
        assert_eq!(addresses(3, Topology::Flat)[3], "n3 172.30.0.13");
    }

    #[test]
    fn dual_stack_gives_every_machine_a_second_address() {
        let layout = Layout::new("demo", 3, Topology::Routed)
            .unwrap()
            .with_ipv6();
        let shown: Vec<String> = layout.hosts().iter().map(Host::addresses).collect();
        assert_eq!(
            shown,
            [
                "172.30.0.2,fd30::2",
                "172.30.0.11,fd30::b",
                "172.30.0.12,fd30::c",
                "172.30.1.13,fd30:0:0:1::d"
            ]
        );
    }

    #[test]
    fn names_that_cannot_name_a_namespace_are_refused() {
        for name in ["", "Upper", "a/b", "-first", "far-too-long-for-a-name"] {
            assert!(Layout::new(name, 3, Topology::Flat).is_err(), "{name}");
        }
        assert!(Layout::new("demo", 0, Topology::Flat).is_err());
    }
}
