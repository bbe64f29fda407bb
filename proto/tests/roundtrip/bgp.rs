//! Strategies of BGP's records.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use margay_api::bgp::{
    BgpNextHopMode, Community, CommunityValue, FilterAction, FilterRule, Filters, LargeCommunity,
    MatchOperator, PeerType, PrefixMatch, RouteOperation, SecretKey,
};
use margay_api::network::NodeBgp;
use margay_calc::model::{BgpMesh, BgpPeerRecord, BgpRecord};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option::of;
use proptest::prelude::*;

use super::strategies::{name, net};

pub fn node_bgp() -> impl Strategy<Value = NodeBgp> {
    (any::<u32>(), of(any::<Ipv4Addr>()), any::<u16>()).prop_map(
        |(asn, cluster_id, listen_port)| NodeBgp {
            asn,
            cluster_id,
            listen_port,
        },
    )
}

fn community() -> impl Strategy<Value = CommunityValue> {
    prop_oneof![
        any::<u32>().prop_map(|value| CommunityValue::Standard(Community(value))),
        any::<[u32; 3]>().prop_map(|value| CommunityValue::Large(LargeCommunity(value))),
    ]
}

fn secret() -> impl Strategy<Value = SecretKey> {
    (name(), name()).prop_map(|(name, key)| SecretKey { name, key })
}

fn time() -> impl Strategy<Value = Duration> {
    (0..65536_u64).prop_map(Duration::from_secs)
}

fn prefix() -> impl Strategy<Value = PrefixMatch> {
    let operator = prop_oneof![
        Just(MatchOperator::Equal),
        Just(MatchOperator::NotEqual),
        Just(MatchOperator::In),
        Just(MatchOperator::NotIn),
    ];
    (net(), operator, any::<u8>(), any::<u8>()).prop_map(|(cidr, operator, one, other)| {
        let (one, other) = (
            one % (cidr.max_prefix_len() + 1),
            other % (cidr.max_prefix_len() + 1),
        );
        let (min, max) = (one.min(other), one.max(other));
        PrefixMatch::new(cidr, operator, Some(min), Some(max)).expect("lengths of the family")
    })
}

fn rule() -> impl Strategy<Value = FilterRule> {
    let operation = prop_oneof![
        community().prop_map(RouteOperation::AddCommunity),
        vec(any::<u32>(), 1..4).prop_map(RouteOperation::PrependAsPath),
        any::<u32>().prop_map(RouteOperation::SetPriority),
    ];
    let action = prop_oneof![
        Just(FilterAction::Reject),
        vec(operation, 0..3).prop_map(FilterAction::Accept),
    ];
    let peer_type = of(prop_oneof![
        Just(PeerType::External),
        Just(PeerType::Internal)
    ]);
    (
        of(prefix()),
        any::<bool>(),
        of(name()),
        peer_type,
        of(community()),
        vec(any::<u32>(), 0..3),
        of(any::<u32>()),
        action,
    )
        .prop_map(
            |(
                prefix,
                from_peers,
                interface,
                peer_type,
                community,
                as_path_prefix,
                priority,
                action,
            )| FilterRule {
                prefix,
                from_peers,
                interface,
                peer_type,
                community,
                as_path_prefix,
                priority,
                action,
            },
        )
}

fn filters() -> impl Strategy<Value = Filters> {
    (vec(rule(), 0..3), vec(rule(), 0..3)).prop_map(|(ipv4, ipv6)| Filters { ipv4, ipv6 })
}

fn peer() -> impl Strategy<Value = BgpPeerRecord> {
    let mode = prop_oneof![
        Just(BgpNextHopMode::Auto),
        Just(BgpNextHopMode::Own),
        Just(BgpNextHopMode::Keep),
    ];
    let session = (
        of(any::<u32>()),
        any::<u8>(),
        filters(),
        filters(),
        mode,
        of(secret()),
        any::<bool>(),
    );
    let transport = (
        of(any::<IpAddr>()),
        of(time()),
        of(time()),
        of(any::<u8>()),
        of(any::<IpAddr>()),
    );
    let address = (any::<IpAddr>(), any::<u16>());
    (name(), address, any::<u32>(), session, transport).prop_map(
        |(name, (address, port), asn, session, transport)| {
            let (local_asn, allowed_local_asn, import, export, next_hop_mode, password, client) =
                session;
            let (source, restart_time, keepalive, ttl_security, reachable_by) = transport;
            BgpPeerRecord {
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
                is_reflector_client: client,
                ..BgpPeerRecord::new(name, SocketAddr::new(address, port), asn)
            }
        },
    )
}

pub fn bgp() -> impl Strategy<Value = BgpRecord> {
    let mesh = of(
        (of(secret()), of(time())).prop_map(|(password, restart_time)| BgpMesh {
            password,
            restart_time,
        }),
    );
    let speaker = (
        any::<u32>(),
        any::<Ipv4Addr>(),
        of(any::<Ipv4Addr>()),
        any::<u16>(),
        any::<bool>(),
        btree_set(name(), 0..3),
        any::<[u32; 2]>(),
        mesh,
    );
    let routes = (
        btree_map(net(), any::<bool>(), 0..3),
        btree_map(net(), any::<bool>(), 0..3),
        btree_set(net(), 0..3),
        btree_set(net(), 0..3),
        btree_map(net(), btree_set(community(), 0..3), 0..3),
    );
    (speaker, routes, vec(peer(), 0..3)).prop_map(|(speaker, routes, peers)| {
        let (
            asn,
            router_id,
            cluster_id,
            listen_port,
            binds_node_address,
            ignored,
            priorities,
            mesh,
        ) = speaker;
        let (blocks, pools, services, service_ranges, communities) = routes;
        BgpRecord {
            asn,
            router_id,
            cluster_id,
            listen_port,
            binds_node_address,
            ignored_interfaces: ignored,
            priorities,
            mesh,
            blocks,
            pools,
            services,
            service_ranges,
            communities,
            peers,
        }
    })
}
