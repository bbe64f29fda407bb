//! Health of the components' pods.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::{Finding, examples};
use crate::inputs::Inputs;

/// Reasons of a waiting container that do not go away by themselves.
const STUCK: [&str; 8] = [
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
];

/// Health of all pods.
#[derive(Default)]
pub(super) struct Health {
    /// A problem that a person must solve.
    pub(super) failing: Option<Finding>,
    /// Pods that are not ready, with the reason.
    pub(super) waiting: Vec<String>,
}

/// Checks every pod that is not terminating.
pub(super) fn health(inputs: &Inputs) -> Health {
    let mut failing = Vec::new();
    let mut waiting = Vec::new();
    let pods = inputs
        .pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none());
    for pod in pods {
        let before = failing.len();
        failing.extend(containers(pod).filter_map(|container| stuck(pod, container)));
        if failing.len() == before {
            waiting.extend(unready(pod));
        }
    }
    Health {
        failing: (!failing.is_empty()).then(|| Finding::new("PodFailure", examples(&failing))),
        waiting,
    }
}

fn containers(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let init = status.and_then(|s| s.init_container_statuses.as_deref());
    let main = status.and_then(|s| s.container_statuses.as_deref());
    init.unwrap_or_default()
        .iter()
        .chain(main.unwrap_or_default())
}

/// Formats `pod NAME on node NODE`.
fn title(pod: &Pod) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    match pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) {
        Some(node) => format!("pod {name} on node {node}"),
        None => format!("pod {name}"),
    }
}

fn stuck(pod: &Pod, container: &ContainerStatus) -> Option<String> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref()?;
    if !STUCK.contains(&reason) {
        return None;
    }
    let ended = container
        .last_state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    let detail = match ended {
        Some(ended) => format!("it ended with status {}", ended.exit_code),
        None => brief(waiting.message.as_deref().unwrap_or_default()),
    };
    Some(format!(
        "{}: container {}: {reason}: {detail}; {}",
        title(pod),
        container.name,
        remedy(pod, container, reason)
    ))
}

/// Returns the beginning of a runtime's message, which may be pages long.
fn brief(message: &str) -> String {
    const LONGEST: usize = 160;
    match message.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &message[..end]),
        None => message.to_owned(),
    }
}

fn remedy(pod: &Pod, container: &ContainerStatus, reason: &str) -> String {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    if reason.contains("Image") {
        format!(
            "make image {} available to the node, or set spec.registry, imagePath and \
             imagePullSecrets",
            container.image
        )
    } else if reason == "CrashLoopBackOff" {
        format!(
            "see kubectl logs -n {namespace} {name} -c {} --previous",
            container.name
        )
    } else {
        format!("see kubectl describe pod -n {namespace} {name}")
    }
}

fn unready(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let condition = |kind: &str| conditions.iter().find(|c| c.type_ == kind);
    if condition("Ready").is_some_and(|c| c.status == "True") {
        return None;
    }
    let why = ["PodScheduled", "Initialized", "Ready"]
        .into_iter()
        .filter_map(condition)
        .find(|c| c.status != "True")
        .map(|c| {
            let reason = c.reason.as_deref().unwrap_or_default();
            let message = c.message.as_deref().unwrap_or_default();
            format!("{reason}: {message}")
        });
    let phase = status.phase.as_deref().unwrap_or("Pending");
    Some(format!(
        "{} is {phase} and not ready ({})",
        title(pod),
        why.unwrap_or_default()
    ))
}
