//! Reports problems to the operator: this replica's key of a ConfigMap, written when it changes and
//! at most once per `PAUSE`.

use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{Patch, PatchParams};
use margay_api::report::{CONFIG_MAP, Entry, Listing, Report};
use margay_runtime::backoff::{Backoff, jitter};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::warn;

use crate::event::Event;
use crate::registry::Registry;

/// Delay before writing, to combine changes.
const PAUSE: Duration = Duration::from_secs(2);
/// Timeout of the API server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Initial and maximal backoff.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// Maximal length of a field manager's name (Kubernetes validation).
const MAX_MANAGER: usize = 128;

/// Reports the problems of this replica.
pub struct Reporter {
    /// Client of the API server.
    pub client: kube::Client,
    /// Namespace of the ConfigMap.
    pub namespace: String,
    /// Name of this replica's pod, which is its key.
    pub instance: String,
    /// Sender to the owner task.
    pub events: mpsc::Sender<Event>,
    /// Sessions of this replica.
    pub registry: Registry,
}

impl Reporter {
    /// Reports until the owner task ends.
    pub async fn run(self) {
        let mut changes = self.registry.subscribe();
        let mut retry = Backoff::new(RETRY.0, RETRY.1);
        // Written once after every start: a restarted container finds the report of its
        // predecessor.
        let mut reported = None;
        while changes.changed().await.is_ok() {
            loop {
                tokio::time::sleep(PAUSE).await;
                changes.mark_unchanged();
                let Some(report) = report(&self.events, &self.registry).await else {
                    return;
                };
                if reported.as_ref() == Some(&report) {
                    break;
                }
                match self.write(&report).await {
                    Ok(()) => {
                        reported = Some(report);
                        retry.reset();
                        break;
                    }
                    Err(error) => {
                        warn!(
                            error,
                            "what is wrong is not reported to the operator, trying again"
                        );
                        tokio::time::sleep(retry.next(jitter())).await;
                    }
                }
            }
        }
    }

    /// Applies this replica's key only; other replicas own theirs.
    async fn write(&self, report: &Report) -> Result<(), String> {
        let text = serde_json::to_string(report).map_err(|error| error.to_string())?;
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": CONFIG_MAP, "namespace": self.namespace },
            "data": { (self.instance.as_str()): text },
        });
        let manager: String = self.instance.chars().take(MAX_MANAGER).collect();
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let params = PatchParams::apply(&manager).force();
        match timeout(
            REQUEST_TIMEOUT,
            api.patch(CONFIG_MAP, &params, &Patch::Apply(map)),
        )
        .await
        {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {REQUEST_TIMEOUT:?}")),
        }
    }
}

/// Current problems; `None` when the owner task has ended.
pub async fn report(events: &mpsc::Sender<Event>, registry: &Registry) -> Option<Report> {
    let (reply, answer) = oneshot::channel();
    let ask = Event::Query(Box::new(move |state| {
        // The receiver may have been dropped at shutdown.
        let _ = reply.send(state.problems());
    }));
    events.send(ask).await.ok()?;
    let objects = answer.await.ok()?;
    Some(Report {
        objects,
        records: records(registry),
        nodes: nodes(registry),
    })
}

/// Records that nodes cannot enforce as written.
fn records(registry: &Registry) -> Listing {
    let errors = registry.errors();
    let errors = errors
        .iter()
        .flat_map(|(node, errors)| errors.iter().map(move |error| (node, error)));
    Listing::of(errors, |(node, (id, reason))| {
        Entry::new(
            &format!("{} {} on node {node}", id.kind(), id.name()),
            reason,
        )
    })
}

/// Problems of nodes as a whole. Hints are only in the debug service.
fn nodes(registry: &Registry) -> Listing {
    let problems = registry.problems();
    let problems = problems
        .iter()
        .flat_map(|(node, problems)| problems.iter().map(move |problem| (node, problem)));
    let degraded = problems.filter(|(_, problem)| problem.degraded);
    Listing::of(degraded, |(node, problem)| {
        Entry::new(node, &format!("{}: {}", problem.code, problem.message))
    })
}
