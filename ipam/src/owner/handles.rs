//! Deletion of the objects of released handles, after the answer: once no block has an address of
//! the handle, nothing depends on its object, and a DEL need not wait for one more write.
//!
//! What an agent that ends leaves behind is deleted by the operator's collector.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::node_objects::NodeObjects;
use crate::store::{Store, StoreError};

/// Deletions that may be due after the answer; more releases than that wait for one before they are
/// answered.
const MAX_DUE: usize = 256;
/// Deletions at the same time: requests that somebody waits for come first.
const CONCURRENCY: usize = 4;
/// Attempts of a deletion.
const TRIES: u32 = 4;
/// Time to the second attempt; doubled for each later one.
const RETRY: Duration = Duration::from_secs(1);

/// Handles that are being released, until their objects are deleted.
pub(super) struct Deletions {
    releasing: BTreeMap<String, usize>,
    due: Arc<Semaphore>,
    turns: Arc<Semaphore>,
}

impl Default for Deletions {
    fn default() -> Self {
        Self {
            releasing: BTreeMap::new(),
            due: Arc::new(Semaphore::new(MAX_DUE)),
            turns: Arc::new(Semaphore::new(CONCURRENCY)),
        }
    }
}

impl Deletions {
    /// Records that a release of the handle has begun, and returns what carries out its deletion.
    pub(super) fn begin(&mut self, handle: &str) -> Deletion {
        *self.releasing.entry(handle.to_owned()).or_default() += 1;
        Deletion {
            due: self.due.clone(),
            turns: self.turns.clone(),
        }
    }

    /// Records the end of a release. Returns true when it was the last one of the handle.
    pub(super) fn end(&mut self, handle: &str) -> bool {
        let left = self.releasing.get_mut(handle);
        let is_last = left.is_none_or(|left| {
            *left -= 1;
            *left == 0
        });
        if is_last {
            self.releasing.remove(handle);
        }
        is_last
    }

    /// Returns true while an address with this handle would lose the handle to a deletion.
    pub(super) fn contains(&self, handle: &str) -> bool {
        self.releasing.contains_key(handle)
    }
}

/// Deletion of the object of one handle.
pub(super) struct Deletion {
    due: Arc<Semaphore>,
    turns: Arc<Semaphore>,
}

impl Deletion {
    /// Waits until the deletion may be carried out after the answer.
    pub(super) async fn defer(self) -> Deferred {
        // Neither semaphore is ever closed.
        let place = self.due.acquire_owned().await.ok();
        Deferred {
            turns: self.turns,
            _place: place,
        }
    }
}

/// A deletion that has its place among those due.
pub(super) struct Deferred {
    turns: Arc<Semaphore>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Deferred {
    /// Deletes the handle, in several attempts; after the last one it is left to the operator.
    pub(super) async fn exec<S: Store>(self, store: &NodeObjects<S>, handle: &str) {
        let Err(mut error) = self.attempt(store, handle).await else {
            return;
        };
        for attempt in 0..TRIES - 1 {
            tokio::time::sleep(RETRY * 2_u32.pow(attempt)).await;
            match self.attempt(store, handle).await {
                Ok(()) => return,
                Err(next) => error = next,
            }
        }
        tracing::warn!(
            handle,
            %error,
            "the handle of released addresses could not be deleted, and is left to the operator",
        );
    }

    async fn attempt<S: Store>(
        &self,
        store: &NodeObjects<S>,
        handle: &str,
    ) -> Result<(), StoreError> {
        let _turn = self.turns.acquire().await.ok();
        store.delete_handle(handle.to_owned()).await
    }
}
