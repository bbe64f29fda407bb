//! Release of all addresses of a handle, in whatever blocks they are.

use std::collections::BTreeSet;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use tokio::sync::oneshot;

use super::Owner;
use super::events::{Event, Waiting};
use crate::commit::{self, Operation, ReleaseReply};
use crate::constraints::Constraints;
use crate::node_objects::Stored;
use crate::request::NoAddress;
use crate::store::{Store, StoreError};

impl<S: Store> Owner<S> {
    /// Releases a handle. Unless this process has seen it get all its addresses from this node's
    /// blocks, its object is read first, which lists the blocks.
    pub(super) fn release(&mut self, handle: String, reply: ReleaseReply) {
        if let Some(locked) = self.locked() {
            return drop(reply.send(Err(locked)));
        }
        let is_here =
            self.local.contains(&handle) && self.blocks.values().any(|slot| slot.holds(&handle));
        if is_here && self.loading == 0 && self.inputs.map.borrow().is_some() {
            return self.release_from(handle, reply, Vec::new());
        }
        let store = self.store.clone();
        self.spawn(async move {
            let found = commit::locate(&*store, &handle).await;
            Event::Located(handle, reply, found)
        });
    }

    /// Continues the release once the handle's object has been read. A handle that lists no blocks
    /// may still have addresses, because its object and the block are written at the same time and
    /// one of the two writes may have failed. So it counts as released only once all blocks of this
    /// node have been read.
    pub(super) fn finish_locate(
        &mut self,
        handle: String,
        reply: ReleaseReply,
        blocks: Vec<Stored<Block>>,
    ) {
        if blocks.is_empty() && !self.is_ready() {
            return self.waiting.push_back(Waiting::Release(handle, reply));
        }
        if blocks.is_empty()
            && self
                .unread
                .iter()
                .any(|cidr| !self.blocks.contains_key(cidr))
        {
            drop(reply.send(Err(self.inputs.unknown())));
            return self.load();
        }
        self.release_from(handle, reply, blocks);
    }

    /// Releases from the cached blocks that may have the handle, and from those of `located` that
    /// are not cached; then answers, and deletes the handle. In that order, because without the
    /// handle nobody would find the rest.
    fn release_from(&mut self, handle: String, reply: ReleaseReply, located: Vec<Stored<Block>>) {
        let (here, elsewhere): (Vec<_>, Vec<_>) = located
            .into_iter()
            .partition(|block| self.blocks.contains_key(&block.value.cidr()));
        let mut here: BTreeSet<IpNet> = here.iter().map(|block| block.value.cidr()).collect();
        here.extend(
            self.blocks
                .iter()
                .filter(|(_, slot)| slot.may_hold(&handle))
                .map(|(cidr, _)| *cidr),
        );
        let mut answers = Vec::new();
        for block in here {
            let (reply, answer) = oneshot::channel();
            answers.push(answer);
            self.enqueue(block, Operation::Release(handle.clone(), reply));
        }
        self.local.remove(&handle);
        self.borrowed.remove(&handle);
        let constraints = Constraints {
            limits: self.limits(),
            shared: BTreeSet::new(),
            now: (self.clock)(),
        };
        let store = self.store.clone();
        let deletion = self.deletions.begin(&handle);
        self.spawn(async move {
            let failed = |error: StoreError| {
                NoAddress::Unavailable(format!("IPAM release of {handle}: {error}"))
            };
            let released = async {
                for answer in answers {
                    answer.await.map_err(|_| NoAddress::stopping())??;
                }
                commit::release_from(&*store, &handle, elsewhere, &constraints)
                    .await
                    .map_err(failed)
            };
            // The caller may have gone.
            match released.await {
                Ok(()) => {
                    let deferred = deletion.defer().await;
                    let _ = reply.send(Ok(()));
                    deferred.exec(&store, &handle).await;
                }
                Err(error) => drop(reply.send(Err(error))),
            }
            Event::Released(handle)
        });
    }
}
