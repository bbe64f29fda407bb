//! IPAM storage in the API server: Calico's `projectcalico.org/v3` objects. The only place of the node that writes them.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::v3::ipam::{
    BlockAffinity, BlockAffinitySpec, IPAMBlock, IPAMConfiguration, IPAMHandle, IPAMHandleSpec,
};

use super::store::{AffinityState, Store, StoreError, Stored};

/// See the module.
pub struct Objects {
    node: String,
    blocks: Api<IPAMBlock>,
    affinities: Api<BlockAffinity>,
    handles: Api<IPAMHandle>,
    configurations: Api<IPAMConfiguration>,
}

impl Objects {
    /// Storage as seen by one node.
    pub fn new(client: Client, node: String) -> Self {
        Self {
            node,
            blocks: Api::all(client.clone()),
            affinities: Api::all(client.clone()),
            handles: Api::all(client.clone()),
            configurations: Api::all(client),
        }
    }
}

fn error(error: kube::Error) -> StoreError {
    match &error {
        kube::Error::Api(status) if status.code == 409 => StoreError::Conflict,
        kube::Error::Api(status) => StoreError::Failed(status.message.clone()),
        _ => StoreError::Failed(error.to_string()),
    }
}

fn is_missing(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
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
    async fn block(&self, cidr: IpNet) -> Result<Option<Stored<Block>>, StoreError> {
        self.blocks.get_opt(&names::block(cidr)).await.map_err(error)?.map(parse).transpose()
    }

    async fn create_block(&self, block: Block) -> Result<Stored<Block>, StoreError> {
        let created = self.blocks.create(&PostParams::default(), &object(&block, None)).await;
        parse(created.map_err(error)?)
    }

    async fn update_block(&self, block: Stored<Block>) -> Result<Stored<Block>, StoreError> {
        let wanted = object(&block.value, Some(block.revision));
        let name = names::block(block.value.cidr());
        let written = self.blocks.replace(&name, &PostParams::default(), &wanted).await;
        parse(written.map_err(error)?)
    }

    async fn put_affinity(&self, cidr: IpNet, state: AffinityState) -> Result<(), StoreError> {
        let name = names::affinity(&self.node, cidr);
        let state = match state {
            AffinityState::Pending => "pending",
            AffinityState::Confirmed => "confirmed",
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
                state: state.to_owned(),
                kind: Some("host".to_owned()),
                deleted: false,
            },
        };
        if state == "pending" {
            match self.affinities.create(&PostParams::default(), &wanted).await.map_err(error) {
                Err(StoreError::Conflict) => {}
                result => return result.map(drop),
            }
        }
        let mut present = self.affinities.get(&name).await.map_err(error)?;
        present.spec.state = wanted.spec.state;
        present.spec.deleted = false;
        let written = self.affinities.replace(&name, &PostParams::default(), &present).await;
        written.map(drop).map_err(error)
    }

    async fn delete_affinity(&self, cidr: IpNet) -> Result<(), StoreError> {
        let name = names::affinity(&self.node, cidr);
        match self.affinities.delete(&name, &DeleteParams::default()).await {
            Err(missing) if is_missing(&missing) => Ok(()),
            result => result.map(drop).map_err(error),
        }
    }

    async fn put_handle(&self, handle: String, blocks: Vec<IpNet>) -> Result<(), StoreError> {
        let name = names::handle(&handle);
        let wanted: BTreeMap<String, u32> = blocks.iter().map(|block| (block.to_string(), 1)).collect();
        let object = IPAMHandle {
            metadata: ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() },
            spec: IPAMHandleSpec { handle_id: handle, block: wanted.clone(), deleted: false },
        };
        match self.handles.create(&PostParams::default(), &object).await.map_err(error) {
            Err(StoreError::Conflict) => {}
            result => return result.map(drop),
        }
        let mut present = self.handles.get(&name).await.map_err(error)?;
        let before = present.spec.block.len();
        for (block, count) in wanted {
            present.spec.block.entry(block).or_insert(count);
        }
        if present.spec.block.len() == before {
            return Ok(());
        }
        self.handles.replace(&name, &PostParams::default(), &present).await.map(drop).map_err(error)
    }

    async fn handle_blocks(&self, handle: String) -> Result<Vec<IpNet>, StoreError> {
        let found = self.handles.get_opt(&names::handle(&handle)).await.map_err(error)?;
        let blocks = found.into_iter().flat_map(|object| object.spec.block.into_keys());
        Ok(blocks.filter_map(|cidr| cidr.parse().ok()).collect())
    }

    async fn strict_affinity(&self) -> Result<bool, StoreError> {
        let found = self.configurations.get_opt("default").await.map_err(error)?;
        Ok(found.is_some_and(|configuration| configuration.spec.strict_affinity))
    }

    async fn delete_handle(&self, handle: String) -> Result<(), StoreError> {
        match self.handles.delete(&names::handle(&handle), &DeleteParams::default()).await {
            Err(missing) if is_missing(&missing) => Ok(()),
            result => result.map(drop).map_err(error),
        }
    }
}
