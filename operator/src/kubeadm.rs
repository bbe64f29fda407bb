//! Configuration that kubeadm stores in the cluster.

/// Name of the ConfigMap with kubeadm's configuration, in namespace kube-system.
pub const CONFIG_MAP: &str = "kubeadm-config";

/// Reads `networking.podSubnet` of kubeadm's ClusterConfiguration: one range, or several separated
/// by commas. It is a scalar on a line of its own in the YAML that kubeadm writes, so no YAML
/// parser is needed.
pub fn pod_subnets(configuration: &str) -> Vec<String> {
    configuration
        .lines()
        .filter_map(|line| line.trim().strip_prefix("podSubnet:"))
        .flat_map(|value| value.split(','))
        .map(|part| part.trim().trim_matches(['"', '\'']).to_owned())
        .filter(|part| !part.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_ranges_are_read_from_kubeadms_configuration() {
        let table: [(&str, &[&str]); 5] = [
            ("networking:\n  podSubnet: 10.244.0.0/16\n  serviceSubnet: 10.96.0.0/12\n", &["10.244.0.0/16"]),
            ("networking:\n  podSubnet: \"10.1.0.0/16,fd00::/56\"\n", &["10.1.0.0/16", "fd00::/56"]),
            ("networking:\n  podSubnet: '10.1.0.0/16'", &["10.1.0.0/16"]),
            ("networking:\n  podSubnet: \"\"\n", &[]),
            ("networking: {}\n", &[]),
        ];
        for (text, wanted) in table {
            assert_eq!(pod_subnets(text), wanted, "{text}");
        }
    }
}
