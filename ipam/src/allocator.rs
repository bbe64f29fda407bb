//! The allocator of a node: a handle to the one task that owns the node's blocks.

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot, watch};

use super::inputs::Inputs;
use super::node_objects::NodeObjects;
use super::owner::{Event, Owner};
use super::pools::{NodePool, Pools};
use super::request::{AddressRequest, NoAddress};
use super::store::Store;

/// Requests that may wait for the owner task; more wait in the callers, whose number the CNI socket
/// limits.
const QUEUE: usize = 256;

/// How long a request waits until the inputs are known. The runtime retries; meanwhile others have
/// its place at the socket.
const UNKNOWN: Duration = Duration::from_secs(10);

/// Handle to the allocator of a node; cheap to clone.
#[derive(Clone)]
pub struct Allocator {
    events: mpsc::Sender<Event>,
    inputs: Inputs,
}

impl Allocator {
    /// Starts the owner task. Blocks that the map lists for this node are read at once, and later
    /// ones as they appear.
    pub fn spawn<S: Store>(
        node: String,
        store: Arc<S>,
        inputs: Inputs,
        clock: fn() -> String,
    ) -> Self {
        let (events, received) = mpsc::channel(QUEUE);
        let owner = Owner::new(
            node.clone(),
            Arc::new(NodeObjects::new(node, store)),
            inputs.clone(),
            clock,
            events.downgrade(),
        );
        tokio::spawn(owner.run(received));
        Self { events, inputs }
    }

    /// Assigns an address of each IP version that is needed, or none. A second request with the
    /// same handle gets the same addresses.
    pub async fn assign(&self, wanted: AddressRequest) -> Result<Vec<IpNet>, NoAddress> {
        tokio::time::timeout(UNKNOWN, self.inputs.clone().known())
            .await
            .map_err(|_| self.inputs.unknown())??;
        let (reply, answer) = oneshot::channel();
        self.ask(Event::Assign(wanted, reply), answer).await
    }

    /// The pools as this node sees them, as they change.
    pub(super) fn watch_pools(&self) -> watch::Receiver<Pools> {
        self.inputs.pools.clone()
    }

    /// Returns true when no Namespace names pools for its pods.
    pub(super) fn no_namespace_names_pools(&self) -> bool {
        *self.inputs.no_namespace_names_pools.borrow()
    }

    /// The pools as this node sees them, once they are known.
    pub(super) async fn pools(&self) -> Result<Arc<Vec<NodePool>>, NoAddress> {
        let mut pools = self.inputs.pools.clone();
        let known = tokio::time::timeout(UNKNOWN, pools.wait_for(Option::is_some)).await;
        let known = known
            .map_err(|_| self.inputs.unknown())?
            .map_err(|_| NoAddress::stopping())?;
        Ok(known.clone().unwrap_or_default())
    }

    /// Releases all addresses of a handle. An unknown handle is a success.
    pub async fn release(&self, handle: String) -> Result<(), NoAddress> {
        let (reply, answer) = oneshot::channel();
        let mut asked = std::pin::pin!(self.ask(Event::Release(handle, reply), answer));
        match tokio::time::timeout(UNKNOWN, &mut asked).await {
            Ok(released) => released,
            Err(_) if self.inputs.is_known() => asked.await,
            Err(_) => Err(self.inputs.unknown()),
        }
    }

    async fn ask<T>(
        &self,
        event: Event,
        answer: oneshot::Receiver<Result<T, NoAddress>>,
    ) -> Result<T, NoAddress> {
        self.events
            .send(event)
            .await
            .map_err(|_| NoAddress::stopping())?;
        answer.await.map_err(|_| NoAddress::stopping())?
    }
}
