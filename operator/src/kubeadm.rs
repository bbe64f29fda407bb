//! Configuration that kubeadm stores in the cluster.

use serde::Deserialize;

/// Name of the ConfigMap with kubeadm's configuration, in namespace kube-system.
pub const CONFIG_MAP: &str = "kubeadm-config";

/// The part of kubeadm's ClusterConfiguration that is used.
#[derive(Deserialize)]
struct ClusterConfiguration {
    networking: Option<Networking>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Networking {
    pod_subnet: Option<String>,
}

/// Reads `networking.podSubnet` of kubeadm's ClusterConfiguration: one range, or several separated
/// by commas. None if the configuration cannot be parsed.
pub fn pod_subnets(configuration: &str) -> Vec<String> {
    let configuration = serde_saphyr::from_str::<ClusterConfiguration>(configuration).ok();
    let subnets = configuration
        .and_then(|configuration| configuration.networking?.pod_subnet)
        .unwrap_or_default();
    subnets
        .split(',')
        .map(|part| part.trim().to_owned())
        .filter(|part| !part.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_ranges_are_read_from_kubeadms_configuration() {
        let table: [(&str, &[&str]); 9] = [
            (
                "networking:\n  podSubnet: 10.244.0.0/16\n  serviceSubnet: 10.96.0.0/12\n",
                &["10.244.0.0/16"],
            ),
            (
                "networking:\n  podSubnet: \"10.1.0.0/16,fd00::/56\"\n",
                &["10.1.0.0/16", "fd00::/56"],
            ),
            ("networking:\n  podSubnet: '10.1.0.0/16'", &["10.1.0.0/16"]),
            ("networking:\n  podSubnet: \"\"\n", &[]),
            ("networking: {}\n", &[]),
            ("networking:\nkind: ClusterConfiguration\n", &[]),
            (
                "networking: {podSubnet: \"10.1.0.0/16, fd00::/56\"}\n",
                &["10.1.0.0/16", "fd00::/56"],
            ),
            (
                "apiServer:\n  extraArgs:\n    podSubnet: 10.9.0.0/16\n\
                 networking:\n  podSubnet: 10.1.0.0/16\n",
                &["10.1.0.0/16"],
            ),
            ("networking: [", &[]),
        ];
        for (text, wanted) in table {
            assert_eq!(pod_subnets(text), wanted, "{text}");
        }
    }
}
