//! Objects of BGP in the small world.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use margay_api::bgp::{
    BgpFilter, BgpNextHopMode, BgpPeer, BgpSettings, FilterAction, FilterRule, Filters, NodePeers,
    PeerTarget,
};
use margay_api::endpoint::ServiceAddresses;
use margay_api::selector::Selector;
use margay_calc::update::Update;
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use crate::world::{NODES, object, service_key};

/// One update of an object of BGP, or of a Service.
pub fn update() -> impl Strategy<Value = Update> {
    let settings_name = select(&["default", "node.n1", "node.n2", "node.gone"][..]);
    prop_oneof![
        2 => object(settings_name, 0.7, settings(), |name, settings| {
            Update::BgpSettings(name.to_owned(), settings)
        }),
        4 => object(select(&["a", "b", "c"][..]), 0.8, peer(), |name, peer| {
            Update::BgpPeer(name.to_owned(), peer)
        }),
        2 => object(select(&["f", "g"][..]), 0.7, filter(), |name, filter| {
            Update::BgpFilter(name.to_owned(), filter)
        }),
        2 => object(service_key(), 0.8, service(), Update::ServiceAddresses),
    ]
}

fn ranges() -> impl Strategy<Value = Vec<IpNet>> {
    let texts = &["10.96.0.0/24", "10.97.0.0/28", "10.97.0.1/32", "fd96::/112"][..];
    vec(
        select(texts).prop_map(|text| text.parse().expect("a range")),
        0..3,
    )
}

fn addresses() -> impl Strategy<Value = std::collections::BTreeSet<IpAddr>> {
    let texts = &[
        "10.96.0.1",
        "10.97.0.1",
        "10.97.0.2",
        "fd96::1",
        "192.0.2.77",
    ][..];
    btree_set(
        select(texts).prop_map(|text| text.parse().expect("an address")),
        0..3,
    )
}

fn service() -> impl Strategy<Value = ServiceAddresses> {
    (addresses(), addresses(), addresses(), any::<bool>()).prop_map(
        |(cluster_ips, external_ips, load_balancer_ips, is_local)| ServiceAddresses {
            cluster_ips,
            external_ips,
            load_balancer_ips,
            is_local,
        },
    )
}

fn settings() -> impl Strategy<Value = BgpSettings> {
    let numbers = (
        option::of(any::<bool>()),
        option::of(64512..64514_u32),
        option::of(select(&[179_u16, 1179][..])),
        option::of(any::<bool>()),
    );
    (numbers, ranges(), ranges(), ranges()).prop_map(
        |((mesh, asn, listen_port, aggregates), cluster_ips, external_ips, load_balancer_ips)| {
            BgpSettings {
                mesh,
                asn,
                listen_port,
                aggregates_load_balancers: aggregates,
                cluster_ips,
                external_ips,
                load_balancer_ips,
                local_workload_addresses: ["169.254.9.9".parse().ok(), None],
                ..BgpSettings::default()
            }
        },
    )
}

fn filter() -> impl Strategy<Value = BgpFilter> {
    vec(any::<bool>(), 0..3).prop_map(|rules| {
        let rule = |accepts: &bool| match accepts {
            true => FilterRule::new(FilterAction::Accept(Vec::new())),
            false => FilterRule::new(FilterAction::Reject),
        };
        let rules: Vec<FilterRule> = rules.iter().map(rule).collect();
        BgpFilter {
            import: Filters {
                ipv4: rules.clone(),
                ipv6: Vec::new(),
            },
            export: Filters {
                ipv4: Vec::new(),
                ipv6: rules,
            },
        }
    })
}

fn selector(texts: &'static [&'static str]) -> impl Strategy<Value = Selector> {
    select(texts).prop_map(|text| Selector::parse(text).expect("a selector"))
}

fn peer() -> impl Strategy<Value = BgpPeer> {
    const NODE_SELECTORS: &[&str] = &["all()", "zone == 'a'", "has(zone)"];
    const WORKLOADS: &[&str] = &["app == 'web'", "pcns.team == 'a'"];
    let addresses = &[
        "192.0.2.1:0",
        "192.0.2.9:0",
        "192.0.2.9:1179",
        "[fd01::1]:0",
    ][..];
    let address = select(addresses).prop_map(|text| {
        let address: SocketAddr = text.parse().expect("an address");
        PeerTarget::Address(address)
    });
    let target = prop_oneof![
        address,
        selector(NODE_SELECTORS).prop_map(PeerTarget::Nodes),
        selector(WORKLOADS).prop_map(PeerTarget::LocalWorkloads),
    ];
    let nodes = prop_oneof![
        Just(NodePeers::All),
        select(&NODES[..]).prop_map(|name| NodePeers::Node(name.to_owned())),
        selector(NODE_SELECTORS).prop_map(NodePeers::Selected),
    ];
    let filters = vec(select(&["f", "g"][..]).prop_map(str::to_owned), 0..3);
    (
        nodes,
        target,
        option::of(64512..64514_u32),
        filters,
        any::<bool>(),
    )
        .prop_map(|(nodes, target, asn, filters, is_reversed)| BgpPeer {
            nodes,
            target,
            asn,
            local_asn: None,
            allowed_local_asn: 0,
            filters,
            next_hop_mode: BgpNextHopMode::Auto,
            password: None,
            uses_node_address: true,
            restart_time: None,
            keepalive: None,
            ttl_security: None,
            reachable_by: None,
            is_reversed,
        })
}
