//! Carries out the verdicts of [`crate::gc`]: looks at all there is from time to time, and soon after a node has left; asks once more for whom something is
//! taken of, nodes and pods; takes nothing that has changed since it was looked at; and writes nothing while the data is locked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::Api;
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::meta::ANNOTATION_POD_IPS;
use margay_api::storage::Mode;
use margay_api::v3::controllers::leak_grace;
use margay_api::v3::{
    BlockAffinity, ClusterInformation, IPAMBlock, IPAMConfiguration, IPAMHandle, IPPool, KubeControllersConfiguration,
    SINGLETON,
};
use margay_runtime::shutdown::Shutdown;
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::apply::{bounded, has_node};
use crate::gc::{self, Claim, Doomed, Handle, Plan, PodFacts, Release, Rules, Seen, Suspicions};
use crate::objects::{Objects, StoreError, pages};
use crate::overlap;

/// Between looks when nothing happens.
const PERIOD: Duration = Duration::from_secs(300);
/// While a node is absent, or pods are still to be asked for.
const SOON: Duration = Duration::from_secs(12);
/// The most pods that are asked for by name in a round, and at a time; what others have waits for the next.
const ASKED: (usize, usize) = (500, 8);
/// The most handles that are told their owners in a round, and at a time.
const OWNED: (usize, usize) = (2000, 8);

/// Looks and takes while this operator leads; tells of blocks that overlap. Ends with the process.
pub async fn run(
    client: Client,
    mode: Mode,
    overlaps: watch::Sender<Vec<String>>,
    mut leading: watch::Receiver<bool>,
    shutdown: Shutdown,
) {
    let mut collector = Collector::new(client.clone(), mode, overlaps);
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
    pools: Objects<IPPool>,
    settings: Objects<IPAMConfiguration>,
    controllers: Objects<KubeControllersConfiguration>,
    /// Tells of blocks that overlap.
    overlaps: watch::Sender<Vec<String>>,
    /// Begin of its clock, which no setting of the time moves.
    begin: Instant,
    /// Handles that have lost their addresses in a block, and may name it still.
    owed: BTreeMap<IpNet, BTreeSet<String>>,
}

impl Collector {
    fn new(client: Client, mode: Mode, overlaps: watch::Sender<Vec<String>>) -> Self {
        Self {
            overlaps,
            blocks: Objects::new(&client, mode, "IPAMBlock"),
            claims: Objects::new(&client, mode, "BlockAffinity"),
            handles: Objects::new(&client, mode, "IPAMHandle"),
            informations: Objects::new(&client, mode, "ClusterInformation"),
            pools: Objects::new(&client, mode, "IPPool"),
            settings: Objects::new(&client, mode, "IPAMConfiguration"),
            controllers: Objects::new(&client, mode, "KubeControllersConfiguration"),
            begin: Instant::now(),
            client,
            owed: BTreeMap::new(),
        }
    }

    /// One look. Answers whether the next one should be soon: a node is absent, or not everybody could be asked.
    async fn round(&mut self, suspicions: &mut Suspicions) -> Result<bool, StoreError> {
        let information = self.informations.get(SINGLETON).await?;
        if information.is_some_and(|information| information.spec.datastore_ready == Some(false)) {
            return Ok(false);
        }
        let rules = self.rules().await?;
        let seen = self.look().await?;
        let overlapping = overlap::overlaps(&seen.blocks);
        self.overlaps.send_if_modified(|told| std::mem::replace(told, overlapping.clone()) != overlapping);
        let mut plan = gc::plan(&seen, rules, suspicions, self.begin.elapsed());
        let mut back = BTreeSet::new();
        for node in plan.nodes() {
            if !seen.nodes.contains(node) && has_node(&self.client, node).await? {
                back.insert(node.to_owned());
            }
        }
        let in_doubt: Vec<String> = plan.pods().into_iter().map(str::to_owned).collect();
        let asked = self.ask(&in_doubt).await;
        plan.spare(&back, &asked);
        self.exec(&plan).await;
        Ok(suspicions.has_node() || asked.len() < in_doubt.len() || plan.owners.len() > OWNED.0)
    }

    /// What settings say; a bad value counts as not given.
    async fn rules(&self) -> Result<Rules, StoreError> {
        let controllers = self.controllers.get(SINGLETON).await?;
        let leak = controllers.map_or(Ok(None), |object| leak_grace(&object)).unwrap_or_else(|problem| {
            warn!(%problem, "counts as not given");
            None
        });
        let settings = self.settings.get(SINGLETON).await?;
        Ok(Rules {
            leak: leak.map_or(Some(gc::LEAK_GRACE), |leak| Some(leak).filter(|leak| !leak.is_zero())),
            gives_back_spare: settings.is_none_or(|settings| settings.spec.auto_allocate_blocks),
        })
    }

    async fn look(&self) -> Result<Seen, StoreError> {
        let handles = self.handles.map(|object| handle(&object)).await?;
        let block = |object: IPAMBlock| match Block::parse(object.spec) {
            Ok(block) => Some(block),
            Err(fault) => {
                warn!(%fault, "left alone");
                None
            }
        };
        let blocks = self.blocks.map(block).await?;
        let claims = self.claims.map(|object| claim(&object)).await?;
        // Nodes, pods and pools after blocks: who got an address meanwhile is seen, and nothing is suspected for want of him.
        let pods = pages(&Api::<Pod>::all(self.client.clone()), pod_facts).await?;
        let nodes = pages(&Api::<Node>::all(self.client.clone()), |node| node.name_any()).await?;
        let range = |pool: IPPool| (pool.metadata.deletion_timestamp.is_none(), pool.spec.cidr.parse::<IpNet>().ok());
        let pools = self.pools.map(range).await?.into_iter().filter(|(stays, _)| *stays);
        Ok(Seen {
            nodes: nodes.into_iter().collect(),
            pods: pods.into_iter().collect(),
            blocks: blocks.into_iter().flatten().collect(),
            claims: claims.into_iter().flatten().collect(),
            handles,
            // With a pool that cannot be read nobody knows whose a block is.
            pools: pools.map(|(_, range)| range).collect(),
        })
    }

    /// Asks for pods by name: what they are, none where they are not there. Those that could not be asked for are left out.
    async fn ask(&self, pods: &[String]) -> BTreeMap<String, Option<PodFacts>> {
        let ask = |name: &String| {
            let name = name.clone();
            async move {
                let (namespace, pod) = name.split_once('/')?;
                let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
                match bounded(api.get_opt(pod)).await {
                    Ok(found) => Some((name.clone(), found.map(|pod| pod_facts(&pod).1))),
                    Err(error) => {
                        warn!(pod = name, %error, "keeps its addresses until it can be asked for");
                        None
                    }
                }
            }
        };
        stream::iter(pods.iter().take(ASKED.0))
            .map(ask)
            .buffered(ASKED.1)
            .filter_map(|answer| async { answer })
            .collect()
            .await
    }

    /// What fails is tried again after the next look.
    async fn exec(&mut self, plan: &Plan) {
        // First: before its owner is known, no agent may touch a handle.
        stream::iter(plan.owners.iter().take(OWNED.0))
            .for_each_concurrent(OWNED.1, |(handle, node)| self.own(handle, node))
            .await;
        for (cidr, releases) in &plan.releases {
            if let Err(error) = self.release(*cidr, releases).await {
                warn!(block = %cidr, %error, "addresses are not released yet");
            }
        }
        self.settle().await;
        let mut claims: BTreeMap<(IpNet, &str), &Claim> =
            plan.claims.iter().map(|claim| ((claim.cidr, claim.node.as_str()), claim)).collect();
        for block in &plan.blocks {
            let claim = block.node.as_deref().and_then(|node| claims.remove(&(block.cidr, node)));
            match self.give_back(block, claim).await {
                Ok(true) => info!(block = %block.cidr, node = block.node, "given back: empty, and not needed"),
                Ok(false) => info!(block = %block.cidr, node = block.node, "changed since it was looked at, and stays"),
                Err(error) => warn!(block = %block.cidr, node = block.node, %error, "not given back yet"),
            }
        }
        for claim in claims.into_values() {
            match self.delete_claim(claim).await {
                Ok(true) => info!(node = claim.node, block = %claim.cidr, "claim deleted: there is no such block"),
                Ok(false) => {
                    info!(node = claim.node, block = %claim.cidr, "claim changed since it was looked at, and stays")
                }
                Err(error) => warn!(node = claim.node, block = %claim.cidr, %error, "claim not deleted yet"),
            }
        }
        for handle in &plan.handles {
            if let Err(error) = self.delete_handle(handle).await {
                warn!(handle = handle.name, %error, "not deleted yet; no block has an address of it");
            }
        }
    }

    async fn release(&mut self, cidr: IpNet, releases: &[Release]) -> Result<(), StoreError> {
        let Some((mut object, mut block)) = self.block(cidr).await? else {
            return Ok(());
        };
        let mut handles = BTreeSet::new();
        let mut is_changed = false;
        for release in releases {
            if block.release_address(release.address, release.sequence) {
                is_changed = true;
                info!(address = %release.address, node = release.node, pod = release.pod, "released: nobody else will");
                handles.extend(Some(release.handle.clone()).filter(|handle| !handle.is_empty()));
            }
        }
        if !is_changed {
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

    /// Has a handle that is as it was judged say whose it is.
    async fn own(&self, judged: &Handle, node: &str) {
        let written = async {
            let Some(mut object) = self.handles.get(&judged.name).await? else {
                return Ok(());
            };
            if handle(&object) != *judged {
                return Ok(());
            }
            let annotations = object.metadata.annotations.get_or_insert_default();
            annotations.insert(names::ANNOTATION_HANDLE_NODE.to_owned(), node.to_owned());
            self.handles.replace(&judged.name, &object).await.map(drop)
        };
        if let Err(error) = written.await {
            let error: StoreError = error;
            warn!(handle = judged.name, node, %error, "does not say yet whose it is");
        }
    }

    /// Deletes a handle that is as it was judged.
    async fn delete_handle(&self, judged: &Handle) -> Result<(), StoreError> {
        let Some(object) = self.handles.get(&judged.name).await? else {
            return Ok(());
        };
        if handle(&object) != *judged {
            return Ok(());
        }
        if self.handles.delete(&object.metadata).await? {
            info!(handle = judged.name, "handle deleted: no block has an address of it");
        }
        Ok(())
    }

    /// Gives a block back as its node does it: the claim is marked, which tells everybody who works on this data that the block may go, then the block is
    /// deleted, then the claim. Answers whether the block is gone; if it is not, the claim holds again.
    async fn give_back(&self, judged: &Doomed, claimed: Option<&Claim>) -> Result<bool, StoreError> {
        let Some(claimed) = claimed else {
            return self.delete_block(judged).await;
        };
        let Some(marked) = self.mark(claimed, CLAIM_ENDS).await? else {
            return Ok(false);
        };
        if self.delete_block(judged).await? {
            self.delete_claim(&marked).await?;
            return Ok(true);
        }
        self.mark(&marked, CLAIM_HOLDS).await?;
        Ok(false)
    }

    /// Writes the state of a claim; none: it is not as it was judged. Answers with the claim as it is then.
    async fn mark(&self, judged: &Claim, state: &str) -> Result<Option<Claim>, StoreError> {
        let Some(mut object) = self.claims.get(&judged.name).await? else {
            return Ok(None);
        };
        if claim(&object).as_ref() != Some(judged) {
            return Ok(None);
        }
        if object.spec.state != state {
            object.spec.state = state.to_owned();
            object = self.claims.replace(&judged.name, &object).await?;
        }
        Ok(claim(&object))
    }

    /// In two steps: the mark, which is not made of a block that is not as it was judged, then the deletion of what was marked. Answers whether it is
    /// gone.
    async fn delete_block(&self, judged: &Doomed) -> Result<bool, StoreError> {
        let Some((mut object, block)) = self.block(judged.cidr).await? else {
            return Ok(true);
        };
        if !judged.is_still(&block) {
            return Ok(false);
        }
        if !object.spec.deleted {
            object.spec.deleted = true;
            object = self.blocks.replace(&names::block(judged.cidr), &object).await?;
        }
        self.blocks.delete(&object.metadata).await
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

/// States of a claim, as Calico spells them: the block may go, and the block is the node's.
const CLAIM_ENDS: &str = "pendingDeletion";
const CLAIM_HOLDS: &str = "confirmed";

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

fn handle(object: &IPAMHandle) -> Handle {
    Handle {
        name: object.name_any(),
        id: object.spec.handle_id.clone(),
        node: object.annotations().get(names::ANNOTATION_HANDLE_NODE).cloned(),
        blocks: object.spec.block.keys().filter_map(|cidr| cidr.parse().ok()).collect(),
        version: object.resource_version().unwrap_or_default(),
    }
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
        is_finished: matches!(status.and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed")),
    };
    (format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()), facts)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_that_has_ended_has_no_address_any_more() {
        let pod = |phase: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": {"namespace": "x", "name": "a", "annotations": {ANNOTATION_POD_IPS: "10.0.0.1/32,fd00::1/128"}},
                "spec": {"nodeName": "n1", "containers": []},
                "status": {"phase": phase, "podIPs": [{"ip": "10.0.0.1"}]},
            }))
            .unwrap()
        };
        for (phase, is_finished) in
            [("Pending", false), ("Running", false), ("Unknown", false), ("Succeeded", true), ("Failed", true)]
        {
            let (name, facts) = pod_facts(&pod(phase));
            let addresses = ["10.0.0.1", "fd00::1"].map(|text| text.parse().unwrap()).into();
            assert_eq!(
                (name.as_str(), facts),
                ("x/a", PodFacts { node: "n1".to_owned(), addresses, is_finished }),
                "{phase}"
            );
        }
    }
}
