//! The kinds that the operator writes, and manifests of such kinds: JSON with an identity.
//!
//! Manifests are JSON and not typed structs because server-side apply owns exactly the fields that
//! are sent; a test decodes every rendered manifest into its typed form, so that a misspelt field
//! is found.

use std::fmt;

use kube::api::{ApiResource, DynamicObject};
use kube::core::GroupVersionKind;
use margay_api::storage::{self, Mode};
use margay_api::v3;
use serde_json::Value;

/// Label of objects that the operator owns.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Field manager of every server-side apply, and the value of [`MANAGED_BY`].
pub const MANAGER: &str = "margay-operator";

/// Kind of a Kubernetes object.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// API group, empty for the core group.
    pub group: &'static str,
    /// API version.
    pub version: &'static str,
    /// Kind as written in manifests.
    pub kind: &'static str,
    /// Plural, as in URLs and RBAC rules.
    pub plural: &'static str,
    /// True for namespaced kinds.
    pub namespaced: bool,
}

impl Kind {
    const fn new(
        group: &'static str,
        version: &'static str,
        kind: &'static str,
        plural: &'static str,
        namespaced: bool,
    ) -> Self {
        Self {
            group,
            version,
            kind,
            plural,
            namespaced,
        }
    }

    /// Returns `group/version`, or `version` for the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// Returns the resource for an API client, on a cluster with that storage.
    pub fn resource(&self, mode: Mode) -> ApiResource {
        match self.stored(mode) {
            Some(kind) => kind.resource(mode),
            None => {
                let names = GroupVersionKind::gvk(self.group, self.version, self.kind);
                ApiResource::from_gvk_with_plural(&names, self.plural)
            }
        }
    }

    /// Returns the stored kind where it differs from the users' kind.
    pub fn stored(&self, mode: Mode) -> Option<&'static storage::Kind> {
        let differs = mode == Mode::V1 && self.group == v3::GROUP;
        storage::Kind::of(self.kind).filter(|_| differs)
    }
}

/// Kinds that the operator owns: it labels them, watches them and sweeps those that are no longer
/// wanted. In the order of creation.
pub static OWNED_KINDS: &[Kind] = &[
    Kind::new("", "v1", "Namespace", "namespaces", false),
    Kind::new("", "v1", "ServiceAccount", "serviceaccounts", true),
    Kind::new(
        "rbac.authorization.k8s.io",
        "v1",
        "ClusterRole",
        "clusterroles",
        false,
    ),
    Kind::new(
        "rbac.authorization.k8s.io",
        "v1",
        "ClusterRoleBinding",
        "clusterrolebindings",
        false,
    ),
    Kind::new(
        "admissionregistration.k8s.io",
        "v1",
        "ValidatingAdmissionPolicy",
        "validatingadmissionpolicies",
        false,
    ),
    Kind::new(
        "admissionregistration.k8s.io",
        "v1",
        "ValidatingAdmissionPolicyBinding",
        "validatingadmissionpolicybindings",
        false,
    ),
    Kind::new(
        "admissionregistration.k8s.io",
        "v1",
        "MutatingAdmissionPolicy",
        "mutatingadmissionpolicies",
        false,
    ),
    Kind::new(
        "admissionregistration.k8s.io",
        "v1",
        "MutatingAdmissionPolicyBinding",
        "mutatingadmissionpolicybindings",
        false,
    ),
    Kind::new("", "v1", "Service", "services", true),
    Kind::new(
        "policy",
        "v1",
        "PodDisruptionBudget",
        "poddisruptionbudgets",
        true,
    ),
    Kind::new("apps", "v1", "Deployment", "deployments", true),
    Kind::new("apps", "v1", "DaemonSet", "daemonsets", true),
];

/// Kinds that the operator never sweeps: it knows their objects by name (it may not list others'
/// Secrets and ConfigMaps), only reads them, or they hold data that users rely on and that outlives
/// an Installation.
pub static OTHER_KINDS: &[Kind] = &[
    Kind::new("", "v1", "Secret", "secrets", true),
    Kind::new("", "v1", "ConfigMap", "configmaps", true),
    Kind::new("rbac.authorization.k8s.io", "v1", "Role", "roles", true),
    Kind::new(
        "rbac.authorization.k8s.io",
        "v1",
        "RoleBinding",
        "rolebindings",
        true,
    ),
    Kind::new("", "v1", "Node", "nodes", false),
    Kind::new("", "v1", "Pod", "pods", true),
    Kind::new(
        "operator.tigera.io",
        "v1",
        "Installation",
        "installations",
        false,
    ),
    Kind::new(
        "operator.tigera.io",
        "v1",
        "TigeraStatus",
        "tigerastatuses",
        false,
    ),
    Kind::new("projectcalico.org", "v3", "IPPool", "ippools", false),
    Kind::new(
        "projectcalico.org",
        "v3",
        "FelixConfiguration",
        "felixconfigurations",
        false,
    ),
    Kind::new("projectcalico.org", "v3", "Tier", "tiers", false),
    Kind::new(
        "projectcalico.org",
        "v3",
        "ClusterInformation",
        "clusterinformations",
        false,
    ),
    Kind::new(
        "projectcalico.org",
        "v3",
        "HostEndpoint",
        "hostendpoints",
        false,
    ),
    Kind::new(
        "projectcalico.org",
        "v3",
        "KubeControllersConfiguration",
        "kubecontrollersconfigurations",
        false,
    ),
    Kind::new(
        "projectcalico.org",
        "v3",
        "IPAMConfiguration",
        "ipamconfigurations",
        false,
    ),
    Kind::new(
        "projectcalico.org",
        "v3",
        "BGPConfiguration",
        "bgpconfigurations",
        false,
    ),
    Kind::new(
        "certificates.k8s.io",
        "v1",
        "CertificateSigningRequest",
        "certificatesigningrequests",
        false,
    ),
];

/// Returns the entry of the tables above for a kind that is known to be there.
pub fn kind(name: &str) -> &'static Kind {
    OWNED_KINDS
        .iter()
        .chain(OTHER_KINDS)
        .find(|entry| entry.kind == name)
        .expect("every kind that the operator names is in one of its two tables")
}

/// Identity of an object: kind, namespace (empty where there is none), name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Kind.
    pub kind: &'static Kind,
    /// Namespace, empty for cluster-wide kinds.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind.kind, self.namespace, self.name)
        }
    }
}

/// An object to apply.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Identity of the object.
    pub key: Key,
    /// Fields that are applied, `apiVersion` and `kind` included.
    pub body: Value,
}

impl Object {
    /// Creates an object of a kind in the tables; `body` needs no `apiVersion` and `kind`, but a
    /// `metadata.name`.
    pub fn new(name: &str, mut body: Value) -> Self {
        let kind = kind(name);
        body["apiVersion"] = kind.api_version().into();
        body["kind"] = kind.kind.into();
        let text = |field: &str| {
            body["metadata"][field]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        Self {
            key: Key {
                kind,
                namespace: text("namespace"),
                name: text("name"),
            },
            body,
        }
    }

    /// Adds the label of owned objects.
    pub fn managed(mut self) -> Self {
        self.body["metadata"]["labels"][MANAGED_BY] = MANAGER.into();
        self
    }

    /// Makes the Installation its owner: the garbage collector removes both together. Without an
    /// Installation nobody owns it.
    pub fn owned_by(self, owner: &Owner) -> Self {
        let mut object = self.managed();
        if owner.uid.is_empty() {
            return object;
        }
        object.body["metadata"]["ownerReferences"] = serde_json::json!([{
            "apiVersion": kind("Installation").api_version(),
            "kind": "Installation",
            "name": owner.name,
            "uid": owner.uid,
            "controller": true,
            "blockOwnerDeletion": false,
        }]);
        object
    }
}

/// The Installation as owner of other objects.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Owner {
    /// Name of the Installation.
    pub name: String,
    /// UID of the Installation; another object of the same name is another owner.
    pub uid: String,
}

/// Returns the key of an object that was read.
pub fn key_of(kind: &'static Kind, object: &DynamicObject) -> Key {
    Key {
        kind,
        namespace: object.metadata.namespace.clone().unwrap_or_default(),
        name: object.metadata.name.clone().unwrap_or_default(),
    }
}

/// Returns the generation where the kind has it, else the resource version.
pub fn version_of(object: &DynamicObject) -> String {
    match object.metadata.generation {
        Some(generation) => format!("generation {generation}"),
        None => object.metadata.resource_version.clone().unwrap_or_default(),
    }
}
