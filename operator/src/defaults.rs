//! Default values of an Installation's spec, and the patch that writes them back.
//!
//! A default that was filled in once stays: it is read back from the spec like a user's own value,
//! so a later version with other defaults changes nothing that runs.

use ipnet::IpNet;
use margay_api::installation::{
    CalicoNetworkSpec, CniSpec, InstallationSpec, IpPoolSpec, IpamSpec, NodeUpdateStrategy,
    RollingUpdate,
};
use serde_json::{Map, Value, json};

use crate::inputs::{Inputs, PoolFacts};

/// Range of the default pool if the platform declares none.
pub const DEFAULT_CIDR: &str = "192.168.0.0/16";
/// Names of the first IPv4 and the first IPv6 pool.
pub const DEFAULT_POOLS: [&str; 2] = ["default-ipv4-ippool", "default-ipv6-ippool"];
/// Time that a pod's creation waits for its policy, in seconds.
pub const DEFAULT_POLICY_TIMEOUT: i32 = 30;

/// Default prefix length of the blocks of a pool.
pub fn default_block_size(cidr: &str) -> i32 {
    if is_ipv6(cidr) { 122 } else { 26 }
}

/// Returns true for text that looks like an IPv6 range; [`crate::validate`] refuses invalid ranges.
fn is_ipv6(cidr: &str) -> bool {
    cidr.contains(':')
}

/// Returns the spec with the default of every unset field. Pools stay unset while the existing
/// pools are not known.
pub fn complete(given: &InstallationSpec, inputs: &Inputs) -> InstallationSpec {
    let mut spec = given.clone();
    set(&mut spec.variant, "Calico");
    set(&mut spec.image_pull_policy, "IfNotPresent");

    let cni = spec.cni.get_or_insert_with(CniSpec::default);
    set(&mut cni.kind, "Calico");
    set(
        &mut cni.ipam.get_or_insert_with(IpamSpec::default).kind,
        "Calico",
    );
    set(&mut cni.bin_dir, "/opt/cni/bin");
    set(&mut cni.conf_dir, "/etc/cni/net.d");

    let strategy = spec
        .node_update_strategy
        .get_or_insert_with(NodeUpdateStrategy::default);
    set(&mut strategy.kind, "RollingUpdate");
    strategy
        .rolling_update
        .get_or_insert_with(RollingUpdate::default)
        .max_unavailable
        .get_or_insert(json!(1));

    let network = spec
        .calico_network
        .get_or_insert_with(CalicoNetworkSpec::default);
    set(&mut network.linux_dataplane, "Nftables");
    set(&mut network.host_ports, "Enabled");
    network
        .linux_policy_setup_timeout_seconds
        .get_or_insert(DEFAULT_POLICY_TIMEOUT);
    if let Some(existing) = &inputs.pools {
        complete_pools(network, existing, &inputs.pod_subnets);
        let needs_bgp = needs_bgp(network.ip_pools.as_deref().unwrap_or_default(), existing);
        set(
            &mut network.bgp,
            if needs_bgp { "Enabled" } else { "Disabled" },
        );
    }
    spec
}

/// Returns true if a pool of the Installation has packets that other networks see unencapsulated or
/// in IPIP; if it lists no pool, one of the cluster.
fn needs_bgp(pools: &[IpPoolSpec], existing: &[PoolFacts]) -> bool {
    let is_routed = |encapsulation: &str| !encapsulation.starts_with("VXLAN");
    match pools {
        [] => existing
            .iter()
            .any(|pool| is_routed(encapsulation_of(&pool.spec))),
        pools => pools
            .iter()
            .filter_map(|pool| pool.encapsulation.as_deref())
            .any(is_routed),
    }
}

fn set(field: &mut Option<String>, value: &str) {
    field.get_or_insert_with(|| value.to_owned());
}

fn complete_pools(network: &mut CalicoNetworkSpec, existing: &[PoolFacts], subnets: &[String]) {
    let pools = network.ip_pools.get_or_insert_with(|| {
        if existing.is_empty() {
            let pool = |cidr| IpPoolSpec {
                cidr,
                ..IpPoolSpec::default()
            };
            default_cidrs(subnets).into_iter().map(pool).collect()
        } else {
            Vec::new()
        }
    });
    let first: Vec<bool> = (0..pools.len())
        .map(|index| {
            pools[..index]
                .iter()
                .all(|before| is_ipv6(&before.cidr) != is_ipv6(&pools[index].cidr))
        })
        .collect();
    for (pool, is_first) in pools.iter_mut().zip(first) {
        let same = existing.iter().find(|other| other.cidr() == pool.cidr);
        if pool.name.is_none() {
            pool.name = Some(pool_name(is_first, &pool.cidr, same, existing));
        }
        let found = same.map(|other| &other.spec).unwrap_or(&Value::Null);
        set(&mut pool.encapsulation, encapsulation_of(found));
        let nat = found["natOutgoing"].as_bool();
        // IPv6 addresses are often routable, and need no translation.
        let nat = nat.unwrap_or(found.is_null() && !is_ipv6(&pool.cidr));
        set(
            &mut pool.nat_outgoing,
            if nat { "Enabled" } else { "Disabled" },
        );
        let selector = found["nodeSelector"].as_str().filter(|s| !s.is_empty());
        set(&mut pool.node_selector, selector.unwrap_or("all()"));
        let size = found["blockSize"]
            .as_i64()
            .and_then(|size| i32::try_from(size).ok());
        pool.block_size
            .get_or_insert(size.unwrap_or_else(|| default_block_size(&pool.cidr)));
    }
}

/// Returns the first range of each IP version that the platform declares, IPv4 first; the
/// well-known one if it declares none.
fn default_cidrs(subnets: &[String]) -> Vec<String> {
    let declared: Vec<IpNet> = subnets
        .iter()
        .filter_map(|text| text.parse::<IpNet>().ok())
        .map(|net| net.trunc())
        .collect();
    let first = |v6: bool| declared.iter().find(|net| net.addr().is_ipv6() == v6);
    let found: Vec<String> = [first(false), first(true)]
        .into_iter()
        .flatten()
        .map(IpNet::to_string)
        .collect();
    if found.is_empty() {
        vec![DEFAULT_CIDR.to_owned()]
    } else {
        found
    }
}

/// Returns the name of a pool: an existing pool of the same range keeps its name; the first pool of
/// an IP version gets the well-known name unless a pool of another range has it.
fn pool_name(
    is_first: bool,
    cidr: &str,
    same: Option<&PoolFacts>,
    existing: &[PoolFacts],
) -> String {
    if let Some(same) = same {
        return same.name.clone();
    }
    let well_known = DEFAULT_POOLS[usize::from(is_ipv6(cidr))];
    if is_first && existing.iter().all(|pool| pool.name != well_known) {
        return well_known.to_owned();
    }
    let text: String = cidr
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    format!("ippool-{text}")
}

/// Returns the Installation's value for the modes of an existing pool; the default for none.
fn encapsulation_of(pool: &Value) -> &'static str {
    let mode = |field: &str| pool[field].as_str().unwrap_or("Never");
    match (mode("vxlanMode"), mode("ipipMode")) {
        _ if pool.is_null() => "VXLAN",
        ("Always", _) => "VXLAN",
        ("CrossSubnet", _) => "VXLANCrossSubnet",
        (_, "Always") => "IPIP",
        (_, "CrossSubnet") => "IPIPCrossSubnet",
        _ => "None",
    }
}

/// Returns the patch that must be applied to the Installation under our field manager so that the
/// completed spec is stored: the fields filled in now, and those that we wrote earlier (leaving
/// them out would remove them). None if everything is stored already.
pub fn write_back(given: &Value, completed: &Value, written: &Value) -> Option<Value> {
    let added = missing(given, completed)?;
    let kept = owned(given, written).unwrap_or_else(|| json!({}));
    Some(merge(kept, added))
}

/// Returns the parts of `completed` that `given` lacks, or none.
fn missing(given: &Value, completed: &Value) -> Option<Value> {
    match (given, completed) {
        (Value::Null, Value::Null) => None,
        (Value::Null, added) => Some(added.clone()),
        (Value::Object(given), Value::Object(completed)) => {
            let added: Map<String, Value> = completed
                .iter()
                .filter_map(|(key, value)| {
                    let part = missing(given.get(key).unwrap_or(&Value::Null), value)?;
                    Some((key.clone(), part))
                })
                .collect();
            (!added.is_empty()).then_some(Value::Object(added))
        }
        (Value::Array(given), Value::Array(completed)) => {
            let added: Vec<Value> = completed
                .iter()
                .zip(given.iter())
                .filter_map(|(completed, given)| {
                    let mut part = missing(given, completed)?;
                    part["cidr"] = given.get("cidr")?.clone();
                    Some(part)
                })
                .collect();
            (!added.is_empty()).then_some(Value::Array(added))
        }
        _ => None,
    }
}

/// Returns the parts of `value` that a managed-fields trie lists. Lists of pools are keyed by CIDR;
/// of a list that is owned only as a whole (we once wrote it empty) only its presence is ours.
fn owned(value: &Value, trie: &Value) -> Option<Value> {
    let fields = trie.as_object()?;
    let nested = |prefix| fields.keys().any(|key| key.starts_with(prefix));
    match value {
        Value::Object(map) if nested("f:") => {
            let kept: Map<String, Value> = map
                .iter()
                .filter_map(|(key, value)| {
                    let part = owned(value, fields.get(&format!("f:{key}"))?)?;
                    Some((key.clone(), part))
                })
                .collect();
            Some(Value::Object(kept))
        }
        Value::Array(items) => Some(Value::Array(
            items
                .iter()
                .filter_map(|item| {
                    let cidr = item.get("cidr")?;
                    let key = format!("k:{}", json!({ "cidr": cidr }));
                    let mut part = owned(item, fields.get(&key)?)?;
                    part["cidr"] = cidr.clone();
                    Some(part)
                })
                .collect(),
        )),
        value => Some(value.clone()),
    }
}

fn merge(base: Value, over: Value) -> Value {
    match (base, over) {
        (Value::Object(mut base), Value::Object(over)) => {
            for (key, value) in over {
                let merged = match base.remove(&key) {
                    Some(old) => merge(old, value),
                    None => value,
                };
                base.insert(key, merged);
            }
            Value::Object(base)
        }
        (Value::Array(mut base), Value::Array(over)) => {
            for item in over {
                let slot = base.iter_mut().find(|old| old["cidr"] == item["cidr"]);
                match slot {
                    Some(old) => *old = merge(old.take(), item),
                    None => base.push(item),
                }
            }
            Value::Array(base)
        }
        (_, over) => over,
    }
}

#[cfg(test)]
#[path = "defaults_tests.rs"]
mod tests;
