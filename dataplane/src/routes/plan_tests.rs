use margay_api::network::Vtep;
use margay_calc::model::{PoolRecord, RouteRecord};

use super::*;

fn net(text: &str) -> IpNet {
    text.parse().expect("a range")
}

fn node(last: u8, tunnel: [u8; 4]) -> NodeInfo {
    NodeInfo {
        ipv4: format!("192.0.2.{last}/24").parse().ok(),
        vtep: Some(Vtep {
            address: tunnel.into(),
            mac: Mac([0x66, 0, 0, 0, 0, last]),
        }),
        ..NodeInfo::default()
    }
}

fn records(nodes: &[(&str, NodeInfo)], routes: &[(&str, &str)]) -> BTreeMap<RecordId, Record> {
    records_with(Encapsulation::Vxlan, nodes, routes)
}

fn records_with(
    encapsulation: Encapsulation,
    nodes: &[(&str, NodeInfo)],
    routes: &[(&str, &str)],
) -> BTreeMap<RecordId, Record> {
    let pool = Record::Pool(PoolRecord {
        nat_outgoing: false,
        encapsulation,
    });
    let nodes = nodes.iter().map(|(name, info)| {
        (
            RecordId::Node((*name).to_owned()),
            Record::Node(info.clone()),
        )
    });
    let routes = routes.iter().map(|(range, node)| {
        let route = RouteRecord {
            node: (*node).to_owned(),
            encapsulation,
        };
        (RecordId::Route(net(range)), Record::Route(route))
    });
    [(RecordId::Pool(net("10.0.0.0/16")), pool)]
        .into_iter()
        .chain(nodes)
        .chain(routes)
        .collect()
}

#[test]
fn a_pod_of_this_node_is_where_its_link_is() {
    let nodes = [
        ("n1", node(1, [10, 0, 0, 0])),
        ("n9", node(9, [10, 0, 9, 0])),
    ];
    let records = records(
        &nodes,
        &[
            ("10.0.0.0/26", "n1"),
            ("10.0.0.5/32", "n9"),
            ("10.0.0.6/32", "n9"),
        ],
    );
    let pods = LocalPods::from([(IpAddr::from([10, 0, 0, 5]), "cali1".to_owned())]);
    let routes = plan("n1", &records, &pods).routes;
    assert_eq!(
        routes[&net("10.0.0.5/32")],
        Target::Pod {
            interface: "cali1".to_owned()
        }
    );
    assert_eq!(
        routes[&net("10.0.0.6/32")],
        Target::Vxlan {
            via: IpAddr::from([10, 0, 9, 0])
        }
    );
}

#[test]
fn no_node_takes_the_place_of_another_behind_the_tunnel() {
    let nodes = [
        ("n1", node(1, [10, 0, 0, 0])),
        ("n2", node(2, [10, 0, 2, 0])),
        ("n9", node(9, [10, 0, 2, 0])),
    ];
    let plan = |own: &str| plan(own, &records(&nodes, &[]), &LocalPods::new());
    assert_eq!(
        plan("n1").peers[&IpAddr::from([10, 0, 2, 0])].underlay,
        IpAddr::from([192, 0, 2, 2])
    );
    assert_eq!(
        plan("n2").peers.get(&IpAddr::from([10, 0, 2, 0])),
        None,
        "its own end is nobody else's"
    );
}

/// Of IPIP a route names the other node itself, which needs no address for its tunnel.
#[test]
fn each_encapsulation_has_its_routes_and_devices() {
    let mut me = node(1, [10, 0, 0, 0]);
    me.ipip = Some([10, 0, 0, 1].into());
    let (near, mut far) = (node(2, [10, 0, 2, 0]), node(3, [10, 0, 3, 0]));
    far.ipv4 = "198.51.100.3/24".parse().ok();
    let nodes = |me: &NodeInfo| {
        [
            ("n1", me.clone()),
            ("n2", near.clone()),
            ("n3", far.clone()),
        ]
    };
    let routes = [("10.0.2.0/26", "n2"), ("10.0.3.0/26", "n3")];
    let plain = |last| Target::Gateway {
        via: IpAddr::from([192, 0, 2, last]),
    };
    let vxlan = |third| Target::Vxlan {
        via: IpAddr::from([10, 0, third, 0]),
    };
    let ipip = |net: [u8; 3], last| Target::Ipip {
        via: IpAddr::from([net[0], net[1], net[2], last]),
    };
    let (own_net, other_net) = ([192, 0, 2], [198, 51, 100]);
    let v4 = TunnelKind::Vxlan(IpVersion::V4);
    for (encapsulation, to_near, to_far, device) in [
        (Encapsulation::None, plain(2), None, None),
        (Encapsulation::Vxlan, vxlan(2), Some(vxlan(3)), Some(v4)),
        (
            Encapsulation::VxlanCrossSubnet,
            plain(2),
            Some(vxlan(3)),
            Some(v4),
        ),
        (
            Encapsulation::Ipip,
            ipip(own_net, 2),
            Some(ipip(other_net, 3)),
            Some(TunnelKind::Ipip),
        ),
        (
            Encapsulation::IpipCrossSubnet,
            plain(2),
            Some(ipip(other_net, 3)),
            Some(TunnelKind::Ipip),
        ),
    ] {
        let records = records_with(encapsulation, &nodes(&me), &routes);
        let found = plan("n1", &records, &LocalPods::new());
        let route = |range| found.routes.get(&net(range)).cloned();
        assert_eq!(route("10.0.2.0/26"), Some(to_near), "{encapsulation:?}");
        assert_eq!(route("10.0.3.0/26"), to_far, "{encapsulation:?}");
        let devices: Vec<TunnelKind> = found.tunnels.keys().copied().collect();
        assert_eq!(devices, Vec::from_iter(device), "{encapsulation:?}");
    }
    me.ipip = None;
    let records = records_with(Encapsulation::IpipCrossSubnet, &nodes(&me), &routes);
    let found = plan("n1", &records, &LocalPods::new());
    assert_eq!(
        found.routes.keys().collect::<Vec<_>>(),
        [&net("10.0.2.0/26")]
    );
    let reason = &found.unreachable[&net("10.0.3.0/26")];
    assert!(
        reason.contains("no address for its tunnel device tunl0"),
        "{reason}"
    );
}

proptest::proptest! {
    /// The plan does not depend on the order in which pods were added and removed, with a tunnel
    /// device or without.
    #[test]
    fn a_plan_that_follows_pods_is_the_plan_of_those_pods(
        steps in proptest::collection::vec(
            proptest::collection::btree_map(0u8..8, 0u8..3, 0..6),
            1..6,
        ),
        has_tunnel: bool,
    ) {
        let me = NodeInfo {
            vtep: node(1, [10, 0, 0, 0]).vtep.filter(|_| has_tunnel),
            ..node(1, [10, 0, 0, 0])
        };
        let nodes = [("n1", me), ("n9", node(9, [10, 0, 9, 0]))];
        let routes = [
            ("10.0.0.0/26", "n1"),
            ("10.0.0.5/32", "n9"),
            ("10.0.0.6/32", "n9"),
            ("10.0.9.0/26", "n9"),
        ];
        let records = records(&nodes, &routes);
        let mut followed = plan("n1", &records, &LocalPods::new());
        for step in steps {
            let pods: LocalPods = step
                .into_iter()
                .map(|(number, link)| (IpAddr::from([10, 0, 0, number]), format!("cali{link}")))
                .collect();
            let before = followed.routes.clone();
            let changed = followed.update_pods(&pods);
            let fresh = plan("n1", &records, &pods);
            proptest::prop_assert_eq!(&followed, &fresh);
            let destinations: BTreeSet<&IpNet> = before.keys().chain(fresh.routes.keys()).collect();
            for destination in destinations {
                let is_other = before.get(destination) != fresh.routes.get(destination);
                proptest::prop_assert!(
                    !is_other || changed.contains(destination),
                    "{} is not named",
                    destination,
                );
            }
        }
    }
}
