//! Tells the operator what is wrong: this replica's key of a ConfigMap, written when it changes and not more often than every [`PAUSE`].

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

use crate::compute::Event;
use crate::debug::{kind_of, name_of};
use crate::registry::Registry;

/// What comes together is told together.
const PAUSE: Duration = Duration::from_secs(2);
/// The longest time for the API server's answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Between attempts.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// The longest name of a field manager: Kubernetes' limit.
const MANAGER: usize = 128;

/// Who reports.
pub struct Reporter {
    /// Connection to the API.
    pub client: kube::Client,
    /// Namespace of the ConfigMap.
    pub namespace: String,
    /// Name of this replica's pod, which is its key.
    pub instance: String,
    /// The owner task.
    pub events: mpsc::Sender<Event>,
    /// The nodes of this replica.
    pub registry: Registry,
}

impl Reporter {
    /// Reports until the owner task ends.
    pub async fn run(self) {
        let mut bell = self.registry.bell();
        let mut retry = Backoff::new(RETRY.0, RETRY.1);
        // A container that is started anew finds what its predecessor told.
        let mut told = None;
        while bell.changed().await.is_ok() {
            loop {
                tokio::time::sleep(PAUSE).await;
                bell.mark_unchanged();
                let Some(report) = report(&self.events, &self.registry).await else { return };
                if told.as_ref() == Some(&report) {
                    break;
                }
                match self.write(&report).await {
                    Ok(()) => {
                        told = Some(report);
                        retry.reset();
                        break;
                    }
                    Err(error) => {
                        warn!(error, "what is wrong is not told to the operator, trying again");
                        tokio::time::sleep(retry.next(jitter())).await;
                    }
                }
            }
        }
    }

    /// This replica's key alone: those of others are theirs.
    async fn write(&self, report: &Report) -> Result<(), String> {
        let text = serde_json::to_string(report).map_err(|error| error.to_string())?;
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": CONFIG_MAP, "namespace": self.namespace },
            "data": { (self.instance.as_str()): text },
        });
        let manager: String = self.instance.chars().take(MANAGER).collect();
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let params = PatchParams::apply(&manager).force();
        match timeout(ANSWER, api.patch(CONFIG_MAP, &params, &Patch::Apply(map))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {ANSWER:?}")),
        }
    }
}

/// What is wrong now; none when the owner task has ended.
pub async fn report(events: &mpsc::Sender<Event>, registry: &Registry) -> Option<Report> {
    let (reply, answer) = oneshot::channel();
    let ask = Event::Query(Box::new(move |owner| {
        // Whoever asked may have been told to stop.
        let _ = reply.send(owner.refused());
    }));
    events.send(ask).await.ok()?;
    let objects = answer.await.ok()?;
    Some(Report { objects, records: records(registry), nodes: nodes(registry) })
}

/// What nodes cannot enforce as it is written.
fn records(registry: &Registry) -> Listing {
    let errors = registry.errors();
    let errors = errors.iter().flat_map(|(node, errors)| errors.iter().map(move |error| (node, error)));
    Listing::of(errors, |(node, (id, reason))| {
        Entry::new(&format!("{} {} on node {node}", kind_of(id), name_of(id)), reason)
    })
}

/// What is wrong with nodes as a whole. Hints are told to those who ask for them alone.
fn nodes(registry: &Registry) -> Listing {
    let problems = registry.problems();
    let problems = problems.iter().flat_map(|(node, problems)| problems.iter().map(move |problem| (node, problem)));
    let degraded = problems.filter(|(_, problem)| problem.degraded);
    Listing::of(degraded, |(node, problem)| Entry::new(node, &format!("{}: {}", problem.code, problem.message)))
}
