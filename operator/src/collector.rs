//! IPAM garbage collector: carries out the plans of [`margay_ipam::leak_scan`]. It scans periodically,
//! and soon after a node has been deleted; reads nodes and pods by name before it releases their
//! addresses; changes nothing that has changed since the scan; and writes nothing while the
//! datastore is locked.

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

use crate::calico_objects::{CalicoObjects, StoreError, pages};
use crate::client::{bounded, has_node};
use margay_ipam::check;
use margay_ipam::leak_scan::{
    self, Affinity, BlockToDelete, CollectionPlan, Handle, IpamState, LeakCandidates, PodFacts, Release, ScanRules,
};

/// Interval of scans.
const PERIOD: Duration = Duration::from_secs(300);
/// Interval while a node is absent, or pods or handles are left for the next scan.
const SHORT_PERIOD: Duration = Duration::from_secs(12);
/// Maximum number of pods that are read by name in one scan, and concurrently; the others wait for
/// the next scan.
const VERIFIED_PODS: (usize, usize) = (500, 8);
/// Maximum number of handles that get the annotation of their node in one scan, and concurrently.
const ANNOTATED_HANDLES: (usize, usize) = (2000, 8);

/// Scans and collects while this operator leads; publishes overlapping blocks. Ends with the
/// process.
pub async fn run(
    client: Client,
    mode: Mode,
    overlaps: watch::Sender<Vec<String>>,
    mut leading: watch::Receiver<bool>,
    shutdown: Shutdown,
) {
    let mut collector = Collector::new(client.clone(), mode, overlaps);
    let mut candidates = LeakCandidates::default();
    let node_deleted = Arc::new(Notify::new());
    let watched = tokio::spawn(notify_deletions(client, node_deleted.clone()));
    let mut pause = Duration::ZERO;
    loop {
        tokio::select! {
            () = shutdown.wait() => break,
            () = tokio::time::sleep(pause) => {}
            () = node_deleted.notified() => {}
            _ = leading.changed() => {}
        }
        pause = PERIOD;
        if !*leading.borrow_and_update() {
            candidates = LeakCandidates::default();
            collector.stale_handles.clear();
            continue;
        }
        match collector.collect(&mut candidates).await {
            Ok(true) => pause = SHORT_PERIOD,
            Ok(false) => {}
            Err(error) => warn!(%error, "IPAM garbage collection failed, retrying later"),
        }
    }
    watched.abort();
}

/// Notifies of every deletion of a node.
async fn notify_deletions(client: Client, deleted: Arc<Notify>) {
    let nodes: Api<PartialObjectMeta<Node>> = Api::all(client);
    let mut events = std::pin::pin!(watcher(nodes, watcher::Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        if matches!(event, Ok(watcher::Event::Delete(_))) {
            deleted.notify_one();
        }
    }
}

struct Collector {
    client: Client,
    blocks: CalicoObjects<IPAMBlock>,
    affinities: CalicoObjects<BlockAffinity>,
    handles: CalicoObjects<IPAMHandle>,
    informations: CalicoObjects<ClusterInformation>,
    pools: CalicoObjects<IPPool>,
    settings: CalicoObjects<IPAMConfiguration>,
    controllers: CalicoObjects<KubeControllersConfiguration>,
    /// Publishes overlapping blocks.
    overlaps: watch::Sender<Vec<String>>,
    /// Origin of the scans' clock, which is monotonic.
    begin: Instant,
    /// Handles whose addresses in a block have been released, but which may still list the block.
    stale_handles: BTreeMap<IpNet, BTreeSet<String>>,
}

impl Collector {
    fn new(client: Client, mode: Mode, overlaps: watch::Sender<Vec<String>>) -> Self {
        Self {
            overlaps,
            blocks: CalicoObjects::new(&client, mode, "IPAMBlock"),
            affinities: CalicoObjects::new(&client, mode, "BlockAffinity"),
            handles: CalicoObjects::new(&client, mode, "IPAMHandle"),
            informations: CalicoObjects::new(&client, mode, "ClusterInformation"),
            pools: CalicoObjects::new(&client, mode, "IPPool"),
            settings: CalicoObjects::new(&client, mode, "IPAMConfiguration"),
            controllers: CalicoObjects::new(&client, mode, "KubeControllersConfiguration"),
            begin: Instant::now(),
            client,
            stale_handles: BTreeMap::new(),
        }
    }

    /// Runs one scan and collects. Returns true when the next one should be soon: a node is absent,
    /// or not every pod could be read.
    async fn collect(&mut self, candidates: &mut LeakCandidates) -> Result<bool, StoreError> {
        let information = self.informations.get(SINGLETON).await?;
        if information.is_some_and(|information| information.spec.datastore_ready == Some(false)) {
            return Ok(false);
        }
        let rules = self.rules().await?;
        let state = self.read_state().await?;
        let overlapping = check::overlaps(&state.blocks);
        self.overlaps.send_if_modified(|published| std::mem::replace(published, overlapping.clone()) != overlapping);
        let mut plan = leak_scan::plan(&state, rules, candidates, self.begin.elapsed());
        let mut existing = BTreeSet::new();
        for node in plan.nodes() {
            if !state.nodes.contains(node) && has_node(&self.client, node).await? {
                existing.insert(node.to_owned());
            }
        }
        let to_verify: Vec<String> = plan.pods().into_iter().map(str::to_owned).collect();
        let verified = self.read_pods(&to_verify).await;
        plan.retain_confirmed(&existing, &verified);
        self.exec(&plan).await;
        let has_more = verified.len() < to_verify.len() || plan.handle_nodes.len() > ANNOTATED_HANDLES.0;
        Ok(candidates.has_node() || has_more)
    }

    /// Reads the settings; an invalid value counts as unset.
    async fn rules(&self) -> Result<ScanRules, StoreError> {
        let controllers = self.controllers.get(SINGLETON).await?;
        let leak = controllers.map_or(Ok(None), |object| leak_grace(&object)).unwrap_or_else(|problem| {
            warn!(%problem, "setting is invalid and ignored");
            None
        });
        let settings = self.settings.get(SINGLETON).await?;
        Ok(ScanRules {
            leak: leak.map_or(Some(leak_scan::LEAK_GRACE), |leak| Some(leak).filter(|leak| !leak.is_zero())),
            releases_spare_blocks: settings.is_none_or(|settings| settings.spec.auto_allocate_blocks),
        })
    }

    async fn read_state(&self) -> Result<IpamState, StoreError> {
        let handles = self.handles.map(|object| handle(&object)).await?;
        let block = |object: IPAMBlock| match Block::parse(object.spec) {
            Ok(block) => Some(block),
            Err(error) => {
                warn!(%error, "block is invalid and skipped");
                None
            }
        };
        let blocks = self.blocks.map(block).await?;
        let affinities = self.affinities.map(|object| affinity(&object)).await?;
        // Nodes, pods and pools are read after blocks: a pod that gets an address meanwhile is
        // seen, and its address is no candidate.
        let pods = pages(&Api::<Pod>::all(self.client.clone()), pod_facts).await?;
        let nodes = pages(&Api::<Node>::all(self.client.clone()), |node| node.name_any()).await?;
        let range = |pool: IPPool| (pool.metadata.deletion_timestamp.is_none(), pool.spec.cidr.parse::<IpNet>().ok());
        let pools = self.pools.map(range).await?.into_iter().filter(|(stays, _)| *stays);
        Ok(IpamState {
            nodes: nodes.into_iter().collect(),
            pods: pods.into_iter().collect(),
            blocks: blocks.into_iter().flatten().collect(),
            affinities: affinities.into_iter().flatten().collect(),
            handles,
            // Without the range of every pool it is unknown which blocks have none.
            pools: pools.map(|(_, range)| range).collect(),
        })
    }

    /// Reads pods by name: their facts, or none if they do not exist. Pods that could not be read
    /// are left out.
    async fn read_pods(&self, pods: &[String]) -> BTreeMap<String, Option<PodFacts>> {
        let read = |name: &String| {
            let name = name.clone();
            async move {
                let (namespace, pod) = name.split_once('/')?;
                let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
                match bounded(api.get_opt(pod)).await {
                    Ok(found) => Some((name.clone(), found.map(|pod| pod_facts(&pod).1))),
                    Err(error) => {
                        warn!(pod = name, %error, "pod cannot be read and keeps its addresses");
                        None
                    }
                }
            }
        };
        stream::iter(pods.iter().take(VERIFIED_PODS.0))
            .map(read)
            .buffered(VERIFIED_PODS.1)
            .filter_map(|pod| async { pod })
            .collect()
            .await
    }

    /// Carries out a plan. Failures are retried with the next scan.
    async fn exec(&mut self, plan: &CollectionPlan) {
        // First, because agents may not write a handle before its node is known.
        stream::iter(plan.handle_nodes.iter().take(ANNOTATED_HANDLES.0))
            .for_each_concurrent(ANNOTATED_HANDLES.1, |(handle, node)| self.annotate_handle(handle, node))
            .await;
        for (cidr, releases) in &plan.releases {
            if let Err(error) = self.release(*cidr, releases).await {
                warn!(block = %cidr, %error, "addresses cannot be released, retrying later");
            }
        }
        self.update_stale_handles().await;
        let mut affinities: BTreeMap<(IpNet, &str), &Affinity> =
            plan.affinities.iter().map(|affinity| ((affinity.cidr, affinity.node.as_str()), affinity)).collect();
        for block in &plan.blocks {
            let affinity = block.node.as_deref().and_then(|node| affinities.remove(&(block.cidr, node)));
            match self.delete_block_with_affinity(block, affinity).await {
                Ok(true) => info!(block = %block.cidr, node = block.node, "block deleted: empty and not needed"),
                Ok(false) => {
                    info!(block = %block.cidr, node = block.node, "block has changed since the scan and stays")
                }
                Err(error) => {
                    warn!(block = %block.cidr, node = block.node, %error, "block cannot be deleted, retrying later")
                }
            }
        }
        for affinity in affinities.into_values() {
            match self.delete_affinity(affinity).await {
                Ok(true) => info!(node = affinity.node, block = %affinity.cidr, "affinity deleted: it has no block"),
                Ok(false) => {
                    info!(node = affinity.node, block = %affinity.cidr, "affinity has changed since the scan and stays")
                }
                Err(error) => {
                    warn!(node = affinity.node, block = %affinity.cidr, %error, "affinity cannot be deleted, retrying later")
                }
            }
        }
        for handle in &plan.handles {
            if let Err(error) = self.delete_handle(handle).await {
                warn!(handle = handle.name, %error, "handle without addresses cannot be deleted, retrying later");
            }
        }
    }

    async fn release(&mut self, cidr: IpNet, releases: &[Release]) -> Result<(), StoreError> {
        let Some((mut object, mut block)) = self.read_block(cidr).await? else {
            return Ok(());
        };
        let mut handles = BTreeSet::new();
        let mut is_changed = false;
        for release in releases {
            if block.release_address(release.address, release.sequence) {
                is_changed = true;
                info!(address = %release.address, node = release.node, pod = release.pod, "leaked address released");
                handles.extend(Some(release.handle.clone()).filter(|handle| !handle.is_empty()));
            }
        }
        if !is_changed {
            return Ok(());
        }
        object.spec = block.spec().clone();
        // Recorded before the write: it may take effect although there is no answer.
        self.stale_handles.entry(cidr).or_default().extend(handles);
        self.blocks.replace(&names::block(cidr), &object).await?;
        Ok(())
    }

    /// Removes blocks from the handles that have no more addresses in them; failures are kept for
    /// the next scan.
    async fn update_stale_handles(&mut self) {
        for (cidr, handles) in std::mem::take(&mut self.stale_handles) {
            let block = match self.read_block(cidr).await {
                Ok(block) => block.map(|(_, block)| block),
                Err(error) => {
                    warn!(block = %cidr, %error, "handles may still list the block, retrying later");
                    self.stale_handles.insert(cidr, handles);
                    continue;
                }
            };
            for handle in handles {
                if block.as_ref().is_some_and(|block| !block.of_handle(&handle).is_empty()) {
                    continue;
                }
                if let Err(error) = self.remove_block_from_handle(&handle, cidr).await {
                    warn!(block = %cidr, handle, %error, "handle may still list the block, retrying later");
                    self.stale_handles.entry(cidr).or_default().insert(handle);
                }
            }
        }
    }

    async fn read_block(&self, cidr: IpNet) -> Result<Option<(IPAMBlock, Block)>, StoreError> {
        let Some(object) = self.blocks.get(&names::block(cidr)).await? else {
            return Ok(None);
        };
        match Block::parse(object.spec.clone()) {
            Ok(block) => Ok(Some((object, block))),
            Err(error) => Err(StoreError::Unsound(error.to_string())),
        }
    }

    /// Removes a block from a handle; the handle is deleted with its last block.
    async fn remove_block_from_handle(&self, handle: &str, cidr: IpNet) -> Result<(), StoreError> {
        let name = names::handle(handle);
        let Some(mut object) = self.handles.get(&name).await? else {
            return Ok(());
        };
        object.spec.block.remove(&cidr.to_string());
        object.spec.deleted = object.spec.block.is_empty();
        let object = self.handles.replace(&name, &object).await?;
        if object.spec.deleted {
            // If it has been used again meanwhile, it stays.
            self.handles.delete(&object.metadata).await?;
        }
        Ok(())
    }

    /// Writes the node of a handle that has not changed since the scan into its annotation.
    async fn annotate_handle(&self, scanned: &Handle, node: &str) {
        let written = async {
            let Some(mut object) = self.handles.get(&scanned.name).await? else {
                return Ok(());
            };
            if handle(&object) != *scanned {
                return Ok(());
            }
            let annotations = object.metadata.annotations.get_or_insert_default();
            annotations.insert(names::ANNOTATION_HANDLE_NODE.to_owned(), node.to_owned());
            self.handles.replace(&scanned.name, &object).await.map(drop)
        };
        if let Err(error) = written.await {
            let error: StoreError = error;
            warn!(handle = scanned.name, node, %error, "cannot annotate the handle with its node");
        }
    }

    /// Deletes a handle that has not changed since the scan.
    async fn delete_handle(&self, scanned: &Handle) -> Result<(), StoreError> {
        let Some(object) = self.handles.get(&scanned.name).await? else {
            return Ok(());
        };
        if handle(&object) != *scanned {
            return Ok(());
        }
        if self.handles.delete(&object.metadata).await? {
            info!(handle = scanned.name, "handle deleted: no block has an address of it");
        }
        Ok(())
    }

    /// Deletes a block in Calico's order, as its node does: the affinity is marked
    /// `pendingDeletion`, which lets others know that the block may go, then the block is deleted,
    /// then the affinity. Returns true when the block is gone; otherwise the affinity is confirmed
    /// again.
    async fn delete_block_with_affinity(
        &self,
        scanned: &BlockToDelete,
        affinity: Option<&Affinity>,
    ) -> Result<bool, StoreError> {
        let Some(affinity) = affinity else {
            return self.delete_block(scanned).await;
        };
        let Some(marked) = self.set_state(affinity, PENDING_DELETION).await? else {
            return Ok(false);
        };
        if self.delete_block(scanned).await? {
            self.delete_affinity(&marked).await?;
            return Ok(true);
        }
        self.set_state(&marked, CONFIRMED).await?;
        Ok(false)
    }

    /// Writes the state of an affinity and returns it; none if it has changed since the scan.
    async fn set_state(&self, scanned: &Affinity, state: &str) -> Result<Option<Affinity>, StoreError> {
        let Some(mut object) = self.affinities.get(&scanned.name).await? else {
            return Ok(None);
        };
        if affinity(&object).as_ref() != Some(scanned) {
            return Ok(None);
        }
        if object.spec.state != state {
            object.spec.state = state.to_owned();
            object = self.affinities.replace(&scanned.name, &object).await?;
        }
        Ok(affinity(&object))
    }

    /// Deletes a block in two steps: the mark `deleted`, unless the block has changed since the
    /// scan, then the deletion at that version, so that an address assigned in between keeps the
    /// block. Returns true when it is gone.
    async fn delete_block(&self, scanned: &BlockToDelete) -> Result<bool, StoreError> {
        let Some((mut object, block)) = self.read_block(scanned.cidr).await? else {
            return Ok(true);
        };
        if !scanned.is_unchanged(&block) {
            return Ok(false);
        }
        if !object.spec.deleted {
            object.spec.deleted = true;
            object = self.blocks.replace(&names::block(scanned.cidr), &object).await?;
        }
        self.blocks.delete(&object.metadata).await
    }

    /// Deletes an affinity in the same way. Returns true when it is gone.
    async fn delete_affinity(&self, scanned: &Affinity) -> Result<bool, StoreError> {
        let Some(mut object) = self.affinities.get(&scanned.name).await? else {
            return Ok(true);
        };
        if affinity(&object).as_ref() != Some(scanned) {
            return Ok(false);
        }
        if !object.spec.deleted {
            object.spec.deleted = true;
            object = self.affinities.replace(&scanned.name, &object).await?;
        }
        self.affinities.delete(&object.metadata).await
    }
}

/// States of an affinity in Calico: the block may be deleted, and the block is the node's.
const PENDING_DELETION: &str = "pendingDeletion";
const CONFIRMED: &str = "confirmed";

/// Converts a BlockAffinity, if it is one of a node.
fn affinity(object: &BlockAffinity) -> Option<Affinity> {
    let spec = &object.spec;
    let is_of_node = spec.kind.as_deref().is_none_or(|kind| matches!(kind, "" | "host"));
    Some(Affinity {
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
    fn a_finished_pod_has_no_addresses() {
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
