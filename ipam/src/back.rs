//! Giving blocks back that a node does not need: which, as a pure function of what there is and for how long it has been so, and how.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::ipam::block::Block;

use super::node_objects::{NodeObjects, Stored};
use super::store::{AffinityState, Store, StoreError};

/// How long a block has been empty before it is given back, so that pods that come and go do not make it come and go.
pub(super) const GRACE: Duration = Duration::from_secs(300);
/// Between two looks for such blocks.
pub(super) const LOOK: Duration = Duration::from_secs(30);

/// What a block is to its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is of no pool, or of one that is being deleted.
    Gone,
    /// Its pool gives this node nothing unless it is named, or nothing at all.
    Idle,
    /// Of this pool, which pods of the node use.
    Used(String),
}

/// A block of this node as far as giving it back depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) cidr: IpNet,
    pub(super) standing: Standing,
    /// Nothing is or is about to be allocated in it, and nothing rests there.
    pub(super) is_empty: bool,
    /// Addresses that it could give.
    pub(super) room: usize,
}

/// Since when blocks have been empty, by the owner's clock.
#[derive(Clone, Debug, Default)]
pub(super) struct Idle(BTreeMap<IpNet, Duration>);

impl Idle {
    /// Blocks that are to be given back `now`: of no pool at once, others after the grace. Of a pool that pods use so many stay that what is free in the
    /// others is half a block at least, which is more than makes a node claim a spare one: so the last one stays, and nothing goes to and fro.
    pub(super) fn due(&mut self, blocks: &[Facts], now: Duration) -> Vec<IpNet> {
        let empty = |facts: &&Facts| facts.is_empty;
        let before = std::mem::take(&mut self.0);
        let since = |cidr| before.get(&cidr).copied().unwrap_or(now);
        self.0 = blocks.iter().filter(empty).map(|facts| (facts.cidr, since(facts.cidr))).collect();
        let has_waited = |cidr: IpNet| now.saturating_sub(since(cidr)) >= GRACE;
        let mut free: BTreeMap<&str, usize> = BTreeMap::new();
        for facts in blocks {
            if let Standing::Used(pool) = &facts.standing {
                *free.entry(pool).or_default() += facts.room;
            }
        }
        let mut due = Vec::new();
        for facts in blocks.iter().filter(empty) {
            let is_due = match &facts.standing {
                Standing::Gone => true,
                Standing::Idle => has_waited(facts.cidr),
                Standing::Used(pool) => {
                    let left = free.get(pool.as_str()).copied().unwrap_or_default().saturating_sub(facts.room);
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

/// What became of a block that was to be given back.
#[allow(clippy::large_enum_variant, reason = "there is one at a time, on its way to the owner")]
pub(super) enum Returned {
    /// It is this node's no more.
    Gone,
    /// It is in use again, and as it is now; none if that is not known.
    Kept(Option<Stored<Block>>),
}

/// Gives an empty block back as Calico does it: the affinity says that it will go, the block goes if nobody has changed it, the affinity goes. Whatever is left by an
/// end in between is found: a block that is there, by its node's next start; one that is marked, and an affinity without a block, by the collector.
pub(super) async fn give_back<S: Store>(store: &NodeObjects<S>, block: Stored<Block>, node: &str) -> Returned {
    let cidr = block.value.cidr();
    match attempt(store, block, node).await {
        Ok(returned) => returned,
        Err(error) => {
            tracing::warn!(%cidr, %error, "an empty block could not be given back; it is tried again");
            Returned::Kept(None)
        }
    }
}

async fn attempt<S: Store>(store: &NodeObjects<S>, block: Stored<Block>, node: &str) -> Result<Returned, StoreError> {
    let cidr = block.value.cidr();
    match store.put_affinity(cidr, AffinityState::PendingDeletion).await {
        // Somebody has taken it for left over.
        Err(StoreError::Conflict) => {}
        result => result?,
    }
    if store.delete_block(block).await.is_err() {
        match store.block(cidr).await? {
            Some(block) if block.value.node() == Some(node) => {
                confirm(store, cidr).await?;
                return Ok(Returned::Kept(Some(block)));
            }
            _ => {}
        }
    }
    store.delete_affinity(cidr).await?;
    Ok(Returned::Gone)
}

/// Makes this node's claim on a block that it has what it should be, whatever an end of the agent in between has left.
pub(super) async fn confirm<S: Store>(store: &NodeObjects<S>, cidr: IpNet) -> Result<(), StoreError> {
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

    fn facts(cidr: &str, standing: Standing, is_empty: bool, room: usize) -> Facts {
        Facts { cidr: cidr.parse().expect("a range"), standing, is_empty, room }
    }

    fn used(cidr: &str, is_empty: bool, room: usize) -> Facts {
        facts(cidr, Standing::Used("p".to_owned()), is_empty, room)
    }

    /// What is due after the blocks have been so for the grace.
    fn due(blocks: &[Facts]) -> Vec<String> {
        let mut idle = Idle::default();
        idle.due(blocks, Duration::ZERO);
        idle.due(blocks, GRACE).iter().map(IpNet::to_string).collect()
    }

    #[test]
    fn the_last_block_with_room_stays_and_the_others_go() {
        let [one, two, three] = ["10.0.0.0/28", "10.0.0.16/28", "10.0.0.32/28"];
        assert_eq!(due(&[used(one, true, 16)]), [] as [&str; 0], "the last one");
        assert_eq!(due(&[used(one, true, 16), used(two, true, 16), used(three, true, 16)]), [one, two]);
        assert_eq!(due(&[used(one, true, 16), used(two, false, 3)]), [] as [&str; 0], "it will be needed");
        assert_eq!(due(&[used(one, true, 16), used(two, false, 8)]), [one]);
        assert_eq!(due(&[used(one, false, 16), used(two, false, 8)]), [] as [&str; 0], "none is empty");
        let other = facts(two, Standing::Used("q".to_owned()), true, 16);
        assert_eq!(due(&[used(one, true, 16), other]), [] as [&str; 0], "each is the last of its pool");
        assert_eq!(
            due(&[used(one, true, 0), used(two, true, 0)]),
            [] as [&str; 0],
            "reserved whole: nothing is free elsewhere"
        );
        assert_eq!(due(&[facts(one, Standing::Idle, true, 16), used(two, true, 16)]), [one]);
    }

    #[test]
    fn it_takes_the_grace_without_a_pod_but_for_blocks_of_no_pool() {
        let blocks = |is_empty| [used("10.0.0.0/28", is_empty, 16), used("10.0.0.16/28", false, 16)];
        let mut idle = Idle::default();
        let second = Duration::from_secs(1);
        assert!(idle.due(&blocks(true), second).is_empty());
        assert!(idle.due(&blocks(true), GRACE).is_empty());
        assert!(idle.due(&blocks(false), GRACE + second).is_empty());
        assert!(idle.due(&blocks(true), GRACE + 2 * second).is_empty(), "there was a pod in between");
        assert_eq!(idle.due(&blocks(true), 2 * GRACE + 2 * second).len(), 1);
        let gone = facts("10.9.0.0/28", Standing::Gone, true, 16);
        assert_eq!(Idle::default().due(std::slice::from_ref(&gone), Duration::ZERO), [gone.cidr]);
        let resting = Facts { is_empty: false, ..gone };
        assert!(Idle::default().due(&[resting], Duration::ZERO).is_empty());
    }
}
