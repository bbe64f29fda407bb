//! Validation of a completed Installation. Every problem is reported, not only the first; while
//! there is one, nothing that runs is changed.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::installation::{InstallationSpec, IpPoolSpec, WorkloadOverride};
use margay_api::selector::Selector;
use serde_json::Value;

/// Maximum time to wait for policy, in seconds: kubelet gives up on a pod's sandbox after four
/// minutes.
const LONGEST_POLICY_TIMEOUT: i32 = 180;

/// Ports of typha, the agents and the operator.
const OWN_PORTS: [i32; 5] = [5473, 5474, 9097, 9098, 9099];

/// An invalid field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, from `spec`.
    pub field: String,
    /// The value found, as text.
    pub value: String,
    /// The violated rule.
    pub rule: String,
    /// Action for the user.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is {}: {}; {}",
            self.field, self.value, self.rule, self.remedy
        )
    }
}

/// Collects problems.
struct Validator<'a> {
    problems: &'a mut Vec<Problem>,
}

impl Validator<'_> {
    fn fail(
        &mut self,
        field: &str,
        value: impl fmt::Display,
        rule: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let value = value.to_string();
        self.problems.push(Problem {
            field: format!("spec.{field}"),
            value: if value.is_empty() {
                "empty".to_owned()
            } else {
                value
            },
            rule: rule.into(),
            remedy: remedy.into(),
        });
    }

    /// Checks that `value` is one of `allowed`, of which the first is the default.
    fn check_one_of(&mut self, field: &str, value: Option<&String>, allowed: &[&str]) {
        let Some(value) = value else { return };
        if !allowed.contains(&value.as_str()) {
            self.fail(
                field,
                value,
                format!("it must be {}", allowed.join(" or ")),
                format!("set {} or leave the field out", allowed[0]),
            );
        }
    }

    fn check_absolute(&mut self, field: &str, value: Option<&String>) {
        let Some(value) = value else { return };
        if !value.starts_with('/') || value.split('/').any(|part| part == "..") {
            self.fail(
                field,
                value,
                "it must be an absolute path without `..`",
                "give the full path on the host or leave the field out",
            );
        }
    }

    fn check_range(&mut self, field: &str, value: Option<i32>, low: i32, high: i32, zero: bool) {
        let Some(value) = value else { return };
        let good = (low..=high).contains(&value) || (zero && value == 0);
        if !good {
            let rule = if zero {
                format!("it must be 0 or from {low} to {high}")
            } else {
                format!("it must be from {low} to {high}")
            };
            self.fail(
                field,
                value,
                rule,
                "set a value in that range or leave the field out",
            );
        }
    }
}

/// Returns all problems of a spec.
pub fn installation(spec: &InstallationSpec) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut validator = Validator {
        problems: &mut problems,
    };
    images(&mut validator, spec);
    cni(&mut validator, spec);
    network(&mut validator, spec);
    workloads(&mut validator, spec);
    problems
}

fn images(validator: &mut Validator<'_>, spec: &InstallationSpec) {
    validator.check_one_of("variant", spec.variant.as_ref(), &["Calico"]);
    validator.check_one_of(
        "imagePullPolicy",
        spec.image_pull_policy.as_ref(),
        &["IfNotPresent", "Always", "Never"],
    );
    if let Some(registry) = &spec.registry
        && registry != "UseDefault"
        && !registry.is_empty()
        && !registry.ends_with('/')
    {
        validator.fail(
            "registry",
            registry,
            "it must end with /",
            format!("set {registry}/"),
        );
    }
}

fn cni(validator: &mut Validator<'_>, spec: &InstallationSpec) {
    let Some(cni) = &spec.cni else { return };
    validator.check_one_of("cni.type", cni.kind.as_ref(), &["Calico"]);
    let ipam = cni.ipam.as_ref().and_then(|ipam| ipam.kind.as_ref());
    validator.check_one_of("cni.ipam.type", ipam, &["Calico"]);
    validator.check_one_of(
        "cni.specVersion",
        cni.spec_version.as_ref(),
        &["Auto", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    );
    validator.check_absolute("cni.binDir", cni.bin_dir.as_ref());
    validator.check_absolute("cni.confDir", cni.conf_dir.as_ref());
}

fn network(validator: &mut Validator<'_>, spec: &InstallationSpec) {
    let Some(network) = &spec.calico_network else {
        return;
    };
    validator.check_one_of(
        "calicoNetwork.linuxDataplane",
        network.linux_dataplane.as_ref(),
        &["Nftables", "Iptables"],
    );
    validator.check_one_of(
        "calicoNetwork.bgp",
        network.bgp.as_ref(),
        &["Disabled", "Enabled"],
    );
    validator.check_one_of(
        "calicoNetwork.hostPorts",
        network.host_ports.as_ref(),
        &["Disabled", "Enabled"],
    );
    validator.check_range("calicoNetwork.mtu", network.mtu, 576, 65535, true);
    validator.check_range(
        "calicoNetwork.linuxPolicySetupTimeoutSeconds",
        network.linux_policy_setup_timeout_seconds,
        1,
        LONGEST_POLICY_TIMEOUT,
        true,
    );
    pools(validator, network.ip_pools.as_deref().unwrap_or_default());
}

/// Maximum number of pools in one Installation, as in Calico.
const MAX_POOLS: usize = 25;

fn pools(validator: &mut Validator<'_>, pools: &[IpPoolSpec]) {
    const LIST: &str = "calicoNetwork.ipPools";
    if pools.len() > MAX_POOLS {
        validator.fail(
            LIST,
            format!("{} pools long", pools.len()),
            format!("an Installation has at most {MAX_POOLS} pools"),
            "create the others as IPPool objects",
        );
    }
    let mut names = BTreeSet::new();
    let mut ranges: Vec<(usize, IpNet)> = Vec::new();
    for (index, pool) in pools.iter().enumerate() {
        let at = |field: &str| format!("{LIST}[{index}].{field}");
        if let Some(name) = &pool.name {
            if !is_object_name(name) {
                validator.fail(
                    &at("name"),
                    name,
                    "it must be a name of an object (lower-case letters, digits, - and .)",
                    "rename it or leave the field out",
                );
            }
            if !names.insert(name) {
                validator.fail(
                    &at("name"),
                    name,
                    "another pool of the list has the same name",
                    "rename one of them or leave the field out",
                );
            }
        }
        if let Some(net) = cidr(validator, &at("cidr"), &pool.cidr) {
            let overlap = ranges
                .iter()
                .find(|(_, other)| other.contains(&net) || net.contains(other));
            if let Some((other, range)) = overlap {
                validator.fail(
                    &at("cidr"),
                    net,
                    format!("it overlaps ipPools[{other}] ({range})"),
                    "change one of the two ranges",
                );
            }
            ranges.push((index, net));
            block_size(validator, &at("blockSize"), pool.block_size, net);
        }
        pool_settings(validator, pool, at);
    }
}

fn pool_settings(validator: &mut Validator<'_>, pool: &IpPoolSpec, at: impl Fn(&str) -> String) {
    validator.check_one_of(
        &at("encapsulation"),
        pool.encapsulation.as_ref(),
        &[
            "VXLAN",
            "VXLANCrossSubnet",
            "IPIP",
            "IPIPCrossSubnet",
            "None",
        ],
    );
    let is_ipip = pool
        .encapsulation
        .as_deref()
        .is_some_and(|mode| mode.starts_with("IPIP"));
    if is_ipip && pool.cidr.contains(':') {
        validator.fail(
            &at("encapsulation"),
            pool.encapsulation.as_deref().unwrap_or_default(),
            "IPIP carries IPv4 only",
            "set VXLAN, VXLANCrossSubnet or None",
        );
    }
    validator.check_one_of(
        &at("natOutgoing"),
        pool.nat_outgoing.as_ref(),
        &["Enabled", "Disabled"],
    );
    validator.check_one_of(
        &at("assignmentMode"),
        pool.assignment_mode.as_ref(),
        &["Automatic", "Manual"],
    );
    for usage in pool.allowed_uses.iter().flatten() {
        validator.check_one_of(&at("allowedUses"), Some(usage), &["Workload", "Tunnel"]);
    }
    if let Some(selector) = &pool.node_selector {
        node_selector(validator, &at("nodeSelector"), selector);
    }
}

fn node_selector(validator: &mut Validator<'_>, field: &str, text: &str) {
    if text.trim().is_empty() {
        let remedy = "set all() or leave the field out";
        validator.fail(field, "", "it must select nodes", remedy);
    } else if let Err(error) = Selector::parse(text) {
        let rule = format!("{} (at {})", error.rule, error.position);
        validator.fail(field, text, rule, error.remedy);
    }
}

fn cidr(validator: &mut Validator<'_>, field: &str, text: &str) -> Option<IpNet> {
    let Ok(net) = text.parse::<IpNet>() else {
        let remedy = "write it like 10.244.0.0/16 or fd00:10:244::/56";
        validator.fail(field, text, "it is not an address range", remedy);
        return None;
    };
    if net.addr() != net.network() {
        let rule = "host bits must be zero";
        validator.fail(field, text, rule, format!("write {}", net.trunc()));
        return None;
    }
    let first = net.network();
    let (is_link_local, remedy) = match first {
        IpAddr::V4(first) => (
            first.is_link_local(),
            "use a private range like 10.244.0.0/16",
        ),
        IpAddr::V6(first) => (
            first.is_unicast_link_local(),
            "use a private range like fd00:10:244::/56",
        ),
    };
    if is_link_local || first.is_loopback() || first.is_multicast() || first.is_unspecified() {
        let rule = "pods cannot have addresses in that range";
        validator.fail(field, text, rule, remedy);
        return None;
    }
    Some(net)
}

fn block_size(validator: &mut Validator<'_>, field: &str, size: Option<i32>, net: IpNet) {
    let Some(size) = size else { return };
    let (version, lengths, usual) = match net {
        IpNet::V4(_) => ("IPv4", 20..=32, 26),
        IpNet::V6(_) => ("IPv6", 116..=128, 122),
    };
    if !lengths.contains(&size) {
        let rule = format!(
            "blocks of {version} pools have prefix lengths from {} to {}",
            lengths.start(),
            lengths.end()
        );
        validator.fail(
            field,
            size,
            rule,
            format!("set {usual} or leave the field out"),
        );
    } else if size < i32::from(net.prefix_len()) {
        validator.fail(
            field,
            size,
            format!("one block would be larger than the pool {net}"),
            "set a larger blockSize or a larger range",
        );
    }
}

fn workloads(validator: &mut Validator<'_>, spec: &InstallationSpec) {
    if let Some(strategy) = &spec.node_update_strategy {
        validator.check_one_of(
            "nodeUpdateStrategy.type",
            strategy.kind.as_ref(),
            &["RollingUpdate"],
        );
        let most = strategy
            .rolling_update
            .as_ref()
            .and_then(|update| update.max_unavailable.as_ref());
        if let Some(most) = most
            && !is_count_or_share(most)
        {
            validator.fail(
                "nodeUpdateStrategy.rollingUpdate.maxUnavailable",
                most,
                "it must be a number above 0 or a percentage from 1% to 100%",
                "set 1 or leave the field out",
            );
        }
    }
    if let Some(bounds) = &spec.typha_replicas {
        validator.check_range("typhaReplicas.minimum", bounds.minimum, 1, 1000, false);
        let low = bounds.minimum.unwrap_or(1);
        if let Some(high) = bounds.maximum.filter(|high| *high < low) {
            validator.fail(
                "typhaReplicas.maximum",
                high,
                format!("it must be at least the minimum, {low}"),
                "raise it or leave it out",
            );
        }
    }
    check_metrics_ports(validator, spec);
    for (index, resource) in spec.component_resources.iter().flatten().enumerate() {
        validator.check_one_of(
            &format!("componentResources[{index}].componentName"),
            Some(&resource.component_name),
            &["Node", "Typha", "KubeControllers"],
        );
    }
    containers(
        validator,
        "calicoNodeDaemonSet",
        spec.calico_node_daemon_set.as_ref(),
        &["margay-node", "calico-node"],
        &["install-cni"],
    );
    containers(
        validator,
        "typhaDeployment",
        spec.typha_deployment.as_ref(),
        &["margay-typha", "calico-typha"],
        &[],
    );
}

fn containers(
    validator: &mut Validator<'_>,
    field: &str,
    over: Option<&WorkloadOverride>,
    main: &[&str],
    init: &[&str],
) {
    let pod = over
        .and_then(|o| o.spec.as_ref())
        .and_then(|s| s.template.as_ref())
        .and_then(|t| t.spec.as_ref());
    let Some(pod) = pod else { return };
    for (list, found, known) in [
        ("containers", &pod.containers, main),
        ("initContainers", &pod.init_containers, init),
    ] {
        for (index, container) in found.iter().enumerate() {
            if !known.contains(&container.name.as_str()) {
                let remedy = match known.first() {
                    Some(name) => format!("name {name}"),
                    None => "remove it".to_owned(),
                };
                validator.fail(
                    &format!("{field}.spec.template.spec.{list}[{index}].name"),
                    &container.name,
                    "the workload has no such container",
                    remedy,
                );
            }
        }
    }
}

/// Ports for Prometheus, which are on the nodes' own addresses like every port of Margay.
fn check_metrics_ports(validator: &mut Validator<'_>, spec: &InstallationSpec) {
    let fields = [
        ("nodeMetricsPort", spec.node_metrics_port),
        ("typhaMetricsPort", spec.typha_metrics_port),
    ];
    for (field, port) in fields {
        validator.check_range(field, port, 1, 65535, false);
        if let Some(taken) = port.filter(|port| OWN_PORTS.contains(port)) {
            validator.fail(
                field,
                taken,
                format!("Margay uses the ports {OWN_PORTS:?} itself"),
                "choose another one, such as 9091 and 9093",
            );
        }
    }
    if let (Some(node), Some(typha)) = (spec.node_metrics_port, spec.typha_metrics_port)
        && node == typha
    {
        validator.fail(
            "typhaMetricsPort",
            typha,
            "it is nodeMetricsPort too, and typha runs on nodes with an agent",
            "choose another one, such as 9093",
        );
    }
}

fn is_count_or_share(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.as_i64().is_some_and(|n| n > 0),
        Value::String(text) => text
            .strip_suffix('%')
            .and_then(|share| share.parse::<u8>().ok())
            .is_some_and(|share| (1..=100).contains(&share)),
        _ => false,
    }
}

fn is_object_name(name: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    name.len() <= 253
        && edge(name.chars().next())
        && edge(name.chars().last())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.')
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
