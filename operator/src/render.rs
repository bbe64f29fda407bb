//! Renders every wanted object, in the order of creation, from a completed Installation and the
//! state of the cluster. Pure.

mod admission;
#[cfg(test)]
mod cel;
mod cni;
mod config;
mod defaulting;
mod namespace;
mod node;
mod overrides;
mod pools;
mod protection;
mod rbac;
mod selectors;
mod tiers;
mod typha;
mod validating_policy;

use std::collections::{BTreeMap, BTreeSet};

use margay_api::installation::InstallationSpec;
use margay_api::storage::Mode;
use serde_json::{Value, json};

use crate::inputs::Inputs;
use crate::manifest::{Key, Object, Owner};
use crate::names::{NAMESPACE, NODE, STORAGE_VARIABLE, TELEMETRY_SECRET, TYPHA};

pub use pools::PoolPlan;

/// Port of typha's stream.
pub const TYPHA_PORT: u16 = 5473;
/// Folder of a pod's certificate.
const TLS_DIR: &str = "/etc/margay/tls";
/// Folder of the CAs that a pod trusts.
const CA_DIR: &str = "/etc/margay/ca";

/// Settings from the operator's own process.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Image of every component; empty: from the Installation.
    pub image: String,
    /// Version of this build, with the leading `v`.
    pub version: String,
    /// Storage of Calico's data.
    pub mode: Mode,
    /// Variables passed on to every component: log filter and OpenTelemetry's.
    pub environment: BTreeMap<String, String>,
    /// Variables whose values are secrets: components get them from Secret [`TELEMETRY_SECRET`],
    /// under the variables' names.
    pub secrets: BTreeSet<String>,
}

/// Objects to apply.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Objects to apply, in order.
    pub objects: Vec<Object>,
    /// Objects that stay as they are: they cannot be rendered yet, or must not be rendered again.
    pub keep: BTreeSet<Key>,
    /// Prerequisites that are not there yet, for the condition Progressing.
    pub waiting: Vec<String>,
}

/// Inputs of a renderer.
pub(crate) struct Context<'a> {
    pub(crate) spec: &'a InstallationSpec,
    pub(crate) inputs: &'a Inputs,
    pub(crate) owner: &'a Owner,
    pub(crate) settings: &'a Settings,
    pub(crate) image: String,
}

impl Context<'_> {
    /// Makes an object that belongs to the Installation.
    fn object(&self, kind: &str, body: Value) -> Object {
        Object::new(kind, body).owned_by(self.owner)
    }

    fn pull_policy(&self) -> &str {
        self.spec
            .image_pull_policy
            .as_deref()
            .unwrap_or("IfNotPresent")
    }

    fn pull_secrets(&self) -> Value {
        json!(self.spec.image_pull_secrets.as_deref().unwrap_or_default())
    }

    /// Variable with the storage of Calico's data.
    fn storage(&self) -> (&'static str, String) {
        (STORAGE_VARIABLE, self.settings.mode.to_string())
    }

    /// Returns variables with fixed values, then those passed on.
    fn environment(&self, own: &[(&str, String)]) -> Vec<Value> {
        let own = own
            .iter()
            .map(|(name, value)| json!({ "name": name, "value": value }));
        let passed = self
            .settings
            .environment
            .iter()
            .map(|(name, value)| json!({ "name": name, "value": value }));
        let secrets = self.settings.secrets.iter().map(|name| {
            let of = json!({ "name": TELEMETRY_SECRET, "key": name, "optional": true });
            json!({ "name": name, "valueFrom": { "secretKeyRef": of } })
        });
        own.chain(passed).chain(secrets).collect()
    }
}

/// Settings of the C library's memory allocator: memory that was needed for a moment (a whole
/// table, a whole view) goes back to the kernel, and short-lived threads do not keep an arena each
/// (glibc tunables).
fn heap() -> (&'static str, String) {
    let limits = [
        "arena_max=2",
        "mmap_threshold=131072",
        "trim_threshold=131072",
    ];
    (
        "GLIBC_TUNABLES",
        limits
            .map(|limit| format!("glibc.malloc.{limit}"))
            .join(":"),
    )
}

/// Renders everything wanted for the installation but pools and Secrets of certificates.
pub fn plan(spec: &InstallationSpec, inputs: &Inputs, owner: &Owner, settings: &Settings) -> Plan {
    let context = Context {
        spec,
        inputs,
        owner,
        settings,
        image: image(spec, settings),
    };
    let mut plan = Plan::default();
    plan.objects.push(namespace::namespace(&context));
    plan.objects.extend(rbac::objects(&context));
    plan.objects.extend(admission::objects(&context));
    plan.objects.extend(protection::objects(&context));
    plan.objects.extend(selectors::objects(&context));
    plan.objects.extend(tiers::objects(&context));
    plan.objects.extend(defaulting::objects(&context));
    plan.objects.extend(config::objects(&context));
    plan.objects.extend(config::bundle(&context));
    plan.objects.extend(typha::objects(&context));
    node::render(&context, &mut plan);
    plan
}

/// Renders what is left to write where the components come from a manifest: configuration that is
/// absent, and the trusted CAs.
pub fn configuration(spec: &InstallationSpec, inputs: &Inputs, settings: &Settings) -> Plan {
    let context = Context {
        spec,
        inputs,
        owner: &Owner::default(),
        settings,
        image: String::new(),
    };
    let mut plan = Plan::default();
    plan.objects.extend(config::objects(&context));
    plan.objects.extend(config::bundle(&context));
    plan
}

/// Returns the default pools while there is no pool at all; from then on pools are the user's.
pub fn first_pools(spec: &InstallationSpec, inputs: &Inputs) -> PoolPlan {
    match inputs.pools.as_deref() {
        Some([]) => pools::plan(spec, inputs),
        _ => PoolPlan::default(),
    }
}

/// Returns pools to write, and those that cannot be created or changed.
pub fn pools(spec: &InstallationSpec, inputs: &Inputs) -> PoolPlan {
    pools::plan(spec, inputs)
}

/// Names of the validating admission policies, for the operator's own permissions.
pub(crate) fn validating_policy_names() -> Vec<&'static str> {
    [
        admission::names(),
        protection::NAMES.to_vec(),
        selectors::NAMES.to_vec(),
        tiers::NAMES.to_vec(),
    ]
    .concat()
}

/// Names of the mutating admission policies, for the operator's own permissions.
pub(crate) fn mutating_policy_names() -> Vec<&'static str> {
    defaulting::NAMES.to_vec()
}

pub(crate) use rbac::calico;

/// Returns every rule that is granted to a component, which the operator itself must therefore
/// have.
pub(crate) fn granted(mode: Mode) -> Vec<Value> {
    let mut rules = rbac::typha_rules(mode);
    rules.extend(rbac::node_rules(mode));
    rules
}

/// Returns the image of every component.
fn image(spec: &InstallationSpec, settings: &Settings) -> String {
    if !settings.image.is_empty() {
        return settings.image.clone();
    }
    let given = |field: &Option<String>| {
        field
            .clone()
            .filter(|text| !text.is_empty() && text != "UseDefault")
    };
    let registry = given(&spec.registry).unwrap_or_else(|| "margay.io/".to_owned());
    let path = given(&spec.image_path)
        .map(|path| format!("{}/", path.trim_matches('/')))
        .unwrap_or_default();
    let prefix = given(&spec.image_prefix).unwrap_or_default();
    format!("{registry}{path}{prefix}margay:{}", settings.version)
}

/// Returns the labels of a component's objects and pods.
fn labels(name: &str) -> Value {
    json!({
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/part-of": "margay",
    })
}

/// Returns a variable with the value of a field of the pod.
pub(crate) fn field_env(name: &str, path: &str) -> Value {
    json!({ "name": name, "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": path } } })
}

/// Returns the variable with the address for Prometheus: all of the node's, of either IP version.
pub(crate) fn metrics_env(port: Option<i32>) -> Option<Value> {
    let port = port?;
    Some(json!({ "name": "MARGAY_METRICS_LISTEN", "value": format!("[::]:{port}") }))
}

/// Returns the container's port for Prometheus.
pub(crate) fn metrics_port(port: Option<i32>) -> Option<Value> {
    let port = port?;
    Some(json!({
        "name": "metrics",
        "containerPort": port,
        "hostPort": port,
        "protocol": "TCP",
    }))
}

/// Returns the headless Service by which Prometheus finds the pods of a component.
pub(crate) fn metrics_service(
    context: &Context<'_>,
    component: &str,
    port: Option<i32>,
) -> Option<Object> {
    let port = port?;
    let name = format!("{component}-metrics");
    let body = json!({
        "metadata": { "name": name, "namespace": NAMESPACE, "labels": labels(component) },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "None",
            "selector": { "app.kubernetes.io/name": component },
            "ports": [{
                "name": "metrics",
                "port": port,
                "protocol": "TCP",
                "targetPort": port,
            }],
        },
    });
    Some(context.object("Service", body))
}

/// Returns an HTTP probe of the admin port, which listens on the host's loopback only.
pub(crate) fn probe(path: &str, port: u16, period: u32, failures: u32) -> Value {
    json!({
        "httpGet": { "host": "127.0.0.1", "path": path, "port": port, "scheme": "HTTP" },
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    })
}

#[cfg(test)]
#[path = "render/tests.rs"]
mod tests;
