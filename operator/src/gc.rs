//! Addresses that nobody will give back: of nodes that have left the cluster, and of pods that are gone without a word. Pure: what is due, from what is
//! seen and since when it has been so.
//!
//! Nothing is taken at first sight, and nothing when no node is seen at all: a list can be short by error, and an address that is still in use
//! would be given to another pod.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use margay_api::ipam::block::Block;
use margay_api::v3::ipam::AllocationAttribute;

/// How long a node has been gone before what it had is taken.
pub const NODE_GRACE: SignedDuration = SignedDuration::from_secs(10);
/// How long an address has had no pod before it is taken: the agent of a node gives back by itself, and this is for when it could not.
pub const POD_GRACE: SignedDuration = SignedDuration::from_mins(15);

/// A pod as far as its addresses depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Where it runs.
    pub node: String,
    /// What it says that it has; nothing while it starts.
    pub addresses: BTreeSet<IpAddr>,
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
}

/// Who is suspected of being gone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Suspect {
    Node(String),
    /// An allocation of an address: a later one of the same address is another.
    Address(IpAddr, Option<u64>),
}

/// Since when somebody has been suspected.
#[derive(Clone, Debug, Default)]
pub struct Suspicions(BTreeMap<Suspect, Timestamp>);

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
    /// Its handle.
    pub handle: String,
    /// Who had it: a node that is gone, or a pod.
    pub owner: Owner,
}

/// Who had something.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// A node that is gone.
    Node(String),
    /// A pod, `namespace/name`, that has it no more.
    Pod(String),
}

/// What is due.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// What is to be released in each block.
    pub releases: BTreeMap<IpNet, Vec<Release>>,
    /// Blocks that are empty then, and whose node is gone, or whose deletion has begun.
    pub blocks: BTreeSet<Doomed>,
    /// Claims that are not needed then.
    pub claims: BTreeSet<Claim>,
}

impl Plan {
    /// Nodes that something is taken of, so that they can be asked for once more.
    pub fn nodes(&self) -> BTreeSet<&str> {
        let releases = self.releases.values().flatten().filter_map(|release| match &release.owner {
            Owner::Node(node) => Some(node.as_str()),
            Owner::Pod(_) => None,
        });
        let blocks = self.blocks.iter().filter_map(|block| block.node.as_deref());
        let claims = self.claims.iter().map(|claim| claim.node.as_str());
        releases.chain(blocks).chain(claims).collect()
    }
}

/// What is due now; what is suspected now is remembered.
pub fn plan(seen: &Seen, suspicions: &mut Suspicions, now: Timestamp) -> Plan {
    if seen.nodes.is_empty() {
        suspicions.0.clear();
        return Plan::default();
    }
    let mut judge = Judge { seen, before: std::mem::take(&mut suspicions.0), after: BTreeMap::new(), now };
    let mut plan = Plan::default();
    for block in &seen.blocks {
        let releases: Vec<Release> =
            block.allocated().filter_map(|(address, attribute)| judge.release(block, address, attribute)).collect();
        let is_emptied = releases.len() == block.allocated().count();
        let owner_left = block.node().is_some_and(|node| judge.has_left(node));
        if is_emptied && (owner_left || block.spec().deleted) {
            plan.blocks.insert(Doomed::new(block));
        }
        if !releases.is_empty() {
            plan.releases.insert(block.cidr(), releases);
        }
    }
    let blocks: BTreeMap<IpNet, &Block> = seen.blocks.iter().map(|block| (block.cidr(), block)).collect();
    for claim in &seen.claims {
        let block = blocks.get(&claim.cidr);
        let is_needed = block.is_some_and(|block| {
            block.node() == Some(claim.node.as_str()) && !plan.blocks.contains(&Doomed::new(block))
        });
        if !is_needed && (claim.deleted || judge.has_left(&claim.node)) {
            plan.claims.insert(claim.clone());
        }
    }
    suspicions.0 = judge.after;
    plan
}

struct Judge<'a> {
    seen: &'a Seen,
    before: BTreeMap<Suspect, Timestamp>,
    after: BTreeMap<Suspect, Timestamp>,
    now: Timestamp,
}

impl Judge<'_> {
    fn release(&mut self, block: &Block, address: IpAddr, attribute: &AllocationAttribute) -> Option<Release> {
        let secondary = |key: &str| attribute.secondary.as_ref()?.get(key).map(String::as_str);
        let (node, sequence) = (secondary("node")?, block.sequence(address));
        let owner = if !self.seen.nodes.contains(node) {
            self.has_left(node).then(|| Owner::Node(node.to_owned()))
        } else {
            let pod = format!("{}/{}", secondary("namespace")?, secondary("pod")?);
            let is_due = !self.has(&pod, node, address) && self.is_due(Suspect::Address(address, sequence), POD_GRACE);
            is_due.then_some(Owner::Pod(pod))
        }?;
        let handle = attribute.handle_id.clone().unwrap_or_default();
        Some(Release { address, sequence, handle, owner })
    }

    /// Whether the pod may have the address.
    fn has(&self, pod: &str, node: &str, address: IpAddr) -> bool {
        let says = |pod: &PodFacts| pod.addresses.is_empty() || pod.addresses.contains(&address);
        self.seen.pods.get(pod).is_some_and(|pod| pod.node == node && says(pod))
    }

    fn has_left(&mut self, node: &str) -> bool {
        !self.seen.nodes.contains(node) && self.is_due(Suspect::Node(node.to_owned()), NODE_GRACE)
    }

    fn is_due(&mut self, suspect: Suspect, grace: SignedDuration) -> bool {
        let since = self.before.get(&suspect).copied().unwrap_or(self.now);
        self.after.insert(suspect, since);
        self.now.duration_since(since) >= grace
    }
}

#[cfg(test)]
#[path = "gc_tests.rs"]
mod tests;
