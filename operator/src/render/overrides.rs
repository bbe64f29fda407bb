//! Overrides of workloads by an Installation.

use margay_api::installation::{
    ComponentResource, ContainerOverride, MetadataOverride, PodSpecOverride, WorkloadOverride,
};
use serde_json::{Map, Value, json};

/// Names by which overrides refer to the parts of a workload.
pub(super) struct Names {
    /// Component in `componentResources`.
    pub(super) component: &'static str,
    /// Main container; overrides may also use Calico's name for it.
    pub(super) container: &'static str,
    /// Init container, or empty.
    pub(super) init: &'static str,
}

/// Applies component resources, then the workload's own overrides, which take precedence.
pub(super) fn apply(
    body: &mut Value,
    over: Option<&WorkloadOverride>,
    resources: &[ComponentResource],
    names: &Names,
) {
    for resource in resources {
        if resource.component_name == names.component
            && let Some(wanted) = &resource.resource_requirements
        {
            body["spec"]["template"]["spec"]["containers"][0]["resources"] = json!(wanted);
        }
    }
    let Some(over) = over else { return };
    add_metadata(&mut body["metadata"], over.metadata.as_ref());
    let Some(spec) = &over.spec else { return };
    if let Some(seconds) = spec.min_ready_seconds {
        body["spec"]["minReadySeconds"] = json!(seconds);
    }
    let Some(template) = &spec.template else {
        return;
    };
    let wanted = &mut body["spec"]["template"];
    add_metadata(&mut wanted["metadata"], template.metadata.as_ref());
    if let Some(pod) = &template.spec {
        apply_pod(&mut wanted["spec"], pod, names);
    }
}

fn apply_pod(wanted: &mut Value, pod: &PodSpecOverride, names: &Names) {
    if let Some(affinity) = &pod.affinity {
        wanted["affinity"] = affinity.clone();
    }
    for (label, value) in pod.node_selector.iter().flatten() {
        wanted["nodeSelector"][label] = json!(value);
    }
    if let Some(tolerations) = &pod.tolerations {
        wanted["tolerations"] = json!(tolerations);
    }
    if let Some(class) = &pod.priority_class_name {
        wanted["priorityClassName"] = json!(class);
    }
    if let Some(seconds) = pod.termination_grace_period_seconds {
        wanted["terminationGracePeriodSeconds"] = json!(seconds);
    }
    add_resources(&mut wanted["containers"], &pod.containers, names.container);
    if !names.init.is_empty() {
        add_resources(
            &mut wanted["initContainers"],
            &pod.init_containers,
            names.init,
        );
    }
}

fn add_resources(containers: &mut Value, overrides: &[ContainerOverride], name: &str) {
    let calicos = name.replace("margay-", "calico-");
    for over in overrides {
        if (over.name == name || over.name == calicos)
            && let Some(resources) = &over.resources
        {
            containers[0]["resources"] = json!(resources);
        }
    }
}

/// Adds labels and annotations; existing ones take precedence.
fn add_metadata(wanted: &mut Value, over: Option<&MetadataOverride>) {
    let Some(over) = over else { return };
    for (field, added) in [("labels", &over.labels), ("annotations", &over.annotations)] {
        if added.is_empty() {
            continue;
        }
        let mut merged: Map<String, Value> =
            added.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        if let Value::Object(own) = wanted[field].take() {
            merged.extend(own);
        }
        wanted[field] = Value::Object(merged);
    }
}
