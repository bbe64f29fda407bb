//! Objects as the API has them, to what typha's watches make of them: the conversions of `margay-api`, kind by kind.

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking;
use margay_api::meta::{Labels, NamespacedName};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::problem::Refusal;
use margay_api::{k8s, v3};
use margay_calc::update::{Backend, Update};
use margay_typha::cache::{ObjectKey, Observed};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// What an object means, and why it is not used as it is written.
type Meaning = (Option<Update>, Vec<String>);

/// Reads an object of one kind.
type Convert = fn(&Value) -> Result<Meaning>;

/// A kind: API group (empty for the core), name, name in typha's cache, conversion.
type Line = (&'static str, &'static str, &'static str, Convert);

/// Group of Calico's kinds.
const CALICO: &str = "projectcalico.org";

#[rustfmt::skip]
const TABLE: &[Line] = &[
    ("", "Pod", margay_typha::kinds::POD, pod),
    ("", "Namespace", "Namespace", namespace),
    ("", "Node", "Node", node),
    ("", "ServiceAccount", "ServiceAccount", service_account),
    ("discovery.k8s.io", "EndpointSlice", "EndpointSlice", endpoint_slice),
    ("networking.k8s.io", "NetworkPolicy", "KubernetesNetworkPolicy", kubernetes_policy),
    ("policy.networking.k8s.io", "ClusterNetworkPolicy", "KubernetesClusterNetworkPolicy", cluster_policy),
    (CALICO, "NetworkPolicy", "NetworkPolicy", network_policy),
    (CALICO, "GlobalNetworkPolicy", "GlobalNetworkPolicy", global_policy),
    (CALICO, "Tier", "Tier", tier),
    (CALICO, "NetworkSet", "NetworkSet", network_set),
    (CALICO, "GlobalNetworkSet", "GlobalNetworkSet", global_network_set),
    (CALICO, "IPPool", "IPPool", pool),
    (CALICO, "IPAMBlock", margay_typha::kinds::BLOCK, block),
    (CALICO, "FelixConfiguration", "FelixConfiguration", settings),
];

/// What is there before anything else: the tiers that an installation has, settings, and the pool.
pub fn ground(pool: &Value) -> Vec<Value> {
    let of = |kind: &str, name: &str, spec: Value| json!({"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": {"name": name}, "spec": spec});
    vec![
        of("Tier", "kube-admin", json!({"order": 1_000, "defaultAction": "Pass"})),
        of("Tier", "default", json!({"order": 1_000_000, "defaultAction": "Deny"})),
        of("Tier", "kube-baseline", json!({"order": 10_000_000, "defaultAction": "Pass"})),
        of("FelixConfiguration", "default", json!({})),
        of("IPPool", super::POOL, pool.clone()),
    ]
}

/// The object as a watch sees it, with its kind in typha's cache.
pub fn observe(object: &Value) -> Result<(&'static str, Observed)> {
    let (kind, key, convert) = lookup(object)?;
    let mut object = object.clone();
    if object["kind"] == "Namespace" {
        // The API server's own doing.
        object["metadata"]["labels"]["kubernetes.io/metadata.name"] = key.name.clone().into();
    }
    let (update, problems) = convert(&object)?;
    let uid = object["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
    Ok((kind, Observed { key, uid, meaning: Ok(update), problems }))
}

/// Which object of which kind it is.
pub fn identity(object: &Value) -> Result<(&'static str, ObjectKey)> {
    lookup(object).map(|(kind, key, _)| (kind, key))
}

fn lookup(object: &Value) -> Result<(&'static str, ObjectKey, Convert)> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let (group, _) = text("/apiVersion").rsplit_once('/').unwrap_or_default();
    let found = TABLE.iter().find(|line| line.0 == group && line.1 == text("/kind"));
    let Some((_, _, kind, convert)) = found else {
        bail!("{} {}: a lab knows nothing of this kind", text("/apiVersion"), text("/kind"));
    };
    Ok((kind, NamespacedName::new(text("/metadata/namespace"), text("/metadata/name")), *convert))
}

fn read<K: DeserializeOwned>(object: &Value) -> Result<K> {
    serde_json::from_value(object.clone()).with_context(|| format!("{object}: not what its kind is"))
}

fn pod(object: &Value) -> Result<Meaning> {
    let endpoint = k8s::pod::workload_endpoint(&read::<Pod>(object)?);
    Ok(used(endpoint.map(|(key, endpoint)| Update::Endpoint(key, Some(endpoint)))))
}

fn namespace(object: &Value) -> Result<Meaning> {
    let (key, labels) = named(read::<Namespace>(object)?.metadata);
    Ok(used(Some(Update::Namespace(key.name, Some(labels)))))
}

fn node(object: &Value) -> Result<Meaning> {
    let node: Node = read(object)?;
    let info = k8s::node::node_info(&node);
    Ok(used(Some(Update::Node(named(node.metadata).0.name, Some(info)))))
}

fn service_account(object: &Value) -> Result<Meaning> {
    let (key, labels) = named(read::<ServiceAccount>(object)?.metadata);
    Ok(used(Some(Update::ServiceAccount(key, Some(labels)))))
}

fn endpoint_slice(object: &Value) -> Result<Meaning> {
    let slice: EndpointSlice = read(object)?;
    let backends = k8s::service::backends(&slice).into_iter();
    let backends = backends
        .map(|backend| Backend { address: backend.address, protocol: backend.protocol, port: backend.port })
        .collect();
    Ok(used(k8s::service::service_of(&slice).map(|service| Update::Service(service, Some(backends)))))
}

fn kubernetes_policy(object: &Value) -> Result<Meaning> {
    let policy: networking::v1::NetworkPolicy = read(object)?;
    let key = k8s::netpol::key(&policy);
    let parsed = k8s::netpol::policy(&policy).map(|(_, policy)| policy);
    Ok(taken(parsed, |policy| Update::Policy(key, Some(policy))))
}

fn cluster_policy(object: &Value) -> Result<Meaning> {
    let policy: k8s::cnp::ClusterNetworkPolicy = read(object)?;
    let key = k8s::cnp::key(&policy);
    Ok(taken(k8s::cnp::policy(&policy), |policy| Update::Policy(key, Some(policy))))
}

fn network_policy(object: &Value) -> Result<Meaning> {
    let policy: v3::NetworkPolicy = read(object)?;
    let key = PolicyKey::of(PolicyKind::NetworkPolicy, &policy.metadata);
    Ok(taken(v3::policy::network_policy(&policy), |policy| Update::Policy(key, Some(policy))))
}

fn global_policy(object: &Value) -> Result<Meaning> {
    let policy: v3::GlobalNetworkPolicy = read(object)?;
    let key = PolicyKey::of(PolicyKind::GlobalNetworkPolicy, &policy.metadata);
    Ok(taken(v3::policy::global_network_policy(&policy), |policy| Update::Policy(key, Some(policy))))
}

fn tier(object: &Value) -> Result<Meaning> {
    let tier: v3::Tier = read(object)?;
    let parsed = v3::tier::tier(&tier);
    let name = named(tier.metadata).0.name;
    Ok(taken(parsed, |tier| Update::Tier(name, Some(tier))))
}

fn network_set(object: &Value) -> Result<Meaning> {
    let set: v3::NetworkSet = read(object)?;
    let parsed = v3::netset::network_set(&set);
    let key = named(set.metadata).0;
    Ok(taken(parsed, |set| Update::NetworkSet(key, Some(set))))
}

fn global_network_set(object: &Value) -> Result<Meaning> {
    let set: v3::GlobalNetworkSet = read(object)?;
    let parsed = v3::netset::global_network_set(&set);
    let key = named(set.metadata).0;
    Ok(taken(parsed, |set| Update::NetworkSet(key, Some(set))))
}

fn pool(object: &Value) -> Result<Meaning> {
    let pool: v3::IPPool = read(object)?;
    let parsed = v3::pool::pool(&pool);
    let name = named(pool.metadata).0.name;
    Ok(taken(parsed, |pool| Update::Pool(name, Some(pool))))
}

fn block(object: &Value) -> Result<Meaning> {
    let block = v3::pool::block_info(&read::<v3::IPAMBlock>(object)?)?;
    Ok(used(block.map(|(range, info)| Update::Block(range, Some(info)))))
}

fn settings(object: &Value) -> Result<Meaning> {
    let configuration: v3::FelixConfiguration = read(object)?;
    let parsed = v3::cluster::overrides(&configuration);
    let name = named(configuration.metadata).0.name;
    Ok(taken(parsed, |overrides| Update::Settings(name, Some(overrides))))
}

fn named(meta: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> (NamespacedName, Labels) {
    let key = NamespacedName::new(meta.namespace.unwrap_or_default(), meta.name.unwrap_or_default());
    (key, meta.labels.unwrap_or_default())
}

fn used(update: Option<Update>) -> Meaning {
    (update, Vec::new())
}

/// What was parsed, or what is enforced in place of what was refused.
fn taken<T>(parsed: Result<T, Refusal<T>>, update: impl FnOnce(T) -> Update) -> Meaning {
    match parsed {
        Ok(value) => used(Some(update(value))),
        Err(refusal) => (refusal.closed.map(update), refusal.problems.iter().map(ToString::to_string).collect()),
    }
}
