//! Finds leaks of IPAM: addresses and blocks of nodes that have left the cluster, addresses of
//! deleted pods, blocks of deleted pools, and handles without addresses. Pure: from the state that
//! was read, and how long it has been so, to the objects that are due. Handles without the
//! annotation of their node, as Calico writes them, get it, because agents may only write handles
//! of their own node.
//!
//! Nothing is due at first sight, and nothing at all while no node is listed: a list may be
//! incomplete, and the address of a running pod would be assigned to another one. A node that is
//! absent while pods of it are listed may come back (its Node object was deleted and is recreated
//! when kubelet restarts): the addresses of its pods stay, and with them the node's blocks and
//! tunnel addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::v3::ipam::AllocationAttribute;

/// Time that a node has been absent before its addresses are due: longer than Kubernetes' pod
/// garbage collector waits before it deletes the node's pods (quarantine of 40 s, checked every 20
/// s; pkg/controller/podgc), so that their absence is conclusive.
pub const NODE_GRACE: Duration = Duration::from_secs(90);
/// Default time that an address has had no pod before it is due (Calico's `leakGracePeriod`):
/// agents release addresses themselves, and this is for when they could not.
pub const LEAK_GRACE: Duration = Duration::from_secs(15 * 60);
/// Time that a block without a pool has been empty before it is due: agents delete such blocks
/// themselves, and this is for when they are away.
pub const DRAIN_GRACE: Duration = Duration::from_secs(5 * 60);

/// Maximum cooldown of a released address: agents end cooldowns themselves, and this is for when
/// they are away.
pub const COOLDOWN_GRACE: Duration = Duration::from_secs(1200);

/// Settings of the scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanRules {
    /// Time that an address has had no pod before it is due; none: never, as for
    /// `leakGracePeriod: 0`.
    pub leak: Option<Duration>,
    /// True when empty blocks of a node that has another one are due; false where nodes may not
    /// claim new ones themselves.
    pub releases_spare_blocks: bool,
}

impl Default for ScanRules {
    fn default() -> Self {
        Self {
            leak: Some(LEAK_GRACE),
            releases_spare_blocks: true,
        }
    }
}

/// Facts of a pod that its addresses depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Node that it runs on.
    pub node: String,
    /// Addresses that its status and annotations list; none while it starts.
    pub addresses: BTreeSet<IpAddr>,
    /// True when it has ended and only its object is left: then it has no addresses any more.
    pub is_finished: bool,
}

impl PodFacts {
    /// Returns true when the pod may have that address, allocated on that node.
    fn may_have(&self, node: &str, address: IpAddr) -> bool {
        let lists = self.addresses.is_empty() || self.addresses.contains(&address);
        self.node == node && !self.is_finished && lists
    }
}

/// Affinity of a node to a block.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Affinity {
    /// Name of the object.
    pub name: String,
    /// Node that has the affinity.
    pub node: String,
    /// Range of the block.
    pub cidr: IpNet,
    /// True when its deletion has begun.
    pub deleted: bool,
    /// Version of the object: one that has changed since the scan is left alone.
    pub version: String,
}

/// Handle of allocations.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Handle {
    /// Name of the object.
    pub name: String,
    /// The handle as blocks spell it.
    pub id: String,
    /// Node in its annotation, if any.
    pub node: Option<String>,
    /// Blocks that it lists.
    pub blocks: BTreeSet<IpNet>,
    /// Version of the object: one that has changed since the scan is left alone.
    pub version: String,
}

/// A block to delete, as scanned.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockToDelete {
    /// Range of the block.
    pub cidr: IpNet,
    /// The node that it is affine to.
    pub node: Option<String>,
    /// True when its deletion had begun.
    pub deleted: bool,
}

impl BlockToDelete {
    fn new(block: &Block) -> Self {
        Self {
            cidr: block.cidr(),
            node: block.node().map(str::to_owned),
            deleted: block.spec().deleted,
        }
    }

    /// Returns true when the block still has no addresses and is as it was scanned.
    pub fn is_unchanged(&self, block: &Block) -> bool {
        *self == Self::new(block) && block.allocated().next().is_none()
    }
}

/// State of the cluster that a scan reads.
#[derive(Clone, Debug, Default)]
pub struct IpamState {
    /// Names of all nodes.
    pub nodes: BTreeSet<String>,
    /// All pods, by `namespace/name`.
    pub pods: BTreeMap<String, PodFacts>,
    /// All blocks.
    pub blocks: Vec<Block>,
    /// All affinities of nodes.
    pub affinities: Vec<Affinity>,
    /// All handles, listed before blocks: an address is in its block before it is in its handle, so
    /// a new handle is not taken for a leaked one.
    pub handles: Vec<Handle>,
    /// Ranges of all pools, including disabled ones but not those that are being deleted; none
    /// while one is not known.
    pub pools: Option<Vec<IpNet>>,
}

/// Object that is due if it remains a candidate for its grace period.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum LeakCandidate {
    Node(String),
    /// An allocation of an address, by its sequence number: a later one of the same address is
    /// another candidate.
    Address(IpAddr, Option<u64>),
    /// An empty block that is not needed, by the sequence number of its last write.
    Block(IpNet, u64),
    /// A handle without addresses, by name and version.
    Handle(String, String),
}

/// Candidates of the last scan, and when they were found.
#[derive(Clone, Debug, Default)]
pub struct LeakCandidates(BTreeMap<LeakCandidate, Duration>);

impl LeakCandidates {
    /// Returns true when a node is among them.
    pub fn has_node(&self) -> bool {
        self.0
            .keys()
            .any(|candidate| matches!(candidate, LeakCandidate::Node(_)))
    }
}

/// An allocation to release.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// The address.
    pub address: IpAddr,
    /// Sequence number that tells this allocation from later ones.
    pub sequence: Option<u64>,
    /// Its handle; empty for an address in cooldown.
    pub handle: String,
    /// Node of the allocation.
    pub node: String,
    /// Pod of the allocation, `namespace/name`; none: the node itself.
    pub pod: Option<String>,
    /// True when it is due because the node has left the cluster.
    pub has_left: bool,
}

/// Objects that are due.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CollectionPlan {
    /// Addresses to release, by block.
    pub releases: BTreeMap<IpNet, Vec<Release>>,
    /// Blocks to delete, which are empty then: their node or pool is gone, they are spare, or their
    /// deletion has begun.
    pub blocks: BTreeSet<BlockToDelete>,
    /// Affinities to delete after that.
    pub affinities: BTreeSet<Affinity>,
    /// Handles to delete, which have no addresses.
    pub handles: BTreeSet<Handle>,
    /// Handles without the annotation of their node, with the node that has all of their addresses.
    pub handle_nodes: BTreeMap<Handle, String>,
}

impl CollectionPlan {
    /// Nodes of objects that are due, to be read by name.
    pub fn nodes(&self) -> BTreeSet<&str> {
        let releases = self
            .releases
            .values()
            .flatten()
            .filter(|release| release.has_left);
        let blocks = self.blocks.iter().filter_map(|block| block.node.as_deref());
        let affinities = self
            .affinities
            .iter()
            .map(|affinity| affinity.node.as_str());
        releases
            .map(|release| release.node.as_str())
            .chain(blocks)
            .chain(affinities)
            .collect()
    }

    /// Pods of addresses that are due, to be read by name.
    pub fn pods(&self) -> BTreeSet<&str> {
        self.releases
            .values()
            .flatten()
            .filter_map(|release| release.pod.as_deref())
            .collect()
    }

    /// Removes what the reads by name disprove: `existing` are nodes that the list lacked and that
    /// exist; `verified` has the pods that were read by name, with their facts if they exist. A pod
    /// that was not read keeps its addresses.
    pub fn retain_confirmed(
        &mut self,
        existing: &BTreeSet<String>,
        verified: &BTreeMap<String, Option<PodFacts>>,
    ) {
        let keeps = |release: &Release| {
            let pod = release.pod.as_ref().map(|pod| verified.get(pod));
            pod.is_some_and(|found| match found {
                None => true,
                Some(facts) => facts
                    .as_ref()
                    .is_some_and(|pod| pod.may_have(&release.node, release.address)),
            })
        };
        let kept = self
            .releases
            .values()
            .flatten()
            .filter(|release| release.has_left && keeps(release));
        let mut staying: BTreeSet<String> = kept.map(|release| release.node.clone()).collect();
        staying.extend(existing.iter().cloned());
        let stays = |release: &Release| {
            keeps(release) || (release.has_left && staying.contains(&release.node))
        };
        for releases in self.releases.values_mut() {
            releases.retain(|release| !stays(release));
        }
        self.releases.retain(|_, releases| !releases.is_empty());
        self.blocks.retain(|block| {
            block
                .node
                .as_ref()
                .is_none_or(|node| !staying.contains(node))
        });
        self.affinities
            .retain(|affinity| !staying.contains(&affinity.node));
    }
}

/// Returns the objects that are due at `now`, on a monotonic clock, and updates the candidates.
pub fn plan(
    state: &IpamState,
    rules: ScanRules,
    candidates: &mut LeakCandidates,
    now: Duration,
) -> CollectionPlan {
    if state.nodes.is_empty() {
        candidates.0.clear();
        return CollectionPlan::default();
    }
    let inhabited = inhabited(state);
    let mut scan = LeakScan {
        state,
        rules,
        inhabited,
        before: std::mem::take(&mut candidates.0),
        after: BTreeMap::new(),
        now,
    };
    let mut plan = CollectionPlan::default();
    let used = state
        .blocks
        .iter()
        .filter(|block| block.allocated().next().is_some());
    let mut staying: BTreeSet<(&str, bool)> = used
        .filter_map(|block| Some((block.node()?, is_v4(block))))
        .collect();
    for block in &state.blocks {
        let releases: Vec<Release> = block
            .allocated()
            .filter_map(|(address, attribute)| scan.find_release(block, address, attribute))
            .collect();
        let is_emptied = releases.len() == block.allocated().count();
        if is_emptied && scan.is_unneeded(block, &staying) {
            plan.blocks.insert(BlockToDelete::new(block));
        } else {
            staying.extend(block.node().map(|node| (node, is_v4(block))));
        }
        if !releases.is_empty() {
            plan.releases.insert(block.cidr(), releases);
        }
    }
    plan.affinities = scan.find_affinities(&plan.blocks);
    plan.handles = scan.find_handles();
    plan.handle_nodes = find_handle_nodes(state);
    candidates.0 = scan.after;
    plan
}

/// Returns the nodes of handles without the annotation: the node that has an address with the
/// handle in the blocks that the handle lists. If two nodes have one, one of them poses as the
/// other, and the handle gets none.
fn find_handle_nodes(state: &IpamState) -> BTreeMap<Handle, String> {
    let unowned = state.handles.iter().filter(|handle| handle.node.is_none());
    let unowned: BTreeMap<&str, &Handle> =
        unowned.map(|handle| (handle.id.as_str(), handle)).collect();
    let mut nodes: BTreeMap<&Handle, BTreeSet<&str>> = BTreeMap::new();
    for block in state.blocks.iter().filter(|_| !unowned.is_empty()) {
        for (_, attribute) in block.allocated() {
            let handle = attribute
                .handle_id
                .as_deref()
                .and_then(|id| unowned.get(id));
            let handle = handle.filter(|handle| handle.blocks.contains(&block.cidr()));
            if let (Some(handle), Some(node)) = (handle, secondary(attribute, "node")) {
                nodes.entry(handle).or_default().insert(node);
            }
        }
    }
    let single = nodes.into_iter().filter(|(_, nodes)| nodes.len() == 1);
    single
        .filter_map(|(handle, nodes)| Some((handle.clone(), (*nodes.first()?).to_owned())))
        .collect()
}

/// Returns the absent nodes with a listed pod that may have one of their addresses.
fn inhabited(state: &IpamState) -> BTreeSet<&str> {
    let mut nodes = BTreeSet::new();
    for (address, attribute) in state.blocks.iter().flat_map(Block::allocated) {
        if let Some(node) = secondary(attribute, "node")
            && !state.nodes.contains(node)
            && pod_of(attribute).is_some_and(|pod| has_address(state, &pod, node, address))
        {
            nodes.insert(node);
        }
    }
    nodes
}

fn is_v4(block: &Block) -> bool {
    matches!(block.cidr(), IpNet::V4(_))
}

fn secondary<'a>(attribute: &'a AllocationAttribute, key: &str) -> Option<&'a str> {
    attribute.secondary.as_ref()?.get(key).map(String::as_str)
}

fn pod_of(attribute: &AllocationAttribute) -> Option<String> {
    Some(format!(
        "{}/{}",
        secondary(attribute, "namespace")?,
        secondary(attribute, "pod")?
    ))
}

/// Returns true when the pod may have the address.
fn has_address(state: &IpamState, pod: &str, node: &str, address: IpAddr) -> bool {
    state
        .pods
        .get(pod)
        .is_some_and(|pod| pod.may_have(node, address))
}

struct LeakScan<'a> {
    state: &'a IpamState,
    rules: ScanRules,
    /// Absent nodes whose pods still exist.
    inhabited: BTreeSet<&'a str>,
    before: BTreeMap<LeakCandidate, Duration>,
    after: BTreeMap<LeakCandidate, Duration>,
    now: Duration,
}

impl LeakScan<'_> {
    fn find_release(
        &mut self,
        block: &Block,
        address: IpAddr,
        attribute: &AllocationAttribute,
    ) -> Option<Release> {
        if attribute.released_at.is_some() {
            let sequence = block.sequence(address);
            let is_over = self.is_due(LeakCandidate::Address(address, sequence), COOLDOWN_GRACE);
            let (handle, node) = (String::new(), block.node().unwrap_or_default().to_owned());
            return is_over.then_some(Release {
                address,
                sequence,
                handle,
                node,
                pod: None,
                has_left: false,
            });
        }
        let (node, sequence) = (secondary(attribute, "node")?, block.sequence(address));
        let pod = pod_of(attribute);
        let has_left = self.has_left(node);
        if !has_left {
            let pod = pod.as_ref()?;
            let is_leaked = !has_address(self.state, pod, node, address);
            let grace = self.rules.leak.filter(|_| is_leaked)?;
            if !self.is_due(LeakCandidate::Address(address, sequence), grace) {
                return None;
            }
        }
        let handle = attribute.handle_id.clone().unwrap_or_default();
        Some(Release {
            address,
            sequence,
            handle,
            node: node.to_owned(),
            pod,
            has_left,
        })
    }

    /// Returns true when a block that is empty, or will be, is due. `staying` are nodes that keep
    /// another block, of IPv4 (true) or IPv6.
    fn is_unneeded(&mut self, block: &Block, staying: &BTreeSet<(&str, bool)>) -> bool {
        if block.spec().deleted {
            return true;
        }
        let is_empty = block.allocated().next().is_none();
        let candidate = LeakCandidate::Block(block.cidr(), block.spec().sequence_number);
        let Some(node) = block.node() else {
            // Calico leaves a block without affinity when its pool is deleted while addresses are
            // in use. An affinity that is not a node's may be one for Services.
            let has_no_affinity = block.spec().affinity.as_deref().is_none_or(str::is_empty);
            return is_empty && has_no_affinity && self.is_due(candidate, DRAIN_GRACE);
        };
        if self.has_left(node) {
            return true;
        }
        let has_pool = |pools: &Vec<IpNet>| pools.iter().any(|pool| pool.contains(&block.cidr()));
        let is_stray = self
            .state
            .pools
            .as_ref()
            .is_some_and(|pools| !has_pool(pools));
        let is_spare = self.rules.releases_spare_blocks && staying.contains(&(node, is_v4(block)));
        let grace = if is_stray {
            Some(DRAIN_GRACE)
        } else {
            self.rules.leak.filter(|_| is_spare)
        };
        is_empty && grace.is_some_and(|grace| self.is_due(candidate, grace))
    }

    fn find_affinities(&mut self, deleted: &BTreeSet<BlockToDelete>) -> BTreeSet<Affinity> {
        let state = self.state;
        let blocks: BTreeMap<IpNet, &Block> = state
            .blocks
            .iter()
            .map(|block| (block.cidr(), block))
            .collect();
        let mut unneeded = BTreeSet::new();
        for affinity in &state.affinities {
            let block = blocks
                .get(&affinity.cidr)
                .filter(|block| block.node() == Some(affinity.node.as_str()));
            let goes_with_block =
                block.is_some_and(|block| deleted.contains(&BlockToDelete::new(block)));
            let has_no_block =
                block.is_none() && (affinity.deleted || self.has_left(&affinity.node));
            if goes_with_block || has_no_block {
                unneeded.insert(affinity.clone());
            }
        }
        unneeded
    }

    /// Returns the handles that no block has addresses of, and that have not been written since.
    fn find_handles(&mut self) -> BTreeSet<Handle> {
        let state = self.state;
        let Some(grace) = self.rules.leak else {
            return BTreeSet::new();
        };
        let used: BTreeSet<&str> = state
            .blocks
            .iter()
            .flat_map(Block::allocated)
            .filter_map(|(_, attribute)| attribute.handle_id.as_deref())
            .collect();
        let unused = state
            .handles
            .iter()
            .filter(|handle| !used.contains(handle.id.as_str()));
        let candidate =
            |handle: &Handle| LeakCandidate::Handle(handle.name.clone(), handle.version.clone());
        unused
            .filter(|handle| self.is_due(candidate(handle), grace))
            .cloned()
            .collect()
    }

    /// Returns true when the node has been absent for its grace period, and none of its pods is
    /// left.
    fn has_left(&mut self, node: &str) -> bool {
        let is_absent = !self.state.nodes.contains(node);
        is_absent
            && self.is_due(LeakCandidate::Node(node.to_owned()), NODE_GRACE)
            && !self.inhabited.contains(node)
    }

    fn is_due(&mut self, candidate: LeakCandidate, grace: Duration) -> bool {
        let since = self.before.get(&candidate).copied().unwrap_or(self.now);
        self.after.insert(candidate, since);
        self.now.saturating_sub(since) >= grace
    }
}

#[cfg(test)]
mod tests;
