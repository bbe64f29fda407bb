use std::collections::BTreeMap;

use margay_api::bgp::SecretKey;
use margay_api::network::NodeBgp;

use super::*;
use crate::model::BgpMesh;

fn node(ipv4: Option<&str>, ipv6: Option<&str>, cluster_id: Option<&str>) -> NodeInfo {
    NodeInfo {
        ipv4: ipv4.map(|text| text.parse().unwrap()),
        ipv6: ipv6.map(|text| text.parse().unwrap()),
        bgp: Some(NodeBgp {
            asn: 64512,
            cluster_id: cluster_id.map(|text| text.parse().unwrap()),
            listen_port: 179,
        }),
        ..NodeInfo::default()
    }
}

fn record(mesh: Option<BgpMesh>, cluster_id: Option<&str>, peers: &[&str]) -> BgpRecord {
    let peer = |text: &&str| BgpPeerRecord::new("tor", text.parse().unwrap(), 65001);
    BgpRecord {
        asn: 64512,
        router_id: Ipv4Addr::LOCALHOST,
        cluster_id: cluster_id.map(|text| text.parse().unwrap()),
        listen_port: 179,
        binds_node_address: false,
        ignored_interfaces: BTreeSet::new(),
        priorities: [1024; 2],
        mesh,
        blocks: BTreeMap::new(),
        pools: BTreeMap::new(),
        services: BTreeSet::new(),
        service_ranges: BTreeSet::new(),
        communities: BTreeMap::new(),
        peers: peers.iter().map(peer).collect(),
    }
}

#[test]
fn the_mesh_is_every_other_node_that_is_no_reflector() {
    let mut silent = node(Some("10.0.0.9/24"), None, None);
    silent.bgp = None;
    let nodes = [
        ("a", node(Some("10.0.0.1/24"), Some("fd00::1/64"), None)),
        ("b", node(Some("10.0.0.2/24"), Some("fd00::2/64"), None)),
        ("c", node(Some("10.0.0.3/24"), None, None)),
        ("d", node(None, Some("fd00::4/64"), None)),
        (
            "reflector",
            node(Some("10.0.0.8/24"), None, Some("1.0.0.1")),
        ),
        ("silent", silent),
    ];
    let all = "b 10.0.0.2:179, b [fd00::2]:179, c 10.0.0.3:179, d [fd00::4]:179";
    let mesh = || Some(BgpMesh::default());
    let rows = [
        ("a", record(mesh(), None, &[]), all),
        (
            "a",
            record(mesh(), None, &["10.0.0.2:1179"]),
            "b [fd00::2]:179, c 10.0.0.3:179, d [fd00::4]:179",
        ),
        (
            "c",
            record(mesh(), None, &[]),
            "a 10.0.0.1:179, b 10.0.0.2:179",
        ),
        ("a", record(None, None, &[]), ""),
        ("a", record(mesh(), Some("1.0.0.1"), &[]), ""),
        ("gone", record(mesh(), None, &[]), ""),
    ];
    for (own, record, expected) in rows {
        let peers = mesh_peers(own, &record, nodes.iter().map(|(name, node)| (*name, node)));
        let peers = peers
            .iter()
            .map(|peer| format!("{} {}", peer.name, peer.address));
        assert_eq!(peers.collect::<Vec<_>>().join(", "), expected, "{own}");
    }
}

#[test]
fn sessions_of_the_mesh_have_its_settings() {
    let nodes = [
        ("a", node(Some("10.0.0.1/24"), None, None)),
        ("b", node(Some("10.0.0.2/24"), None, None)),
    ];
    let password = Some(SecretKey {
        name: "bgp".into(),
        key: "mesh".into(),
    });
    let mesh = BgpMesh {
        password: password.clone(),
        restart_time: Some(std::time::Duration::from_secs(90)),
    };
    let record = record(Some(mesh.clone()), None, &[]);
    let peers = mesh_peers("a", &record, nodes.iter().map(|(name, node)| (*name, node)));
    let [peer] = &peers[..] else {
        panic!("{peers:?}");
    };
    assert_eq!(
        (&peer.password, peer.restart_time),
        (&password, mesh.restart_time)
    );
    assert_eq!((peer.source, peer.asn), ("10.0.0.1".parse().ok(), 64512));
}

#[test]
fn a_router_id_is_the_address_or_a_number_of_the_name() {
    let with = node(Some("10.0.0.1/24"), None, None);
    assert_eq!(router_id("a", &with), Ipv4Addr::new(10, 0, 0, 1));
    let without = node(None, Some("fd00::1/64"), None);
    let ids: BTreeSet<Ipv4Addr> = (0..1000)
        .map(|number| router_id(&format!("node-{number}"), &without))
        .collect();
    assert_eq!(ids.len(), 1000);
    let is_possible = |id: &Ipv4Addr| !id.is_multicast() && id.octets()[0] > 0;
    assert!(ids.iter().all(is_possible));
}
