//! Addresses and blocks that nobody will give back: of nodes that have left the cluster, of pods that are gone without a word, of pools that are
//! gone; and handles that name nothing. Pure: what is due, from what is seen and since when it has been so. Handles that say of no node that they are its own, as
//! Calico writes them, are found an owner, because agents may touch their own only.
//!
//! Nothing is taken at first sight, and nothing when no node is seen at all: a list can be short by error, and an address that is still in use
//! would be given to another pod. A node that is absent while pods of it are listed may be about to come back (its Node object was deleted and is made
//! again when kubelet restarts): what its pods have stays, and with it the node's blocks and tunnel addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::v3::ipam::AllocationAttribute;

/// How long a node has been absent before what it had is taken: longer than Kubernetes' own collector waits before it deletes the node's pods (a
/// quarantine of 40 s, looked at every 20 s), so that their absence says something.
pub const NODE_GRACE: Duration = Duration::from_secs(90);
/// How long an address has had no pod before it is taken, where settings do not say: the agent of a node gives back by itself, and this is for when
/// it could not.
pub const LEAK_GRACE: Duration = Duration::from_secs(15 * 60);
/// How long a block has been empty without a pool before it is given back: agents do so by themselves, and this is for when they are away.
pub const DRAIN_GRACE: Duration = Duration::from_secs(5 * 60);

/// How long an address that was given back rests at most, whatever the cooldown is: nodes put an end to it by themselves, and this is for when they are away.
pub const REST_GRACE: Duration = Duration::from_secs(1200);

/// What settings say of collecting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How long an address has had no pod before it is taken; none: it is never taken, as `leakGracePeriod: 0` says.
    pub leak: Option<Duration>,
    /// Whether empty blocks that a node has beside another one are given back: not where nodes may not claim new ones by themselves.
    pub gives_back_spare: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self { leak: Some(LEAK_GRACE), gives_back_spare: true }
    }
}

/// A pod as far as its addresses depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Where it runs.
    pub node: String,
    /// What it says that it has; nothing while it starts.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether it has ended and only its object is left: then it has no address any more.
    pub is_finished: bool,
}

impl PodFacts {
    /// Whether the pod may have that address, of an allocation of that node.
    fn may_have(&self, node: &str, address: IpAddr) -> bool {
        let says = self.addresses.is_empty() || self.addresses.contains(&address);
        self.node == node && !self.is_finished && says
    }
}

/// A node's claim on a block.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    /// Name of the object.
    pub name: String,
    /// Who claims.
    pub node: String,
    /// What.
    pub cidr: IpNet,
    /// Whether its deletion has begun.
    pub deleted: bool,
    /// Its version: what has changed since it was judged is judged again.
    pub version: String,
}

/// A handle: what its owner is known by in blocks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Handle {
    /// Name of the object.
    pub name: String,
    /// As blocks spell it.
    pub id: String,
    /// The node whose own it says to be, if any.
    pub node: Option<String>,
    /// Blocks that it names.
    pub blocks: BTreeSet<IpNet>,
    /// Its version: what has changed since it was judged is judged again.
    pub version: String,
}

/// A block that is to be deleted, as it was judged.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Doomed {
    /// Which.
    pub cidr: IpNet,
    /// The node that it is affine to.
    pub node: Option<String>,
    /// Whether its deletion had begun.
    pub deleted: bool,
}

impl Doomed {
    fn new(block: &Block) -> Self {
        Self { cidr: block.cidr(), node: block.node().map(str::to_owned), deleted: block.spec().deleted }
    }

    /// Whether the block as it is now may go on the ground on which the one that was seen was judged.
    pub fn is_still(&self, block: &Block) -> bool {
        *self == Self::new(block) && block.allocated().next().is_none()
    }
}

/// What there is.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Names of all nodes.
    pub nodes: BTreeSet<String>,
    /// All pods, by `namespace/name`.
    pub pods: BTreeMap<String, PodFacts>,
    /// All blocks.
    pub blocks: Vec<Block>,
    /// All claims of nodes.
    pub claims: Vec<Claim>,
    /// All handles, listed before blocks: an address is in its block before it is in its handle.
    pub handles: Vec<Handle>,
    /// Ranges of all pools, also of disabled ones, but not of those that are being deleted; none while they are not known.
    pub pools: Option<Vec<IpNet>>,
}

/// Who is suspected of being gone, or of no use.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Suspect {
    Node(String),
    /// An allocation of an address: a later one of the same address is another.
    Address(IpAddr, Option<u64>),
    /// A block that is empty and not needed, as of a write of it.
    Block(IpNet, u64),
    /// A handle without addresses, by name and version.
    Handle(String, String),
}

/// Since when somebody has been suspected.
#[derive(Clone, Debug, Default)]
pub struct Suspicions(BTreeMap<Suspect, Duration>);

impl Suspicions {
    /// Whether a node is among them.
    pub fn has_node(&self) -> bool {
        self.0.keys().any(|suspect| matches!(suspect, Suspect::Node(_)))
    }
}

/// An allocation that is to be released.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// The address.
    pub address: IpAddr,
    /// Tells this allocation of it from later ones.
    pub sequence: Option<u64>,
    /// Its handle; empty where the address only rests.
    pub handle: String,
    /// The node that has it.
    pub node: String,
    /// The pod that had it, `namespace/name`; none: the node itself.
    pub pod: Option<String>,
    /// Whether it is due because the node has left.
    pub has_left: bool,
}

/// What is due.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// What is to be released in each block.
    pub releases: BTreeMap<IpNet, Vec<Release>>,
    /// Blocks that are empty then, and whose node or pool is gone, that are spare, or whose deletion has begun.
    pub blocks: BTreeSet<Doomed>,
    /// Claims that are not needed then.
    pub claims: BTreeSet<Claim>,
    /// Handles that name nothing.
    pub handles: BTreeSet<Handle>,
    /// Handles that do not say whose they are, with the node that has all of their addresses.
    pub owners: BTreeMap<Handle, String>,
}

impl Plan {
    /// Nodes that something is taken of, so that they can be asked for once more.
    pub fn nodes(&self) -> BTreeSet<&str> {
        let releases = self.releases.values().flatten().filter(|release| release.has_left);
        let blocks = self.blocks.iter().filter_map(|block| block.node.as_deref());
        let claims = self.claims.iter().map(|claim| claim.node.as_str());
        releases.map(|release| release.node.as_str()).chain(blocks).chain(claims).collect()
    }

    /// Pods that addresses are taken of, so that they can be asked for once more.
    pub fn pods(&self) -> BTreeSet<&str> {
        self.releases.values().flatten().filter_map(|release| release.pod.as_deref()).collect()
    }

    /// Takes out what must stay by a second answer: `back` are nodes that were not in the list and are there; `asked` has the pods that were asked for
    /// by name, with what they are if they are there. A pod that was not asked for keeps what it has.
    pub fn spare(&mut self, back: &BTreeSet<String>, asked: &BTreeMap<String, Option<PodFacts>>) {
        let keeps = |release: &Release| {
            let pod = release.pod.as_ref().map(|pod| asked.get(pod));
            pod.is_some_and(|answer| match answer {
                None => true,
                Some(facts) => facts.as_ref().is_some_and(|pod| pod.may_have(&release.node, release.address)),
            })
        };
        let kept = self.releases.values().flatten().filter(|release| release.has_left && keeps(release));
        let mut staying: BTreeSet<String> = kept.map(|release| release.node.clone()).collect();
        staying.extend(back.iter().cloned());
        let stays = |release: &Release| keeps(release) || (release.has_left && staying.contains(&release.node));
        for releases in self.releases.values_mut() {
            releases.retain(|release| !stays(release));
        }
        self.releases.retain(|_, releases| !releases.is_empty());
        self.blocks.retain(|block| block.node.as_ref().is_none_or(|node| !staying.contains(node)));
        self.claims.retain(|claim| !staying.contains(&claim.node));
    }
}

/// What is due at `now`, on a clock that no setting of the time moves; what is suspected is remembered.
pub fn plan(seen: &Seen, rules: Rules, suspicions: &mut Suspicions, now: Duration) -> Plan {
    if seen.nodes.is_empty() {
        suspicions.0.clear();
        return Plan::default();
    }
    let inhabited = inhabited(seen);
    let mut judge =
        Judge { seen, rules, inhabited, before: std::mem::take(&mut suspicions.0), after: BTreeMap::new(), now };
    let mut plan = Plan::default();
    let used = seen.blocks.iter().filter(|block| block.allocated().next().is_some());
    let mut staying: BTreeSet<(&str, bool)> = used.filter_map(|block| Some((block.node()?, is_v4(block)))).collect();
    for block in &seen.blocks {
        let releases: Vec<Release> =
            block.allocated().filter_map(|(address, attribute)| judge.release(block, address, attribute)).collect();
        let is_emptied = releases.len() == block.allocated().count();
        if is_emptied && judge.is_unneeded(block, &staying) {
            plan.blocks.insert(Doomed::new(block));
        } else {
            staying.extend(block.node().map(|node| (node, is_v4(block))));
        }
        if !releases.is_empty() {
            plan.releases.insert(block.cidr(), releases);
        }
    }
    plan.claims = judge.claims(&plan.blocks);
    plan.handles = judge.handles();
    plan.owners = owners(seen);
    suspicions.0 = judge.after;
    plan
}

/// Owners of handles that say of none: the node that has an address under the handle in the blocks that the handle names. Where two nodes have,
/// one of them poses as the other, and it is left open which.
fn owners(seen: &Seen) -> BTreeMap<Handle, String> {
    let unowned = seen.handles.iter().filter(|handle| handle.node.is_none());
    let unowned: BTreeMap<&str, &Handle> = unowned.map(|handle| (handle.id.as_str(), handle)).collect();
    let mut nodes: BTreeMap<&Handle, BTreeSet<&str>> = BTreeMap::new();
    for block in seen.blocks.iter().filter(|_| !unowned.is_empty()) {
        for (_, attribute) in block.allocated() {
            let handle = attribute.handle_id.as_deref().and_then(|id| unowned.get(id));
            let handle = handle.filter(|handle| handle.blocks.contains(&block.cidr()));
            if let (Some(handle), Some(node)) = (handle, secondary(attribute, "node")) {
                nodes.entry(handle).or_default().insert(node);
            }
        }
    }
    let single = nodes.into_iter().filter(|(_, nodes)| nodes.len() == 1);
    single.filter_map(|(handle, nodes)| Some((handle.clone(), (*nodes.first()?).to_owned()))).collect()
}

/// Absent nodes of which a pod is listed that may have an address.
fn inhabited(seen: &Seen) -> BTreeSet<&str> {
    let mut nodes = BTreeSet::new();
    for (address, attribute) in seen.blocks.iter().flat_map(Block::allocated) {
        if let Some(node) = secondary(attribute, "node")
            && !seen.nodes.contains(node)
            && pod_of(attribute).is_some_and(|pod| has(seen, &pod, node, address))
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
    Some(format!("{}/{}", secondary(attribute, "namespace")?, secondary(attribute, "pod")?))
}

/// Whether the pod may have the address.
fn has(seen: &Seen, pod: &str, node: &str, address: IpAddr) -> bool {
    seen.pods.get(pod).is_some_and(|pod| pod.may_have(node, address))
}

struct Judge<'a> {
    seen: &'a Seen,
    rules: Rules,
    /// Absent nodes whose pods are still there.
    inhabited: BTreeSet<&'a str>,
    before: BTreeMap<Suspect, Duration>,
    after: BTreeMap<Suspect, Duration>,
    now: Duration,
}

impl Judge<'_> {
    fn release(&mut self, block: &Block, address: IpAddr, attribute: &AllocationAttribute) -> Option<Release> {
        if attribute.released_at.is_some() {
            let sequence = block.sequence(address);
            let is_over = self.is_due(Suspect::Address(address, sequence), REST_GRACE);
            let (handle, node) = (String::new(), block.node().unwrap_or_default().to_owned());
            return is_over.then_some(Release { address, sequence, handle, node, pod: None, has_left: false });
        }
        let (node, sequence) = (secondary(attribute, "node")?, block.sequence(address));
        let pod = pod_of(attribute);
        let has_left = self.has_left(node);
        if !has_left {
            let pod = pod.as_ref()?;
            let is_leaked = !has(self.seen, pod, node, address);
            let grace = self.rules.leak.filter(|_| is_leaked)?;
            if !self.is_due(Suspect::Address(address, sequence), grace) {
                return None;
            }
        }
        let handle = attribute.handle_id.clone().unwrap_or_default();
        Some(Release { address, sequence, handle, node: node.to_owned(), pod, has_left })
    }

    /// Whether a block that is empty, or will be, may go. `staying`: nodes that keep another block, of IPv4 (true) or IPv6.
    fn is_unneeded(&mut self, block: &Block, staying: &BTreeSet<(&str, bool)>) -> bool {
        if block.spec().deleted {
            return true;
        }
        let is_empty = block.allocated().next().is_none();
        let suspect = Suspect::Block(block.cidr(), block.spec().sequence_number);
        let Some(node) = block.node() else {
            // Calico leaves one behind where a pool goes while its addresses are in use. What is not a node's may be for Services.
            let is_nobodys = block.spec().affinity.as_deref().is_none_or(str::is_empty);
            return is_empty && is_nobodys && self.is_due(suspect, DRAIN_GRACE);
        };
        if self.has_left(node) {
            return true;
        }
        let has_pool = |pools: &Vec<IpNet>| pools.iter().any(|pool| pool.contains(&block.cidr()));
        let is_stray = self.seen.pools.as_ref().is_some_and(|pools| !has_pool(pools));
        let is_spare = self.rules.gives_back_spare && staying.contains(&(node, is_v4(block)));
        let grace = if is_stray { Some(DRAIN_GRACE) } else { self.rules.leak.filter(|_| is_spare) };
        is_empty && grace.is_some_and(|grace| self.is_due(suspect, grace))
    }

    fn claims(&mut self, doomed: &BTreeSet<Doomed>) -> BTreeSet<Claim> {
        let seen = self.seen;
        let blocks: BTreeMap<IpNet, &Block> = seen.blocks.iter().map(|block| (block.cidr(), block)).collect();
        let mut unneeded = BTreeSet::new();
        for claim in &seen.claims {
            let block = blocks.get(&claim.cidr).filter(|block| block.node() == Some(claim.node.as_str()));
            let goes_with_block = block.is_some_and(|block| doomed.contains(&Doomed::new(block)));
            let is_vain = block.is_none() && (claim.deleted || self.has_left(&claim.node));
            if goes_with_block || is_vain {
                unneeded.insert(claim.clone());
            }
        }
        unneeded
    }

    /// Handles under which no block has an address any more, and which nobody has written since.
    fn handles(&mut self) -> BTreeSet<Handle> {
        let seen = self.seen;
        let Some(grace) = self.rules.leak else {
            return BTreeSet::new();
        };
        let used: BTreeSet<&str> = seen
            .blocks
            .iter()
            .flat_map(Block::allocated)
            .filter_map(|(_, attribute)| attribute.handle_id.as_deref())
            .collect();
        let unused = seen.handles.iter().filter(|handle| !used.contains(handle.id.as_str()));
        let suspect = |handle: &Handle| Suspect::Handle(handle.name.clone(), handle.version.clone());
        unused.filter(|handle| self.is_due(suspect(handle), grace)).cloned().collect()
    }

    /// Whether the node has been absent for long enough, and no pod of it is left.
    fn has_left(&mut self, node: &str) -> bool {
        let is_absent = !self.seen.nodes.contains(node);
        is_absent && self.is_due(Suspect::Node(node.to_owned()), NODE_GRACE) && !self.inhabited.contains(node)
    }

    fn is_due(&mut self, suspect: Suspect, grace: Duration) -> bool {
        let since = self.before.get(&suspect).copied().unwrap_or(self.now);
        self.after.insert(suspect, since);
        self.now.saturating_sub(since) >= grace
    }
}

#[cfg(test)]
#[path = "gc_tests.rs"]
mod tests;
