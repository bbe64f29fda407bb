//! The operator's own objects, which are applied by hand, beside the CRDs. `deploy/operator.yaml`
//! and `deploy/operator-v1.yaml` are generated from this; a test compares them.

use kube::ResourceExt;
use margay_api::crds;
use margay_api::installation::InstallationSpec;
use margay_api::report::CONFIG_MAP;
use margay_api::storage::Mode;
use serde_json::{Value, json};

use crate::csr_policy::SIGNER;
use crate::defaults;
use crate::inputs::Inputs;
use crate::manifest::{MANAGER, Object, Owner};
use crate::names::{self, CA_NAME, CAPTURE_SECRET, READER_SECRET, TYPHA_SECRET};
use crate::render::{self, Settings};

/// Namespace of the operator.
const NAMESPACE: &str = "margay-operator";
/// Port of the admin server, on the host's loopback.
const ADMIN_PORT: u16 = 9097;
const READ: [&str; 3] = ["get", "list", "watch"];
/// Secrets with certificates in the components' namespace.
const SECRETS: [&str; 3] = [CAPTURE_SECRET, READER_SECRET, TYPHA_SECRET];
/// Server-side apply creates objects that are absent, so it needs both verbs.
const APPLY: [&str; 2] = ["create", "patch"];
const APPLY_AND_SWEEP: [&str; 3] = ["create", "delete", "patch"];

/// Returns everything but the CRDs, in the order of creation, for clusters with that storage.
pub fn objects(version: &str, mode: Mode) -> Vec<Object> {
    own(version, cluster_rules(mode), &[])
}

/// Returns everything but the CRDs of an installation without an Installation: the components as
/// the operator renders them for an empty one, and the operator itself for what is left: the CA and
/// certificates, default objects, reports, host endpoints and IPAM collection. In the newer storage
/// only.
pub fn standalone(version: &str) -> Vec<Object> {
    let settings = Settings {
        version: version.to_owned(),
        ..Settings::default()
    };
    let inputs = Inputs {
        // kubelet puts the address of a Service of the pod's own namespace there.
        typha_address: Some("$(MARGAY_TYPHA_SERVICE_HOST)".to_owned()),
        ..Inputs::default()
    };
    let spec = defaults::complete(&InstallationSpec::default(), &inputs);
    let mut objects = own(version, standalone_rules(), &["--standalone"]);
    let plan = render::plan(&spec, &inputs, &Owner::default(), &settings);
    // With the label of owned objects: by it the operator finds what it reports about.
    objects.extend(plan.objects);
    objects
}

/// Returns the operator's own objects.
fn own(version: &str, rules: Vec<Value>, arguments: &[&str]) -> Vec<Object> {
    let labels = json!({
        "app.kubernetes.io/name": MANAGER,
        "app.kubernetes.io/part-of": "margay",
        "pod-security.kubernetes.io/enforce": "privileged",
    });
    let subject = json!([{ "kind": "ServiceAccount", "name": MANAGER, "namespace": NAMESPACE }]);
    let role = |kind: &str| {
        json!({
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": kind,
            "name": MANAGER,
        })
    };
    let named = json!({ "name": MANAGER });
    let placed = json!({ "name": MANAGER, "namespace": NAMESPACE });
    vec![
        Object::new(
            "Namespace",
            json!({ "metadata": { "name": NAMESPACE, "labels": labels } }),
        ),
        Object::new("ServiceAccount", json!({ "metadata": placed })),
        Object::new("ClusterRole", json!({ "metadata": named, "rules": rules })),
        Object::new(
            "ClusterRoleBinding",
            json!({ "metadata": named, "roleRef": role("ClusterRole"), "subjects": subject }),
        ),
        Object::new("Role", json!({ "metadata": placed, "rules": own_rules() })),
        Object::new(
            "RoleBinding",
            json!({ "metadata": placed, "roleRef": role("Role"), "subjects": subject }),
        ),
        Object::new(
            "Deployment",
            json!({ "metadata": placed, "spec": deployment(version, arguments) }),
        ),
    ]
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({ "apiGroups": [group], "resources": resources, "verbs": verbs })
}

/// Returns a rule for objects of these names only. Server-side apply checks `create` with the name,
/// so that verb can be restricted too.
fn named(group: &str, resources: &[&str], names: &[&str], verbs: &[&str]) -> Value {
    let mut rule = rule(group, resources, verbs);
    rule["resourceNames"] = json!(names);
    rule
}

/// Rules that the operator needs itself, then those that it grants: Kubernetes allows nobody to
/// grant permissions that he does not have (escalation prevention).
fn cluster_rules(mode: Mode) -> Vec<Value> {
    [
        api_rules(),
        storage_rules(mode),
        read_rules(),
        write_rules(),
        certificate_rules(),
        render::granted(mode),
    ]
    .concat()
}

/// The same without those for components that come from a manifest.
fn standalone_rules() -> Vec<Value> {
    let certificates = vec![
        named("", &["configmaps"], &[CA_NAME, CONFIG_MAP], &APPLY),
        named("", &["secrets"], &SECRETS, &APPLY),
    ];
    [
        api_rules(),
        storage_rules(Mode::V3),
        read_rules(),
        certificates,
        certificate_rules(),
    ]
    .concat()
}

/// Rules for the Installation and its status.
fn api_rules() -> Vec<Value> {
    let applied = ["create", "get", "list", "patch", "watch"];
    vec![
        rule(
            "operator.tigera.io",
            &["installations"],
            &["get", "list", "patch", "watch"],
        ),
        rule("operator.tigera.io", &["installations/status"], &["patch"]),
        rule("operator.tigera.io", &["tigerastatuses"], &applied),
        rule("operator.tigera.io", &["tigerastatuses/status"], &["patch"]),
    ]
}

/// Rules for Calico's objects that the operator writes. In the older storage it reads an object,
/// changes it and writes it whole, because an object's metadata is one text there; and it installs
/// the kinds that are newer than the cluster's Calico.
fn storage_rules(mode: Mode) -> Vec<Value> {
    let shared = [
        "clusterinformations",
        "felixconfigurations",
        "ippools",
        "tiers",
    ];
    // Shows whether the data has been migrated to the newer storage.
    let migration = named(
        "migration.projectcalico.org",
        &["datastoremigrations"],
        &["v1-to-v3"],
        &["get"],
    );
    // Automatic host endpoints are created, replaced and deleted; a label tells them from others,
    // and RBAC cannot select by label.
    let hosts = render::calico(
        mode,
        &["hostendpoints"],
        &["create", "delete", "get", "list", "update", "watch"],
    );
    let read = ["bgpconfigurations", "kubecontrollersconfigurations"];
    let controllers = render::calico(mode, &read, &READ);
    // Objects that the IPAM garbage collector reads, releases and deletes.
    let ipam = ["blockaffinities", "ipamblocks", "ipamhandles"];
    let ipam = render::calico(mode, &ipam, &["delete", "get", "list", "update"]);
    let settings = render::calico(mode, &["ipamconfigurations"], &READ);
    let common = vec![hosts, controllers, ipam, settings, migration];
    if mode == Mode::V3 {
        let applied = render::calico(mode, &shared, &["create", "get", "list", "patch", "watch"]);
        let statuses = render::calico(mode, &["ippools/status"], &["patch"]);
        return [vec![applied, statuses], common].concat();
    }
    let definitions: Vec<String> = crds::later()
        .iter()
        .map(|definition| definition.name_any())
        .collect();
    let definitions: Vec<&str> = definitions.iter().map(String::as_str).collect();
    let written = render::calico(mode, &shared, &["create", "get", "list", "update", "watch"]);
    let installed = named(
        "apiextensions.k8s.io",
        &["customresourcedefinitions"],
        &definitions,
        &APPLY,
    );
    [vec![written, installed], common].concat()
}

const ADMISSION: [&str; 2] = [
    "validatingadmissionpolicies",
    "validatingadmissionpolicybindings",
];
const MUTATION: [&str; 2] = [
    "mutatingadmissionpolicies",
    "mutatingadmissionpolicybindings",
];
const ROLES: [&str; 2] = ["clusterrolebindings", "clusterroles"];
const WORKLOADS: [&str; 2] = ["daemonsets", "deployments"];

/// Rules for watches: whole kinds, because owned objects are found by label; Secrets and ConfigMaps
/// by name only.
fn read_rules() -> Vec<Value> {
    let core = ["namespaces", "nodes", "pods", "serviceaccounts", "services"];
    vec![
        rule("", &core, &READ),
        rule("apps", &WORKLOADS, &READ),
        rule("policy", &["poddisruptionbudgets"], &READ),
        rule("rbac.authorization.k8s.io", &ROLES, &READ),
        rule(
            "admissionregistration.k8s.io",
            &[ADMISSION, MUTATION].concat(),
            &READ,
        ),
        named(
            "",
            &["configmaps"],
            &[CA_NAME, CONFIG_MAP, "kubeadm-config"],
            &READ,
        ),
        named("", &["secrets"], &SECRETS, &READ),
    ]
}

/// Rules for owned objects, which the operator creates, changes and sweeps: objects of its own
/// names only.
fn write_rules() -> Vec<Value> {
    let own = [names::NODE, names::TYPHA];
    let both = &APPLY_AND_SWEEP;
    vec![
        named("", &["namespaces"], &[names::NAMESPACE], both),
        named("", &["serviceaccounts", "services"], &own, both),
        named("apps", &WORKLOADS, &own, both),
        named("policy", &["poddisruptionbudgets"], &own, both),
        named("rbac.authorization.k8s.io", &ROLES, &own, both),
        named(
            "admissionregistration.k8s.io",
            &ADMISSION,
            &render::validating_policy_names(),
            both,
        ),
        named(
            "admissionregistration.k8s.io",
            &MUTATION,
            &render::mutating_policy_names(),
            both,
        ),
        named("", &["configmaps"], &[CA_NAME], &APPLY),
        named("", &["secrets"], &SECRETS, &APPLY),
    ]
}

/// Rules for nodes' certificates.
fn certificate_rules() -> Vec<Value> {
    const GROUP: &str = "certificates.k8s.io";
    const REQUESTS: &str = "certificatesigningrequests";
    let answers = [
        "certificatesigningrequests/approval",
        "certificatesigningrequests/status",
    ];
    vec![
        rule(GROUP, &[REQUESTS], &READ),
        rule(GROUP, &answers, &["update"]),
        named(GROUP, &["signers"], &[SIGNER], &["approve", "sign"]),
    ]
}

/// Rules in the operator's own namespace: the CA and the Lease.
fn own_rules() -> Vec<Value> {
    vec![
        named(
            "",
            &["secrets"],
            &[CA_NAME],
            &["get", "list", "patch", "watch"],
        ),
        named(
            "coordination.k8s.io",
            &["leases"],
            &[MANAGER],
            &["get", "update"],
        ),
        // RBAC cannot restrict a plain create by name.
        rule("", &["secrets"], &["create"]),
        rule("coordination.k8s.io", &["leases"], &["create"]),
    ]
}

fn deployment(version: &str, arguments: &[&str]) -> Value {
    let labels =
        json!({ "app.kubernetes.io/name": MANAGER, "app.kubernetes.io/part-of": "margay" });
    json!({
        "replicas": 1,
        "selector": { "matchLabels": { "app.kubernetes.io/name": MANAGER } },
        "strategy": { "type": "Recreate" },
        "template": { "metadata": { "labels": labels }, "spec": pod(version, arguments) },
    })
}

/// Returns the pod spec: in the host's network, on any node, because it runs before the network
/// works.
fn pod(version: &str, arguments: &[&str]) -> Value {
    let command = [&["/margay", "operator"], arguments].concat();
    json!({
        "serviceAccountName": MANAGER,
        "hostNetwork": true,
        "dnsPolicy": "Default",
        "priorityClassName": "system-cluster-critical",
        "terminationGracePeriodSeconds": 15,
        "nodeSelector": { "kubernetes.io/os": "linux" },
        "tolerations": [{ "operator": "Exists" }],
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "containers": [{
            "name": MANAGER,
            "image": format!("margay.io/margay:{version}"),
            "imagePullPolicy": "IfNotPresent",
            "command": command,
            "env": [
                render::field_env("NAMESPACE", "metadata.namespace"),
                render::field_env("POD_NAME", "metadata.name"),
                { "name": "MARGAY_ADMIN_LISTEN", "value": format!("127.0.0.1:{ADMIN_PORT}") },
            ],
            "livenessProbe": render::probe("/healthz", ADMIN_PORT, 10, 6),
            "readinessProbe": render::probe("/readyz", ADMIN_PORT, 2, 3),
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": { "drop": ["ALL"] },
                "readOnlyRootFilesystem": true,
            },
        }],
    })
}
