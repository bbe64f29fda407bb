//! One write of a block with many operations in it, and what becomes of each.

use std::time::Duration;

use futures::future::join_all;
use ipnet::IpNet;
use margay_api::ipam::block::Block;

use super::allocator::{AssignReply, Part, ReleaseReply, whole};
use super::known::Heed;
use super::node_objects::{NodeObjects, Stored};
use super::request::NoAddress;
use super::store::{Store, StoreError};

/// How often a write is tried before those who wait for it are told that storage is unavailable.
const TRIES: u32 = 5;
/// Delay before the second try after an error that is not a conflict; it doubles.
const DELAY: Duration = Duration::from_millis(100);

/// Something that is asked of a block, and who waits for it.
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

/// What a write came to.
pub(super) struct Written {
    pub(super) cidr: IpNet,
    /// The block as it is now, if that is known.
    pub(super) block: Option<Stored<Block>>,
    /// Operations that another block must do: this one is full, or not ours any more.
    pub(super) unfinished: Vec<Operation>,
}

/// Does the operations in one write. On a conflict the block is read again and the operations are done anew on what it is now: an assignment
/// that did get through is found by its handle. What needs no write is answered from a block that has been read for it, as nothing else would tell that the cache
/// is old.
pub(super) async fn commit<S: Store>(
    store: &NodeObjects<S>,
    mut stored: Stored<Block>,
    operations: Vec<Operation>,
    heed: &Heed,
) -> Written {
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
                    return Written { cidr, block: block.or(Some(gone(cidr))), unfinished: operations };
                }
                Err(error) => {
                    failure = error;
                    continue;
                }
            }
        }
        if attempt == 0 && operations.iter().any(|operation| misses(&stored.value, operation)) {
            failure = StoreError::Conflict;
            continue;
        }
        match write(store, &stored, &operations, heed, attempt > 0).await {
            Ok(Done { block, full }) => return answer(block, operations, full),
            Err(error) => failure = error,
        }
    }
    for operation in operations {
        operation.fail(NoAddress::Unavailable(format!(
            "IPAM block {cidr} could not be written: {failure}; the runtime will try again"
        )));
    }
    Written { cidr, block: None, unfinished: Vec::new() }
}

/// Whether what is to be released is not there, as far as the cache knows: an address that a pod names is taken behind its back.
fn misses(block: &Block, operation: &Operation) -> bool {
    matches!(operation, Operation::Release(handle, _) if block.of_handle(handle).is_empty())
}

struct Done {
    block: Stored<Block>,
    /// Whether an assignment found no room.
    full: bool,
}

async fn write<S: Store>(
    store: &NodeObjects<S>,
    stored: &Stored<Block>,
    operations: &[Operation],
    heed: &Heed,
    is_fresh: bool,
) -> Result<Done, StoreError> {
    let mut block = stored.value.clone();
    block.end_cooldown(|since| heed.is_over(since));
    let (mut full, mut handles) = (false, Vec::new());
    for operation in operations {
        match operation {
            Operation::Assign(part, reply) if !reply.is_closed() => {
                if block.of_handle(part.handle()).is_empty() {
                    full |= block.assign(&part.attribute, |address| heed.is_reserved(address)).is_none();
                }
                if !part.recorded.is_empty() {
                    handles.push(store.put_handle(part.handle().to_owned(), part.recorded.clone()));
                }
            }
            Operation::Assign(..) => {}
            Operation::Release(handle, _) if heed.limits.cooldown > 0 => drop(block.start_cooldown(handle, &heed.now)),
            Operation::Release(handle, _) => drop(block.release(handle)),
        }
    }
    if block == stored.value {
        if !is_fresh {
            return Err(StoreError::Conflict);
        }
        join_all(handles).await.into_iter().collect::<Result<Vec<()>, _>>()?;
        return Ok(Done { block: stored.clone(), full });
    }
    let changed = Stored { value: block, revision: stored.revision.clone() };
    let (written, handled) = tokio::join!(store.update_block(changed), join_all(handles));
    let block = written?;
    handled.into_iter().collect::<Result<Vec<()>, _>>()?;
    Ok(Done { block, full })
}

fn answer(block: Stored<Block>, operations: Vec<Operation>, full: bool) -> Written {
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
    Written { cidr: block.value.cidr(), block: Some(block), unfinished }
}

/// A block that belongs to nobody, in the place of one that does not exist.
fn gone(cidr: IpNet) -> Stored<Block> {
    let mut spec = Block::new(cidr, "", String::new()).spec().clone();
    spec.deleted = true;
    Stored {
        value: Block::parse(spec).unwrap_or_else(|_| Block::new(cidr, "", String::new())),
        revision: String::new(),
    }
}

/// The blocks that a handle's object names.
pub(super) async fn locate<S: Store>(store: &NodeObjects<S>, handle: &str) -> Result<Vec<Stored<Block>>, StoreError> {
    let mut found = Vec::new();
    for cidr in store.handle_blocks(handle.to_owned()).await? {
        found.extend(store.block(cidr).await?);
    }
    Ok(found)
}

/// Releases a handle's addresses from blocks that are not in the cache. Nothing else changes there.
pub(super) async fn release_from<S: Store>(
    store: &NodeObjects<S>,
    handle: &str,
    blocks: Vec<Stored<Block>>,
    heed: &Heed,
) -> Result<(), StoreError> {
    for mut stored in blocks {
        for attempt in 0.. {
            let released = match heed.limits.cooldown {
                0 => stored.value.release(handle),
                _ => stored.value.start_cooldown(handle, &heed.now),
            };
            if released.is_empty() {
                break;
            }
            match store.update_block(stored.clone()).await {
                Ok(_) => break,
                Err(StoreError::Conflict) if attempt < TRIES => match store.block(stored.value.cidr()).await? {
                    Some(newer) => stored = newer,
                    None => break,
                },
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}
