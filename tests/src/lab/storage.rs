//! IPAM storage in memory: pools, blocks and handles, with the compare-and-swap of the API, for all
//! nodes of a lab. typha receives the events of blocks as from its watch.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::meta::Labels;
use margay_api::v3::IPPool;
use margay_api::v3::pool::IPPoolSpec;
use margay_ipam::limits::KnownLimits;
use margay_ipam::pools::{self, Listed, Pools};
use margay_ipam::store::memory::{Kept, Memory};
use margay_ipam::store::{Namespace, Objects, Store, StoreError};
use margay_typha::cause::Cause;
use margay_typha::event::Event;
use margay_typha::object::{BLOCK, ObjectKey};
use parking_lot::{Mutex, MutexGuard};
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc, watch};

use super::objects;

/// The storage; cheap to clone, every clone is of the same objects.
#[derive(Clone)]
pub struct Blocks(Arc<Shared>);

struct Shared {
    memory: Memory,
    /// Names of blocks whose latest change has not been sent to typha.
    unsent: Mutex<BTreeSet<String>>,
    changed: Notify,
    pools: watch::Sender<Listed<IPPool>>,
    limits: watch::Sender<KnownLimits>,
}

impl Blocks {
    /// Empty storage.
    pub fn new(runtime: &Runtime, events: mpsc::Sender<Event>) -> Self {
        let pools = watch::Sender::new(Some(Arc::default()));
        let limits = watch::Sender::new(Some(Arc::default()));
        let shared = Arc::new(Shared {
            memory: Memory::default(),
            unsent: Mutex::default(),
            changed: Notify::new(),
            pools,
            limits,
        });
        runtime.spawn(report_blocks(shared.clone(), events));
        Self(shared)
    }

    /// Every block as it is now.
    pub fn all(&self) -> Vec<Block> {
        self.0.memory.lock().blocks().into_values().collect()
    }

    /// Every handle with the blocks that it has addresses in.
    pub fn handles(&self) -> BTreeMap<String, BTreeSet<IpNet>> {
        self.0.memory.lock().handles()
    }

    /// Creates, changes or removes a pool.
    pub fn set_pool(&self, name: &str, spec: Option<IPPoolSpec>) {
        self.0.pools.send_modify(|pools| {
            let pools = Arc::make_mut(pools.get_or_insert_default());
            drop(match spec {
                Some(spec) => pools.insert(name.to_owned(), IPPool::new(name, spec)),
                None => pools.remove(name),
            });
        });
    }

    /// The pools as a node with these labels sees them, as they change.
    pub fn pools(&self, labels: watch::Receiver<Option<Labels>>) -> watch::Receiver<Pools> {
        pools::follow(self.0.pools.subscribe(), labels)
    }

    /// Limits, as they change.
    pub fn limits(&self) -> watch::Receiver<KnownLimits> {
        self.0.limits.subscribe()
    }

    /// Schedules an event for typha if the object that was written is a block.
    fn note<K: Kept>(&self, name: String) {
        if K::is_block() {
            self.0.unsent().insert(name);
            self.0.changed.notify_one();
        }
    }
}

impl Shared {
    fn unsent(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.unsent.lock()
    }
}

/// Sends changed blocks to typha, one after another, each in its latest state.
async fn report_blocks(shared: Arc<Shared>, events: mpsc::Sender<Event>) {
    loop {
        let names = std::mem::take(&mut *shared.unsent());
        for name in names {
            let block = names::block_range(&name).and_then(|cidr| shared.memory.lock().block(cidr));
            let Some(block) = block else {
                let event = Event::Deleted {
                    kind: BLOCK,
                    key: ObjectKey {
                        namespace: String::new(),
                        name,
                    },
                    cause: Cause::default(),
                };
                if events.send(event).await.is_err() {
                    return;
                }
                continue;
            };
            let object = json!({
                "apiVersion": "projectcalico.org/v3", "kind": "IPAMBlock",
                "metadata": {"name": names::block(block.cidr())}, "spec": block.spec(),
            });
            let (kind, observed) =
                objects::observe(&object).expect("a block that is sound is an object that is");
            let event = Event::Observed {
                kind,
                objects: vec![observed],
                cause: Cause::default(),
            };
            if events.send(event).await.is_err() {
                return;
            }
        }
        shared.changed.notified().await;
    }
}

impl<K: Kept> Objects<K> for Blocks {
    async fn get(&self, name: String) -> Result<Option<K>, StoreError> {
        Objects::<K>::get(&self.0.memory, name).await
    }

    async fn list<T: Send>(&self, keep: fn(K) -> T) -> Result<Vec<T>, StoreError> {
        self.0.memory.list(keep).await
    }

    async fn create(&self, object: K) -> Result<K, StoreError> {
        let name = object.meta().name.clone().unwrap_or_default();
        let created = self.0.memory.create(object).await?;
        self.note::<K>(name);
        Ok(created)
    }

    async fn replace(&self, object: K) -> Result<K, StoreError> {
        let name = object.meta().name.clone().unwrap_or_default();
        let replaced = self.0.memory.replace(object).await?;
        self.note::<K>(name);
        Ok(replaced)
    }

    async fn delete(&self, metadata: ObjectMeta) -> Result<bool, StoreError> {
        let name = metadata.name.clone().unwrap_or_default();
        let is_gone = Objects::<K>::delete(&self.0.memory, metadata).await?;
        self.note::<K>(name);
        Ok(is_gone)
    }
}

impl Store for Blocks {
    /// Namespaces of a lab have no annotations, and no pool selects them by labels.
    async fn namespace(&self, _: String) -> Result<Namespace, StoreError> {
        Ok(Namespace::default())
    }
}
