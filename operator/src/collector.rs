//! Carries out the verdicts of [`crate::gc`]: looks at all there is from time to time, and soon after a node has left; asks once more for whom something is
//! taken of; and writes nothing while the data is locked.

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

use crate::apply::bounded;
use crate::gc::{self, Claim, Owner, Plan, PodFacts, Release, Seen, Suspicions};
use crate::objects::{Objects, StoreError, pages};

/// Between looks when nothing happens.
const PERIOD: Duration = Duration::from_secs(300);
/// After a node has left: a little more than what it is given to come back.
const SOON: Duration = Duration::from_secs(12);

/// Looks and takes while this operator leads. Ends with the process.
pub async fn run(client: Client, mode: Mode, mut leading: watch::Receiver<bool>, shutdown: Shutdown) {
    let collector = Collector::new(client.clone(), mode);
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
}

impl Collector {
    fn new(client: Client, mode: Mode) -> Self {
        Self {
            blocks: Objects::new(&client, mode, "IPAMBlock"),
            claims: Objects::new(&client, mode, "BlockAffinity"),
            handles: Objects::new(&client, mode, "IPAMHandle"),
            informations: Objects::new(&client, mode, "ClusterInformation"),
            client,
        }
    }

    /// One look. Answers whether a node is suspected, so that the next look should be soon.
    async fn round(&self, suspicions: &mut Suspicions) -> Result<bool, StoreError> {
        let information = self.informations.get(SINGLETON).await?;
        if information.is_some_and(|information| information.spec.datastore_ready == Some(false)) {
            return Ok(false);
        }
        let seen = self.look().await?;
        let plan = gc::plan(&seen, suspicions, Timestamp::now());
        let mut back = BTreeSet::new();
        for node in plan.nodes() {
            if !seen.nodes.contains(node) && self.exists(node).await? {
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
        let claim = |object: BlockAffinity| {
            let is_of_node = object.spec.kind.as_deref().is_none_or(|kind| matches!(kind, "" | "host"));
            let cidr = object.spec.cidr.parse().ok().filter(|_| is_of_node)?;
            Some(Claim { name: object.name_any(), node: object.spec.node, cidr, deleted: object.spec.deleted })
        };
        Ok(Seen {
            nodes: nodes.into_iter().collect(),
            pods: pods.into_iter().collect(),
            blocks: blocks.filter_map(block).collect(),
            claims: claims.filter_map(claim).collect(),
        })
    }

    async fn exists(&self, node: &str) -> Result<bool, StoreError> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        Ok(bounded(nodes.get_metadata_opt(node)).await?.is_some())
    }

    /// What fails is tried again after the next look.
    async fn exec(&self, plan: &Plan, back: &BTreeSet<String>) {
        for (cidr, releases) in &plan.releases {
            let due: Vec<&Release> = releases.iter().filter(|release| !is_back(release, back)).collect();
            match self.release(*cidr, &due).await {
                Ok(()) => {}
                Err(error) => warn!(block = %cidr, %error, "addresses are not released yet"),
            }
        }
        for cidr in &plan.blocks {
            if let Err(error) = self.delete_block(*cidr, back).await {
                warn!(block = %cidr, %error, "not deleted yet");
            }
        }
        for claim in plan.claims.iter().filter(|claim| !back.contains(&claim.node)) {
            match self.delete_claim(claim).await {
                Ok(()) => {
                    info!(node = claim.node, block = %claim.cidr, "claim deleted: the node has left, or had begun to give it back")
                }
                Err(error) => warn!(node = claim.node, block = %claim.cidr, %error, "claim not deleted yet"),
            }
        }
    }

    async fn release(&self, cidr: IpNet, releases: &[&Release]) -> Result<(), StoreError> {
        let name = names::block(cidr);
        let Some(mut object) = self.blocks.get(&name).await? else {
            return Ok(());
        };
        let mut block = sound(&object)?;
        let mut handles: BTreeMap<&str, u32> = BTreeMap::new();
        for release in releases {
            if block.release_address(release.address, release.sequence) {
                info!(address = %release.address, owner = ?release.owner, "released: nobody else will");
                *handles.entry(&release.handle).or_default() += 1;
            }
        }
        if handles.is_empty() {
            return Ok(());
        }
        object.spec = block.spec().clone();
        self.blocks.replace(&name, &object).await?;
        for handle in handles.into_keys().filter(|handle| block.of_handle(handle).is_empty()) {
            self.forget(handle, cidr).await?;
        }
        Ok(())
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
        if object.spec.deleted { self.handles.delete(&object.metadata).await } else { Ok(()) }
    }

    /// In two steps: the mark, which is not made when somebody has taken an address meanwhile, then the deletion of what was marked.
    async fn delete_block(&self, cidr: IpNet, back: &BTreeSet<String>) -> Result<(), StoreError> {
        let name = names::block(cidr);
        let Some(mut object) = self.blocks.get(&name).await? else {
            return Ok(());
        };
        let block = sound(&object)?;
        let is_back = block.node().is_some_and(|node| back.contains(node));
        if is_back || block.allocated().next().is_some() {
            return Ok(());
        }
        if !object.spec.deleted {
            object.spec.deleted = true;
            object = self.blocks.replace(&name, &object).await?;
        }
        self.blocks.delete(&object.metadata).await
    }

    async fn delete_claim(&self, claim: &Claim) -> Result<(), StoreError> {
        let Some(mut object) = self.claims.get(&claim.name).await? else {
            return Ok(());
        };
        if !object.spec.deleted {
            object.spec.deleted = true;
            object = self.claims.replace(&claim.name, &object).await?;
        }
        self.claims.delete(&object.metadata).await
    }
}

fn sound(object: &IPAMBlock) -> Result<Block, StoreError> {
    Block::parse(object.spec.clone()).map_err(|fault| StoreError::Unsound(fault.to_string()))
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
