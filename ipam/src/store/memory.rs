//! Storage in memory, for tests: compare-and-swap as in the API server, and failures on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::v3::ipam::{BlockAffinity, IPAMBlock, IPAMBlockSpec, IPAMHandle, IPAMHandleSpec};
use parking_lot::{Mutex, MutexGuard};

use super::{AffinityState, Cluster, Namespace, Objects, Store, StoreError};
use crate::leak_scan::PodFacts;

/// Storage in memory; clones share its contents.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<Contents>>);

/// Contents of a storage in memory.
#[derive(Default)]
pub struct Contents {
    revision: u64,
    blocks: BTreeMap<String, IPAMBlock>,
    affinities: BTreeMap<String, BlockAffinity>,
    handles: BTreeMap<String, IPAMHandle>,
    /// Namespaces by name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Names of all nodes.
    pub nodes: BTreeSet<String>,
    /// All pods, by `namespace/name`.
    pub pods: BTreeMap<String, PodFacts>,
    /// Ranges of all pools.
    pub pools: Vec<IpNet>,
    /// Number of writes of blocks.
    pub writes: u64,
    /// Number of the next writes of blocks that succeed without an answer.
    pub lose_answers: u32,
    /// True while requests for blocks and namespaces are not answered.
    pub is_silent: bool,
    /// True while handles are neither written nor deleted.
    pub refuses_handles: bool,
}

/// Kinds of objects that a storage in memory has.
pub trait Kept: Resource<DynamicType = ()> + Clone + Send + Sync + 'static {
    /// Objects of the kind, by name.
    fn table(contents: &mut Contents) -> &mut BTreeMap<String, Self>;
    /// Returns true for blocks, whose requests are counted and can fail.
    fn is_block() -> bool {
        Self::kind(&()) == "IPAMBlock"
    }
}

impl Kept for IPAMBlock {
    fn table(contents: &mut Contents) -> &mut BTreeMap<String, Self> {
        &mut contents.blocks
    }
}

impl Kept for BlockAffinity {
    fn table(contents: &mut Contents) -> &mut BTreeMap<String, Self> {
        &mut contents.affinities
    }
}

impl Kept for IPAMHandle {
    fn table(contents: &mut Contents) -> &mut BTreeMap<String, Self> {
        &mut contents.handles
    }
}

impl Contents {
    /// The block of that range, also when its deletion has begun.
    pub fn block(&self, cidr: IpNet) -> Option<Block> {
        Block::parse(self.blocks.get(&names::block(cidr))?.spec.clone()).ok()
    }

    /// All blocks by range, including those whose deletion has begun.
    pub fn blocks(&self) -> BTreeMap<IpNet, Block> {
        let blocks = self
            .blocks
            .values()
            .filter_map(|object| Block::parse(object.spec.clone()).ok());
        blocks.map(|block| (block.cidr(), block)).collect()
    }

    /// States of all affinities, by node and range of the block.
    pub fn affinities(&self) -> BTreeMap<(String, IpNet), AffinityState> {
        let states = [
            AffinityState::Pending,
            AffinityState::Confirmed,
            AffinityState::PendingDeletion,
        ];
        let affinity = |object: &BlockAffinity| {
            let state = states
                .into_iter()
                .find(|state| state.as_str() == object.spec.state)?;
            Some((
                (object.spec.node.clone(), object.spec.cidr.parse().ok()?),
                state,
            ))
        };
        self.affinities.values().filter_map(affinity).collect()
    }

    /// All handles, with the ranges of the blocks that they list.
    pub fn handles(&self) -> BTreeMap<String, BTreeSet<IpNet>> {
        let handle = |object: &IPAMHandle| {
            let blocks = object
                .spec
                .block
                .keys()
                .filter_map(|cidr| cidr.parse().ok())
                .collect();
            (object.spec.handle_id.clone(), blocks)
        };
        self.handles.values().map(handle).collect()
    }

    /// Writes a block as another writer would.
    pub fn put_block(&mut self, block: &Block) {
        self.put_block_spec(block.cidr(), block.spec().clone());
    }

    /// Writes whatever another writer has written under the name of a block.
    pub fn put_block_spec(&mut self, cidr: IpNet, spec: IPAMBlockSpec) {
        let mut object = IPAMBlock::new(&names::block(cidr), spec);
        self.revision += 1;
        object.metadata.resource_version = Some(self.revision.to_string());
        self.blocks.insert(names::block(cidr), object);
    }

    /// Writes a handle as another writer would, without the annotation of its node.
    pub fn put_handle(&mut self, handle: &str, blocks: &[IpNet]) {
        let block = blocks.iter().map(|cidr| (cidr.to_string(), 1)).collect();
        let spec = IPAMHandleSpec {
            handle_id: handle.to_owned(),
            block,
            deleted: false,
        };
        let mut object = IPAMHandle::new(&names::handle(handle), spec);
        self.revision += 1;
        object.metadata.resource_version = Some(self.revision.to_string());
        self.handles.insert(names::handle(handle), object);
    }

    /// Removes all blocks.
    pub fn clear_blocks(&mut self) {
        self.blocks.clear();
    }

    fn check_kind<K: Kept>(&self) -> Result<(), StoreError> {
        if self.refuses_handles && K::kind(&()) == "IPAMHandle" {
            return Err(StoreError::Failed("no handles today".to_owned()));
        }
        Ok(())
    }

    /// Removes all handles.
    pub fn clear_handles(&mut self) {
        self.handles.clear();
    }
}

impl Memory {
    /// Locks the contents.
    pub fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock()
    }

    async fn answer(&self) {
        // Requests take their turns, as they do where each is a round trip.
        tokio::task::yield_now().await;
        if self.lock().is_silent {
            std::future::pending().await
        }
    }

    fn write<K: Kept>(
        &self,
        mut object: K,
        is_allowed: impl FnOnce(Option<&K>, &K) -> bool,
    ) -> Result<K, StoreError> {
        let mut contents = self.lock();
        contents.check_kind::<K>()?;
        let name = object.meta().name.clone().unwrap_or_default();
        if !is_allowed(K::table(&mut contents).get(&name), &object) {
            return Err(StoreError::Conflict);
        }
        contents.revision += 1;
        object.meta_mut().resource_version = Some(contents.revision.to_string());
        K::table(&mut contents).insert(name, object.clone());
        if K::is_block() {
            contents.writes += 1;
            if contents.lose_answers > 0 {
                contents.lose_answers -= 1;
                return Err(StoreError::Failed("connection reset".to_owned()));
            }
        }
        Ok(object)
    }
}

impl<K: Kept> Objects<K> for Memory {
    async fn get(&self, name: String) -> Result<Option<K>, StoreError> {
        if K::is_block() {
            self.answer().await;
        }
        Ok(K::table(&mut self.lock()).get(&name).cloned())
    }

    async fn list<T: Send>(&self, keep: fn(K) -> T) -> Result<Vec<T>, StoreError> {
        Ok(K::table(&mut self.lock())
            .values()
            .cloned()
            .map(keep)
            .collect())
    }

    async fn create(&self, object: K) -> Result<K, StoreError> {
        if K::is_block() {
            self.answer().await;
        }
        self.write(object, |present, _| present.is_none())
    }

    async fn replace(&self, object: K) -> Result<K, StoreError> {
        if K::is_block() {
            self.answer().await;
        }
        let is_same = |present: &K, object: &K| {
            present.meta().resource_version == object.meta().resource_version
        };
        self.write(object, |present, object| {
            present.is_some_and(|present| is_same(present, object))
        })
    }

    async fn delete(&self, metadata: ObjectMeta) -> Result<bool, StoreError> {
        if K::is_block() {
            self.answer().await;
        }
        let mut contents = self.lock();
        contents.check_kind::<K>()?;
        let table = K::table(&mut contents);
        let name = metadata.name.unwrap_or_default();
        let Some(present) = table.get(&name).map(Resource::meta) else {
            return Ok(true);
        };
        let is_other = metadata.uid.is_some() && metadata.uid != present.uid;
        if is_other
            || (metadata.resource_version.is_some()
                && metadata.resource_version != present.resource_version)
        {
            return Ok(false);
        }
        table.remove(&name);
        Ok(true)
    }
}

impl Store for Memory {
    async fn namespace(&self, name: String) -> Result<Namespace, StoreError> {
        self.answer().await;
        Ok(self
            .lock()
            .namespaces
            .get(&name)
            .cloned()
            .unwrap_or_default())
    }
}

impl Cluster for Memory {
    async fn nodes(&self) -> Result<BTreeSet<String>, StoreError> {
        Ok(self.lock().nodes.clone())
    }

    async fn pods(&self) -> Result<BTreeMap<String, PodFacts>, StoreError> {
        Ok(self.lock().pods.clone())
    }

    async fn pools(&self) -> Result<Option<Vec<IpNet>>, StoreError> {
        Ok(Some(self.lock().pools.clone()))
    }

    async fn has_node(&self, name: String) -> Result<bool, StoreError> {
        Ok(self.lock().nodes.contains(&name))
    }

    async fn pod(&self, name: String) -> Result<Option<PodFacts>, StoreError> {
        Ok(self.lock().pods.get(&name).cloned())
    }
}
