//! Ready replicas of typha, from the EndpointSlices of its Service.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use tokio::sync::mpsc;
use tracing::debug;

use crate::event::Event;
use crate::placement::Replica;

/// Label selector of the slices of typha's Service.
const SLICES: &str = "kubernetes.io/service-name=margay-typha";
/// Name of the port for agents.
const PORT: &str = "sync";

/// Watches the slices in `namespace` and reports the ready replicas when they change, until the
/// owner task ends. While the API server does not answer, the last ones stay.
pub async fn run(client: kube::Client, namespace: String, events: mpsc::Sender<Event>) {
    let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
    let config = watcher::Config::default().labels(SLICES);
    let mut stream = std::pin::pin!(watcher(api, config).default_backoff());
    let (mut slices, mut listing) = (BTreeMap::new(), None);
    while let Some(event) = stream.next().await {
        match event {
            Ok(watcher::Event::Init) => listing = Some(BTreeMap::new()),
            Ok(watcher::Event::InitApply(slice)) => {
                let listing = listing.get_or_insert_default();
                listing.insert(slice.name_any(), ready_replicas(&slice));
            }
            Ok(watcher::Event::InitDone) => slices = listing.take().unwrap_or_default(),
            Ok(watcher::Event::Apply(slice)) => {
                slices.insert(slice.name_any(), ready_replicas(&slice));
            }
            Ok(watcher::Event::Delete(slice)) => drop(slices.remove(&slice.name_any())),
            Err(error) => debug!(%error, "replicas of typha cannot be watched, trying again"),
        }
        if listing.is_some() {
            continue;
        }
        let all: BTreeSet<Replica> = slices.values().flatten().cloned().collect();
        let replicas = Event::Replicas(all.into_iter().collect());
        if events.send(replicas).await.is_err() {
            return;
        }
    }
}

/// Replicas of a slice that are ready and do not end.
fn ready_replicas(slice: &EndpointSlice) -> Vec<Replica> {
    let ports = slice.ports.iter().flatten();
    let port = ports
        .filter(|port| port.name.as_deref() == Some(PORT))
        .find_map(|port| port.port);
    let Some(port) = port else {
        return Vec::new();
    };
    let replica = |endpoint: &k8s_openapi::api::discovery::v1::Endpoint| {
        let conditions = endpoint.conditions.as_ref()?;
        let is_ready = conditions.ready == Some(true) && conditions.terminating != Some(true);
        let address = endpoint.addresses.first().filter(|_| is_ready)?;
        let pod = endpoint.target_ref.as_ref()?.name.clone()?;
        let server = match address.contains(':') {
            true => format!("[{address}]:{port}"),
            false => format!("{address}:{port}"),
        };
        Some(Replica {
            pod,
            server,
            zone: endpoint.zone.clone().unwrap_or_default(),
        })
    };
    slice
        .endpoints
        .iter()
        .flatten()
        .filter_map(replica)
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn replicas_that_are_ready_and_do_not_end_are_served_from() {
        let endpoint = |pod: &str, address: &str, ready: bool, terminating: bool| {
            json!({
                "addresses": [address],
                "conditions": { "ready": ready, "terminating": terminating },
                "targetRef": { "kind": "Pod", "name": pod },
                "zone": "z",
            })
        };
        let slice = json!({
            "metadata": { "name": "margay-typha-x" },
            "addressType": "IPv4",
            "ports": [{ "name": "metrics", "port": 9093 }, { "name": "sync", "port": 5473 }],
            "endpoints": [
                endpoint("a", "192.0.2.1", true, false),
                endpoint("b", "192.0.2.2", false, false),
                endpoint("c", "192.0.2.3", true, true),
                endpoint("d", "fd00::4", true, false),
            ],
        });
        let slice: EndpointSlice = serde_json::from_value(slice).expect("a slice");
        let replicas = ready_replicas(&slice);
        let servers: Vec<_> = replicas
            .iter()
            .map(|Replica { pod, server, zone }| format!("{pod} {server} {zone}"))
            .collect();
        assert_eq!(servers, ["a 192.0.2.1:5473 z", "d [fd00::4]:5473 z"]);
        let without = EndpointSlice {
            ports: None,
            ..slice
        };
        assert_eq!(ready_replicas(&without), []);
    }
}
