//! DaemonSet of the node agent, with the installation of the CNI plugin as its init container.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::PodSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

use super::overrides::{self, Names};
use super::{
    CA_DIR, Context, NAMESPACE, NODE, Plan, TYPHA, TYPHA_PORT, cni, field_env, heap, labels,
    metrics_env, metrics_port, metrics_service, probe,
};
use crate::manifest::{Key, Object, kind};
use crate::names::CA_NAME;

/// Port of the admin server, on the host's loopback.
const ADMIN_PORT: u16 = 9099;
/// Port of the debug services.
const DEBUG_PORT: u16 = 5474;
/// Name of the init container, as in Calico.
const INSTALL: &str = "install-cni";
/// Mounts of the host's folders in both containers.
const HOST_BIN: &str = "/host/opt/cni/bin";
const HOST_CONF: &str = "/host/etc/cni/net.d";

/// Folders of the host that agent and installation share with it: volume, path on the host, path in
/// the agent (empty: not mounted there).
const HOST_FOLDERS: [(&str, &str, &str); 3] = [
    ("state", "/var/lib/margay", "/var/lib/margay"),
    ("run", "/var/run/margay", "/var/run/margay"),
    // Network namespaces of pods appear here while the agent runs, so mounts must propagate into
    // its container.
    ("netns", "/run/netns", "/run/netns"),
];

/// Adds the DaemonSet, or the reason why it stays as it is. The agent starts before cluster DNS
/// works, so it gets typha's address. A new version is rolled out to typha first, so that no agent
/// has a server older than itself.
pub(super) fn render(context: &Context<'_>, plan: &mut Plan) {
    let reason = match &context.inputs.typha_address {
        Some(address) if !is_ahead_of_typha(context) => {
            plan.objects.push(daemon_set(context, address));
            let port = context.spec.node_metrics_port;
            plan.objects.extend(metrics_service(context, NODE, port));
            return;
        }
        Some(_) => format!(
            "agents get image {} after Deployment {NAMESPACE}/{TYPHA}",
            context.image
        ),
        None => format!(
            "Service {NAMESPACE}/{TYPHA} has no cluster IP yet; agents start when it has one"
        ),
    };
    plan.waiting.push(reason);
    plan.keep.insert(Key {
        kind: kind("DaemonSet"),
        namespace: NAMESPACE.to_owned(),
        name: NODE.to_owned(),
    });
}

/// Returns true while there are agents of another image, and typha does not serve with the wanted
/// one alone yet. Unavailable replicas, as on a node that is gone, do not block while another one
/// serves.
fn is_ahead_of_typha(context: &Context<'_>) -> bool {
    let inputs = context.inputs;
    let runs = |pod: Option<&PodSpec>| {
        let images = pod.map(|pod| pod.containers.as_slice()).unwrap_or_default();
        images
            .iter()
            .any(|c| c.image.as_deref() == Some(context.image.as_str()))
    };
    let agents = inputs
        .daemon_sets
        .iter()
        .find(|d| is_named(&d.metadata, NODE));
    let Some(agents) = agents else { return false };
    if runs(agents.spec.template.spec.as_ref()) {
        return false;
    }
    let typha = inputs
        .deployments
        .iter()
        .find(|d| is_named(&d.metadata, TYPHA));
    !typha.is_some_and(|typha| runs(typha.spec.template.spec.as_ref()) && serves_alone(typha))
}

/// Returns true when the Deployment has pods of its newest template only, and one of them is
/// available.
fn serves_alone(deployment: &Deployment) -> bool {
    let Some(status) = &deployment.status else {
        return false;
    };
    let (all, updated) = (
        status.replicas.unwrap_or(0),
        status.updated_replicas.unwrap_or(0),
    );
    status.observed_generation >= deployment.metadata.generation
        && updated >= all
        && status
            .available_replicas
            .is_some_and(|available| available > 0)
}

fn is_named(metadata: &ObjectMeta, name: &str) -> bool {
    metadata.name.as_deref() == Some(name)
}

fn daemon_set(context: &Context<'_>, typha: &str) -> Object {
    let spec = context.spec;
    let most = spec
        .node_update_strategy
        .as_ref()
        .and_then(|strategy| strategy.rolling_update.as_ref())
        .and_then(|update| update.max_unavailable.clone())
        .unwrap_or_else(|| json!(1));
    let mut body = json!({
        "metadata": { "name": NODE, "namespace": NAMESPACE, "labels": labels(NODE) },
        "spec": {
            "revisionHistoryLimit": 2,
            "selector": { "matchLabels": { "app.kubernetes.io/name": NODE } },
            "updateStrategy": {
                "type": "RollingUpdate",
                "rollingUpdate": { "maxUnavailable": most },
            },
            "template": { "metadata": { "labels": labels(NODE) }, "spec": pod(context, typha) },
        },
    });
    overrides::apply(
        &mut body,
        spec.calico_node_daemon_set.as_ref(),
        spec.component_resources.as_deref().unwrap_or_default(),
        &Names {
            component: "Node",
            container: NODE,
            init: INSTALL,
        },
    );
    context.object("DaemonSet", body)
}

fn pod(context: &Context<'_>, typha: &str) -> Value {
    json!({
        "serviceAccountName": NODE,
        "hostNetwork": true,
        "dnsPolicy": "Default",
        "priorityClassName": "system-node-critical",
        "terminationGracePeriodSeconds": 5,
        "nodeSelector": { "kubernetes.io/os": "linux" },
        "tolerations": [{ "operator": "Exists" }],
        "imagePullSecrets": context.pull_secrets(),
        "initContainers": [install(context)],
        "containers": [agent(context, typha)],
        "volumes": volumes(context),
    })
}

/// Installs the plugin's binary and network configuration; runs as root, but without capabilities.
fn install(context: &Context<'_>) -> Value {
    let environment = context.environment(&[
        ("CNI_BIN_DIR", HOST_BIN.to_owned()),
        ("CNI_CONF_DIR", HOST_CONF.to_owned()),
        ("CNI_CONFLIST", cni::conflist(context.spec)),
    ]);
    json!({
        "name": INSTALL,
        "image": context.image,
        "imagePullPolicy": context.pull_policy(),
        "command": ["/margay-cni", "install"],
        "env": environment,
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsUser": 0,
        },
        "volumeMounts": [
            { "name": "cni-bin", "mountPath": HOST_BIN },
            { "name": "cni-conf", "mountPath": HOST_CONF },
        ],
    })
}

/// Privileged, because it enters pods' network namespaces and writes /proc/sys, which is read-only
/// for unprivileged containers.
fn agent(context: &Context<'_>, typha: &str) -> Value {
    let network = context.spec.calico_network.clone().unwrap_or_default();
    let timeout = cni::policy_timeout(&network);
    let mut environment = vec![
        field_env("NODE_NAME", "spec.nodeName"),
        field_env("NODE_IP", "status.hostIPs"),
    ];
    environment.extend(metrics_env(context.spec.node_metrics_port));
    let mut ports = vec![json!({
        "name": "debug",
        "containerPort": DEBUG_PORT,
        "hostPort": DEBUG_PORT,
        "protocol": "TCP",
    })];
    ports.extend(metrics_port(context.spec.node_metrics_port));
    environment.extend(context.environment(&[
        ("MARGAY_TYPHA", authority(typha)),
        ("MARGAY_CA_DIR", CA_DIR.to_owned()),
        context.storage(),
        heap(),
        ("MARGAY_STATE_DIR", "/var/lib/margay".to_owned()),
        ("MARGAY_RUN_DIR", "/var/run/margay".to_owned()),
        ("MARGAY_CNI_BIN_DIR", HOST_BIN.to_owned()),
        ("MARGAY_CNI_CONF_DIR", HOST_CONF.to_owned()),
        ("CNI_CONFLIST", cni::conflist(context.spec)),
        ("MARGAY_LISTEN", format!("0.0.0.0:{DEBUG_PORT}")),
        ("MARGAY_ADMIN_LISTEN", format!("127.0.0.1:{ADMIN_PORT}")),
        ("MARGAY_POLICY_SETUP_TIMEOUT_SECONDS", timeout.to_string()),
        ("MARGAY_MTU", network.mtu.unwrap_or(0).to_string()),
    ]));
    json!({
        "name": NODE,
        "image": context.image,
        "imagePullPolicy": context.pull_policy(),
        "command": ["/margay", "node"],
        "env": environment,
        "ports": ports,
        "livenessProbe": probe("/healthz", ADMIN_PORT, 10, 6),
        "readinessProbe": probe("/readyz", ADMIN_PORT, 2, 3),
        "securityContext": { "privileged": true, "readOnlyRootFilesystem": true, "runAsUser": 0 },
        "volumeMounts": mounts(),
    })
}

/// Formats `host:port`, with brackets around an IPv6 address.
fn authority(address: &str) -> String {
    if address.contains(':') {
        format!("[{address}]:{TYPHA_PORT}")
    } else {
        format!("{address}:{TYPHA_PORT}")
    }
}

fn mounts() -> Vec<Value> {
    let mut mounts = vec![
        json!({ "name": "ca", "mountPath": CA_DIR, "readOnly": true }),
        // The agent checks which configuration the container runtime reads and which plugin it
        // calls, and restores its own.
        json!({ "name": "cni-bin", "mountPath": HOST_BIN }),
        json!({ "name": "cni-conf", "mountPath": HOST_CONF }),
    ];
    for (name, _, path) in HOST_FOLDERS {
        match name {
            // Container runtimes use either path for namespaces; without a distribution's symbolic
            // link they differ.
            "netns" => mounts.extend([path, "/var/run/netns"].map(|path| {
                json!({
                    "name": name,
                    "mountPath": path,
                    "mountPropagation": "HostToContainer",
                })
            })),
            _ => mounts.push(json!({ "name": name, "mountPath": path })),
        }
    }
    mounts
}

fn volumes(context: &Context<'_>) -> Vec<Value> {
    let cni = context.spec.cni.clone().unwrap_or_default();
    let folder = |name: &str, path: String| {
        json!({
            "name": name,
            "hostPath": { "path": path, "type": "DirectoryOrCreate" },
        })
    };
    let mut volumes = vec![
        json!({ "name": "ca", "configMap": { "name": CA_NAME } }),
        folder(
            "cni-bin",
            cni.bin_dir.unwrap_or_else(|| "/opt/cni/bin".to_owned()),
        ),
        folder(
            "cni-conf",
            cni.conf_dir.unwrap_or_else(|| "/etc/cni/net.d".to_owned()),
        ),
    ];
    volumes.extend(
        HOST_FOLDERS
            .iter()
            .map(|(name, host, _)| folder(name, (*host).to_owned())),
    );
    volumes
}
