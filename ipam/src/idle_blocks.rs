//! Release of blocks that a node does not need: the choice, as a pure function of the blocks and of
//! how long they have been empty, and the writes.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::ipam::block::Block;

use super::node_objects::{NodeObjects, Stored};
use super::store::{AffinityState, Store, StoreError};

/// Time that a block has been empty before it is released, so that pods that come and go do not
/// make it come and go.
pub(super) const IDLE_GRACE: Duration = Duration::from_secs(300);
/// Interval of the scans for such blocks.
pub(super) const SCAN_INTERVAL: Duration = Duration::from_secs(30);

/// Need of a node for one of its blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// It has no pool, or one that is being deleted.
    NoPool,
    /// Its pool serves this node only by name, or not at all.
    Unused,
    /// It belongs to this pool, which pods of the node use.
    Used(String),
}

/// Facts of a block that its release depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockFacts {
    pub(super) cidr: IpNet,
    pub(super) need: Need,
    /// True when nothing is allocated in it, about to be, or in cooldown.
    pub(super) is_empty: bool,
    /// Number of addresses that it can still assign.
    pub(super) room: usize,
}

/// Blocks that are empty, and since when, on the owner's clock.
#[derive(Clone, Debug, Default)]
pub(super) struct IdleBlocks(BTreeMap<IpNet, Duration>);

impl IdleBlocks {
    /// Returns the blocks to release at `now`: those without a pool at once, others after the grace
    /// period. Of a pool that pods use, a block goes only while the pool's other blocks keep half a
    /// block free. That is more than the shortage that makes a node claim a spare block, so the
    /// last block stays and none is released and claimed in turns.
    pub(super) fn find_due(&mut self, blocks: &[BlockFacts], now: Duration) -> Vec<IpNet> {
        let empty = |facts: &&BlockFacts| facts.is_empty;
        let before = std::mem::take(&mut self.0);
        let since = |cidr| before.get(&cidr).copied().unwrap_or(now);
        self.0 = blocks
            .iter()
            .filter(empty)
            .map(|facts| (facts.cidr, since(facts.cidr)))
            .collect();
        let has_waited = |cidr: IpNet| now.saturating_sub(since(cidr)) >= IDLE_GRACE;
        let mut free: BTreeMap<&str, usize> = BTreeMap::new();
        for facts in blocks {
            if let Need::Used(pool) = &facts.need {
                *free.entry(pool).or_default() += facts.room;
            }
        }
        let mut due = Vec::new();
        for facts in blocks.iter().filter(empty) {
            let is_due = match &facts.need {
                Need::NoPool => true,
                Need::Unused => has_waited(facts.cidr),
                Need::Used(pool) => {
                    let left = free
                        .get(pool.as_str())
                        .copied()
                        .unwrap_or_default()
                        .saturating_sub(facts.room);
                    let is_due = has_waited(facts.cidr) && left >= (facts.room / 2).max(1);
                    if is_due {
                        free.insert(pool, left);
                    }
                    is_due
                }
            };
            if is_due {
                due.push(facts.cidr);
            }
        }
        due
    }
}

/// Outcome of the release of a block.
#[allow(
    clippy::large_enum_variant,
    reason = "there is one at a time, on its way to the owner"
)]
pub(super) enum BlockRelease {
    /// The block is not this node's any more.
    Done,
    /// The block is in use again, in this state; none if the state is unknown.
    Kept(Option<Stored<Block>>),
}

/// Releases an empty block in Calico's order: the affinity is marked `pendingDeletion`, the block
/// is deleted unless it has changed, the affinity is deleted. If the agent ends in between, a
/// remaining block is found by the node's next start; a block marked as deleted, or an affinity
/// without a block, by the collector.
pub(super) async fn release_block<S: Store>(
    store: &NodeObjects<S>,
    block: Stored<Block>,
    node: &str,
) -> BlockRelease {
    let cidr = block.value.cidr();
    match attempt(store, block, node).await {
        Ok(returned) => returned,
        Err(error) => {
            tracing::warn!(
                %cidr,
                %error,
                "an empty block could not be given back; it is tried again",
            );
            BlockRelease::Kept(None)
        }
    }
}

async fn attempt<S: Store>(
    store: &NodeObjects<S>,
    block: Stored<Block>,
    node: &str,
) -> Result<BlockRelease, StoreError> {
    let cidr = block.value.cidr();
    match store
        .put_affinity(cidr, AffinityState::PendingDeletion)
        .await
    {
        // The collector took the affinity for left over; the block may go all the same.
        Err(StoreError::Conflict) => {}
        result => result?,
    }
    // An error may be a conflict, or a deletion that was done without an answer: a read tells.
    if store.delete_block(block).await.is_err() {
        match store.block(cidr).await? {
            Some(block) if block.value.node() == Some(node) => {
                confirm(store, cidr).await?;
                return Ok(BlockRelease::Kept(Some(block)));
            }
            _ => {}
        }
    }
    store.delete_affinity(cidr).await?;
    Ok(BlockRelease::Done)
}

/// Confirms this node's affinity to a block that it has, whatever state an interrupted agent has
/// left it in.
pub(super) async fn confirm<S: Store>(
    store: &NodeObjects<S>,
    cidr: IpNet,
) -> Result<(), StoreError> {
    match store.put_affinity(cidr, AffinityState::Confirmed).await {
        Err(StoreError::Conflict) => {
            store.put_affinity(cidr, AffinityState::Pending).await?;
            store.put_affinity(cidr, AffinityState::Confirmed).await
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(cidr: &str, need: Need, is_empty: bool, room: usize) -> BlockFacts {
        BlockFacts {
            cidr: cidr.parse().expect("a range"),
            need,
            is_empty,
            room,
        }
    }

    fn used(cidr: &str, is_empty: bool, room: usize) -> BlockFacts {
        facts(cidr, Need::Used("p".to_owned()), is_empty, room)
    }

    /// Returns the blocks that are due after they have been empty for the grace period.
    fn due(blocks: &[BlockFacts]) -> Vec<String> {
        let mut idle = IdleBlocks::default();
        idle.find_due(blocks, Duration::ZERO);
        idle.find_due(blocks, IDLE_GRACE)
            .iter()
            .map(IpNet::to_string)
            .collect()
    }

    #[test]
    fn the_last_block_with_room_stays_and_the_others_go() {
        let [one, two, three] = ["10.0.0.0/28", "10.0.0.16/28", "10.0.0.32/28"];
        assert_eq!(due(&[used(one, true, 16)]), [] as [&str; 0], "the last one");
        assert_eq!(
            due(&[
                used(one, true, 16),
                used(two, true, 16),
                used(three, true, 16)
            ]),
            [one, two]
        );
        assert_eq!(
            due(&[used(one, true, 16), used(two, false, 3)]),
            [] as [&str; 0],
            "it will be needed"
        );
        assert_eq!(due(&[used(one, true, 16), used(two, false, 8)]), [one]);
        assert_eq!(
            due(&[used(one, false, 16), used(two, false, 8)]),
            [] as [&str; 0],
            "none is empty"
        );
        let other = facts(two, Need::Used("q".to_owned()), true, 16);
        assert_eq!(
            due(&[used(one, true, 16), other]),
            [] as [&str; 0],
            "each is the last of its pool"
        );
        assert_eq!(
            due(&[used(one, true, 0), used(two, true, 0)]),
            [] as [&str; 0],
            "reserved whole: nothing is free elsewhere"
        );
        assert_eq!(
            due(&[facts(one, Need::Unused, true, 16), used(two, true, 16)]),
            [one]
        );
    }

    #[test]
    fn it_takes_the_grace_without_a_pod_but_for_blocks_of_no_pool() {
        let blocks = |is_empty| {
            [
                used("10.0.0.0/28", is_empty, 16),
                used("10.0.0.16/28", false, 16),
            ]
        };
        let mut idle = IdleBlocks::default();
        let second = Duration::from_secs(1);
        assert!(idle.find_due(&blocks(true), second).is_empty());
        assert!(idle.find_due(&blocks(true), IDLE_GRACE).is_empty());
        assert!(
            idle.find_due(&blocks(false), IDLE_GRACE + second)
                .is_empty()
        );
        assert!(
            idle.find_due(&blocks(true), IDLE_GRACE + 2 * second)
                .is_empty(),
            "there was a pod in between"
        );
        assert_eq!(
            idle.find_due(&blocks(true), 2 * IDLE_GRACE + 2 * second)
                .len(),
            1
        );
        let gone = facts("10.9.0.0/28", Need::NoPool, true, 16);
        assert_eq!(
            IdleBlocks::default().find_due(std::slice::from_ref(&gone), Duration::ZERO),
            [gone.cidr]
        );
        let resting = BlockFacts {
            is_empty: false,
            ..gone
        };
        assert!(
            IdleBlocks::default()
                .find_due(&[resting], Duration::ZERO)
                .is_empty()
        );
    }
}
