//! Table of the watched kinds.

use std::pin::Pin;

use margay_api::k8s;
use margay_api::storage::{self, Mode};
use margay_calc::ingest;
use tokio::sync::mpsc;

use crate::event::Event;
use crate::feed::Form;
use crate::metrics::Counters;
use crate::object::{BLOCK, POD};
use crate::watch::Watch;

/// Services of Kubernetes.
const SERVICE: &str = "Service";
/// Cluster-wide policies of Kubernetes.
const CLUSTER_POLICY: &str = "KubernetesClusterNetworkPolicy";

/// Kinds that a cluster may lack, with the definition that serves them.
const OPTIONAL: &[(&str, &str)] = &[(CLUSTER_POLICY, k8s::cnp::DEFINITION)];

/// A watched kind.
pub struct KindSpec {
    /// Name of the kind.
    pub name: &'static str,
    /// API path; for Calico's kinds that of the users' form, wherever they are stored.
    path: &'static str,
    /// True if a working cluster has at least one object: an empty list is an error of the API
    /// server.
    never_empty: bool,
    run: fn(Watch) -> WatchFuture,
}

macro_rules! kind_spec {
    ($name:expr, $path:literal, $never_empty:literal, $ingest:path $(,)?) => {
        KindSpec {
            name: $name,
            path: $path,
            never_empty: $never_empty,
            run: |watch| Box::pin(watch.run($ingest)),
        }
    };
}

type WatchFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

impl KindSpec {
    /// Watches the kind in the storage of `mode` until the owner task ends. `jitter` spreads
    /// retries.
    pub fn start(
        &self,
        mode: Mode,
        client: kube::Client,
        events: mpsc::Sender<Event>,
        counters: Counters,
        jitter: fn() -> f64,
    ) -> WatchFuture {
        let (path, form) = self.location(mode);
        let definition = self.definition(form);
        let Self {
            name: kind,
            never_empty,
            run,
            ..
        } = *self;
        run(Watch {
            kind,
            path,
            form,
            definition,
            never_empty,
            client,
            events,
            counters,
            jitter,
        })
    }

    /// Definition without which the kind has no objects: of optional kinds, and in the older
    /// storage of those that are newer than some clusters' Calico. The operator creates these;
    /// nothing waits for them.
    fn definition(&self, form: Form) -> Option<String> {
        if let Form::Stored(stored) = form {
            return (!stored.classic)
                .then(|| format!("{}.{}", stored.stored_plural, Mode::V1.group()));
        }
        let optional = OPTIONAL.iter().find(|(optional, _)| *optional == self.name);
        optional.map(|(_, definition)| (*definition).to_owned())
    }

    /// API version and kind in that storage.
    pub fn identity(&self, mode: Mode) -> (String, &'static str) {
        let (path, form) = self.location(mode);
        let version = path
            .trim_start_matches("/apis/")
            .trim_start_matches("/api/");
        let version = version
            .rsplit_once('/')
            .map_or(version, |(version, _)| version)
            .to_owned();
        let kind = match form {
            Form::Stored(stored) => stored.stored_kind,
            Form::Plain => self.name.strip_prefix("Kubernetes").unwrap_or(self.name),
        };
        (version, kind)
    }

    /// API path and encoding in that storage.
    fn location(&self, mode: Mode) -> (String, Form) {
        match storage::Kind::of_path(self.path).filter(|_| mode == Mode::V1) {
            Some(kind) => (kind.path(mode), Form::Stored(kind)),
            None => (self.path.to_owned(), Form::Plain),
        }
    }
}

/// All kinds that policy or routing depends on, and all of them must be served: an API server that
/// does not serve a kind yet (just started, CRDs not installed) must not look like one without
/// policies. For `OPTIONAL` kinds the definition decides.
#[rustfmt::skip]
pub const KINDS: &[KindSpec] = &[
    kind_spec!(POD, "/api/v1/pods", true, ingest::pod),
    kind_spec!("Namespace", "/api/v1/namespaces", true, ingest::namespace),
    kind_spec!("Node", "/api/v1/nodes", true, ingest::node),
    kind_spec!("ServiceAccount", "/api/v1/serviceaccounts", true, ingest::service_account),
    kind_spec!(
        "EndpointSlice",
        "/apis/discovery.k8s.io/v1/endpointslices",
        false,
        ingest::endpoint_slice,
    ),
    kind_spec!(
        "KubernetesNetworkPolicy",
        "/apis/networking.k8s.io/v1/networkpolicies",
        false,
        ingest::kubernetes_policy,
    ),
    kind_spec!(
        CLUSTER_POLICY,
        "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
        false,
        ingest::cluster_policy,
    ),
    kind_spec!(
        "NetworkPolicy",
        "/apis/projectcalico.org/v3/networkpolicies",
        false,
        ingest::network_policy,
    ),
    kind_spec!(
        "GlobalNetworkPolicy",
        "/apis/projectcalico.org/v3/globalnetworkpolicies",
        false,
        ingest::global_policy,
    ),
    kind_spec!(
        "StagedNetworkPolicy",
        "/apis/projectcalico.org/v3/stagednetworkpolicies",
        false,
        ingest::staged_policy,
    ),
    kind_spec!(
        "StagedGlobalNetworkPolicy",
        "/apis/projectcalico.org/v3/stagedglobalnetworkpolicies",
        false,
        ingest::staged_global_policy,
    ),
    kind_spec!(
        "StagedKubernetesNetworkPolicy",
        "/apis/projectcalico.org/v3/stagedkubernetesnetworkpolicies",
        false,
        ingest::staged_kubernetes_policy,
    ),
    kind_spec!("Tier", "/apis/projectcalico.org/v3/tiers", false, ingest::tier),
    kind_spec!("NetworkSet", "/apis/projectcalico.org/v3/networksets", false, ingest::network_set),
    kind_spec!(
        "GlobalNetworkSet",
        "/apis/projectcalico.org/v3/globalnetworksets",
        false,
        ingest::global_network_set,
    ),
    kind_spec!(
        "HostEndpoint",
        "/apis/projectcalico.org/v3/hostendpoints",
        false,
        ingest::host_endpoint,
    ),
    kind_spec!("IPPool", "/apis/projectcalico.org/v3/ippools", false, ingest::pool),
    kind_spec!(BLOCK, "/apis/projectcalico.org/v3/ipamblocks", false, ingest::block),
    kind_spec!(
        "FelixConfiguration",
        "/apis/projectcalico.org/v3/felixconfigurations",
        false,
        ingest::settings,
    ),
    kind_spec!(SERVICE, "/api/v1/services", true, ingest::service),
    kind_spec!(
        "BGPConfiguration",
        "/apis/projectcalico.org/v3/bgpconfigurations",
        false,
        ingest::bgp_settings,
    ),
    kind_spec!("BGPPeer", "/apis/projectcalico.org/v3/bgppeers", false, ingest::bgp_peer),
    kind_spec!("BGPFilter", "/apis/projectcalico.org/v3/bgpfilters", false, ingest::bgp_filter),
];

/// Kinds to watch. Services are read for their announcement by BGP only; peers are always read, to
/// report those that have no effect.
pub fn watched(bgp: bool) -> impl Iterator<Item = &'static KindSpec> {
    KINDS.iter().filter(move |spec| bgp || spec.name != SERVICE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calicos_kinds_are_watched_where_they_are_stored() {
        let locations = |mode: Mode| KINDS.iter().map(move |spec| spec.location(mode));
        assert!(
            locations(Mode::V3)
                .zip(KINDS)
                .all(|(location, spec)| location == (spec.path.to_owned(), Form::Plain))
        );
        let (calico, others): (Vec<_>, Vec<_>) = locations(Mode::V1)
            .zip(KINDS)
            .partition(|(_, spec)| spec.path.starts_with("/apis/projectcalico.org/"));
        assert!(
            others
                .iter()
                .all(|((path, form), spec)| path == spec.path && *form == Form::Plain)
        );
        assert!(calico.len() >= 8);
        for ((path, form), spec) in calico {
            assert!(
                path.starts_with("/apis/crd.projectcalico.org/v1/"),
                "{} is not known to storage: {path}",
                spec.name
            );
            assert!(
                matches!(form, Form::Stored(kind) if kind.kind == spec.name),
                "{}: {form:?}",
                spec.name
            );
            let wanted = [
                "Tier",
                "StagedNetworkPolicy",
                "StagedGlobalNetworkPolicy",
                "StagedKubernetesNetworkPolicy",
                "BGPFilter",
            ];
            assert_eq!(
                spec.definition(form).is_some(),
                wanted.contains(&spec.name),
                "{}",
                spec.name
            );
            assert_eq!(spec.definition(Form::Plain), None, "{}", spec.name);
        }
    }

    #[test]
    fn services_are_read_for_bgp_only() {
        let names = |bgp| watched(bgp).map(|spec| spec.name).collect::<Vec<_>>();
        let (with, mut without) = (names(true), names(false));
        assert!(!without.contains(&SERVICE));
        without.push(SERVICE);
        without.sort_unstable();
        let mut with = with;
        with.sort_unstable();
        assert_eq!(with, without);
    }

    #[test]
    fn the_watched_kinds_are_those_of_calc() {
        let known = margay_calc::kinds::KINDS.iter().map(|kind| kind.name);
        assert!(known.eq(KINDS.iter().map(|spec| spec.name)));
        for known in margay_calc::kinds::KINDS {
            let spec = KINDS
                .iter()
                .find(|spec| spec.name == known.name)
                .expect("a watched kind");
            let (version, kind) = spec.identity(Mode::V3);
            assert_eq!(
                margay_calc::kinds::KindName::of(&version, kind),
                Some(known)
            );
        }
    }

    #[test]
    fn kinds_have_the_names_of_the_api() {
        let identity = |kind: &str, mode| {
            let spec = KINDS
                .iter()
                .find(|spec| spec.name == kind)
                .expect("a kind of the table");
            let (version, kind) = spec.identity(mode);
            format!("{version} {kind}")
        };
        assert_eq!(identity(POD, Mode::V1), "v1 Pod");
        assert_eq!(
            identity("KubernetesNetworkPolicy", Mode::V3),
            "networking.k8s.io/v1 NetworkPolicy"
        );
        assert_eq!(
            identity(CLUSTER_POLICY, Mode::V3),
            "policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy"
        );
        assert_eq!(
            identity("NetworkPolicy", Mode::V3),
            "projectcalico.org/v3 NetworkPolicy"
        );
        assert_eq!(
            identity("NetworkPolicy", Mode::V1),
            "crd.projectcalico.org/v1 NetworkPolicy"
        );
    }
}
