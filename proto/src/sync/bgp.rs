//! BGP's records between wire and model.

use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::bgp::{
    BgpNextHopMode, CommunityValue, FilterAction, FilterRule, Filters, MatchOperator, PeerType,
    PrefixMatch, RouteOperation, SecretKey,
};
use margay_api::network::NodeBgp;
use margay_calc::model::{BgpMesh, BgpPeerRecord, BgpRecord};

use super::fields::{
    ADDRESS, RANGE, decode_byte, decode_port, non_empty, parse, parse_list, require, truncate,
    unknown_kind,
};
use super::{Error, wire};

const COMMUNITY: &str = "a community aa:nn or aa:nn:mm";
const SOCKET: &str = "an address with a port";

pub(super) fn encode_node_bgp(value: &NodeBgp) -> wire::NodeBgp {
    let NodeBgp {
        asn,
        cluster_id,
        listen_port,
    } = value;
    wire::NodeBgp {
        asn: *asn,
        cluster_id: cluster_id.map(Ipv4Addr::to_bits),
        listen_port: (*listen_port).into(),
    }
}

pub(super) fn decode_node_bgp(value: wire::NodeBgp) -> Result<NodeBgp, Error> {
    Ok(NodeBgp {
        asn: value.asn,
        cluster_id: value.cluster_id.map(Ipv4Addr::from_bits),
        listen_port: decode_port("node.bgp.listen_port", value.listen_port)?,
    })
}

pub(super) fn encode_bgp(value: &BgpRecord) -> wire::Bgp {
    let BgpRecord {
        asn,
        router_id,
        cluster_id,
        listen_port,
        binds_node_address,
        ignored_interfaces,
        priorities: [priority, priority_v6],
        mesh,
        blocks,
        pools,
        services,
        service_ranges,
        communities,
        peers,
    } = value;
    let range = |(range, exported): (&IpNet, &bool)| wire::BgpRange {
        range: range.to_string(),
        exported: *exported,
    };
    let communities = communities
        .iter()
        .map(|(range, values)| wire::BgpCommunities {
            range: range.to_string(),
            communities: values.iter().map(ToString::to_string).collect(),
        });
    wire::Bgp {
        asn: *asn,
        router_id: router_id.to_bits(),
        cluster_id: cluster_id.map(Ipv4Addr::to_bits),
        listen_port: (*listen_port).into(),
        binds_node_address: *binds_node_address,
        ignored_interfaces: ignored_interfaces.iter().cloned().collect(),
        priority: *priority,
        priority_v6: *priority_v6,
        mesh: mesh.as_ref().map(encode_mesh),
        blocks: blocks.iter().map(range).collect(),
        pools: pools.iter().map(range).collect(),
        services: services.iter().map(ToString::to_string).collect(),
        service_ranges: service_ranges.iter().map(ToString::to_string).collect(),
        communities: communities.collect(),
        peers: peers.iter().map(encode_peer).collect(),
    }
}

pub(super) fn decode_bgp(value: wire::Bgp) -> Result<BgpRecord, Error> {
    let range =
        |range: wire::BgpRange| Ok((parse("bgp.range", &range.range, RANGE)?, range.exported));
    let communities = |entry: wire::BgpCommunities| {
        let values: Vec<CommunityValue> =
            parse_list("bgp.communities", &entry.communities, COMMUNITY)?;
        let range: IpNet = parse("bgp.communities.range", &entry.range, RANGE)?;
        Ok((range, values.into_iter().collect()))
    };
    let ranges = |field, values: &[String]| -> Result<Vec<IpNet>, Error> {
        parse_list(field, values, RANGE)
    };
    Ok(BgpRecord {
        asn: value.asn,
        router_id: Ipv4Addr::from_bits(value.router_id),
        cluster_id: value.cluster_id.map(Ipv4Addr::from_bits),
        listen_port: decode_port("bgp.listen_port", value.listen_port)?,
        binds_node_address: value.binds_node_address,
        ignored_interfaces: value.ignored_interfaces.into_iter().collect(),
        priorities: [value.priority, value.priority_v6],
        mesh: value.mesh.map(decode_mesh).transpose()?,
        blocks: value
            .blocks
            .into_iter()
            .map(range)
            .collect::<Result<_, _>>()?,
        pools: value
            .pools
            .into_iter()
            .map(range)
            .collect::<Result<_, _>>()?,
        services: ranges("bgp.services", &value.services)?
            .into_iter()
            .collect(),
        service_ranges: ranges("bgp.service_ranges", &value.service_ranges)?
            .into_iter()
            .collect(),
        communities: value
            .communities
            .into_iter()
            .map(communities)
            .collect::<Result<_, _>>()?,
        peers: value
            .peers
            .into_iter()
            .map(decode_peer)
            .collect::<Result<_, _>>()?,
    })
}

fn encode_mesh(value: &BgpMesh) -> wire::BgpMesh {
    let BgpMesh {
        password,
        restart_time,
    } = value;
    wire::BgpMesh {
        password: password.as_ref().map(encode_secret),
        restart_seconds: restart_time.map(encode_seconds),
    }
}

fn decode_mesh(value: wire::BgpMesh) -> Result<BgpMesh, Error> {
    Ok(BgpMesh {
        password: value.password.map(decode_secret).transpose()?,
        restart_time: value.restart_seconds.map(decode_seconds),
    })
}

fn encode_peer(value: &BgpPeerRecord) -> wire::BgpPeer {
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
    } = value;
    let mode = match next_hop_mode {
        BgpNextHopMode::Auto => wire::NextHopMode::Auto,
        BgpNextHopMode::Own => wire::NextHopMode::Own,
        BgpNextHopMode::Keep => wire::NextHopMode::Keep,
    };
    let optional = |address: &Option<std::net::IpAddr>| {
        address
            .map(|address| address.to_string())
            .unwrap_or_default()
    };
    wire::BgpPeer {
        name: name.clone(),
        address: address.to_string(),
        asn: *asn,
        local_asn: *local_asn,
        allowed_local_asn: (*allowed_local_asn).into(),
        import: Some(encode_filters(import)),
        export: Some(encode_filters(export)),
        next_hop_mode: mode.into(),
        password: password.as_ref().map(encode_secret),
        source: optional(source),
        restart_seconds: restart_time.map(encode_seconds),
        keepalive_seconds: keepalive.map(encode_seconds),
        ttl_security: ttl_security.map(u32::from),
        reachable_by: optional(reachable_by),
        is_reflector_client: *is_reflector_client,
    }
}

fn decode_peer(value: wire::BgpPeer) -> Result<BgpPeerRecord, Error> {
    let optional = |field, text: &str| match text {
        "" => Ok(None),
        text => parse(field, text, ADDRESS).map(Some),
    };
    let next_hop_mode = match value.next_hop_mode() {
        wire::NextHopMode::Auto => BgpNextHopMode::Auto,
        wire::NextHopMode::Own => BgpNextHopMode::Own,
        wire::NextHopMode::Keep => BgpNextHopMode::Keep,
        wire::NextHopMode::Unspecified => return Err(unknown_kind("bgp.peer.next_hop_mode")),
    };
    let ttl_security = value
        .ttl_security
        .map(|hops| decode_byte("bgp.peer.ttl_security", hops));
    Ok(BgpPeerRecord {
        address: parse("bgp.peer.address", &value.address, SOCKET)?,
        asn: value.asn,
        local_asn: value.local_asn,
        allowed_local_asn: decode_byte("bgp.peer.allowed_local_asn", value.allowed_local_asn)?,
        import: decode_filters(value.import.unwrap_or_default())?,
        export: decode_filters(value.export.unwrap_or_default())?,
        next_hop_mode,
        password: value.password.map(decode_secret).transpose()?,
        source: optional("bgp.peer.source", &value.source)?,
        restart_time: value.restart_seconds.map(decode_seconds),
        keepalive: value.keepalive_seconds.map(decode_seconds),
        ttl_security: ttl_security.transpose()?,
        reachable_by: optional("bgp.peer.reachable_by", &value.reachable_by)?,
        is_reflector_client: value.is_reflector_client,
        name: non_empty("bgp.peer.name", value.name)?,
    })
}

fn encode_filters(Filters { ipv4, ipv6 }: &Filters) -> wire::Filters {
    wire::Filters {
        ipv4: ipv4.iter().map(encode_rule).collect(),
        ipv6: ipv6.iter().map(encode_rule).collect(),
    }
}

fn decode_filters(value: wire::Filters) -> Result<Filters, Error> {
    let rules =
        |rules: Vec<wire::FilterRule>| rules.into_iter().map(decode_rule).collect::<Result<_, _>>();
    Ok(Filters {
        ipv4: rules(value.ipv4)?,
        ipv6: rules(value.ipv6)?,
    })
}

fn encode_rule(value: &FilterRule) -> wire::FilterRule {
    let FilterRule {
        prefix,
        from_peers,
        interface,
        peer_type,
        community,
        as_path_prefix,
        priority,
        action,
    } = value;
    let peer_type = match peer_type {
        None => wire::PeerType::Unspecified,
        Some(PeerType::External) => wire::PeerType::External,
        Some(PeerType::Internal) => wire::PeerType::Internal,
    };
    let operations: &[RouteOperation] = match action {
        FilterAction::Reject => &[],
        FilterAction::Accept(operations) => operations,
    };
    wire::FilterRule {
        prefix: prefix.as_ref().map(encode_prefix),
        from_peers: *from_peers,
        interface: interface.clone().unwrap_or_default(),
        peer_type: peer_type.into(),
        community: community.map(|each| each.to_string()).unwrap_or_default(),
        as_path_prefix: as_path_prefix.clone(),
        priority: *priority,
        accept: *action != FilterAction::Reject,
        operations: operations.iter().map(encode_operation).collect(),
    }
}

fn decode_rule(value: wire::FilterRule) -> Result<FilterRule, Error> {
    let peer_type = match wire::PeerType::try_from(value.peer_type) {
        Ok(wire::PeerType::Unspecified) => None,
        Ok(wire::PeerType::External) => Some(PeerType::External),
        Ok(wire::PeerType::Internal) => Some(PeerType::Internal),
        Err(_) => return Err(unknown_kind("bgp.filter.peer_type")),
    };
    let community = match value.community.as_str() {
        "" => None,
        text => Some(parse("bgp.filter.community", text, COMMUNITY)?),
    };
    let action = if value.accept {
        let operations = value.operations.into_iter().map(decode_operation);
        FilterAction::Accept(operations.collect::<Result<_, _>>()?)
    } else {
        FilterAction::Reject
    };
    Ok(FilterRule {
        prefix: value.prefix.map(decode_prefix).transpose()?,
        from_peers: value.from_peers,
        interface: (!value.interface.is_empty()).then_some(value.interface),
        peer_type,
        community,
        as_path_prefix: value.as_path_prefix,
        priority: value.priority,
        action,
    })
}

fn encode_prefix(value: &PrefixMatch) -> wire::PrefixMatch {
    let operator = match value.operator() {
        MatchOperator::Equal => wire::MatchOperator::Equal,
        MatchOperator::NotEqual => wire::MatchOperator::NotEqual,
        MatchOperator::In => wire::MatchOperator::In,
        MatchOperator::NotIn => wire::MatchOperator::NotIn,
    };
    let lengths = value.lengths();
    wire::PrefixMatch {
        cidr: value.cidr().to_string(),
        operator: operator.into(),
        min: (*lengths.start()).into(),
        max: (*lengths.end()).into(),
    }
}

fn decode_prefix(value: wire::PrefixMatch) -> Result<PrefixMatch, Error> {
    let operator = match value.operator() {
        wire::MatchOperator::Equal => MatchOperator::Equal,
        wire::MatchOperator::NotEqual => MatchOperator::NotEqual,
        wire::MatchOperator::In => MatchOperator::In,
        wire::MatchOperator::NotIn => MatchOperator::NotIn,
        wire::MatchOperator::Unspecified => return Err(unknown_kind("bgp.filter.operator")),
    };
    let min = decode_byte("bgp.filter.min", value.min)?;
    let max = decode_byte("bgp.filter.max", value.max)?;
    let cidr = parse("bgp.filter.cidr", &value.cidr, RANGE)?;
    PrefixMatch::new(cidr, operator, Some(min), Some(max)).map_err(|error| Error::Text {
        field: "bgp.filter.lengths",
        value: truncate(&error.value),
        rule: "a range of prefix lengths",
    })
}

fn encode_operation(value: &RouteOperation) -> wire::RouteOperation {
    use wire::route_operation::Operation;
    let operation = match value {
        RouteOperation::AddCommunity(community) => Operation::AddCommunity(community.to_string()),
        RouteOperation::PrependAsPath(asns) => {
            Operation::PrependAsPath(wire::AsPath { asns: asns.clone() })
        }
        RouteOperation::SetPriority(value) => Operation::SetPriority(*value),
    };
    wire::RouteOperation {
        operation: Some(operation),
    }
}

fn decode_operation(value: wire::RouteOperation) -> Result<RouteOperation, Error> {
    use wire::route_operation::Operation;
    Ok(match require("bgp.filter.operation", value.operation)? {
        Operation::AddCommunity(text) => {
            RouteOperation::AddCommunity(parse("bgp.filter.add_community", &text, COMMUNITY)?)
        }
        Operation::PrependAsPath(path) => RouteOperation::PrependAsPath(path.asns),
        Operation::SetPriority(value) => RouteOperation::SetPriority(value),
    })
}

fn encode_secret(SecretKey { name, key }: &SecretKey) -> wire::SecretKey {
    wire::SecretKey {
        name: name.clone(),
        key: key.clone(),
    }
}

fn decode_secret(value: wire::SecretKey) -> Result<SecretKey, Error> {
    Ok(SecretKey {
        name: non_empty("bgp.password.name", value.name)?,
        key: non_empty("bgp.password.key", value.key)?,
    })
}

/// Times of BGP are whole seconds, at most 65535.
fn encode_seconds(time: Duration) -> u32 {
    u32::try_from(time.as_secs()).unwrap_or(u32::MAX)
}

fn decode_seconds(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into())
}
