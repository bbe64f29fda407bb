//! Address pools: created and updated where they are ours, adopted where they are equal, never
//! deleted, and never in conflict with existing ones.

use ipnet::IpNet;
use margay_api::installation::{InstallationSpec, IpPoolSpec};
use serde_json::{Map, Value, json};

use crate::defaults::default_block_size;
use crate::inputs::{Inputs, PoolFacts};
use crate::manifest::Object;

/// Changes of pools.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PoolPlan {
    /// Pools to create, update or adopt.
    pub objects: Vec<Object>,
    /// Pools of the Installation that cannot be created or updated: object, cause and remedy.
    pub conflicts: Vec<String>,
}

/// Compares the Installation's pools with the existing ones.
pub(super) fn plan(spec: &InstallationSpec, inputs: &Inputs) -> PoolPlan {
    let mut plan = PoolPlan::default();
    let wanted = spec
        .calico_network
        .as_ref()
        .and_then(|n| n.ip_pools.as_deref());
    let (Some(wanted), Some(existing)) = (wanted, &inputs.pools) else {
        return plan;
    };
    for pool in wanted {
        match decide(pool, existing) {
            Ok(object) => plan.objects.extend(object),
            Err(conflict) => plan.conflicts.push(conflict),
        }
    }
    plan
}

fn decide(pool: &IpPoolSpec, existing: &[PoolFacts]) -> Result<Option<Object>, String> {
    let name = pool.name.as_deref().unwrap_or_default();
    let fields = fields(pool);
    if let Some(found) = existing.iter().find(|other| other.cidr() == pool.cidr) {
        let differing = differing(&fields, &found.spec);
        if found.name != name {
            return Err(format!(
                "IPPool {} has the range {} that the Installation calls {name}; use the existing \
                 name or remove the name",
                found.name, pool.cidr
            ));
        }
        if let Some(field) = differing.iter().find(|f| f.as_str() == "blockSize") {
            return Err(format!(
                "IPPool {name} has {field} {} and the Installation wants {}, which cannot change \
                 on a pool; set the Installation's {field} to the pool's",
                found.spec[field], fields[field]
            ));
        }
        if !found.managed && !differing.is_empty() {
            return Err(format!(
                "IPPool {name} ({}) exists, was not created from the Installation, and differs in \
                 {}; make them equal, or remove the pool from spec.calicoNetwork.ipPools",
                pool.cidr,
                differing.join(", ")
            ));
        }
        let is_up_to_date = found.managed && differing.is_empty();
        return Ok((!is_up_to_date).then(|| object(name, fields)));
    }
    if let Some(other) = existing.iter().find(|other| other.name == name) {
        return Err(format!(
            "IPPool {name} exists with range {}, the Installation wants {}; a pool's range cannot \
             change: give the new pool another name",
            other.cidr(),
            pool.cidr
        ));
    }
    let net: Option<IpNet> = pool.cidr.parse().ok();
    let overlap = existing.iter().find(|other| {
        let other: Option<IpNet> = other.cidr().parse().ok();
        matches!((net, other), (Some(a), Some(b)) if a.contains(&b) || b.contains(&a))
    });
    if let Some(other) = overlap {
        return Err(format!(
            "the Installation's pool {} overlaps IPPool {} ({}); change one of the two ranges",
            pool.cidr,
            other.name,
            other.cidr()
        ));
    }
    Ok(Some(object(name, fields)))
}

/// Returns the fields of the IPPool that the Installation determines.
fn fields(pool: &IpPoolSpec) -> Map<String, Value> {
    let (vxlan, ipip) = match pool.encapsulation.as_deref() {
        Some("VXLAN") => ("Always", "Never"),
        Some("VXLANCrossSubnet") => ("CrossSubnet", "Never"),
        Some("IPIP") => ("Never", "Always"),
        Some("IPIPCrossSubnet") => ("Never", "CrossSubnet"),
        _ => ("Never", "Never"),
    };
    let mut fields = Map::new();
    let mut set = |field: &str, value: Value| fields.insert(field.to_owned(), value);
    set("cidr", json!(pool.cidr));
    set("blockSize", json!(pool.block_size));
    set("vxlanMode", json!(vxlan));
    set("ipipMode", json!(ipip));
    set(
        "natOutgoing",
        json!(pool.nat_outgoing.as_deref() == Some("Enabled")),
    );
    set("nodeSelector", json!(pool.node_selector));
    if let Some(disabled) = pool.disable_new_allocations {
        set("disabled", json!(disabled));
    }
    if let Some(disabled) = pool.disable_bgp_export {
        set("disableBGPExport", json!(disabled));
    }
    if let Some(uses) = &pool.allowed_uses {
        set("allowedUses", json!(uses));
    }
    if let Some(mode) = &pool.assignment_mode {
        set("assignmentMode", json!(mode));
    }
    fields
}

/// Returns the names of fields in which an existing pool differs from the wanted one; an absent
/// field has its default.
fn differing(wanted: &Map<String, Value>, found: &Value) -> Vec<String> {
    wanted
        .iter()
        .filter(|(field, value)| {
            let found = match found.get(field.as_str()) {
                Some(found) if !found.is_null() => found.clone(),
                _ => match field.as_str() {
                    "vxlanMode" | "ipipMode" => json!("Never"),
                    "blockSize" => json!(default_block_size(
                        wanted["cidr"].as_str().unwrap_or_default()
                    )),
                    "nodeSelector" => json!("all()"),
                    "allowedUses" => json!(["Workload", "Tunnel"]),
                    "assignmentMode" => json!("Automatic"),
                    _ => json!(false),
                },
            };
            found != **value
        })
        .map(|(field, _)| field.clone())
        .collect()
}

fn object(name: &str, fields: Map<String, Value>) -> Object {
    Object::new(
        "IPPool",
        json!({ "metadata": { "name": name }, "spec": fields }),
    )
    .managed()
}

#[cfg(test)]
#[path = "pools_tests.rs"]
mod tests;
