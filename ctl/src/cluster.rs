//! A cluster out of its objects: what the API server and the controllers would add is added, and
//! everything goes through the graph that typha computes with.

use std::collections::{BTreeMap, BTreeSet};

use margay_api::endpoint::EndpointKey;
use margay_api::meta::{Labels, NamespacedName};
use margay_api::policy::{Order, Policy, PolicyKey, StagedPolicy, Tier};
use margay_api::rule::Action;
use margay_api::v3::tier::BUILT_IN_TIERS;
use margay_calc::graph::Graph;
use margay_calc::ingest::Ingested;
use margay_calc::update::Update;

use crate::address::Addresses;
use crate::manifest::{Origin, Unreadable};
use crate::objects::{Content, ObjectName, Objects};
use crate::service::{self, ServicePort};
use crate::workload::{ClusterPod, PodObject};

/// Names that a note lists.
const LISTED: usize = 5;

/// An object that is not enforced as written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refused {
    /// Kind and name.
    pub object: String,
    /// Where it was read.
    pub origin: Origin,
    /// Reasons: field, value, rule and remedy of each.
    pub problems: Vec<String>,
}

/// The computed state of a cluster.
#[derive(Debug, Default)]
pub struct Cluster {
    /// What nodes enforce.
    pub graph: Graph,
    /// Pods by name.
    pub pods: BTreeMap<EndpointKey, ClusterPod>,
    /// Ports of Services, with the pods behind them.
    pub services: BTreeMap<NamespacedName, Vec<ServicePort>>,
    /// Where each policy was read.
    pub origins: BTreeMap<PolicyKey, Origin>,
    /// Objects that are not enforced as written.
    pub refused: Vec<Refused>,
    /// Documents that are not objects.
    pub unreadable: Vec<Unreadable>,
    /// What was assumed, and what contradicts other objects.
    pub notes: Vec<String>,
}

impl Cluster {
    /// Computes the state of these objects.
    pub fn of(objects: &Objects) -> Self {
        build(objects, false)
    }

    /// Computes the state as if staged policies were enforced.
    pub fn with_staged(objects: &Objects) -> Self {
        build(objects, true)
    }
}

fn build(objects: &Objects, enforces_staged: bool) -> Cluster {
    let mut cluster = Cluster {
        unreadable: objects.unreadable.clone(),
        notes: objects.notes.clone(),
        ..Cluster::default()
    };
    // Manifests do not say whether it is on, and a peer is not to be blamed for that.
    cluster.graph.set_bgp(true);
    let mut updates = Vec::new();
    for (name, object) in &objects.known {
        match &object.content {
            Content::Ingested(ingested) => {
                cluster.add_problems(name, &object.origin, ingested);
                updates.extend(ingested.update.clone());
                cluster
                    .origins
                    .extend(policy_of(ingested).map(|key| (key, object.origin.clone())));
            }
            Content::Pod(_) | Content::Service(_) => {}
        }
    }
    cluster.add_pods(objects);
    cluster.assign_addresses(&updates, objects);
    let pods = cluster.pods.iter();
    updates.extend(pods.map(|(key, pod)| Update::Endpoint(key.clone(), pod.endpoint.clone())));
    let implied = cluster.add_implied(&updates);
    let backends = service::slices(objects);
    cluster.services = service::services(objects, &cluster.pods, &backends);
    updates.retain(|update| !matches!(update, Update::Service(..)));
    updates.extend(service::updates(&cluster.services, backends));
    for update in implied.into_iter().chain(updates) {
        cluster.graph.apply(update);
    }
    if enforces_staged {
        cluster.enforce_staged(objects);
    }
    cluster.graph.flush();
    let conflicts = cluster.graph.conflicts().into_iter();
    cluster
        .notes
        .extend(conflicts.map(|conflict| format!("{}: {}", conflict.object(), conflict.reason())));
    cluster
}

/// A staged policy as an update of the policy that it previews.
fn staged(content: &Content) -> Option<(PolicyKey, Option<Policy>)> {
    let Content::Ingested(ingested) = content else {
        return None;
    };
    let Some(Update::Staged(key, Some(staged))) = &ingested.update else {
        return None;
    };
    let key = PolicyKey {
        kind: key.kind.enforced(),
        ..key.clone()
    };
    match staged {
        StagedPolicy::Set(policy) => Some((key, Some(policy.clone()))),
        StagedPolicy::Delete => Some((key, None)),
        StagedPolicy::Ignore => None,
    }
}

fn policy_of(ingested: &Ingested) -> Option<PolicyKey> {
    match &ingested.update {
        Some(Update::Policy(key, _) | Update::Staged(key, _)) => Some(key.clone()),
        _ => None,
    }
}

impl Cluster {
    fn enforce_staged(&mut self, objects: &Objects) {
        for object in objects.known.values() {
            if let Some((key, policy)) = staged(&object.content) {
                self.origins.insert(key.clone(), object.origin.clone());
                self.graph.apply(Update::Policy(key, policy));
            }
        }
    }

    fn add_problems(&mut self, name: &ObjectName, origin: &Origin, ingested: &Ingested) {
        if !ingested.problems.is_empty() {
            let problems = ingested.problems.clone();
            self.refused.push(Refused {
                object: name.to_string(),
                origin: origin.clone(),
                problems,
            });
        }
    }

    /// Adds the pods, and those of workloads that have none among them: an API server has both.
    fn add_pods(&mut self, objects: &Objects) {
        let pods = objects
            .known
            .iter()
            .filter_map(|(name, object)| match &object.content {
                Content::Pod(pod) => Some((name.kind == "Pod", pod.as_ref())),
                Content::Ingested(_) | Content::Service(_) => None,
            });
        let (pods, workloads): (Vec<_>, Vec<_>) = pods.partition(|(is_pod, _)| *is_pod);
        pods.iter().for_each(|(_, pod)| self.add_pod(pod));
        for (_, workload) in workloads {
            if !pods.iter().any(|(_, pod)| workload.may_own(pod)) {
                self.add_pod(workload);
            }
        }
    }

    fn add_pod(&mut self, pod: &PodObject) {
        let PodObject {
            key,
            endpoint,
            ports,
            ..
        } = pod.clone();
        if self
            .pods
            .insert(key.clone(), ClusterPod { endpoint, ports })
            .is_some()
        {
            self.notes.push(format!(
                "workloads of one name have the pod {key} in common; the last by kind counts"
            ));
        }
    }

    /// Gives addresses to pods that have none yet, out of the pools, so that rules about ranges
    /// mean something.
    fn assign_addresses(&mut self, updates: &[Update], objects: &Objects) {
        let alive = objects
            .known
            .values()
            .filter_map(|object| match &object.content {
                Content::Pod(pod) if pod.is_alive => Some(&pod.key),
                _ => None,
            });
        let alive: BTreeSet<&EndpointKey> = alive.collect();
        let endpoints = self.pods.values().filter_map(|pod| pod.endpoint.as_ref());
        let mut addresses = Addresses::new(
            updates,
            endpoints.flat_map(|endpoint| endpoint.addresses.iter().copied()),
        );
        let mut given = BTreeSet::new();
        for (key, pod) in self.pods.iter_mut().filter(|(key, _)| alive.contains(key)) {
            if let Some(endpoint) = pod
                .endpoint
                .as_mut()
                .filter(|endpoint| endpoint.addresses.is_empty())
            {
                endpoint.addresses = addresses.assign();
                given.insert(key.to_string());
            }
        }
        if !given.is_empty() {
            let source = addresses.source();
            self.notes.push(format!(
                "pods without addresses were given some of {source}: {}",
                list(&given)
            ));
        }
    }

    /// Returns what an installation and the API server add: tiers, and the namespaces and accounts
    /// of pods.
    fn add_implied(&mut self, updates: &[Update]) -> Vec<Update> {
        let tiers = BUILT_IN_TIERS.iter().map(|(name, order, action)| {
            let tier = Tier {
                order: Order(Some(f64::from(*order))),
                default_action: match *action {
                    "Pass" => Action::Pass,
                    _ => Action::Deny,
                },
            };
            Update::Tier((*name).to_owned(), Some(tier))
        });
        let (mut namespaces, mut accounts) = (BTreeSet::new(), BTreeSet::new());
        for (key, pod) in &self.pods {
            namespaces.insert(key.namespace.clone());
            let account = pod
                .endpoint
                .as_ref()
                .map(|endpoint| endpoint.service_account.as_str());
            accounts.extend(account.map(|name| NamespacedName::new(key.namespace.as_str(), name)));
        }
        for update in updates {
            match update {
                Update::Namespace(name, _) => namespaces.remove(name),
                Update::ServiceAccount(name, _) => accounts.remove(name),
                _ => false,
            };
        }
        // Every cluster has this one.
        let unknown: BTreeSet<String> = namespaces
            .iter()
            .filter(|name| *name != "default")
            .cloned()
            .collect();
        if !unknown.is_empty() {
            self.notes.push(format!(
                "namespaces that are not given count as ones without labels: {}",
                list(&unknown)
            ));
        }
        let labels = |name: &str| {
            Labels::from([("kubernetes.io/metadata.name".to_owned(), name.to_owned())])
        };
        let namespaces = namespaces
            .iter()
            .map(|name| Update::Namespace(name.clone(), Some(labels(name).into())));
        let accounts = accounts
            .iter()
            .map(|name| Update::ServiceAccount(name.clone(), Some(Labels::new())));
        tiers.chain(namespaces).chain(accounts).collect()
    }
}

/// The first of the names, and how many more there are.
fn list(names: &BTreeSet<String>) -> String {
    let shown: Vec<&str> = names.iter().take(LISTED).map(String::as_str).collect();
    match names.len().saturating_sub(LISTED) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
