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
    let mut plugins = vec![json!({
        "type": "margay",
        "policy_setup_timeout_seconds": policy_timeout(&network),
        // With this capability the agent learns of addresses that a pod requests without a request
        // to the API.
        "capabilities": { "io.kubernetes.cri.pod-annotations": true },
    })];
    if network.host_ports.as_deref() == Some("Enabled") {
        plugins.push(json!({
            "type": "portmap",
            "snat": true,
            "capabilities": { "portMappings": true },
        }));
    }
    let list = json!({ "cniVersion": "1.1.0", "name": "k8s-pod-network", "plugins": plugins });
    format!("{list:#}\n")
}
