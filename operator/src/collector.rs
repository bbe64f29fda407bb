//! IPAM garbage collection: scans periodically, and soon after a node has been deleted, while this
//! operator leads and the datastore is not locked. [`margay_ipam::collector`] decides and collects.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::Api;
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use margay_api::storage::Mode;
use margay_api::v3::parse::controllers::leak_grace;
use margay_api::v3::{
    ClusterInformation, IPAMConfiguration, KubeControllersConfiguration, SINGLETON,
};
use margay_ipam::collector::Collector;
use margay_ipam::leak_scan::{LEAK_GRACE, ScanRules};
use margay_ipam::store::api_server::ApiServer;
use margay_ipam::store::{Objects, StoreError};
use margay_runtime::shutdown::Shutdown;
use tokio::sync::{Notify, watch};
use tracing::warn;

/// Interval of scans.
const PERIOD: Duration = Duration::from_secs(300);
/// Interval while a node is absent, or pods or handles are left for the next scan.
const SHORT_PERIOD: Duration = Duration::from_secs(12);

/// Scans and collects while this operator leads; publishes overlapping blocks. Ends with the
/// process.
pub async fn run(
    client: Client,
    mode: Mode,
    overlaps: watch::Sender<Vec<String>>,
    mut leading: watch::Receiver<bool>,
    shutdown: Shutdown,
) {
    let server = ApiServer::new(client.clone(), mode);
    let mut collector = Collector::new(server.clone(), overlaps);
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
            collector.reset();
            continue;
        }
        match collect(&server, &mut collector).await {
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

/// Collects once, unless the datastore is locked. Returns true when the next time should be soon.
async fn collect(
    server: &ApiServer,
    collector: &mut Collector<ApiServer>,
) -> Result<bool, StoreError> {
    let information = Objects::<ClusterInformation>::get(server, SINGLETON.to_owned()).await?;
    if information.is_some_and(|information| information.spec.datastore_ready == Some(false)) {
        return Ok(false);
    }
    collector.collect(rules(server).await?).await
}

/// Reads the settings; an invalid value counts as unset.
async fn rules(server: &ApiServer) -> Result<ScanRules, StoreError> {
    let controllers =
        Objects::<KubeControllersConfiguration>::get(server, SINGLETON.to_owned()).await?;
    let leak = controllers
        .map_or(Ok(None), |object| leak_grace(&object))
        .unwrap_or_else(|problem| {
            warn!(%problem, "setting is invalid and ignored");
            None
        });
    let settings = Objects::<IPAMConfiguration>::get(server, SINGLETON.to_owned()).await?;
    Ok(ScanRules {
        leak: leak.map_or(Some(LEAK_GRACE), |leak| {
            Some(leak).filter(|leak| !leak.is_zero())
        }),
        releases_spare_blocks: settings.is_none_or(|settings| settings.spec.auto_allocate_blocks),
    })
}
