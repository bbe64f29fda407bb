//! BGP's records as text.

use margay_api::bgp::{
    BgpNextHopMode, FilterAction, FilterRule, Filters, MatchOperator, PeerType, RouteOperation,
    SecretKey,
};

use super::joined;
use crate::model::{BgpMesh, BgpPeerRecord, BgpRecord};

pub(super) fn bgp_text(record: &BgpRecord) -> String {
    let BgpRecord {
        asn,
        router_id,
        cluster_id,
        listen_port,
        binds_node_address,
        ignored_interfaces,
        priorities,
        mesh,
        blocks,
        pools,
        services,
        service_ranges,
        communities,
        peers,
    } = record;
    let mut text = format!(" as {asn} id {router_id} port {listen_port}");
    if let Some(cluster) = cluster_id {
        text += &format!(" cluster {cluster}");
    }
    if *binds_node_address {
        text += " node-address-only";
    }
    if *priorities != [1024; 2] {
        text += &format!(" priorities {} {}", priorities[0], priorities[1]);
    }
    if let Some(BgpMesh {
        password,
        restart_time,
    }) = mesh
    {
        text += "\n  mesh";
        text += &password.as_ref().map(secret).unwrap_or_default();
        if let Some(time) = restart_time {
            text += &format!(" restart {}s", time.as_secs());
        }
    }
    let exported = |is_exported: &bool| if *is_exported { "" } else { " unexported" };
    for (kind, ranges) in [("block", blocks), ("pool", pools)] {
        for (range, is_exported) in ranges {
            text += &format!("\n  {kind} {range}{}", exported(is_exported));
        }
    }
    let lists = [
        ("ignored", joined(ignored_interfaces.iter(), ", ")),
        ("services", joined(services.iter(), ", ")),
        ("service-ranges", joined(service_ranges.iter(), ", ")),
    ];
    for (name, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
        text += &format!("\n  {name} {list}");
    }
    for (range, values) in communities {
        text += &format!("\n  communities {range} {}", joined(values.iter(), ", "));
    }
    peers.iter().for_each(|peer| text += &peer_text(peer));
    text
}

fn peer_text(peer: &BgpPeerRecord) -> String {
    let BgpPeerRecord {
        name,
        address,
        asn,
        local_asn,
        allowed_local_asn,
        import,
        export,
        next_hop_mode,
        password,
        source,
        restart_time,
        keepalive,
        ttl_security,
        reachable_by,
        is_reflector_client,
    } = peer;
    let mut text = format!("\n  peer {name} {address} as {asn}");
    let mut add = |name: &str, value: Option<String>| {
        text += &value
            .map(|value| format!(" {name} {value}"))
            .unwrap_or_default();
    };
    add("local-as", local_asn.map(|asn| asn.to_string()));
    let allowed = (*allowed_local_asn > 0).then(|| allowed_local_asn.to_string());
    add("allowed-local-as", allowed);
    add("from", source.map(|address| address.to_string()));
    add("by", reachable_by.map(|address| address.to_string()));
    add("hops", ttl_security.map(|hops| hops.to_string()));
    let seconds = |time: &std::time::Duration| format!("{}s", time.as_secs());
    add("restart", restart_time.as_ref().map(seconds));
    add("keepalive", keepalive.as_ref().map(seconds));
    text += match next_hop_mode {
        BgpNextHopMode::Auto => "",
        BgpNextHopMode::Own => " next-hop self",
        BgpNextHopMode::Keep => " next-hop kept",
    };
    text += &password.as_ref().map(secret).unwrap_or_default();
    text += if *is_reflector_client { " client" } else { "" };
    for (direction, Filters { ipv4, ipv6 }) in [("in", import), ("out", export)] {
        for (family, rules) in [("ip4", ipv4), ("ip6", ipv6)] {
            for rule in rules {
                text += &format!("\n    {direction} {family} {}", rule_text(rule));
            }
        }
    }
    text
}

fn rule_text(rule: &FilterRule) -> String {
    let FilterRule {
        prefix,
        from_peers,
        interface,
        peer_type,
        community,
        as_path_prefix,
        priority,
        action,
    } = rule;
    let mut text = match action {
        FilterAction::Reject => String::from("reject"),
        FilterAction::Accept(operations) => {
            format!(
                "accept{}",
                operations.iter().map(operation).collect::<String>()
            )
        }
    };
    if let Some(prefix) = prefix {
        let operator = match prefix.operator() {
            MatchOperator::Equal => "=",
            MatchOperator::NotEqual => "!=",
            MatchOperator::In => "in",
            MatchOperator::NotIn => "!in",
        };
        let lengths = prefix.lengths();
        let (start, end) = (lengths.start(), lengths.end());
        text += &format!(" {operator} {} /{start}-{end}", prefix.cidr());
    }
    text += if *from_peers { " from-peers" } else { "" };
    text += match peer_type {
        None => "",
        Some(PeerType::External) => " ebgp",
        Some(PeerType::Internal) => " ibgp",
    };
    if let Some(interface) = interface {
        text += &format!(" interface {interface}");
    }
    if let Some(community) = community {
        text += &format!(" community {community}");
    }
    if !as_path_prefix.is_empty() {
        text += &format!(" as-path {}", joined(as_path_prefix.iter(), " "));
    }
    if let Some(priority) = priority {
        text += &format!(" priority {priority}");
    }
    text
}

fn operation(operation: &RouteOperation) -> String {
    match operation {
        RouteOperation::AddCommunity(community) => format!(" +{community}"),
        RouteOperation::PrependAsPath(asns) => format!(" prepend {}", joined(asns.iter(), " ")),
        RouteOperation::SetPriority(value) => format!(" priority={value}"),
    }
}

/// Name of a Secret's key; the value is on no server.
fn secret(SecretKey { name, key }: &SecretKey) -> String {
    format!(" password {name}/{key}")
}
