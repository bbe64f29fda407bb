//! The CNI service's view of IPAM: which attributes Calico keeps with an address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;
use tokio::sync::watch;

use super::allocator::{Allocator, Pools, Wanted};
use super::pools::{Choice, Use};
use super::spaces::{self, Asked, Known, Look, Relevance};
use super::store::Namespace;
use crate::request::{AddressRequest, Addresses, Demand, NoAddress};

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
    namespaces: Look,
    known: Known,
    clock: fn() -> String,
}

impl NodeAddresses {
    /// The addresses of a node. `clock` gives the time in RFC 3339, which is kept with each address.
    pub fn new(node: String, allocator: Allocator, namespaces: Look, clock: fn() -> String) -> Self {
        Self { node, allocator, namespaces, known: Known::default(), clock }
    }

    /// The address of this node's VXLAN device for an IP version; the same one again after a restart, until its pool goes.
    pub async fn tunnel(&self, version: IpVersion) -> Result<Vec<IpNet>, NoAddress> {
        let present = self.assign_tunnel(version).await?;
        if !self.has_to_move(&present) {
            return Ok(present);
        }
        // Nobody else is given it meanwhile: nothing new is taken from such a pool.
        self.allocator.release(tunnel_names(&self.node, version).0).await?;
        self.assign_tunnel(version).await
    }

    /// Whether a tunnel's address is of no pool, or of one that is being deleted, while there is another one that it may come from: the block around it
    /// would never be given back.
    pub fn has_to_move(&self, present: &[IpNet]) -> bool {
        let Some(pools) = self.pools().borrow().clone() else { return false };
        let choice = Choice { usage: Use::Tunnel, ..Choice::default() };
        let stays = |address: IpAddr| pools.iter().any(|pool| pool.cidr.contains(&address) && !pool.is_leaving);
        let may_go = |address: IpAddr| {
            pools.iter().any(|pool| pool.cidr.addr().is_ipv4() == address.is_ipv4() && pool.serves(&choice))
        };
        present.iter().map(IpNet::addr).any(|address| !stays(address) && may_go(address))
    }

    /// The pools as this node sees them.
    pub fn pools(&self) -> watch::Receiver<Pools> {
        self.allocator.watch_pools()
    }

    async fn assign_tunnel(&self, version: IpVersion) -> Result<Vec<IpNet>, NoAddress> {
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
        let (exact, admitted) = (Vec::new(), BTreeSet::new());
        self.allocator.assign(Wanted { attribute, ipv4, ipv6, exact, usage: Use::Tunnel, admitted }).await
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
        let AddressRequest { ipv4, ipv6, named_by_pod, exact, .. } = request;
        let asked = Asked { demands: [ipv4, ipv6], named_by_pod, exact };
        let name = request.endpoint.namespace;
        match self.known.relevance(&name, &asked, &self.allocator.pools().await?) {
            Relevance::None => self.assign_in(attribute, asked, &name, &Namespace::default()).await,
            Relevance::Likely => self.assign_in(attribute, asked, &name, &self.namespace(&name).await?).await,
            Relevance::Unlikely => self.assign_meanwhile(attribute, asked, &name).await,
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
        attribute: AllocationAttribute,
        asked: Asked,
        name: &str,
        namespace: &Namespace,
    ) -> Result<Vec<IpNet>, NoAddress> {
        let [ipv4, ipv6] = spaces::demands(&asked, name, namespace)?;
        let admitted = spaces::admitted(&self.allocator.pools().await?, namespace);
        self.allocator
            .assign(Wanted { attribute, ipv4, ipv6, exact: asked.exact, usage: Use::Workload, admitted })
            .await
    }

    /// Claims while the namespace is read, as if it said nothing.
    async fn assign_meanwhile(
        &self,
        attribute: AllocationAttribute,
        asked: Asked,
        name: &str,
    ) -> Result<Vec<IpNet>, NoAddress> {
        let nothing = Namespace::default();
        let (namespace, given) =
            tokio::join!(self.namespace(name), self.assign_in(attribute.clone(), asked.clone(), name, &nothing));
        // Whatever fails here, the caller takes back what is under the handle.
        let namespace = namespace?;
        if spaces::demands(&asked, name, &namespace)? == asked.demands {
            return given;
        }
        self.allocator.release(attribute.handle_id.clone().unwrap_or_default()).await?;
        self.assign_in(attribute, asked, name, &namespace).await
    }
}
