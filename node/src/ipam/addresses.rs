//! The CNI service's view of IPAM: which attributes Calico keeps with an address.

use std::collections::BTreeMap;

use ipnet::IpNet;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;

use super::allocator::{Allocator, Wanted};
use crate::cni::ports::{AddressRequest, Addresses, Demand, NoAddress};

/// Handle and type of a node's VXLAN tunnel address of an IP version, as Calico names them.
fn tunnel_names(node: &str, version: IpVersion) -> (String, &'static str) {
    match version {
        IpVersion::V4 => (format!("vxlan-tunnel-addr-{node}"), "vxlanTunnelAddress"),
        IpVersion::V6 => (format!("vxlan-v6-tunnel-addr-{node}"), "vxlanV6TunnelAddress"),
    }
}

/// Assigns to pods of this node.
#[derive(Clone)]
pub struct NodeAddresses {
    node: String,
    allocator: Allocator,
    clock: fn() -> String,
}

impl NodeAddresses {
    /// The addresses of a node. `clock` gives the time in RFC 3339, which is kept with each address.
    pub fn new(node: String, allocator: Allocator, clock: fn() -> String) -> Self {
        Self { node, allocator, clock }
    }

    /// The address of this node's VXLAN device for an IP version; the same one again after a restart.
    pub async fn tunnel(&self, version: IpVersion) -> Result<Vec<IpNet>, NoAddress> {
        let (handle, kind) = tunnel_names(&self.node, version);
        let secondary = BTreeMap::from([("node".to_owned(), self.node.clone()), ("type".to_owned(), kind.to_owned())]);
        let attribute = AllocationAttribute {
            handle_id: Some(handle),
            secondary: Some(secondary),
            ..AllocationAttribute::default()
        };
        let any = Demand::Always(Vec::new());
        let (ipv4, ipv6) = match version {
            IpVersion::V4 => (any, Demand::Never),
            IpVersion::V6 => (Demand::Never, any),
        };
        self.allocator.assign(Wanted { attribute, ipv4, ipv6, exact: Vec::new() }).await
    }
}

impl Addresses for NodeAddresses {
    async fn assign(&self, request: AddressRequest) -> Result<Vec<IpNet>, NoAddress> {
        let secondary = BTreeMap::from(
            [
                ("namespace", request.endpoint.namespace.clone()),
                ("node", self.node.clone()),
                ("pod", request.endpoint.name.clone()),
                ("timestamp", (self.clock)()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        let attribute = AllocationAttribute {
            handle_id: Some(request.handle.clone()),
            secondary: Some(secondary),
            ..AllocationAttribute::default()
        };
        let AddressRequest { ipv4, ipv6, exact, .. } = request;
        self.allocator.assign(Wanted { attribute, ipv4, ipv6, exact }).await
    }

    async fn release(&self, handle: String) -> Result<(), NoAddress> {
        self.allocator.release(handle).await
    }
}
