//! Carries out the verdicts of [`crate::gc`]: looks at all there is from time to time, and soon after a node has left; asks once more for whom something is
//! taken of; takes nothing that has changed since it was looked at; and writes nothing while the data is locked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::Api;
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::meta::ANNOTATION_POD_IPS;
use margay_api::storage::Mode;
use margay_api::v3::{BlockAffinity, ClusterInformation, IPAMBlock, IPAMHandle, SINGLETON};
use margay_runtime::shutdown::Shutdown;
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::apply::has_node;
use crate::gc::{self, Claim, Doomed, Owner, Plan, PodFacts, Release, Seen, Suspicions};
use crate::objects::{Objects, StoreError, pages};

/// Between looks when nothing happens.
const PERIOD: Duration = Duration::from_secs(300);
/// After a node has left: a little more than what it is given to come back.
const SOON: Duration = Duration::from_secs(12);

/// Looks and takes while this operator leads. Ends with the process.
pub async fn run(client: Client, mode: Mode, mut leading: watch::Receiver<bool>, shutdown: Shutdown) {
    let mut collector = Collector::new(client.clone(), mode);
    let mut suspicions = Suspicions::default();
    let left = Arc::new(Notify::new());
    let watched = tokio::spawn(departures(client, left.clone()));
    let mut pause = Duration::ZERO;
    loop {
        tokio::select! {
            () = shutdown.wait() => break,
            () = tokio::time::sleep(pause) => {}
            () = left.notified() => {}
            _ = leading.changed() => {}
        }
        pause = PERIOD;
        if !*leading.borrow_and_update() {
            suspicions = Suspicions::default();
            collector.owed.clear();
            continue;
        }
        match collector.round(&mut suspicions).await {
            Ok(true) => pause = SOON,
            Ok(false) => {}
            Err(error) => warn!(%error, "addresses that nobody will give back are not looked for now; tried again"),
        }
    }
    watched.abort();
}

/// Rings whenever a node has left.
async fn departures(client: Client, bell: Arc<Notify>) {
    let nodes: Api<PartialObjectMeta<Node>> = Api::all(client);
    let mut events = std::pin::pin!(watcher(nodes, watcher::Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        if matches!(event, Ok(watcher::Event::Delete(_))) {
            bell.notify_one();
        }
    }
}

struct Collector {
    client: Client,
    blocks: Objects<IPAMBlock>,
    claims: Objects<BlockAffinity>,
    handles: Objects<IPAMHandle>,
    informations: Objects<ClusterInformation>,
    /// Handles that have lost their addresses in a block, and may name it still.
    owed: BTreeMap<IpNet, BTreeSet<String>>,
}

impl Collector {
    fn new(client: Client, mode: Mode) -> Self {
        Self {
            blocks: Objects::new(&client, mode, "IPAMBlock"),
            claims: Objects::new(&client, mode, "BlockAffinity"),
            handles: Objects::new(&client, mode, "IPAMHandle"),
            informations: Objects::new(&client, mode, "ClusterInformation"),
            client,
            owed: BTreeMap::new(),
        }
    }

    /// One look. Answers whether a node is suspected, so that the next look should be soon.
    async fn round(&mut self, suspicions: &mut Suspicions) -> Result<bool, StoreError> {
        let information = self.informations.get(SINGLETON).await?;
        if information.is_some_and(|information| information.spec.datastore_ready == Some(false)) {
            return Ok(false);
        }
        let seen = self.look().await?;
        let plan = gc::plan(&seen, suspicions, Timestamp::now());
        let mut back = BTreeSet::new();
        for node in plan.nodes() {
            if !seen.nodes.contains(node) && has_node(&self.client, node).await? {
                back.insert(node.to_owned());
            }
        }
        self.exec(&plan, &back).await;
        Ok(suspicions.has_node())
    }

    async fn look(&self) -> Result<Seen, StoreError> {
        let blocks = self.blocks.list().await?.into_iter();
        let claims = self.claims.list().await?.into_iter();
        // Nodes and pods after blocks: who got an address meanwhile is seen, and nothing is suspected for want of him.
        let pods = pages(&Api::<Pod>::all(self.client.clone()), pod_facts).await?;
        let nodes = pages(&Api::<Node>::all(self.client.clone()), |node| node.name_any()).await?;
        let block = |object: IPAMBlock| match Block::parse(object.spec) {
            Ok(block) => Some(block),
            Err(fault) => {
                warn!(%fault, "left alone");
                None
            }
        };
        Ok(Seen {
            nodes: nodes.into_iter().collect(),
            pods: pods.into_iter().collect(),
            blocks: blocks.filter_map(block).collect(),
            claims: claims.filter_map(|object| claim(&object)).collect(),
        })
    }

    /// What fails is tried again after the next look.
    async fn exec(&mut self, plan: &Plan, back: &BTreeSet<String>) {
        for (cidr, releases) in &plan.releases {
            let due: Vec<&Release> = releases.iter().filter(|release| !is_back(release, back)).collect();
            match self.release(*cidr, &due).await {
                Ok(()) => {}
                Err(error) => warn!(block = %cidr, %error, "addresses are not released yet"),
            }
        }
        self.settle().await;
        for block in plan.blocks.iter().filter(|block| block.node.as_ref().is_none_or(|node| !back.contains(node))) {
            if let Err(error) = self.delete_block(block).await {
                warn!(block = %block.cidr, %error, "not deleted yet");
            }
        }
        for claim in plan.claims.iter().filter(|claim| !back.contains(&claim.node)) {
            match self.delete_claim(claim).await {
                Ok(true) => {
                    info!(node = claim.node, block = %claim.cidr, "claim deleted: the node has left, or had begun to give it back")
                }
                Ok(false) => {
                    info!(node = claim.node, block = %claim.cidr, "claim changed since it was looked at, and stays")
                }
                Err(error) => warn!(node = claim.node, block = %claim.cidr, %error, "claim not deleted yet"),
            }
        }
    }

    async fn release(&mut self, cidr: IpNet, releases: &[&Release]) -> Result<(), StoreError> {
        let Some((mut object, mut block)) = self.block(cidr).await? else {
            return Ok(());
        };
        let mut handles = BTreeSet::new();
        for release in releases {
            if block.release_address(release.address, release.sequence) {
                info!(address = %release.address, owner = ?release.owner, "released: nobody else will");
                handles.insert(release.handle.clone());
            }
        }
        if handles.is_empty() {
            return Ok(());
        }
        object.spec = block.spec().clone();
        // Before the writing: that may have been done though there is no answer.
        self.owed.entry(cidr).or_default().extend(handles);
        self.blocks.replace(&names::block(cidr), &object).await?;
        Ok(())
    }

    /// Has handles forget the blocks in which they have nothing any more; those that cannot yet are owed it until the next time.
    async fn settle(&mut self) {
        for (cidr, handles) in std::mem::take(&mut self.owed) {
            let block = match self.block(cidr).await {
                Ok(block) => block.map(|(_, block)| block),
                Err(error) => {
                    warn!(block = %cidr, %error, "handles may still name the block; tried again");
                    self.owed.insert(cidr, handles);
                    continue;
                }
            };
            for handle in handles {
                if block.as_ref().is_some_and(|block| !block.of_handle(&handle).is_empty()) {
                    continue;
                }
                if let Err(error) = self.forget(&handle, cidr).await {
                    warn!(block = %cidr, handle, %error, "handle may still name the block; tried again");
                    self.owed.entry(cidr).or_default().insert(handle);
                }
            }
        }
    }

    async fn block(&self, cidr: IpNet) -> Result<Option<(IPAMBlock, Block)>, StoreError> {
        let Some(object) = self.blocks.get(&names::block(cidr)).await? else {
            return Ok(None);
        };
        match Block::parse(object.spec.clone()) {
            Ok(block) => Ok(Some((object, block))),
            Err(fault) => Err(StoreError::Unsound(fault.to_string())),
        }
    }

    /// Takes a block out of a handle, which goes with its last one.
    async fn forget(&self, handle: &str, cidr: IpNet) -> Result<(), StoreError> {
        let name = names::handle(handle);
        let Some(mut object) = self.handles.get(&name).await? else {
            return Ok(());
        };
        object.spec.block.remove(&cidr.to_string());
        object.spec.deleted = object.spec.block.is_empty();
        let object = self.handles.replace(&name, &object).await?;
        if object.spec.deleted {
            // If somebody has used it again meanwhile, it stays.
            self.handles.delete(&object.metadata).await?;
        }
        Ok(())
    }

    /// In two steps: the mark, which is not made of a block that is not as it was judged, then the deletion of what was marked.
    async fn delete_block(&self, judged: &Doomed) -> Result<(), StoreError> {
        let Some((mut object, block)) = self.block(judged.cidr).await? else {
            return Ok(());
        };
        if !judged.is_still(&block) {
            return Ok(());
        }
        if !object.spec.deleted {
            object.spec.deleted = true;
            object = self.blocks.replace(&names::block(judged.cidr), &object).await?;
        }
        self.blocks.delete(&object.metadata).await.map(drop)
    }

    /// The same for a claim. Answers whether it is gone.
    async fn delete_claim(&self, judged: &Claim) -> Result<bool, StoreError> {
        let Some(mut object) = self.claims.get(&judged.name).await? else {
            return Ok(true);
        };
        if claim(&object).as_ref() != Some(judged) {
            return Ok(false);
        }
        if !object.spec.deleted {
            object.spec.deleted = true;
            object = self.claims.replace(&judged.name, &object).await?;
        }
        self.claims.delete(&object.metadata).await
    }
}

/// The claim of a node that the object is, if it is one.
fn claim(object: &BlockAffinity) -> Option<Claim> {
    let spec = &object.spec;
    let is_of_node = spec.kind.as_deref().is_none_or(|kind| matches!(kind, "" | "host"));
    Some(Claim {
        name: object.name_any(),
        node: spec.node.clone(),
        cidr: spec.cidr.parse().ok().filter(|_| is_of_node)?,
        deleted: spec.deleted,
        version: object.resource_version().unwrap_or_default(),
    })
}

fn is_back(release: &Release, back: &BTreeSet<String>) -> bool {
    matches!(&release.owner, Owner::Node(node) if back.contains(node))
}

fn pod_facts(pod: &Pod) -> (String, PodFacts) {
    let status = pod.status.as_ref();
    let reported =
        status.into_iter().flat_map(|status| status.pod_ips.iter().flatten()).map(|address| address.ip.clone());
    let annotated = pod.annotations().get(ANNOTATION_POD_IPS).into_iter().flat_map(|text| text.split(','));
    let annotated = annotated.map(|text| text.split('/').next().unwrap_or_default().to_owned());
    let facts = PodFacts {
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        addresses: reported.chain(annotated).filter_map(|text| text.parse().ok()).collect(),
    };
    (format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()), facts)
}
