//! The CNI service's view of IPAM: which attributes Calico keeps with an address.

use std::collections::BTreeMap;

use ipnet::IpNet;
use margay_api::v3::ipam::AllocationAttribute;

use super::allocator::{Allocator, Wanted};
use crate::cni::ports::{AddressRequest, Addresses, NoAddress};

/// Handle of a node's VXLAN tunnel address, as Calico names it.
pub fn tunnel_handle(node: &str) -> String {
    format!("vxlan-tunnel-addr-{node}")
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

    /// The address of this node's VXLAN device; the same one again after a restart.
    pub async fn tunnel(&self) -> Result<Vec<IpNet>, NoAddress> {
        let secondary = BTreeMap::from([
            ("node".to_owned(), self.node.clone()),
            ("type".to_owned(), "vxlanTunnelAddress".to_owned()),
        ]);
        let attribute = AllocationAttribute {
            handle_id: Some(tunnel_handle(&self.node)),
            secondary: Some(secondary),
            released_at: None,
        };
        self.allocator.assign(Wanted { attribute, pools: Vec::new() }).await
    }
}

impl Addresses for NodeAddresses {
    async fn assign(&self, request: AddressRequest) -> Result<Vec<IpNet>, NoAddress> {
        let secondary = BTreeMap::from(
            [
                ("namespace", request.endpoint.namespace),
                ("node", self.node.clone()),
                ("pod", request.endpoint.name),
                ("timestamp", (self.clock)()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        let attribute =
            AllocationAttribute { handle_id: Some(request.handle), secondary: Some(secondary), released_at: None };
        self.allocator.assign(Wanted { attribute, pools: request.ipv4_pools }).await
    }

    async fn release(&self, handle: String) -> Result<(), NoAddress> {
        self.allocator.release(handle).await
    }
}
