//! Ingestion of API objects: converts each kind to an [`Update`], or to its problems.

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use margay_api::meta::{ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6, Labels, NamespacedName};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::problem::{Problem, Refusal};
use margay_api::report;
use margay_api::{ipam, k8s, v3};

use crate::update::{Backend, NamespaceInfo, Update};

/// Maximal number of problems kept of one object.
const MAX_PROBLEMS: usize = 16;
/// Maximal length of each, in bytes.
const MAX_PROBLEM_BYTES: usize = 1024;

/// Result of ingesting an object.
#[derive(Debug, Default)]
pub struct Ingested {
    /// The update; `None` if the object is irrelevant to policy and routing.
    pub update: Option<Update>,
    /// True if the former value of the object takes precedence over `update`.
    pub prefers_former: bool,
    /// Reasons why it is not enforced as written: field, value, rule and remedy.
    pub problems: Vec<String>,
}

/// Endpoint of a pod.
pub fn pod(pod: Pod) -> Ingested {
    let endpoint = k8s::pod::workload_endpoint(&pod);
    relevant(endpoint.map(|(key, endpoint)| Update::Endpoint(key, Some(endpoint))))
}

/// Labels of a Namespace, and whether it names pools.
pub fn namespace(namespace: Namespace) -> Ingested {
    let annotations = namespace.metadata.annotations.as_ref();
    let names_pools = annotations.is_some_and(|annotations| {
        [ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6]
            .iter()
            .any(|name| annotations.contains_key(*name))
    });
    let (key, labels) = identity(namespace.metadata);
    let namespace = NamespaceInfo {
        labels,
        names_pools,
    };
    relevant(Some(Update::Namespace(key.name, Some(namespace))))
}

/// Addresses and labels of a Node.
pub fn node(node: Node) -> Ingested {
    let (info, problems) = (k8s::node::node_info(&node), k8s::node::problems(&node));
    let update = Update::Node(identity(node.metadata).0.name, Some(info));
    Ingested {
        update: Some(update),
        prefers_former: false,
        problems: describe(&problems),
    }
}

/// Labels of a ServiceAccount.
pub fn service_account(account: ServiceAccount) -> Ingested {
    let (key, labels) = identity(account.metadata);
    relevant(Some(Update::ServiceAccount(key, Some(labels))))
}

/// Backends in one EndpointSlice, as an update of its whole Service: a caller with several slices
/// of a Service must merge them.
pub fn endpoint_slice(slice: EndpointSlice) -> Ingested {
    let backends = k8s::service::backends(&slice).into_iter();
    let backends = backends.map(|backend| Backend {
        address: backend.address,
        protocol: backend.protocol,
        port: backend.port,
        ready_on: backend.ready_on,
    });
    let service = k8s::service::service_of(&slice);
    relevant(service.map(|service| Update::Service(service, Some(backends.collect()))))
}

/// Policy of a Kubernetes NetworkPolicy.
pub fn kubernetes_policy(policy: networking::v1::NetworkPolicy) -> Ingested {
    let key = k8s::netpol::key(&policy);
    let parsed = k8s::netpol::policy(&policy).map(|(_, policy)| policy);
    accepted(parsed, |policy| Update::Policy(key, Some(policy)))
}

/// Policy of a ClusterNetworkPolicy.
pub fn cluster_policy(policy: k8s::cnp::ClusterNetworkPolicy) -> Ingested {
    let key = k8s::cnp::key(&policy);
    accepted(k8s::cnp::policy(&policy), |policy| {
        Update::Policy(key, Some(policy))
    })
}

/// Policy of Calico's NetworkPolicy.
pub fn network_policy(policy: v3::NetworkPolicy) -> Ingested {
    let key = PolicyKey::of(PolicyKind::NetworkPolicy, &policy.metadata);
    accepted(v3::parse::policy::network_policy(&policy), |policy| {
        Update::Policy(key, Some(policy))
    })
}

/// Policy of a GlobalNetworkPolicy.
pub fn global_policy(policy: v3::GlobalNetworkPolicy) -> Ingested {
    let key = PolicyKey::of(PolicyKind::GlobalNetworkPolicy, &policy.metadata);
    accepted(
        v3::parse::policy::global_network_policy(&policy),
        |policy| Update::Policy(key, Some(policy)),
    )
}

/// Staged policy of a StagedNetworkPolicy.
pub fn staged_policy(policy: v3::StagedNetworkPolicy) -> Ingested {
    let key = PolicyKey::of(PolicyKind::StagedNetworkPolicy, &policy.metadata);
    accepted(
        v3::parse::staged::staged_network_policy(&policy),
        |staged| Update::Staged(key, Some(staged)),
    )
}

/// Staged policy of a StagedGlobalNetworkPolicy.
pub fn staged_global_policy(policy: v3::StagedGlobalNetworkPolicy) -> Ingested {
    let key = PolicyKey::of(PolicyKind::StagedGlobalNetworkPolicy, &policy.metadata);
    accepted(
        v3::parse::staged::staged_global_network_policy(&policy),
        |staged| Update::Staged(key, Some(staged)),
    )
}

/// Staged policy of a StagedKubernetesNetworkPolicy.
pub fn staged_kubernetes_policy(policy: v3::StagedKubernetesNetworkPolicy) -> Ingested {
    let key = PolicyKey::of(PolicyKind::StagedKubernetesNetworkPolicy, &policy.metadata);
    accepted(
        v3::parse::staged::staged_kubernetes_network_policy(&policy),
        |staged| Update::Staged(key, Some(staged)),
    )
}

/// Tier.
pub fn tier(tier: v3::Tier) -> Ingested {
    let parsed = v3::parse::tier::tier(&tier);
    let name = identity(tier.metadata).0.name;
    accepted(parsed, |tier| Update::Tier(name, Some(tier)))
}

/// Network set of a NetworkSet.
pub fn network_set(set: v3::NetworkSet) -> Ingested {
    let parsed = v3::parse::netset::network_set(&set);
    let key = identity(set.metadata).0;
    accepted(parsed, |set| Update::NetworkSet(key, Some(set)))
}

/// Network set of a GlobalNetworkSet.
pub fn global_network_set(set: v3::GlobalNetworkSet) -> Ingested {
    let parsed = v3::parse::netset::global_network_set(&set);
    let key = identity(set.metadata).0;
    accepted(parsed, |set| Update::NetworkSet(key, Some(set)))
}

/// Host endpoint of a HostEndpoint.
pub fn host_endpoint(endpoint: v3::HostEndpoint) -> Ingested {
    let parsed = v3::parse::host::host_endpoint(&endpoint);
    let name = identity(endpoint.metadata).0.name;
    accepted(parsed, |endpoint| {
        Update::HostEndpoint(name, Some(endpoint))
    })
}

/// Pool of an IPPool.
pub fn pool(pool: v3::IPPool) -> Ingested {
    let parsed = v3::parse::pool::pool(&pool);
    let name = identity(pool.metadata).0.name;
    accepted(parsed, |pool| Update::Pool(name, Some(pool)))
}

/// Block of an IPAMBlock.
pub fn block(block: v3::IPAMBlock) -> Ingested {
    match ipam::info::block_info(&block) {
        Ok(block) => relevant(block.map(|(range, info)| Update::Block(range, Some(info)))),
        Err(fault) => Ingested {
            update: None,
            prefers_former: true,
            problems: vec![fault.to_string()],
        },
    }
}

/// Settings of a FelixConfiguration.
pub fn settings(configuration: v3::FelixConfiguration) -> Ingested {
    let parsed = v3::parse::felix::overrides(&configuration);
    let name = identity(configuration.metadata).0.name;
    accepted(parsed, |overrides| Update::Settings(name, Some(overrides)))
}

/// Addresses of a Service.
pub fn service(service: Service) -> Ingested {
    let addresses = k8s::service::addresses(&service);
    let key = identity(service.metadata).0;
    relevant(addresses.map(|addresses| Update::ServiceAddresses(key, Some(addresses))))
}

/// Settings of a BGPConfiguration.
pub fn bgp_settings(configuration: v3::BGPConfiguration) -> Ingested {
    let parsed = v3::parse::bgp::settings(&configuration);
    let name = identity(configuration.metadata).0.name;
    accepted(parsed, |settings| Update::BgpSettings(name, Some(settings)))
}

/// Peer of a BGPPeer.
pub fn bgp_peer(peer: v3::BGPPeer) -> Ingested {
    let parsed = v3::parse::bgp::peer(&peer);
    let name = identity(peer.metadata).0.name;
    accepted(parsed, |peer| Update::BgpPeer(name, Some(peer)))
}

/// Filter of a BGPFilter.
pub fn bgp_filter(filter: v3::BGPFilter) -> Ingested {
    let parsed = v3::parse::bgp::filter(&filter);
    let name = identity(filter.metadata).0.name;
    accepted(parsed, |filter| Update::BgpFilter(name, Some(filter)))
}

fn identity(meta: ObjectMeta) -> (NamespacedName, Labels) {
    let key = NamespacedName {
        namespace: meta.namespace.unwrap_or_default(),
        name: meta.name.unwrap_or_default(),
    };
    (key, meta.labels.unwrap_or_default())
}

fn relevant(update: Option<Update>) -> Ingested {
    Ingested {
        update,
        ..Ingested::default()
    }
}

/// Returns the parsed value, or the substitute for a refused one.
fn accepted<T>(parsed: Result<T, Refusal<T>>, update: impl FnOnce(T) -> Update) -> Ingested {
    match parsed {
        Ok(value) => relevant(Some(update(value))),
        Err(refusal) => Ingested {
            prefers_former: refusal.prefers_former,
            update: refusal.closed.map(update),
            problems: describe(&refusal.problems),
        },
    }
}

/// Describes problems: the first of them, each of limited size, however many a large object has.
fn describe(problems: &[Problem]) -> Vec<String> {
    let shown = problems
        .iter()
        .take(MAX_PROBLEMS)
        .map(|problem| report::cut(&problem.to_string(), MAX_PROBLEM_BYTES));
    let more = problems.len().saturating_sub(MAX_PROBLEMS);
    let more = (more > 0).then(|| format!("and {more} further fields have problems"));
    shown.chain(more).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_limited_in_number_and_length() {
        let problems = vec![
            Problem::new(
                "spec.selector",
                "x".repeat(1 << 20),
                "not a selector",
                "write one"
            );
            5000
        ];
        let texts = describe(&problems);
        assert_eq!(texts.len(), MAX_PROBLEMS + 1);
        assert!(texts.iter().all(|text| text.len() <= MAX_PROBLEM_BYTES));
    }
}
