//! Typha: Services, PodDisruptionBudget, Deployment.

use serde_json::{Value, json};

use super::overrides::{self, Names};
use super::{
    CA_DIR, Context, NAMESPACE, TLS_DIR, TYPHA, TYPHA_PORT, field_env, heap, labels, metrics_env,
    metrics_port, metrics_service, probe,
};
use crate::manifest::Object;
use crate::names::{CA_NAME, TYPHA_SECRET};
use crate::scale;

/// Port of the admin server, on the host's loopback.
const ADMIN_PORT: u16 = 9098;
/// User id of typha, which needs no privileges.
const USER: u32 = 65532;

/// Returns typha's objects except its account.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    let mut objects = vec![
        context.object("Service", service()),
        context.object("PodDisruptionBudget", budget()),
        deployment(context),
    ];
    let port = context.spec.typha_metrics_port;
    objects.extend(metrics_service(context, TYPHA, port));
    objects
}

fn selector() -> Value {
    json!({ "app.kubernetes.io/name": TYPHA })
}

fn metadata() -> Value {
    json!({ "name": TYPHA, "namespace": NAMESPACE, "labels": labels(TYPHA) })
}

fn service() -> Value {
    json!({
        "metadata": metadata(),
        "spec": {
            "type": "ClusterIP",
            "selector": selector(),
            "ports": [{
                "name": "sync",
                "port": TYPHA_PORT,
                "protocol": "TCP",
                "targetPort": TYPHA_PORT,
            }],
        },
    })
}

fn budget() -> Value {
    json!({
        "metadata": metadata(),
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": selector() } },
    })
}

fn deployment(context: &Context<'_>) -> Object {
    let spec = context.spec;
    let mut body = json!({
        "metadata": metadata(),
        "spec": {
            "revisionHistoryLimit": 2,
            "selector": { "matchLabels": selector() },
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": { "maxSurge": "100%", "maxUnavailable": 1 },
            },
            "template": { "metadata": { "labels": labels(TYPHA) }, "spec": pod(context) },
        },
    });
    overrides::apply(
        &mut body,
        spec.typha_deployment.as_ref(),
        spec.component_resources.as_deref().unwrap_or_default(),
        &Names {
            component: "Typha",
            container: TYPHA,
            init: "",
        },
    );
    body["spec"]["replicas"] = json!(replicas(context, &body));
    context.object("Deployment", body)
}

/// Returns the number of replicas, from the pod spec after all overrides.
fn replicas(context: &Context<'_>, body: &Value) -> i32 {
    let inputs = context.inputs;
    let pod = serde_json::from_value(body["spec"]["template"]["spec"].clone());
    let eligible = pod.map_or(inputs.usable_nodes(), |pod| {
        scale::eligible(&inputs.nodes, &pod)
    });
    scale::typha_replicas(
        inputs.usable_nodes(),
        eligible,
        context.spec.typha_replicas.as_ref(),
    )
}

/// Returns the pod spec. Typha runs in the host's network and tolerates everything, because it must
/// run before there is a network. The host port keeps two replicas off the same node.
fn pod(context: &Context<'_>) -> Value {
    let spec = context.spec;
    let mut tolerations = vec![json!({ "operator": "Exists" })];
    tolerations.extend(
        spec.control_plane_tolerations
            .iter()
            .flatten()
            .map(|t| json!(t)),
    );
    let mut nodes = json!({ "kubernetes.io/os": "linux" });
    for (label, value) in spec.control_plane_node_selector.iter().flatten() {
        nodes[label] = json!(value);
    }
    json!({
        "serviceAccountName": TYPHA,
        "hostNetwork": true,
        "dnsPolicy": "Default",
        "priorityClassName": "system-cluster-critical",
        "terminationGracePeriodSeconds": 30,
        "nodeSelector": nodes,
        "tolerations": tolerations,
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{
                    "weight": 1,
                    "podAffinityTerm": {
                        "labelSelector": { "matchLabels": selector() },
                        "topologyKey": "topology.kubernetes.io/zone",
                    },
                }],
            },
        },
        "imagePullSecrets": context.pull_secrets(),
        "securityContext": {
            "fsGroup": USER,
            "runAsGroup": USER,
            "runAsNonRoot": true,
            "runAsUser": USER,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "containers": [container(context)],
        "volumes": [
            { "name": "tls", "secret": { "secretName": TYPHA_SECRET, "defaultMode": 0o440 } },
            { "name": "ca", "configMap": { "name": CA_NAME } },
        ],
    })
}

/// Routing between nodes, in Calico's words.
fn backend(context: &Context<'_>) -> &'static str {
    let network = context.spec.calico_network.as_ref();
    match network.and_then(|network| network.bgp.as_deref()) {
        Some("Enabled") => "bird",
        _ => "vxlan",
    }
}

fn container(context: &Context<'_>) -> Value {
    let mut environment = vec![
        field_env("NODE_NAME", "spec.nodeName"),
        field_env("POD_NAME", "metadata.name"),
        field_env("POD_NAMESPACE", "metadata.namespace"),
    ];
    environment.extend(metrics_env(context.spec.typha_metrics_port));
    environment.extend(context.environment(&[
        ("MARGAY_LISTEN", format!("0.0.0.0:{TYPHA_PORT}")),
        ("MARGAY_ADMIN_LISTEN", format!("127.0.0.1:{ADMIN_PORT}")),
        ("MARGAY_TLS_DIR", TLS_DIR.to_owned()),
        ("MARGAY_CA_DIR", CA_DIR.to_owned()),
        context.storage(),
        ("CALICO_NETWORKING_BACKEND", backend(context).to_owned()),
        heap(),
    ]));
    let mut ports = vec![json!({
        "name": "sync",
        "containerPort": TYPHA_PORT,
        "hostPort": TYPHA_PORT,
        "protocol": "TCP",
    })];
    ports.extend(metrics_port(context.spec.typha_metrics_port));
    json!({
        "name": TYPHA,
        "image": context.image,
        "imagePullPolicy": context.pull_policy(),
        "command": ["/margay", "typha"],
        "env": environment,
        "ports": ports,
        "livenessProbe": probe("/healthz", ADMIN_PORT, 10, 6),
        "readinessProbe": probe("/readyz", ADMIN_PORT, 2, 3),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "privileged": false,
            "readOnlyRootFilesystem": true,
        },
        "volumeMounts": [
            { "name": "tls", "mountPath": TLS_DIR, "readOnly": true },
            { "name": "ca", "mountPath": CA_DIR, "readOnly": true },
        ],
    })
}
