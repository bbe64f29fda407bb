//! Addresses of this node's pods and tunnels, with the attributes that Calico keeps with an
//! address.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::TunnelKind;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;
use tokio::sync::watch;

use super::allocator::Allocator;
use super::namespaces::{self, NamespacesWithPools, ReadNamespace, Relevance};
use super::pools::{PoolChoice, Pools, Use};
use super::request::{AddressRequest, Addresses, Demand, NoAddress};
use super::store::Namespace;

/// Handle and type of a node's tunnel address, as Calico names them.
fn tunnel_names(node: &str, kind: TunnelKind) -> (String, &'static str) {
    let (prefix, name) = match kind {
        TunnelKind::Vxlan(IpVersion::V4) => ("vxlan", "vxlanTunnelAddress"),
        TunnelKind::Vxlan(IpVersion::V6) => ("vxlan-v6", "vxlanV6TunnelAddress"),
        TunnelKind::Ipip => ("ipip", "ipipTunnelAddress"),
    };
    (format!("{prefix}-tunnel-addr-{node}"), name)
}

/// Addresses of a node: assigned to its pods and its tunnels, and released.
#[derive(Clone)]
pub struct NodeAddresses {
    node: String,
    allocator: Allocator,
    namespaces: ReadNamespace,
    known: NamespacesWithPools,
    clock: fn() -> String,
}

impl NodeAddresses {
    /// Creates the service of a node. `clock` returns the time in RFC 3339, which is kept with each
    /// address.
    pub fn new(
        node: String,
        allocator: Allocator,
        namespaces: ReadNamespace,
        clock: fn() -> String,
    ) -> Self {
        Self {
            node,
            allocator,
            namespaces,
            known: NamespacesWithPools::default(),
            clock,
        }
    }

    /// Assigns the address of a tunnel device of this node. It is the same one after a restart,
    /// until its pool goes.
    pub async fn tunnel(&self, kind: TunnelKind) -> Result<Vec<IpNet>, NoAddress> {
        let present = self.assign_tunnel(kind).await?;
        if !self.has_to_move(&present) {
            return Ok(present);
        }
        // Nobody else gets it meanwhile, because nothing is assigned from such a pool any more.
        self.allocator
            .release(tunnel_names(&self.node, kind).0)
            .await?;
        self.assign_tunnel(kind).await
    }

    /// Returns true when a tunnel's address has no pool, or one that is being deleted, and another
    /// pool can serve the tunnel: the block around the old address would never be released.
    pub fn has_to_move(&self, present: &[IpNet]) -> bool {
        let Some(pools) = self.pools().borrow().clone() else {
            return false;
        };
        let choice = PoolChoice {
            usage: Use::Tunnel,
            ..PoolChoice::default()
        };
        let stays = |address: IpAddr| {
            pools
                .iter()
                .any(|pool| pool.cidr.contains(&address) && !pool.is_terminating)
        };
        let may_go = |address: IpAddr| {
            pools
                .iter()
                .any(|pool| pool.cidr.addr().is_ipv4() == address.is_ipv4() && pool.serves(&choice))
        };
        present
            .iter()
            .map(IpNet::addr)
            .any(|address| !stays(address) && may_go(address))
    }

    /// The pools as this node sees them.
    pub fn pools(&self) -> watch::Receiver<Pools> {
        self.allocator.watch_pools()
    }

    async fn assign_tunnel(&self, kind: TunnelKind) -> Result<Vec<IpNet>, NoAddress> {
        let (handle, name) = tunnel_names(&self.node, kind);
        let secondary = BTreeMap::from([
            ("node".to_owned(), self.node.clone()),
            ("type".to_owned(), name.to_owned()),
        ]);
        let attribute = AllocationAttribute {
            handle_id: Some(handle),
            secondary: Some(secondary),
            ..AllocationAttribute::default()
        };
        let any = Demand::Always(Vec::new());
        let (ipv4, ipv6) = match kind.version() {
            IpVersion::V4 => (any, Demand::Never),
            IpVersion::V6 => (Demand::Never, any),
        };
        let request = AddressRequest {
            attribute,
            ipv4,
            ipv6,
            usage: Use::Tunnel,
            ..AddressRequest::default()
        };
        self.allocator.assign(request).await
    }
}

impl Addresses for NodeAddresses {
    async fn assign(&self, mut request: AddressRequest) -> Result<Vec<IpNet>, NoAddress> {
        let secondary = request.attribute.secondary.get_or_insert_default();
        secondary.insert("node".to_owned(), self.node.clone());
        secondary.insert("timestamp".to_owned(), (self.clock)());
        let none_names_pools = self.allocator.no_namespace_names_pools();
        let pools = self.allocator.pools().await?;
        match self.known.relevance(&request, &pools, none_names_pools) {
            Relevance::None => self.assign_in(request, &Namespace::default()).await,
            Relevance::Likely => {
                let namespace = self.namespace(request.namespace()).await?;
                self.assign_in(request, &namespace).await
            }
            Relevance::Unlikely => self.assign_meanwhile(request).await,
        }
    }

    async fn release(&self, handle: String) -> Result<(), NoAddress> {
        self.allocator.release(handle).await
    }
}

impl NodeAddresses {
    async fn namespace(&self, name: &str) -> Result<Namespace, NoAddress> {
        let failed = |error| NoAddress::Unavailable(format!("{error}; the runtime will try again"));
        let namespace = (self.namespaces)(name.to_owned()).await.map_err(failed)?;
        self.known.learn(name, &namespace);
        Ok(namespace)
    }

    async fn assign_in(
        &self,
        mut request: AddressRequest,
        namespace: &Namespace,
    ) -> Result<Vec<IpNet>, NoAddress> {
        [request.ipv4, request.ipv6] = namespaces::demands(&request, namespace)?;
        request.admitted = namespaces::admitted(&self.allocator.pools().await?, namespace);
        self.allocator.assign(request).await
    }

    /// Assigns while the namespace is read, as if the namespace named no pools.
    async fn assign_meanwhile(&self, request: AddressRequest) -> Result<Vec<IpNet>, NoAddress> {
        let nothing = Namespace::default();
        let (namespace, given) = tokio::join!(
            self.namespace(request.namespace()),
            self.assign_in(request.clone(), &nothing)
        );
        // Whatever fails from here on, the caller releases the handle.
        let namespace = namespace?;
        if namespaces::demands(&request, &namespace)?
            == [request.ipv4.clone(), request.ipv6.clone()]
        {
            return given;
        }
        self.allocator.release(request.handle().to_owned()).await?;
        self.assign_in(request, &namespace).await
    }
}
