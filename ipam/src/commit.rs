//! One write of a block that carries out many operations, and the outcome of each.

use std::net::IpAddr;
use std::time::Duration;

use futures::future::join_all;
use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;
use tokio::sync::oneshot;

use super::constraints::Constraints;
use super::node_objects::{NodeObjects, Stored};
use super::pools::PoolChoice;
use super::request::NoAddress;
use super::store::{Store, StoreError};

/// Maximum number of attempts of a write; then its callers get an error that storage is
/// unavailable.
const TRIES: u32 = 5;
/// Delay before the second try after an error that is not a conflict; it doubles.
const DELAY: Duration = Duration::from_millis(100);

/// Part of a request that one block can serve: the address of one IP version.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) attribute: AllocationAttribute,
    pub(super) version: IpVersion,
    /// Pools to take the address from.
    pub(super) choice: PoolChoice,
    /// Blocks that the handle must list once the address is claimed. Only one part of a request has
    /// all of them, so that recording them is one write.
    pub(super) recorded: Vec<IpNet>,
}

impl Part {
    /// The handle.
    pub(super) fn handle(&self) -> &str {
        self.attribute.handle_id.as_deref().unwrap_or_default()
    }
}

pub(super) type AssignReply = oneshot::Sender<Result<Vec<IpNet>, NoAddress>>;
pub(super) type ReleaseReply = oneshot::Sender<Result<(), NoAddress>>;

/// Operation on a block, with the caller's reply channel.
pub(super) enum Operation {
    Assign(Part, AssignReply),
    Release(String, ReleaseReply),
}

impl Operation {
    pub(super) fn handle(&self) -> &str {
        match self {
            Self::Assign(part, _) => part.handle(),
            Self::Release(handle, _) => handle,
        }
    }

    fn fail(self, error: NoAddress) {
        match self {
            Self::Assign(_, reply) => drop(reply.send(Err(error))),
            Self::Release(_, reply) => drop(reply.send(Err(error))),
        }
    }
}

/// Outcome of a write.
pub(super) struct WriteOutcome {
    pub(super) cidr: IpNet,
    /// The block after the write, if its state is known.
    pub(super) block: Option<Stored<Block>>,
    /// Operations for another block, because this one is full or not this node's any more.
    pub(super) unfinished: Vec<Operation>,
}

/// Carries out the operations in one write. After an error the write may have been done all the
/// same, so the block is read again before the next attempt, and an assignment that did get through
/// is found by its handle. Operations that change nothing are answered only from a block read for
/// them: the cache may be older than a write by another node, and nothing else would tell.
pub(super) async fn commit<S: Store>(
    store: &NodeObjects<S>,
    mut stored: Stored<Block>,
    operations: Vec<Operation>,
    constraints: &Constraints,
) -> WriteOutcome {
    let (cidr, owner) = (stored.value.cidr(), stored.value.node().map(str::to_owned));
    let mut delay = DELAY;
    let mut failure = StoreError::Conflict;
    for attempt in 0..TRIES {
        if attempt > 0 {
            if failure != StoreError::Conflict {
                tokio::time::sleep(delay).await;
                delay *= 2;
            }
            match store.block(cidr).await {
                Ok(Some(block)) if block.value.node() == owner.as_deref() => stored = block,
                Ok(block) => {
                    // Another node's, or deleted: none of the attempts can have been done in it.
                    return WriteOutcome {
                        cidr,
                        block: block.or(Some(gone(cidr))),
                        unfinished: operations,
                    };
                }
                Err(error) => {
                    failure = error;
                    continue;
                }
            }
        }
        if attempt == 0
            && operations
                .iter()
                .any(|operation| is_missing(&stored.value, operation))
        {
            failure = StoreError::Conflict;
            continue;
        }
        match write(store, &stored, &operations, constraints, attempt > 0).await {
            Ok(Done { block, full }) => return answer(block, operations, full),
            Err(error) => failure = error,
        }
    }
    for operation in operations {
        operation.fail(NoAddress::Unavailable(format!(
            "IPAM block {cidr} could not be written: {failure}; the runtime will try again"
        )));
    }
    WriteOutcome {
        cidr,
        block: None,
        unfinished: Vec::new(),
    }
}

/// Returns true when the cache lacks the handle to be released: another task writes the addresses
/// that pods name, past the cache.
fn is_missing(block: &Block, operation: &Operation) -> bool {
    matches!(operation, Operation::Release(handle, _) if block.of_handle(handle).is_empty())
}

struct Done {
    block: Stored<Block>,
    /// True when an assignment found no room.
    full: bool,
}

async fn write<S: Store>(
    store: &NodeObjects<S>,
    stored: &Stored<Block>,
    operations: &[Operation],
    constraints: &Constraints,
    is_fresh: bool,
) -> Result<Done, StoreError> {
    let mut block = stored.value.clone();
    block.end_cooldown(|since| constraints.is_over(since));
    let (mut full, mut handles) = (false, Vec::new());
    for operation in operations {
        match operation {
            Operation::Assign(part, reply) if !reply.is_closed() => {
                if block.of_handle(part.handle()).is_empty() {
                    full |= block
                        .assign(&part.attribute, |address| constraints.is_reserved(address))
                        .is_none();
                }
                if !part.recorded.is_empty() {
                    handles.push(store.put_handle(part.handle().to_owned(), part.recorded.clone()));
                }
            }
            Operation::Assign(..) => {}
            Operation::Release(handle, _) if constraints.limits.cooldown > 0 => {
                drop(block.start_cooldown(handle, &constraints.now))
            }
            Operation::Release(handle, _) => drop(block.release(handle)),
        }
    }
    if block == stored.value {
        // Answered from the cache, it might be about a block that another node has by now.
        if !is_fresh {
            return Err(StoreError::Conflict);
        }
        join_all(handles)
            .await
            .into_iter()
            .collect::<Result<Vec<()>, _>>()?;
        return Ok(Done {
            block: stored.clone(),
            full,
        });
    }
    let changed = Stored {
        value: block,
        revision: stored.revision.clone(),
    };
    // At the same time, so that a pod waits for one round trip. If only one of the two is done, the
    // caller gets an error and releases the handle, which looks for it in all blocks of this node.
    let (written, handled) = tokio::join!(store.update_block(changed), join_all(handles));
    let block = written?;
    handled.into_iter().collect::<Result<Vec<()>, _>>()?;
    Ok(Done { block, full })
}

fn answer(block: Stored<Block>, operations: Vec<Operation>, full: bool) -> WriteOutcome {
    let mut unfinished = Vec::new();
    for operation in operations {
        match operation {
            Operation::Assign(part, reply) => match block.value.of_handle(part.handle()) {
                none if none.is_empty() && full && !reply.is_closed() => {
                    unfinished.push(Operation::Assign(part, reply))
                }
                addresses => drop(reply.send(Ok(whole(addresses)))),
            },
            Operation::Release(_, reply) => drop(reply.send(Ok(()))),
        }
    }
    WriteOutcome {
        cidr: block.value.cidr(),
        block: Some(block),
        unfinished,
    }
}

/// Stand-in for a block that does not exist: a deleted one, which belongs to nobody.
fn gone(cidr: IpNet) -> Stored<Block> {
    let mut spec = Block::new(cidr, "", String::new()).spec().clone();
    spec.deleted = true;
    Stored {
        value: Block::parse(spec).unwrap_or_else(|_| Block::new(cidr, "", String::new())),
        revision: String::new(),
    }
}

/// Reads the blocks that a handle lists.
pub(super) async fn locate<S: Store>(
    store: &NodeObjects<S>,
    handle: &str,
) -> Result<Vec<Stored<Block>>, StoreError> {
    let mut found = Vec::new();
    for cidr in store.handle_blocks(handle.to_owned()).await? {
        found.extend(store.block(cidr).await?);
    }
    Ok(found)
}

/// Releases a handle's addresses from blocks that are not in the cache, and changes nothing else
/// there.
pub(super) async fn release_from<S: Store>(
    store: &NodeObjects<S>,
    handle: &str,
    blocks: Vec<Stored<Block>>,
    constraints: &Constraints,
) -> Result<(), StoreError> {
    for mut stored in blocks {
        for attempt in 0.. {
            let released = match constraints.limits.cooldown {
                0 => stored.value.release(handle),
                _ => stored.value.start_cooldown(handle, &constraints.now),
            };
            if released.is_empty() {
                break;
            }
            match store.update_block(stored.clone()).await {
                Ok(_) => break,
                Err(StoreError::Conflict) if attempt < TRIES => {
                    match store.block(stored.value.cidr()).await? {
                        Some(newer) => stored = newer,
                        None => break,
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Addresses with their full prefix length.
pub(super) fn whole(addresses: Vec<IpAddr>) -> Vec<IpNet> {
    addresses.into_iter().map(IpNet::from).collect()
}
