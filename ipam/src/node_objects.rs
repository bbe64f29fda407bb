//! Blocks, affinities and handles as one node reads and writes them: in Calico's order, which
//! leaves nothing behind that another writer would misread. Every operation ends within a time
//! limit.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::v3::ipam::{
    BlockAffinity, BlockAffinitySpec, IPAMBlock, IPAMHandle, IPAMHandleSpec,
};

use super::store::{AffinityState, Objects, Store, StoreError, bounded};

/// A value with the version of its object.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored<T> {
    /// The value.
    pub(super) value: T,
    /// Version; a write with an old one is refused.
    pub(super) revision: String,
}

/// Objects of IPAM, as one node reads and writes them.
pub(super) struct NodeObjects<S> {
    node: String,
    store: Arc<S>,
}

fn parse(object: IPAMBlock) -> Result<Stored<Block>, StoreError> {
    let revision = object.metadata.resource_version.unwrap_or_default();
    match Block::parse(object.spec) {
        Ok(value) => Ok(Stored { value, revision }),
        Err(error) => Err(StoreError::Damaged(format!(
            "IPAMBlock {}: {error}; repair or delete it",
            object.metadata.name.unwrap_or_default()
        ))),
    }
}

fn object(block: &Block, revision: Option<String>) -> IPAMBlock {
    IPAMBlock {
        metadata: ObjectMeta {
            name: Some(names::block(block.cidr())),
            resource_version: revision,
            ..ObjectMeta::default()
        },
        spec: block.spec().clone(),
    }
}

/// Metadata that names an object whatever its version: what is marked as deleted may go.
fn any_version(metadata: ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        resource_version: None,
        ..metadata
    }
}

impl<S: Store> NodeObjects<S> {
    /// Objects in `store`, as the node reads and writes them.
    pub(super) fn new(node: String, store: Arc<S>) -> Self {
        Self { node, store }
    }

    /// Reads a block, if it exists. A block whose deletion has begun is deleted; where this node
    /// may not do that, it exists until its deleter is back.
    pub(super) async fn block(&self, cidr: IpNet) -> Result<Option<Stored<Block>>, StoreError> {
        bounded(async {
            let Some(found) = Objects::<IPAMBlock>::get(&*self.store, names::block(cidr)).await?
            else {
                return Ok(None);
            };
            let metadata = any_version(found.metadata.clone());
            if found.spec.deleted
                && Objects::<IPAMBlock>::delete(&*self.store, metadata)
                    .await
                    .is_ok()
            {
                return Ok(None);
            }
            parse(found).map(Some)
        })
        .await
    }

    /// Creates a block.
    pub(super) async fn create_block(&self, block: Block) -> Result<Stored<Block>, StoreError> {
        bounded(async { parse(self.store.create(object(&block, None)).await?) }).await
    }

    /// Replaces a block, unless it has changed since it was read.
    pub(super) async fn update_block(
        &self,
        block: Stored<Block>,
    ) -> Result<Stored<Block>, StoreError> {
        bounded(async {
            parse(
                self.store
                    .replace(object(&block.value, Some(block.revision)))
                    .await?,
            )
        })
        .await
    }

    /// Deletes a block in two steps: the mark, unless the block has changed since it was read, then
    /// the deletion of what is marked. An address that was assigned in between keeps the block.
    pub(super) async fn delete_block(&self, block: Stored<Block>) -> Result<(), StoreError> {
        bounded(async {
            let mut wanted = object(&block.value, Some(block.revision));
            wanted.spec.deleted = true;
            let marked = self.store.replace(wanted).await?;
            Objects::<IPAMBlock>::delete(&*self.store, any_version(marked.metadata))
                .await
                .map(drop)
        })
        .await
    }

    /// Writes this node's affinity to a block. [`AffinityState::Pending`] creates it; another state
    /// of one that has gone is a conflict: somebody took it for left over, and the claim begins
    /// again.
    pub(super) async fn put_affinity(
        &self,
        cidr: IpNet,
        state: AffinityState,
    ) -> Result<(), StoreError> {
        let name = names::affinity(&self.node, cidr);
        let wanted = BlockAffinity {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(names::affinity_labels(&self.node, cidr)),
                ..ObjectMeta::default()
            },
            spec: BlockAffinitySpec {
                cidr: cidr.to_string(),
                node: self.node.clone(),
                state: state.as_str().to_owned(),
                kind: Some("host".to_owned()),
                deleted: false,
            },
        };
        bounded(async {
            if state == AffinityState::Pending {
                match self.store.create(wanted.clone()).await {
                    Err(StoreError::Conflict) => {}
                    result => return result.map(drop),
                }
            }
            let present = Objects::<BlockAffinity>::get(&*self.store, name).await?;
            let mut present = present.ok_or(StoreError::Conflict)?;
            if present.spec.state == wanted.spec.state && !present.spec.deleted {
                return Ok(());
            }
            present.spec.state = wanted.spec.state;
            present.spec.deleted = false;
            self.store.replace(present).await.map(drop)
        })
        .await
    }

    /// Deletes this node's affinity to a block, if it exists, in two steps: the mark, which only
    /// one of two writers can set, then the deletion of what is marked.
    pub(super) async fn delete_affinity(&self, cidr: IpNet) -> Result<(), StoreError> {
        bounded(async {
            let name = names::affinity(&self.node, cidr);
            let Some(mut present) = Objects::<BlockAffinity>::get(&*self.store, name).await? else {
                return Ok(());
            };
            if !present.spec.deleted {
                present.spec.deleted = true;
                present = self.store.replace(present).await?;
            }
            Objects::<BlockAffinity>::delete(&*self.store, any_version(present.metadata))
                .await
                .map(drop)
        })
        .await
    }

    /// Records that one address of each of these blocks has the handle. Blocks that are recorded
    /// already stay as they are. The annotation keeps other nodes' agents from changing the handle.
    pub(super) async fn put_handle(
        &self,
        handle: String,
        blocks: Vec<IpNet>,
    ) -> Result<(), StoreError> {
        let name = names::handle(&handle);
        let wanted: BTreeMap<String, u32> =
            blocks.iter().map(|block| (block.to_string(), 1)).collect();
        let annotations =
            BTreeMap::from([(names::ANNOTATION_HANDLE_NODE.to_owned(), self.node.clone())]);
        let object = IPAMHandle {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                annotations: Some(annotations),
                ..ObjectMeta::default()
            },
            spec: IPAMHandleSpec {
                handle_id: handle,
                block: wanted.clone(),
                deleted: false,
            },
        };
        bounded(async {
            match self.store.create(object.clone()).await {
                Err(StoreError::Conflict) => {}
                result => return result.map(drop),
            }
            let present = Objects::<IPAMHandle>::get(&*self.store, name).await?;
            let mut present = present.ok_or(StoreError::Conflict)?;
            if present.spec.deleted {
                // An unfinished deletion has left it: it has no addresses any more.
                present.spec = object.spec;
            } else {
                let before = present.spec.block.len();
                for (block, count) in wanted {
                    present.spec.block.entry(block).or_insert(count);
                }
                if present.spec.block.len() == before {
                    return Ok(());
                }
            }
            self.store.replace(present).await.map(drop)
        })
        .await
    }

    /// Reads the blocks that a handle has addresses in; none if there is no such handle.
    pub(super) async fn handle_blocks(&self, handle: String) -> Result<Vec<IpNet>, StoreError> {
        let found = bounded(Objects::<IPAMHandle>::get(
            &*self.store,
            names::handle(&handle),
        ))
        .await?;
        let blocks = found
            .into_iter()
            .flat_map(|object| object.spec.block.into_keys());
        Ok(blocks.filter_map(|cidr| cidr.parse().ok()).collect())
    }

    /// Deletes a handle, if it exists, in one step: only this node writes handles of its pods. A
    /// handle without the annotation of its node, as Calico writes it, may not be deleted here; the
    /// operator collects it once it has no addresses.
    pub(super) async fn delete_handle(&self, handle: String) -> Result<(), StoreError> {
        let metadata = ObjectMeta {
            name: Some(names::handle(&handle)),
            ..ObjectMeta::default()
        };
        match bounded(Objects::<IPAMHandle>::delete(&*self.store, metadata)).await {
            Err(StoreError::Refused(why)) => {
                tracing::warn!(
                    handle,
                    why,
                    "a handle may not be deleted by its node, and is left to the operator"
                );
                Ok(())
            }
            result => result.map(drop),
        }
    }
}
