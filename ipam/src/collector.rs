//! IPAM garbage collector: carries out the plans of [`crate::leak_scan`]. It reads nodes and pods
//! by name before it releases their addresses, and changes nothing that has changed since the scan.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, stream};
use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::v3::ipam::{BlockAffinity, IPAMBlock, IPAMHandle};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::check;
use crate::leak_scan::{
    self, Affinity, BlockToDelete, CollectionPlan, Handle, IpamState, LeakCandidates, PodFacts,
    Release, ScanRules,
};
use crate::release::remove_block_from_handle;
use crate::store::{AffinityState, Cluster, Objects, Store, StoreError};

/// Maximum number of pods that are read by name in one scan, and concurrently; the others wait for
/// the next scan.
const VERIFIED_PODS: (usize, usize) = (500, 8);
/// Maximum number of handles that get the annotation of their node in one scan, and concurrently.
const ANNOTATED_HANDLES: (usize, usize) = (2000, 8);

/// Garbage collector of a cluster's IPAM.
pub struct Collector<S> {
    store: S,
    /// Publishes overlapping blocks.
    overlaps: watch::Sender<Vec<String>>,
    /// Origin of the scans' clock, which is monotonic.
    begin: Instant,
    candidates: LeakCandidates,
    /// Handles whose addresses in a block have been released, but which may still list the block.
    stale_handles: BTreeMap<IpNet, BTreeSet<String>>,
}

impl<S: Store + Cluster> Collector<S> {
    /// Creates a collector that has found no candidates yet. It publishes overlapping blocks to
    /// `overlaps`.
    pub fn new(store: S, overlaps: watch::Sender<Vec<String>>) -> Self {
        let (candidates, stale_handles) = (LeakCandidates::default(), BTreeMap::new());
        Self {
            store,
            overlaps,
            begin: Instant::now(),
            candidates,
            stale_handles,
        }
    }

    /// Forgets what earlier scans have found, because others may have collected since.
    pub fn reset(&mut self) {
        self.candidates = LeakCandidates::default();
        self.stale_handles.clear();
    }

    /// Runs one scan and collects. Returns true when the next one should be soon: a node is absent,
    /// or not every pod could be read.
    pub async fn collect(&mut self, rules: ScanRules) -> Result<bool, StoreError> {
        let state = self.read_state().await?;
        let overlapping = check::overlaps(&state.blocks);
        self.overlaps.send_if_modified(|published| {
            std::mem::replace(published, overlapping.clone()) != overlapping
        });
        let mut plan = leak_scan::plan(&state, rules, &mut self.candidates, self.begin.elapsed());
        let mut existing = BTreeSet::new();
        for node in plan.nodes() {
            if !state.nodes.contains(node) && self.store.has_node(node.to_owned()).await? {
                existing.insert(node.to_owned());
            }
        }
        let to_verify: Vec<String> = plan.pods().into_iter().map(str::to_owned).collect();
        let verified = self.read_pods(&to_verify).await;
        plan.retain_confirmed(&existing, &verified);
        self.exec(&plan).await;
        let has_more =
            verified.len() < to_verify.len() || plan.handle_nodes.len() > ANNOTATED_HANDLES.0;
        Ok(self.candidates.has_node() || has_more)
    }

    /// Reads the state in the order that [`IpamState`] asks for: handles before blocks, and nodes,
    /// pods and pools after them. A pod that gets an address meanwhile is seen, and its address is
    /// no candidate.
    async fn read_state(&self) -> Result<IpamState, StoreError> {
        let handles = Objects::<IPAMHandle>::list(&self.store, handle).await?;
        let blocks = Objects::<IPAMBlock>::list(&self.store, block).await?;
        let affinities = Objects::<BlockAffinity>::list(&self.store, affinity).await?;
        let pods = self.store.pods().await?;
        let nodes = self.store.nodes().await?;
        // Without the range of every pool it is unknown which blocks have none.
        let pools = self.store.pools().await?;
        let blocks = blocks.into_iter().flatten().collect();
        let affinities = affinities.into_iter().flatten().collect();
        Ok(IpamState {
            nodes,
            pods,
            blocks,
            affinities,
            handles,
            pools,
        })
    }

    /// Reads pods by name: their facts, or none if they do not exist. Pods that could not be read
    /// are left out.
    async fn read_pods(&self, pods: &[String]) -> BTreeMap<String, Option<PodFacts>> {
        let read = |name: String| async move {
            match self.store.pod(name.clone()).await {
                Ok(found) => Some((name, found)),
                Err(error) => {
                    warn!(pod = name, %error, "pod cannot be read and keeps its addresses");
                    None
                }
            }
        };
        stream::iter(pods.iter().take(VERIFIED_PODS.0).cloned())
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
            .for_each_concurrent(ANNOTATED_HANDLES.1, |(handle, node)| {
                self.annotate_handle(handle, node)
            })
            .await;
        for (cidr, releases) in &plan.releases {
            if let Err(error) = self.release(*cidr, releases).await {
                warn!(block = %cidr, %error, "addresses cannot be released, retrying later");
            }
        }
        self.update_stale_handles().await;
        let mut affinities: BTreeMap<(IpNet, &str), &Affinity> = plan
            .affinities
            .iter()
            .map(|affinity| ((affinity.cidr, affinity.node.as_str()), affinity))
            .collect();
        for block in &plan.blocks {
            let affinity = block
                .node
                .as_deref()
                .and_then(|node| affinities.remove(&(block.cidr, node)));
            match self.delete_block_with_affinity(block, affinity).await {
                Ok(true) => {
                    info!(
                        block = %block.cidr,
                        node = block.node,
                        "block deleted: empty and not needed",
                    )
                }
                Ok(false) => {
                    info!(
                        block = %block.cidr,
                        node = block.node,
                        "block has changed since the scan and stays",
                    )
                }
                Err(error) => {
                    warn!(
                        block = %block.cidr,
                        node = block.node,
                        %error,
                        "block cannot be deleted, retrying later",
                    )
                }
            }
        }
        for affinity in affinities.into_values() {
            match self.delete_affinity(affinity).await {
                Ok(true) => {
                    info!(
                        node = affinity.node,
                        block = %affinity.cidr,
                        "affinity deleted: it has no block",
                    )
                }
                Ok(false) => {
                    info!(
                        node = affinity.node,
                        block = %affinity.cidr,
                        "affinity has changed since the scan and stays",
                    )
                }
                Err(error) => {
                    warn!(
                        node = affinity.node,
                        block = %affinity.cidr,
                        %error,
                        "affinity cannot be deleted, retrying later",
                    )
                }
            }
        }
        for handle in &plan.handles {
            if let Err(error) = self.delete_handle(handle).await {
                warn!(
                    handle = handle.name,
                    %error,
                    "handle without addresses cannot be deleted, retrying later",
                );
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
                info!(
                    address = %release.address,
                    node = release.node,
                    pod = release.pod,
                    "leaked address released",
                );
                handles.extend(Some(release.handle.clone()).filter(|handle| !handle.is_empty()));
            }
        }
        if !is_changed {
            return Ok(());
        }
        object.spec = block.spec().clone();
        // Recorded before the write: it may take effect although there is no answer.
        self.stale_handles.entry(cidr).or_default().extend(handles);
        self.store.replace(object).await?;
        Ok(())
    }

    /// Removes blocks from the handles that have no more addresses in them; failures are kept for
    /// the next scan.
    async fn update_stale_handles(&mut self) {
        for (cidr, handles) in std::mem::take(&mut self.stale_handles) {
            let block = match self.read_block(cidr).await {
                Ok(block) => block.map(|(_, block)| block),
                Err(error) => {
                    warn!(
                        block = %cidr,
                        %error,
                        "handles may still list the block, retrying later",
                    );
                    self.stale_handles.insert(cidr, handles);
                    continue;
                }
            };
            for handle in handles {
                if block
                    .as_ref()
                    .is_some_and(|block| !block.of_handle(&handle).is_empty())
                {
                    continue;
                }
                if let Err(error) = remove_block_from_handle(&self.store, &handle, cidr).await {
                    warn!(
                        block = %cidr,
                        handle,
                        %error,
                        "handle may still list the block, retrying later",
                    );
                    self.stale_handles.entry(cidr).or_default().insert(handle);
                }
            }
        }
    }

    async fn read_block(&self, cidr: IpNet) -> Result<Option<(IPAMBlock, Block)>, StoreError> {
        let Some(object) = Objects::<IPAMBlock>::get(&self.store, names::block(cidr)).await? else {
            return Ok(None);
        };
        match Block::parse(object.spec.clone()) {
            Ok(block) => Ok(Some((object, block))),
            Err(error) => Err(StoreError::Damaged(format!("{error}; repair or delete it"))),
        }
    }

    /// Writes the node of a handle that has not changed since the scan into its annotation.
    async fn annotate_handle(&self, scanned: &Handle, node: &str) {
        let written = async {
            let Some(mut object) =
                Objects::<IPAMHandle>::get(&self.store, scanned.name.clone()).await?
            else {
                return Ok(());
            };
            if handle(object.clone()) != *scanned {
                return Ok(());
            }
            let annotations = object.metadata.annotations.get_or_insert_default();
            annotations.insert(names::ANNOTATION_HANDLE_NODE.to_owned(), node.to_owned());
            self.store.replace(object).await.map(drop)
        };
        if let Err(error) = written.await {
            let error: StoreError = error;
            warn!(handle = scanned.name, node, %error, "cannot annotate the handle with its node");
        }
    }

    /// Deletes a handle that has not changed since the scan.
    async fn delete_handle(&self, scanned: &Handle) -> Result<(), StoreError> {
        let Some(object) = Objects::<IPAMHandle>::get(&self.store, scanned.name.clone()).await?
        else {
            return Ok(());
        };
        if handle(object.clone()) != *scanned {
            return Ok(());
        }
        if Objects::<IPAMHandle>::delete(&self.store, object.metadata).await? {
            info!(
                handle = scanned.name,
                "handle deleted: no block has an address of it"
            );
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
        let Some(marked) = self
            .set_state(affinity, AffinityState::PendingDeletion)
            .await?
        else {
            return Ok(false);
        };
        if self.delete_block(scanned).await? {
            self.delete_affinity(&marked).await?;
            return Ok(true);
        }
        self.set_state(&marked, AffinityState::Confirmed).await?;
        Ok(false)
    }

    /// Writes the state of an affinity and returns it; none if it has changed since the scan.
    async fn set_state(
        &self,
        scanned: &Affinity,
        state: AffinityState,
    ) -> Result<Option<Affinity>, StoreError> {
        let Some(mut object) =
            Objects::<BlockAffinity>::get(&self.store, scanned.name.clone()).await?
        else {
            return Ok(None);
        };
        if affinity(object.clone()).as_ref() != Some(scanned) {
            return Ok(None);
        }
        if object.spec.state != state.as_str() {
            object.spec.state = state.as_str().to_owned();
            object = self.store.replace(object).await?;
        }
        Ok(affinity(object))
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
            object = self.store.replace(object).await?;
        }
        Objects::<IPAMBlock>::delete(&self.store, object.metadata).await
    }

    /// Deletes an affinity in the same way. Returns true when it is gone.
    async fn delete_affinity(&self, scanned: &Affinity) -> Result<bool, StoreError> {
        let Some(mut object) =
            Objects::<BlockAffinity>::get(&self.store, scanned.name.clone()).await?
        else {
            return Ok(true);
        };
        if affinity(object.clone()).as_ref() != Some(scanned) {
            return Ok(false);
        }
        if !object.spec.deleted {
            object.spec.deleted = true;
            object = self.store.replace(object).await?;
        }
        Objects::<BlockAffinity>::delete(&self.store, object.metadata).await
    }
}

/// Converts an IPAMBlock, if it is valid.
fn block(object: IPAMBlock) -> Option<Block> {
    match Block::parse(object.spec) {
        Ok(block) => Some(block),
        Err(error) => {
            warn!(%error, "block is invalid and skipped");
            None
        }
    }
}

/// Converts a BlockAffinity, if it is one of a node.
pub fn affinity(object: BlockAffinity) -> Option<Affinity> {
    let BlockAffinity { metadata, spec } = object;
    let is_of_node = spec
        .kind
        .as_deref()
        .is_none_or(|kind| matches!(kind, "" | "host"));
    Some(Affinity {
        name: metadata.name.unwrap_or_default(),
        cidr: spec.cidr.parse().ok().filter(|_| is_of_node)?,
        node: spec.node,
        deleted: spec.deleted,
        version: metadata.resource_version.unwrap_or_default(),
    })
}

/// Converts an IPAMHandle.
pub fn handle(object: IPAMHandle) -> Handle {
    let IPAMHandle { metadata, spec } = object;
    Handle {
        name: metadata.name.unwrap_or_default(),
        id: spec.handle_id,
        node: metadata
            .annotations
            .and_then(|mut annotations| annotations.remove(names::ANNOTATION_HANDLE_NODE)),
        blocks: spec
            .block
            .into_keys()
            .filter_map(|cidr| cidr.parse().ok())
            .collect(),
        version: metadata.resource_version.unwrap_or_default(),
    }
}
