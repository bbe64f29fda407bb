//! The table of what is watched: one line for a kind.

use std::pin::Pin;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use margay_api::meta::{Labels, NamespacedName};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::problem::{Problem, Refusal};
use margay_api::report;
use margay_api::storage::{self, Mode};
use margay_api::{k8s, v3};
use margay_calc::update::{Backend, Update};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::compute::Event;
use crate::feed::{Form, Parsed};
use crate::metrics::Counters;
use crate::watch::Watch;

/// The kind whose objects are endpoints.
pub const POD: &str = "Pod";

/// The kind whose objects say which node an address belongs to.
pub const BLOCK: &str = "IPAMBlock";

/// The kind of Kubernetes' cluster-wide policies.
const CLUSTER_POLICY: &str = "KubernetesClusterNetworkPolicy";

/// Kinds that a cluster may do without, with the definition that would serve them.
const OPTIONAL: &[(&str, &str)] = &[(CLUSTER_POLICY, k8s::cnp::DEFINITION)];

/// Problems of one object that are kept.
const PROBLEMS: usize = 16;
/// Bytes that are kept of each.
const PROBLEM: usize = 1024;

/// One line of the table.
pub struct Line {
    /// Name of the kind.
    pub kind: &'static str,
    /// Where the API serves it; Calico's kinds in the users' form, wherever they are stored.
    path: &'static str,
    /// In a working cluster there is at least one: what an empty list of it would mean is that the API server errs.
    never_empty: bool,
    run: fn(Watch) -> Watching,
    parse: fn(Value) -> serde_json::Result<Parsed>,
}

macro_rules! line {
    ($kind:expr, $path:literal, $never_empty:literal, $parse:path) => {
        Line {
            kind: $kind,
            path: $path,
            never_empty: $never_empty,
            run: |watch| Box::pin(watch.run($parse)),
            parse: |object| serde_json::from_value(object).map($parse),
        }
    };
}

type Watching = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Line {
    /// Watches the kind, where `mode` keeps it, until the owner task ends.
    pub fn start(&self, mode: Mode, client: kube::Client, events: mpsc::Sender<Event>, counters: Counters) -> Watching {
        let (path, form) = self.place(mode);
        let definition = self.definition(form);
        let Self { kind, never_empty, run, .. } = *self;
        run(Watch { kind, path, form, definition, never_empty, client, events, counters })
    }

    /// The definition without which the kind has no objects: of those that a cluster may do without, and in the older storage of those that came
    /// after the Calico of some clusters. The operator brings these; they are waited for by nobody.
    fn definition(&self, form: Form) -> Option<String> {
        if let Form::Stored(stored) = form {
            return (!stored.classic).then(|| format!("{}.{}", stored.stored_plural, Mode::V1.group()));
        }
        let optional = OPTIONAL.iter().find(|(optional, _)| *optional == self.kind);
        optional.map(|(_, definition)| (*definition).to_owned())
    }

    /// Version and kind by which the API knows the kind in that storage.
    pub fn identity(&self, mode: Mode) -> (String, &'static str) {
        let (path, form) = self.place(mode);
        let version = path.trim_start_matches("/apis/").trim_start_matches("/api/");
        let version = version.rsplit_once('/').map_or(version, |(version, _)| version).to_owned();
        let kind = match form {
            Form::Stored(stored) => stored.stored_kind,
            Form::Plain => self.kind.strip_prefix("Kubernetes").unwrap_or(self.kind),
        };
        (version, kind)
    }

    /// What an object of the kind means, given in the users' form.
    pub fn parse(&self, object: Value) -> serde_json::Result<Parsed> {
        (self.parse)(object)
    }

    /// Where the kind is served, and in which form.
    fn place(&self, mode: Mode) -> (String, Form) {
        match storage::Kind::of_path(self.path).filter(|_| mode == Mode::V1) {
            Some(kind) => (kind.path(mode), Form::Stored(kind)),
            None => (self.path.to_owned(), Form::Plain),
        }
    }
}

/// Every kind that policy or routing depends on. All of them must be served: an API server that does not know a kind yet
/// (it has just started, its CRDs are not installed) must not be taken for one that has no policies. Of [`OPTIONAL`] ones the definition is
/// asked for, and believed.
#[rustfmt::skip]
pub const TABLE: &[Line] = &[
    line!(POD, "/api/v1/pods", true, pod),
    line!("Namespace", "/api/v1/namespaces", true, namespace),
    line!("Node", "/api/v1/nodes", true, node),
    line!("ServiceAccount", "/api/v1/serviceaccounts", true, service_account),
    line!("EndpointSlice", "/apis/discovery.k8s.io/v1/endpointslices", false, endpoint_slice),
    line!("KubernetesNetworkPolicy", "/apis/networking.k8s.io/v1/networkpolicies", false, kubernetes_policy),
    line!(CLUSTER_POLICY, "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies", false, cluster_policy),
    line!("NetworkPolicy", "/apis/projectcalico.org/v3/networkpolicies", false, network_policy),
    line!("GlobalNetworkPolicy", "/apis/projectcalico.org/v3/globalnetworkpolicies", false, global_policy),
    line!("StagedNetworkPolicy", "/apis/projectcalico.org/v3/stagednetworkpolicies", false, staged_policy),
    line!("StagedGlobalNetworkPolicy", "/apis/projectcalico.org/v3/stagedglobalnetworkpolicies", false, staged_global_policy),
    line!("StagedKubernetesNetworkPolicy", "/apis/projectcalico.org/v3/stagedkubernetesnetworkpolicies", false, staged_kubernetes_policy),
    line!("Tier", "/apis/projectcalico.org/v3/tiers", false, tier),
    line!("NetworkSet", "/apis/projectcalico.org/v3/networksets", false, network_set),
    line!("GlobalNetworkSet", "/apis/projectcalico.org/v3/globalnetworksets", false, global_network_set),
    line!("HostEndpoint", "/apis/projectcalico.org/v3/hostendpoints", false, host_endpoint),
    line!("IPPool", "/apis/projectcalico.org/v3/ippools", false, pool),
    line!(BLOCK, "/apis/projectcalico.org/v3/ipamblocks", false, block),
    line!("FelixConfiguration", "/apis/projectcalico.org/v3/felixconfigurations", false, settings),
];

fn pod(pod: Pod) -> Parsed {
    let endpoint = k8s::pod::workload_endpoint(&pod);
    used(endpoint.map(|(key, endpoint)| Update::Endpoint(key, Some(endpoint))))
}

fn namespace(namespace: Namespace) -> Parsed {
    let (key, labels) = named(namespace.metadata);
    used(Some(Update::Namespace(key.name, Some(labels))))
}

fn node(node: Node) -> Parsed {
    let info = k8s::node::node_info(&node);
    used(Some(Update::Node(named(node.metadata).0.name, Some(info))))
}

fn service_account(account: ServiceAccount) -> Parsed {
    let (key, labels) = named(account.metadata);
    used(Some(Update::ServiceAccount(key, Some(labels))))
}

/// Means the part of its Service that it holds; the cache puts the parts together.
fn endpoint_slice(slice: EndpointSlice) -> Parsed {
    let backends = k8s::service::backends(&slice).into_iter();
    let backends =
        backends.map(|backend| Backend { address: backend.address, protocol: backend.protocol, port: backend.port });
    let service = k8s::service::service_of(&slice);
    used(service.map(|service| Update::Service(service, Some(backends.collect()))))
}

/// The meaning of a policy of Kubernetes.
pub fn kubernetes_policy(policy: networking::v1::NetworkPolicy) -> Parsed {
    let key = k8s::netpol::key(&policy);
    let parsed = k8s::netpol::policy(&policy).map(|(_, policy)| policy);
    taken(parsed, |policy| Update::Policy(key, Some(policy)))
}

fn cluster_policy(policy: k8s::cnp::ClusterNetworkPolicy) -> Parsed {
    let key = k8s::cnp::key(&policy);
    taken(k8s::cnp::policy(&policy), |policy| Update::Policy(key, Some(policy)))
}

/// The meaning of a policy of Calico's in a namespace.
pub fn network_policy(policy: v3::NetworkPolicy) -> Parsed {
    let key = PolicyKey::of(PolicyKind::NetworkPolicy, &policy.metadata);
    taken(v3::policy::network_policy(&policy), |policy| Update::Policy(key, Some(policy)))
}

fn global_policy(policy: v3::GlobalNetworkPolicy) -> Parsed {
    let key = PolicyKey::of(PolicyKind::GlobalNetworkPolicy, &policy.metadata);
    taken(v3::policy::global_network_policy(&policy), |policy| Update::Policy(key, Some(policy)))
}

fn staged_policy(policy: v3::StagedNetworkPolicy) -> Parsed {
    let key = PolicyKey::of(PolicyKind::StagedNetworkPolicy, &policy.metadata);
    taken(v3::policy::staged_network_policy(&policy), |staged| Update::Staged(key, Some(staged)))
}

fn staged_global_policy(policy: v3::StagedGlobalNetworkPolicy) -> Parsed {
    let key = PolicyKey::of(PolicyKind::StagedGlobalNetworkPolicy, &policy.metadata);
    taken(v3::policy::staged_global_network_policy(&policy), |staged| Update::Staged(key, Some(staged)))
}

fn staged_kubernetes_policy(policy: v3::StagedKubernetesNetworkPolicy) -> Parsed {
    let key = PolicyKey::of(PolicyKind::StagedKubernetesNetworkPolicy, &policy.metadata);
    taken(v3::policy::staged_kubernetes_network_policy(&policy), |staged| Update::Staged(key, Some(staged)))
}

fn tier(tier: v3::Tier) -> Parsed {
    let parsed = v3::tier::tier(&tier);
    let name = named(tier.metadata).0.name;
    taken(parsed, |tier| Update::Tier(name, Some(tier)))
}

fn network_set(set: v3::NetworkSet) -> Parsed {
    let parsed = v3::netset::network_set(&set);
    let key = named(set.metadata).0;
    taken(parsed, |set| Update::NetworkSet(key, Some(set)))
}

fn global_network_set(set: v3::GlobalNetworkSet) -> Parsed {
    let parsed = v3::netset::global_network_set(&set);
    let key = named(set.metadata).0;
    taken(parsed, |set| Update::NetworkSet(key, Some(set)))
}

fn host_endpoint(endpoint: v3::HostEndpoint) -> Parsed {
    let parsed = v3::host::host_endpoint(&endpoint);
    let name = named(endpoint.metadata).0.name;
    taken(parsed, |endpoint| Update::HostEndpoint(name, Some(endpoint)))
}

fn pool(pool: v3::IPPool) -> Parsed {
    let parsed = v3::pool::pool(&pool);
    let name = named(pool.metadata).0.name;
    taken(parsed, |pool| Update::Pool(name, Some(pool)))
}

fn block(block: v3::IPAMBlock) -> Parsed {
    match v3::pool::block_info(&block) {
        Ok(block) => used(block.map(|(range, info)| Update::Block(range, Some(info)))),
        Err(fault) => Parsed { update: None, prefers_former: true, problems: vec![fault.to_string()] },
    }
}

fn settings(configuration: v3::FelixConfiguration) -> Parsed {
    let parsed = v3::cluster::overrides(&configuration);
    let name = named(configuration.metadata).0.name;
    taken(parsed, |overrides| Update::Settings(name, Some(overrides)))
}

fn named(meta: ObjectMeta) -> (NamespacedName, Labels) {
    let key = NamespacedName { namespace: meta.namespace.unwrap_or_default(), name: meta.name.unwrap_or_default() };
    (key, meta.labels.unwrap_or_default())
}

fn used(update: Option<Update>) -> Parsed {
    Parsed { update, ..Parsed::default() }
}

/// What was parsed, or what is enforced in place of what was refused.
fn taken<T>(parsed: Result<T, Refusal<T>>, update: impl FnOnce(T) -> Update) -> Parsed {
    match parsed {
        Ok(value) => used(Some(update(value))),
        Err(refusal) => Parsed {
            prefers_former: refusal.prefers_former,
            update: refusal.closed.map(update),
            problems: words(&refusal.problems),
        },
    }
}

/// Problems as they are kept and shown: the first of them, each of limited size, however many a large object has.
fn words(problems: &[Problem]) -> Vec<String> {
    let shown = problems.iter().take(PROBLEMS).map(|problem| report::cut(&problem.to_string(), PROBLEM));
    let more = problems.len().saturating_sub(PROBLEMS);
    let more = (more > 0).then(|| format!("and {more} more of its fields are not as they should be"));
    shown.chain(more).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calicos_kinds_are_watched_where_they_are_stored() {
        let places = |mode: Mode| TABLE.iter().map(move |line| line.place(mode));
        assert!(places(Mode::V3).zip(TABLE).all(|(place, line)| place == (line.path.to_owned(), Form::Plain)));
        let (calico, others): (Vec<_>, Vec<_>) =
            places(Mode::V1).zip(TABLE).partition(|(_, line)| line.path.starts_with("/apis/projectcalico.org/"));
        assert!(others.iter().all(|((path, form), line)| path == line.path && *form == Form::Plain));
        assert!(calico.len() >= 8);
        for ((path, form), line) in calico {
            assert!(
                path.starts_with("/apis/crd.projectcalico.org/v1/"),
                "{} is not known to storage: {path}",
                line.kind
            );
            assert!(matches!(form, Form::Stored(kind) if kind.kind == line.kind), "{}: {form:?}", line.kind);
            let wanted = ["Tier", "StagedNetworkPolicy", "StagedGlobalNetworkPolicy", "StagedKubernetesNetworkPolicy"];
            assert_eq!(line.definition(form).is_some(), wanted.contains(&line.kind), "{}", line.kind);
            assert_eq!(line.definition(Form::Plain), None, "{}", line.kind);
        }
    }

    #[test]
    fn the_api_knows_kinds_by_their_own_names() {
        let identity = |kind: &str, mode| {
            let line = TABLE.iter().find(|line| line.kind == kind).expect("a kind of the table");
            let (version, kind) = line.identity(mode);
            format!("{version} {kind}")
        };
        assert_eq!(identity(POD, Mode::V1), "v1 Pod");
        assert_eq!(identity("KubernetesNetworkPolicy", Mode::V3), "networking.k8s.io/v1 NetworkPolicy");
        assert_eq!(identity(CLUSTER_POLICY, Mode::V3), "policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy");
        assert_eq!(identity("NetworkPolicy", Mode::V3), "projectcalico.org/v3 NetworkPolicy");
        assert_eq!(identity("NetworkPolicy", Mode::V1), "crd.projectcalico.org/v1 NetworkPolicy");
    }

    #[test]
    fn what_is_kept_of_problems_is_of_limited_size() {
        let problems = vec![Problem::new("spec.selector", "x".repeat(1 << 20), "not a selector", "write one"); 5000];
        let words = words(&problems);
        assert_eq!(words.len(), PROBLEMS + 1);
        assert!(words.iter().all(|words| words.len() <= PROBLEM));
    }
}
