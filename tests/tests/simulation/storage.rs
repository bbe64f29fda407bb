//! IPAM's storage as one node reaches it: requests that are late, and so overtake each other, fail
//! before or after they are done, and die with the agent.

use std::any::Any;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use margay_api::ipam::names;
use margay_api::v3::ipam::IPAMBlock;
use margay_ipam::store::memory::{Kept, Memory};
use margay_ipam::store::{Namespace, Objects, Store, StoreError};
use parking_lot::Mutex;
use tokio::time::sleep;

use crate::plant::Plant;
use crate::run::Run;

/// Longest way of a request or an answer, in milliseconds.
const SLOWEST: u64 = 40;

/// State that a node's agent and the run share.
#[derive(Default)]
pub struct Life {
    /// The agent has ended: none of its requests is made any more, or answered.
    pub is_over: AtomicBool,
    /// One request in so many fails; 0: none.
    pub failing: Mutex<u8>,
}

/// The storage, for one run of a node's agent.
#[derive(Clone)]
pub struct Remote {
    /// The run.
    pub run: Run,
    /// Name of the node.
    pub node: String,
    /// What all nodes share.
    pub storage: Memory,
    /// The agent's life.
    pub life: Arc<Life>,
    /// Random numbers of the node.
    pub dice: Arc<Mutex<fastrand::Rng>>,
}

impl Remote {
    /// The way there or back, from which a dead agent does not return.
    async fn pass(&self) -> Result<(), StoreError> {
        let (delay, fails) = {
            let mut dice = self.dice.lock();
            let failing = *self.life.failing.lock();
            let delay = if dice.bool() { 0 } else { dice.u64(1..SLOWEST) };
            (delay, failing > 0 && dice.u8(0..failing) == 0)
        };
        sleep(Duration::from_millis(delay)).await;
        if self.life.is_over.load(Ordering::SeqCst) {
            pending::<()>().await;
        }
        if fails {
            Err(StoreError::Failed("connection reset".to_owned()))
        } else {
            Ok(())
        }
    }

    /// Returns true when the API server lets the node delete the object: of blocks, its own only.
    fn may_delete<K: Kept>(&self, metadata: &ObjectMeta) -> bool {
        let cidr = metadata
            .name
            .as_deref()
            .and_then(names::block_range)
            .filter(|_| K::is_block());
        let block = cidr.and_then(|cidr| self.storage.lock().block(cidr));
        block.is_none_or(|block| {
            block.spec().affinity.as_deref() == Some(&format!("host:{}", self.node))
        })
    }

    /// What is reported as written and was not, by a planted fault.
    fn is_lost<K: Kept>(&self, object: &K) -> bool {
        if K::kind(&()) == "IPAMHandle" {
            return self.run.has(Plant::LostHandle);
        }
        let Some(block) = (object as &dyn Any).downcast_ref::<IPAMBlock>() else {
            return false;
        };
        let used = |block: &IPAMBlock| block.spec.allocations.iter().flatten().count();
        let name = block.metadata.name.clone().unwrap_or_default();
        let kept = <IPAMBlock as Kept>::table(&mut self.storage.lock())
            .get(&name)
            .map(used);
        kept.is_some_and(|kept| used(block) < kept) && self.run.has(Plant::LostRelease)
    }
}

impl<K: Kept> Objects<K> for Remote {
    async fn get(&self, name: String) -> Result<Option<K>, StoreError> {
        self.pass().await?;
        let found = Objects::<K>::get(&self.storage, name).await;
        self.pass().await?;
        found
    }

    async fn list<T: Send>(&self, keep: fn(K) -> T) -> Result<Vec<T>, StoreError> {
        self.pass().await?;
        self.storage.list(keep).await
    }

    async fn create(&self, object: K) -> Result<K, StoreError> {
        self.pass().await?;
        if self.is_lost(&object) {
            return Ok(object);
        }
        let done = self.storage.create(object).await;
        self.pass().await?;
        done
    }

    async fn replace(&self, mut object: K) -> Result<K, StoreError> {
        self.pass().await?;
        if self.is_lost(&object) {
            return Ok(object);
        }
        if K::is_block() && self.run.has(Plant::UncheckedWrite) {
            let name = object.meta().name.clone().unwrap_or_default();
            let current = K::table(&mut self.storage.lock())
                .get(&name)
                .and_then(|kept| kept.meta().resource_version.clone());
            object.meta_mut().resource_version = current;
        }
        let done = self.storage.replace(object).await;
        self.pass().await?;
        done
    }

    async fn delete(&self, metadata: ObjectMeta) -> Result<bool, StoreError> {
        self.pass().await?;
        if !self.may_delete::<K>(&metadata) {
            return Err(StoreError::Refused("the block of another node".to_owned()));
        }
        let done = Objects::<K>::delete(&self.storage, metadata).await;
        self.pass().await?;
        done
    }
}

impl Store for Remote {
    async fn namespace(&self, name: String) -> Result<Namespace, StoreError> {
        self.pass().await?;
        self.storage.namespace(name).await
    }
}
