//! IPAM storage in the API server: Calico's `projectcalico.org/v3` objects. The only place of the node that writes them.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::v3::ipam::{BlockAffinity, BlockAffinitySpec, IPAMBlock, IPAMHandle, IPAMHandleSpec};

use super::store::{AffinityState, Store, StoreError, Stored};

/// Label of affinities: `host`.
const LABEL_AFFINITY_TYPE: &str = "projectcalico.org/affinity-type";
/// Label of affinities: `4` or `6`.
const LABEL_IP_VERSION: &str = "projectcalico.org/ip-version";

/// See the module.
pub struct Objects {
    node: String,
    blocks: Api<IPAMBlock>,
    affinities: Api<BlockAffinity>,
    handles: Api<IPAMHandle>,
}

impl Objects {
    /// Storage as seen by one node.
    pub fn new(client: Client, node: String) -> Self {
        Self { node, blocks: Api::all(client.clone()), affinities: Api::all(client.clone()), handles: Api::all(client) }
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
        let version = if cidr.addr().is_ipv4() { "4" } else { "6" };
        let labels = BTreeMap::from(
            [(LABEL_AFFINITY_TYPE, "host"), (LABEL_IP_VERSION, version)]
                .map(|(key, value)| (key.to_owned(), value.to_owned())),
        );
        let wanted = BlockAffinity {
            metadata: ObjectMeta { name: Some(name.clone()), labels: Some(labels), ..ObjectMeta::default() },
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

    async fn create_handle(&self, handle: String, block: IpNet) -> Result<(), StoreError> {
        let wanted = IPAMHandle {
            metadata: ObjectMeta { name: Some(names::handle(&handle)), ..ObjectMeta::default() },
            spec: IPAMHandleSpec { handle_id: handle, block: BTreeMap::from([(block.to_string(), 1)]), deleted: false },
        };
        match self.handles.create(&PostParams::default(), &wanted).await.map_err(error) {
            Err(StoreError::Conflict) => Ok(()),
            result => result.map(drop),
        }
    }

    async fn handle_blocks(&self, handle: String) -> Result<Vec<IpNet>, StoreError> {
        let found = self.handles.get_opt(&names::handle(&handle)).await.map_err(error)?;
        let blocks = found.into_iter().flat_map(|object| object.spec.block.into_keys());
        Ok(blocks.filter_map(|cidr| cidr.parse().ok()).collect())
    }

    async fn delete_handle(&self, handle: String) -> Result<(), StoreError> {
        match self.handles.delete(&names::handle(&handle), &DeleteParams::default()).await {
            Err(missing) if is_missing(&missing) => Ok(()),
            result => result.map(drop).map_err(error),
        }
    }
}
