//! IPAM storage in memory: pools, blocks and handles, with the compare-and-swap of the API, for all
//! nodes of a lab. typha receives the events of blocks as from its watch.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::meta::Labels;
use margay_api::v3::IPPool;
use margay_api::v3::pool::IPPoolSpec;
use margay_node::ipam::allocator::Pools;
use margay_node::ipam::limits::Known;
use margay_node::ipam::pools::of_node;
use margay_node::ipam::store::{AffinityState, Namespace, Store, StoreError, Stored};
use margay_typha::cause::Cause;
use margay_typha::event::Event;
use margay_typha::object::{BLOCK, ObjectKey};
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc, watch};

use super::objects;

/// The storage; cheap to clone, every clone is of the same objects.
#[derive(Clone)]
pub struct Blocks(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Notify,
    pools: watch::Sender<BTreeMap<String, IPPool>>,
    limits: watch::Sender<Known>,
}

#[derive(Default)]
struct State {
    revision: u64,
    blocks: BTreeMap<IpNet, Stored<Block>>,
    affinities: BTreeMap<(String, IpNet), AffinityState>,
    handles: BTreeMap<String, BTreeSet<IpNet>>,
    /// Blocks whose latest change has not been sent to typha.
    unsent: BTreeSet<IpNet>,
}

impl Blocks {
    /// Empty storage.
    pub fn new(runtime: &Runtime, events: mpsc::Sender<Event>) -> Self {
        let pools = watch::Sender::new(BTreeMap::new());
        let limits = watch::Sender::new(Some(Arc::default()));
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Notify::new(), pools, limits });
        runtime.spawn(report_blocks(shared.clone(), events));
        Self(shared)
    }

    /// The storage as a node uses it.
    pub fn of_node(&self, node: &str) -> Memory {
        Memory { node: node.to_owned(), blocks: self.clone() }
    }

    /// Every block as it is now.
    pub fn all(&self) -> Vec<Block> {
        self.state().blocks.values().map(|stored| stored.value.clone()).collect()
    }

    /// Every handle with the blocks that it has addresses in.
    pub fn handles(&self) -> BTreeMap<String, BTreeSet<IpNet>> {
        self.state().handles.clone()
    }

    /// Creates, changes or removes a pool.
    pub fn set_pool(&self, name: &str, spec: Option<IPPoolSpec>) {
        self.0.pools.send_modify(|pools| {
            drop(match spec {
                Some(spec) => pools.insert(name.to_owned(), IPPool::new(name, spec)),
                None => pools.remove(name),
            });
        });
    }

    /// The pools as a node with these labels sees them, as they change.
    pub fn pools(&self, mut labels: watch::Receiver<Option<Labels>>) -> watch::Receiver<Pools> {
        let mut known = self.0.pools.subscribe();
        let now = |known: &BTreeMap<String, IPPool>, labels: &Option<Labels>| {
            labels.as_ref().map(|labels| Arc::new(of_node(known, labels)))
        };
        let (sender, receiver) = watch::channel(now(&known.borrow_and_update(), &labels.borrow_and_update()));
        tokio::spawn(async move {
            loop {
                let changed = tokio::select! {
                    changed = known.changed() => changed,
                    changed = labels.changed() => changed,
                };
                if changed.is_err() {
                    return;
                }
                let pools = now(&known.borrow_and_update(), &labels.borrow_and_update());
                sender.send_replace(pools);
            }
        });
        receiver
    }

    /// Limits, as they change.
    pub fn limits(&self) -> watch::Receiver<Known> {
        self.0.limits.subscribe()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn write(
        &self,
        block: Block,
        allowed: impl FnOnce(Option<&Stored<Block>>) -> bool,
    ) -> Result<Stored<Block>, StoreError> {
        let mut state = self.state();
        let cidr = block.cidr();
        if !allowed(state.blocks.get(&cidr)) {
            return Err(StoreError::Conflict);
        }
        state.revision += 1;
        let stored = Stored { value: block, revision: state.revision.to_string() };
        state.blocks.insert(cidr, stored.clone());
        state.unsent.insert(cidr);
        drop(state);
        self.0.changed.notify_one();
        Ok(stored)
    }
}

/// Sends changed blocks to typha, one after another, each in its latest state.
async fn report_blocks(shared: Arc<Shared>, events: mpsc::Sender<Event>) {
    loop {
        let unsent: Vec<(IpNet, Option<Block>)> = {
            let mut state = shared.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let unsent = std::mem::take(&mut state.unsent);
            let now = |cidr: IpNet| (cidr, state.blocks.get(&cidr).map(|stored| stored.value.clone()));
            unsent.into_iter().map(now).collect()
        };
        for (cidr, block) in unsent {
            let Some(block) = block else {
                let key = ObjectKey { namespace: String::new(), name: names::block(cidr) };
                let event = Event::Deleted { kind: BLOCK, key, cause: Cause::default() };
                if events.send(event).await.is_err() {
                    return;
                }
                continue;
            };
            let object = json!({
                "apiVersion": "projectcalico.org/v3", "kind": "IPAMBlock",
                "metadata": {"name": names::block(block.cidr())}, "spec": block.spec(),
            });
            let (kind, observed) = objects::observe(&object).expect("a block that is sound is an object that is");
            let event = Event::Observed { kind, objects: vec![observed], cause: Cause::default() };
            if events.send(event).await.is_err() {
                return;
            }
        }
        shared.changed.notified().await;
    }
}

/// The storage as one node uses it.
pub struct Memory {
    node: String,
    blocks: Blocks,
}

impl Store for Memory {
    async fn block(&self, cidr: IpNet) -> Result<Option<Stored<Block>>, StoreError> {
        Ok(self.blocks.state().blocks.get(&cidr).cloned())
    }

    async fn create_block(&self, block: Block) -> Result<Stored<Block>, StoreError> {
        self.blocks.write(block, |present| present.is_none())
    }

    async fn update_block(&self, block: Stored<Block>) -> Result<Stored<Block>, StoreError> {
        self.blocks.write(block.value, |present| present.is_some_and(|present| present.revision == block.revision))
    }

    async fn delete_block(&self, block: Stored<Block>) -> Result<(), StoreError> {
        let mut state = self.blocks.state();
        let cidr = block.value.cidr();
        if state.blocks.get(&cidr).is_none_or(|present| present.revision != block.revision) {
            return Err(StoreError::Conflict);
        }
        state.blocks.remove(&cidr);
        state.unsent.insert(cidr);
        drop(state);
        self.blocks.0.changed.notify_one();
        Ok(())
    }

    async fn put_affinity(&self, cidr: IpNet, state: AffinityState) -> Result<(), StoreError> {
        self.blocks.state().affinities.insert((self.node.clone(), cidr), state);
        Ok(())
    }

    async fn delete_affinity(&self, cidr: IpNet) -> Result<(), StoreError> {
        self.blocks.state().affinities.remove(&(self.node.clone(), cidr));
        Ok(())
    }

    async fn put_handle(&self, handle: String, blocks: Vec<IpNet>) -> Result<(), StoreError> {
        self.blocks.state().handles.entry(handle).or_default().extend(blocks);
        Ok(())
    }

    async fn handle_blocks(&self, handle: String) -> Result<Vec<IpNet>, StoreError> {
        Ok(self.blocks.state().handles.get(&handle).into_iter().flatten().copied().collect())
    }

    async fn delete_handle(&self, handle: String) -> Result<(), StoreError> {
        self.blocks.state().handles.remove(&handle);
        Ok(())
    }

    /// Namespaces of a lab have no annotations, and no pool selects them by labels.
    async fn namespace(&self, _: String) -> Result<Namespace, StoreError> {
        Ok(Namespace::default())
    }
}
