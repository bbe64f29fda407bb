//! The network configuration that container runtimes read.

use margay_api::installation::InstallationSpec;
use serde_json::json;

/// The configuration list as text. Everything else the plugin learns from the agent, so that a change there needs no new file.
pub(super) fn conflist(spec: &InstallationSpec) -> String {
    let network = spec.calico_network.clone().unwrap_or_default();
    let mut plugins = vec![json!({ "type": "margay" })];
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
