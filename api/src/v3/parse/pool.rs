//! Parses pools and blocks, as far as routes depend on them.

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::ipam::block::{Block, BlockError};
use crate::ipam::names;
use crate::network::{BlockInfo, Encapsulation, Pool};
use crate::problem::{Problems, Refusal};
use crate::v3::ipam::{AllocationAttribute, IPAMBlock};
use crate::v3::pool::IPPool;

/// Key of an allocation's attribute with the node that uses the address (libcalico-go's ipam
/// package).
const ATTRIBUTE_NODE: &str = "node";

/// Parses a pool. Disabled pools are included: their addresses are still in use.
pub fn pool(pool: &IPPool) -> Result<Pool, Refusal<Pool>> {
    let spec = &pool.spec;
    let mut problems = Problems::default();
    let Ok(cidr) = spec.cidr.parse::<IpNet>() else {
        problems.add("spec.cidr", &spec.cidr, "not a range", "write it like 10.244.0.0/16");
        return Err(Refusal::without_replacement(problems).or_former(true));
    };
    let vxlan = mode(&mut problems, "spec.vxlanMode", &spec.vxlan_mode);
    let ipip = mode(&mut problems, "spec.ipipMode", &spec.ipip_mode);
    let encapsulation = match (vxlan, ipip) {
        (Mode::Never, Mode::Never) => Encapsulation::None,
        (Mode::Always, Mode::Never) => Encapsulation::Vxlan,
        (Mode::CrossSubnet, Mode::Never) => Encapsulation::VxlanCrossSubnet,
        (Mode::Never, Mode::Always) => Encapsulation::Ipip,
        (Mode::Never, Mode::CrossSubnet) => Encapsulation::IpipCrossSubnet,
        _ => {
            problems.add(
                "spec.ipipMode",
                spec.ipip_mode.as_deref().unwrap_or_default(),
                "ipipMode and vxlanMode exclude each other",
                "set one of them to Never",
            );
            Encapsulation::Vxlan
        }
    };
    let is_ipip = matches!(encapsulation, Encapsulation::Ipip | Encapsulation::IpipCrossSubnet);
    let encapsulation = if is_ipip && cidr.addr().is_ipv6() {
        problems.add(
            "spec.ipipMode",
            spec.ipip_mode.as_deref().unwrap_or_default(),
            "IPIP carries IPv4 only",
            "set ipipMode to Never, and vxlanMode if the pool's packets need a tunnel",
        );
        Encapsulation::Vxlan
    } else {
        encapsulation
    };
    // A bad selector matters to IPAM only, where such a pool serves no node. The encapsulation of
    // its packets must not change because of a typing error.
    let is_route_unclear = !problems.is_empty();
    for (field, text) in
        [("spec.nodeSelector", &spec.node_selector), ("spec.namespaceSelector", &spec.namespace_selector)]
    {
        problems.selector(field, text.as_deref().unwrap_or_default());
    }
    let block_size = spec.block_size.and_then(|size| u8::try_from(size).ok()).filter(|size| *size > 0);
    let parsed = Pool {
        cidr: cidr.trunc(),
        encapsulation,
        nat_outgoing: spec.nat_outgoing.unwrap_or(false),
        block_size: block_size.unwrap_or(Pool::default_block_size(cidr)),
        created: seconds(&pool.metadata),
    };
    problems.finish(parsed, Some).map_err(|refusal| refusal.or_former(is_route_unclear))
}

#[derive(Clone, Copy)]
enum Mode {
    Never,
    Always,
    CrossSubnet,
}

fn mode(problems: &mut Problems, field: &str, mode: &Option<String>) -> Mode {
    match mode.as_deref().unwrap_or_default() {
        "" | "Never" => Mode::Never,
        "Always" => Mode::Always,
        "CrossSubnet" => Mode::CrossSubnet,
        other => {
            problems.add(field, other, "not a mode", "use Never, Always or CrossSubnet");
            Mode::Never
        }
    }
}

/// Parses what routes need of a block: range, node, borrowers, and tunnel endpoints. `Ok(None)`:
/// the block is being deleted.
pub fn block_info(object: &IPAMBlock) -> Result<Option<(IpNet, BlockInfo)>, BlockError> {
    if object.spec.deleted {
        return Ok(None);
    }
    let block = Block::parse(object.spec.clone())?;
    // Two objects of one range would replace each other in turn.
    let (name, wanted) = (object.metadata.name.as_deref().unwrap_or_default(), names::block(block.cidr().trunc()));
    if name != wanted {
        return Err(BlockError::Name { name: name.to_owned(), wanted });
    }
    let node = block.node().map(str::to_owned);
    let borrowed = block
        .allocated()
        .filter_map(|(address, attribute)| {
            let user = attribute.secondary.as_ref()?.get(ATTRIBUTE_NODE)?;
            (attribute.released_at.is_none() && node.as_ref() != Some(user)).then(|| (address, user.clone()))
        })
        .collect();
    let tunnels =
        block.allocated().filter_map(|(address, attribute)| Some((address, tunnel_of(attribute)?.to_owned())));
    let tunnels = tunnels.collect();
    let cidr = block.cidr();
    Ok(Some((cidr, BlockInfo { node, borrowed, tunnels, created: seconds(&object.metadata) })))
}

/// Returns the node whose VXLAN tunnel's handle the allocation is under.
fn tunnel_of(attribute: &AllocationAttribute) -> Option<&str> {
    let handle = attribute.handle_id.as_deref().filter(|_| attribute.released_at.is_none())?;
    ["vxlan-tunnel-addr-", "vxlan-v6-tunnel-addr-"].iter().find_map(|prefix| handle.strip_prefix(prefix))
}

fn seconds(metadata: &ObjectMeta) -> i64 {
    metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second())
}
