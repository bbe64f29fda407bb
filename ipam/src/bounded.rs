//! Storage whose every request ends: one that is not answered counts as one that may or may not have been done.

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::ipam::block::Block;

use super::store::{AffinityState, Namespace, Store, StoreError, Stored};

/// The longest that one request may take: a connection that dies silently must not stop what is queued behind it.
const PATIENCE: Duration = Duration::from_secs(15);

/// See the module.
pub(super) struct Bounded<S>(pub(super) Arc<S>);

async fn bounded<T>(request: impl Future<Output = Result<T, StoreError>> + Send) -> Result<T, StoreError> {
    let silence = |_| Err(StoreError::Failed(format!("no answer from the API server within {PATIENCE:?}")));
    tokio::time::timeout(PATIENCE, request).await.unwrap_or_else(silence)
}

impl<S: Store> Store for Bounded<S> {
    async fn block(&self, cidr: IpNet) -> Result<Option<Stored<Block>>, StoreError> {
        bounded(self.0.block(cidr)).await
    }

    async fn create_block(&self, block: Block) -> Result<Stored<Block>, StoreError> {
        bounded(self.0.create_block(block)).await
    }

    async fn update_block(&self, block: Stored<Block>) -> Result<Stored<Block>, StoreError> {
        bounded(self.0.update_block(block)).await
    }

    async fn delete_block(&self, block: Stored<Block>) -> Result<(), StoreError> {
        bounded(self.0.delete_block(block)).await
    }

    async fn put_affinity(&self, cidr: IpNet, state: AffinityState) -> Result<(), StoreError> {
        bounded(self.0.put_affinity(cidr, state)).await
    }

    async fn delete_affinity(&self, cidr: IpNet) -> Result<(), StoreError> {
        bounded(self.0.delete_affinity(cidr)).await
    }

    async fn put_handle(&self, handle: String, blocks: Vec<IpNet>) -> Result<(), StoreError> {
        bounded(self.0.put_handle(handle, blocks)).await
    }

    async fn handle_blocks(&self, handle: String) -> Result<Vec<IpNet>, StoreError> {
        bounded(self.0.handle_blocks(handle)).await
    }

    async fn delete_handle(&self, handle: String) -> Result<(), StoreError> {
        bounded(self.0.delete_handle(handle)).await
    }

    async fn namespace(&self, name: String) -> Result<Namespace, StoreError> {
        bounded(self.0.namespace(name)).await
    }
}
