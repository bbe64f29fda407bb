//! Network configuration for the CNI plugin, as container runtimes read it.

use margay_api::installation::{CalicoNetworkSpec, InstallationSpec};
use serde_json::json;

use crate::defaults::DEFAULT_POLICY_TIMEOUT;

/// Returns the time that a pod's creation waits for its policy, in seconds. Calico's 0 (do not
/// wait) means the default: no pod starts unprotected.
pub(super) fn policy_timeout(network: &CalicoNetworkSpec) -> i32 {
    network
        .linux_policy_setup_timeout_seconds
        .filter(|seconds| *seconds > 0)
        .unwrap_or(DEFAULT_POLICY_TIMEOUT)
}

/// Returns the configuration list as text. The plugin must know how long its agent may wait;
/// everything else is the agent's.
pub(super) fn conflist(spec: &InstallationSpec) -> String {
    let network = spec.calico_network.clone().unwrap_or_default();
    // With these capabilities the agent learns of addresses and host ports of a pod without a
    // request to the API.
    let mut capabilities = json!({ "io.kubernetes.cri.pod-annotations": true });
    if network.host_ports.as_deref() != Some("Disabled") {
        capabilities["portMappings"] = json!(true);
    }
    let plugin = json!({
        "type": "margay",
        "policy_setup_timeout_seconds": policy_timeout(&network),
        "capabilities": capabilities,
    });
    let mut list = json!({ "name": "k8s-pod-network", "plugins": [plugin] });
    let wanted = spec
        .cni
        .as_ref()
        .and_then(|cni| cni.spec_version.as_deref());
    match wanted {
        Some(version) if version != "Auto" => list["cniVersion"] = json!(version),
        _ => {
            // Runtimes that know `cniVersions` (libcni 1.2 and later) choose the newest version
            // that they support. Others, such as containerd 1.6 and 1.7, refuse 1.1.0 and read
            // only `cniVersion`.
            list["cniVersion"] = json!("1.0.0");
            list["cniVersions"] = json!(["1.0.0", "1.1.0"]);
        }
    }
    format!("{list:#}\n")
}
