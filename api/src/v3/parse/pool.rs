//! Parses pools, as far as routes depend on them.

use ipnet::IpNet;

use crate::meta;
use crate::network::{Encapsulation, Pool};
use crate::problem::{Problems, Refusal};
use crate::v3::pool::IPPool;

/// Parses a pool. Disabled pools are included: their addresses are still in use.
pub fn pool(pool: &IPPool) -> Result<Pool, Refusal<Pool>> {
    let spec = &pool.spec;
    let mut problems = Problems::default();
    let Ok(cidr) = spec.cidr.parse::<IpNet>() else {
        problems.add(
            "spec.cidr",
            &spec.cidr,
            "not a range",
            "write it like 10.244.0.0/16",
        );
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
    let is_ipip = matches!(
        encapsulation,
        Encapsulation::Ipip | Encapsulation::IpipCrossSubnet
    );
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
    for (field, text) in [
        ("spec.nodeSelector", &spec.node_selector),
        ("spec.namespaceSelector", &spec.namespace_selector),
    ] {
        problems.selector(field, text.as_deref().unwrap_or_default());
    }
    let block_size = spec
        .block_size
        .and_then(|size| u8::try_from(size).ok())
        .filter(|size| *size > 0);
    let parsed = Pool {
        cidr: cidr.trunc(),
        encapsulation,
        nat_outgoing: spec.nat_outgoing.unwrap_or(false),
        block_size: block_size.unwrap_or(Pool::default_block_size(cidr)),
        is_exported: !spec.disable_bgp_export.unwrap_or(false),
        created: meta::created(&pool.metadata),
    };
    problems
        .finish(parsed, Some)
        .map_err(|refusal| refusal.or_former(is_route_unclear))
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
            problems.add(
                field,
                other,
                "not a mode",
                "use Never, Always or CrossSubnet",
            );
            Mode::Never
        }
    }
}
