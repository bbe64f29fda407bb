//! IPAM storage in the API server: Calico's objects, in whichever storage the cluster has. The only place of the node that writes them.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Namespace as Core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Api, Client};
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::meta::{ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6};
use margay_api::rule::IpVersion;
use margay_api::storage::Mode;
use margay_api::v3::ipam::{BlockAffinity, BlockAffinitySpec, IPAMBlock, IPAMHandle, IPAMHandleSpec};

use super::collection::Collection;
use super::store::{AffinityState, Namespace, Store, StoreError, Stored};

/// See the module.
pub struct Objects {
    node: String,
    blocks: Collection<IPAMBlock>,
    affinities: Collection<BlockAffinity>,
    handles: Collection<IPAMHandle>,
    namespaces: Api<Core>,
}

impl Objects {
    /// Storage as seen by one node.
    pub fn new(client: &Client, mode: Mode, node: String) -> Self {
        Self {
            node,
            blocks: Collection::new(client, mode, "IPAMBlock"),
            affinities: Collection::new(client, mode, "BlockAffinity"),
            handles: Collection::new(client, mode, "IPAMHandle"),
            namespaces: Api::all(client.clone()),
        }
    }

    /// What says that a handle is this node's: no other agent may change it then.
    fn mark(&self) -> BTreeMap<String, String> {
        [(names::ANNOTATION_HANDLE_NODE.to_owned(), self.node.clone())].into()
    }
}

fn parse(object: IPAMBlock) -> Result<Stored<Block>, StoreError> {
    let revision = object.metadata.resource_version.unwrap_or_default();
    match Block::parse(object.spec) {
        Ok(value) => Ok(Stored { value, revision }),
        Err(fault) => Err(StoreError::Failed(format!(
            "IPAMBlock {}: {fault}; repair or delete it",
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

impl Store for Objects {
    /// A block that somebody has begun to delete is deleted; where this node may not do that, it is there until its deleter is back.
    async fn block(&self, cidr: IpNet) -> Result<Option<Stored<Block>>, StoreError> {
        let Some(found) = self.blocks.get(&names::block(cidr)).await? else {
            return Ok(None);
        };
        if found.spec.deleted && self.blocks.delete(&found.metadata).await.is_ok() {
            return Ok(None);
        }
        parse(found).map(Some)
    }

    async fn create_block(&self, block: Block) -> Result<Stored<Block>, StoreError> {
        parse(self.blocks.create(&object(&block, None)).await?)
    }

    async fn update_block(&self, block: Stored<Block>) -> Result<Stored<Block>, StoreError> {
        let wanted = object(&block.value, Some(block.revision));
        parse(self.blocks.replace(&names::block(block.value.cidr()), &wanted).await?)
    }

    /// In two steps, as everybody does it who works on this data: the mark, which only holds if nobody has changed the block, then the deletion of what was marked.
    async fn delete_block(&self, block: Stored<Block>) -> Result<(), StoreError> {
        let mut wanted = object(&block.value, Some(block.revision));
        wanted.spec.deleted = true;
        let marked = self.blocks.replace(&names::block(block.value.cidr()), &wanted).await?;
        self.blocks.delete(&marked.metadata).await
    }

    async fn put_affinity(&self, cidr: IpNet, state: AffinityState) -> Result<(), StoreError> {
        let name = names::affinity(&self.node, cidr);
        let text = match state {
            AffinityState::Pending => "pending",
            AffinityState::Confirmed => "confirmed",
            AffinityState::PendingDeletion => "pendingDeletion",
        };
        let wanted = BlockAffinity {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(names::affinity_labels(&self.node, cidr)),
                ..ObjectMeta::default()
            },
            spec: BlockAffinitySpec {
                cidr: cidr.to_string(),
                node: self.node.clone(),
                state: text.to_owned(),
                kind: Some("host".to_owned()),
                deleted: false,
            },
        };
        if state == AffinityState::Pending {
            match self.affinities.create(&wanted).await {
                Err(StoreError::Conflict) => {}
                result => return result.map(drop),
            }
        }
        // Gone in between: somebody took it for left over. The claim begins anew.
        let mut present = self.affinities.get(&name).await?.ok_or(StoreError::Conflict)?;
        if present.spec.state == wanted.spec.state && !present.spec.deleted {
            return Ok(());
        }
        present.spec.state = wanted.spec.state;
        present.spec.deleted = false;
        self.affinities.replace(&name, &present).await.map(drop)
    }

    /// In two steps, as everybody does it who works on this data: the mark, which only one of two can set, then the deletion of what was marked.
    async fn delete_affinity(&self, cidr: IpNet) -> Result<(), StoreError> {
        let name = names::affinity(&self.node, cidr);
        let Some(mut present) = self.affinities.get(&name).await? else {
            return Ok(());
        };
        if !present.spec.deleted {
            present.spec.deleted = true;
            present = self.affinities.replace(&name, &present).await?;
        }
        self.affinities.delete(&present.metadata).await
    }

    async fn put_handle(&self, handle: String, blocks: Vec<IpNet>) -> Result<(), StoreError> {
        let name = names::handle(&handle);
        let wanted: BTreeMap<String, u32> = blocks.iter().map(|block| (block.to_string(), 1)).collect();
        let object = IPAMHandle {
            metadata: ObjectMeta { name: Some(name.clone()), annotations: Some(self.mark()), ..ObjectMeta::default() },
            spec: IPAMHandleSpec { handle_id: handle, block: wanted.clone(), deleted: false },
        };
        match self.handles.create(&object).await {
            Err(StoreError::Conflict) => {}
            result => return result.map(drop),
        }
        let mut present = self.handles.get(&name).await?.ok_or(StoreError::Conflict)?;
        if present.spec.deleted {
            // What a deletion that was not finished has left names nothing any more.
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
        self.handles.replace(&name, &present).await.map(drop)
    }

    async fn handle_blocks(&self, handle: String) -> Result<Vec<IpNet>, StoreError> {
        let found = self.handles.get(&names::handle(&handle)).await?;
        let blocks = found.into_iter().flat_map(|object| object.spec.block.into_keys());
        Ok(blocks.filter_map(|cidr| cidr.parse().ok()).collect())
    }

    /// In one step: nobody but this node writes a handle of one of its pods. One of which nobody has said yet that it is this node's, as Calico wrote it, is left to the
    /// operator, which collects handles without addresses.
    async fn delete_handle(&self, handle: String) -> Result<(), StoreError> {
        let metadata = ObjectMeta { name: Some(names::handle(&handle)), ..ObjectMeta::default() };
        match self.handles.delete(&metadata).await {
            Err(StoreError::Refused(why)) => {
                tracing::warn!(handle, why, "a handle may not be deleted by its node, and is left to the operator");
                Ok(())
            }
            result => result,
        }
    }

    async fn namespace(&self, name: String) -> Result<Namespace, StoreError> {
        let found = self.namespaces.get_metadata_opt(&name).await;
        let metadata = found.map_err(|error| StoreError::Failed(format!("Namespace {name}: {error}")))?;
        let Some(metadata) = metadata.map(|found| found.metadata) else { return Ok(Namespace::default()) };
        let annotations = metadata.annotations.unwrap_or_default();
        let pools = [(IpVersion::V4, ANNOTATION_POD_POOLS_V4), (IpVersion::V6, ANNOTATION_POD_POOLS_V6)];
        let pools = pools.into_iter().filter_map(|(version, name)| Some((version, annotations.get(name)?.clone())));
        Ok(Namespace { labels: metadata.labels.unwrap_or_default(), pools: pools.collect() })
    }
}
