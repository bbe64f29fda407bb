//! BGP: what the speakers of nodes do, from manifests; and that it depends on nothing but the
//! current objects.

mod history;
mod objects;

use expect_test::{Expect, expect};
use margay_calc::graph::Graph;
use margay_calc::kinds::{self, KindName};
use margay_calc::model::{Record, RecordId};
use margay_calc::text;
use margay_calc::update::Update;
use serde_json::{Value, json};

/// A graph with BGP.
struct Cluster(Graph);

impl Cluster {
    /// Nodes `n1` to `n3` in rack `a`, `a` and `b`, in 192.0.2.0/24 and fd00::/64, with a block
    /// each.
    fn new() -> Self {
        let mut graph = Graph::default();
        graph.set_bgp(true);
        let mut cluster = Self(graph);
        cluster.apply(
            "projectcalico.org/v3",
            "IPPool",
            "main",
            json!({"cidr": "10.0.0.0/16"}),
        );
        for (number, rack) in [(1, "a"), (2, "a"), (3, "b")] {
            cluster.node(number, rack, json!({}));
            let node = format!("n{number}");
            cluster.0.apply(Update::Block(
                format!("10.0.0.{}/26", 64 * number)
                    .parse()
                    .expect("a range"),
                Some(margay_api::network::BlockInfo {
                    node: Some(node),
                    ..Default::default()
                }),
            ));
        }
        cluster
    }

    fn node(&mut self, number: u8, rack: &str, annotations: Value) {
        let metadata = json!({
            "name": format!("n{number}"),
            "labels": {"rack": rack},
            "annotations": annotations,
        });
        let addresses = [format!("192.0.2.{number}"), format!("fd00::{number}")]
            .map(|address| json!({"type": "InternalIP", "address": address}));
        let status = json!({"addresses": addresses});
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata,
            "status": status});
        self.ingest(object);
    }

    fn bgp(&mut self, kind: &str, name: &str, spec: Value) {
        self.apply("projectcalico.org/v3", kind, name, spec);
    }

    fn apply(&mut self, version: &str, kind: &str, name: &str, spec: Value) {
        let metadata = json!({"name": name, "namespace": "ns"});
        self.ingest(
            json!({"apiVersion": version, "kind": kind, "metadata": metadata,
            "spec": spec}),
        );
    }

    fn ingest(&mut self, object: Value) {
        let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
        let kind = KindName::of(&text("apiVersion"), &text("kind")).expect("a watched kind");
        let ingested = kinds::ingest(kind.name, object)
            .expect("a kind")
            .expect("its form");
        assert_eq!(ingested.problems, [""; 0]);
        self.0.apply(ingested.update.expect("something of use"));
    }

    /// Record of a node's speaker, and conflicts.
    fn show(&mut self, node: &str) -> String {
        self.0.flush();
        let record = self.0.record_for(node, &RecordId::Bgp);
        let mut shown =
            record.map_or_else(String::new, |record| text::record(&RecordId::Bgp, &record));
        for conflict in self.0.conflicts() {
            shown += &format!("{}: {}\n", conflict.object(), conflict.reason());
        }
        shown
    }

    fn check(&mut self, node: &str, expected: &Expect) {
        expected.assert_eq(&self.show(node));
    }
}

#[test]
fn a_node_without_objects_of_bgp_is_in_the_mesh() {
    let mut cluster = Cluster::new();
    cluster.check(
        "n1",
        &expect![[r#"
        bgp as 64512 id 192.0.2.1 port 179
          mesh
          block 10.0.0.64/26
          pool 10.0.0.0/16
    "#]],
    );
    let node = cluster.0.record(&RecordId::Node("n1".to_owned()));
    let shown = node.map(|node| text::record(&RecordId::Node("n1".to_owned()), &node));
    expect![[r#"
        node n1 192.0.2.1/32 fd00::1/128 as 64512 port 179 rack=a
    "#]]
    .assert_eq(&shown.unwrap_or_default());
}

#[test]
fn settings_of_a_node_are_over_those_of_all() {
    let mut cluster = Cluster::new();
    let all = json!({
        "asNumber": 64513,
        "listenPort": 1179,
        "bindMode": "NodeIP",
        "ignoredInterfaces": ["eth9"],
        "nodeMeshPassword": {"secretKeyRef": {"name": "bgp", "key": "mesh"}},
        "nodeMeshMaxRestartTime": "90s",
        "ipv4NormalRoutePriority": 2000,
        "communities": [{"name": "rack", "value": "64512:100"}],
        "prefixAdvertisements": [{"cidr": "10.0.0.0/16", "communities": ["rack", "1:2:3"]}],
    });
    cluster.bgp("BGPConfiguration", "default", all);
    cluster.bgp(
        "BGPConfiguration",
        "node.n2",
        json!({"listenPort": 2179, "ipv6NormalRoutePriority": 7}),
    );
    cluster.check(
        "n1",
        &expect![[r#"
        bgp as 64513 id 192.0.2.1 port 1179 node-address-only priorities 2000 1024
          mesh password bgp/mesh restart 90s
          block 10.0.0.64/26
          pool 10.0.0.0/16
          ignored eth9
          communities 10.0.0.0/16 64512:100, 1:2:3
    "#]],
    );
    cluster.check(
        "n2",
        &expect![[r#"
        bgp as 64513 id 192.0.2.2 port 2179 node-address-only priorities 2000 7
          mesh password bgp/mesh restart 90s
          block 10.0.0.128/26
          pool 10.0.0.0/16
          ignored eth9
          communities 10.0.0.0/16 64512:100, 1:2:3
    "#]],
    );
    cluster.bgp(
        "BGPConfiguration",
        "default",
        json!({"nodeToNodeMeshEnabled": false}),
    );
    cluster.check(
        "n1",
        &expect![[r#"
        bgp as 64512 id 192.0.2.1 port 179
          block 10.0.0.64/26
          pool 10.0.0.0/16
    "#]],
    );
}

#[test]
fn pools_that_are_not_exported_and_refused_blocks_are_marked() {
    let mut cluster = Cluster::new();
    cluster.bgp(
        "IPPool",
        "main",
        json!({"cidr": "10.0.0.0/16", "disableBGPExport": true}),
    );
    cluster.0.apply(Update::Block(
        "10.9.0.0/26".parse().expect("a range"),
        Some(margay_api::network::BlockInfo {
            node: Some("n1".to_owned()),
            ..Default::default()
        }),
    ));
    cluster.check("n1", &expect![[r#"
        bgp as 64512 id 192.0.2.1 port 179
          mesh
          block 10.0.0.64/26
          block 10.9.0.0/26 unexported
          pool 10.0.0.0/16 unexported
        IPAMBlock 10-9-0-0-26: spec.cidr: 10.9.0.0/26 of n1: no IPPool has this range, so other nodes have no route to it; create such a pool, or delete the block once no pod uses it
    "#]]);
}

#[test]
fn a_peer_has_everything_that_its_object_says() {
    let mut cluster = Cluster::new();
    let rules = json!([{"action": "Accept", "cidr": "10.0.0.0/8", "matchOperator": "In",
        "operations": [{"addCommunity": {"value": "64512:1"}}]}, {"action": "Reject"}]);
    cluster.bgp("BGPFilter", "narrow", json!({"exportV4": rules}));
    cluster.bgp(
        "BGPFilter",
        "v6",
        json!({"importV6": [{"action": "Reject", "source": "RemotePeers"}]}),
    );
    let peer = json!({
        "peerIP": "192.0.2.100:1179", "nodeSelector": "rack == 'a'", "asNumber": "1.10",
        "localASNumber": 64999, "numAllowedLocalASNumbers": 2, "filters": ["narrow", "v6"],
        "nextHopMode": "Self", "password": {"secretKeyRef": {"name": "bgp", "key": "tor"}},
        "maxRestartTime": "2m", "keepaliveTime": "10s", "ttlSecurity": 1,
        "reachableBy": "192.0.2.254",
    });
    cluster.bgp("BGPPeer", "tor", peer);
    cluster.check("n1", &expect![[r#"
        bgp as 64512 id 192.0.2.1 port 179
          mesh
          block 10.0.0.64/26
          pool 10.0.0.0/16
          peer tor 192.0.2.100:1179 as 65546 local-as 64999 allowed-local-as 2 from 192.0.2.1 by 192.0.2.254 hops 1 restart 120s keepalive 10s next-hop self password bgp/tor
            in ip6 reject from-peers
            out ip4 accept +64512:1 in 10.0.0.0/8 /8-32
            out ip4 reject
    "#]]);
    let before = cluster.show("n3");
    assert!(!before.contains("peer"), "{before}");
    cluster.bgp(
        "BGPPeer",
        "tor",
        json!({"peerIP": "fd00::100", "asNumber": 65001,
        "sourceAddress": "None"}),
    );
    cluster.check(
        "n3",
        &expect![[r#"
        bgp as 64512 id 192.0.2.3 port 179
          mesh
          block 10.0.0.192/26
          pool 10.0.0.0/16
          peer tor [fd00::100]:179 as 65001
    "#]],
    );
}

#[test]
fn reflectors_have_the_others_for_clients_and_are_in_no_mesh() {
    let mut cluster = Cluster::new();
    let annotations = json!({
        "projectcalico.org/RouteReflectorClusterID": "1.0.0.1",
        "projectcalico.org/ASNumber": "64512",
    });
    cluster.node(3, "reflectors", annotations);
    cluster.bgp(
        "BGPPeer",
        "reflectors",
        json!({"nodeSelector": "rack == 'a'",
        "peerSelector": "rack == 'reflectors'"}),
    );
    cluster.check(
        "n1",
        &expect![[r#"
        bgp as 64512 id 192.0.2.1 port 179
          mesh
          block 10.0.0.64/26
          pool 10.0.0.0/16
          peer reflectors 192.0.2.3:179 as 64512 from 192.0.2.1
          peer reflectors [fd00::3]:179 as 64512 from fd00::1
    "#]],
    );
    cluster.check(
        "n3",
        &expect![[r#"
        bgp as 64512 id 192.0.2.3 port 179 cluster 1.0.0.1
          block 10.0.0.192/26
          pool 10.0.0.0/16
          peer reflectors 192.0.2.1:179 as 64512 from 192.0.2.3 client
          peer reflectors 192.0.2.2:179 as 64512 from 192.0.2.3 client
          peer reflectors [fd00::1]:179 as 64512 from fd00::3 client
          peer reflectors [fd00::2]:179 as 64512 from fd00::3 client
    "#]],
    );
    // Without the other direction only those that name the reflector have the session.
    cluster.bgp(
        "BGPPeer",
        "reflectors",
        json!({"nodeSelector": "rack == 'a'",
        "peerSelector": "rack == 'reflectors'", "reversePeering": "Manual"}),
    );
    let reflector = cluster.show("n3");
    assert!(!reflector.contains("peer"), "{reflector}");
}

#[test]
fn workloads_of_the_node_are_peers() {
    let mut cluster = Cluster::new();
    cluster.bgp(
        "BGPConfiguration",
        "default",
        json!({"localWorkloadPeeringIPV4": "169.254.9.9"}),
    );
    cluster.bgp(
        "BGPPeer",
        "router",
        json!({"localWorkloadSelector": "app == 'router'",
        "asNumber": 65010}),
    );
    let pod = |node: &str, app: &str| {
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "r", "namespace": "ns", "labels": {"app": app}},
            "spec": {"nodeName": node, "containers": []},
            "status": {"podIPs": [{"ip": "10.0.0.70"}]}})
    };
    cluster.ingest(pod("n1", "router"));
    cluster.check(
        "n1",
        &expect![[r#"
        bgp as 64512 id 192.0.2.1 port 179
          mesh
          block 10.0.0.64/26
          pool 10.0.0.0/16
          peer router 10.0.0.70:179 as 65010 from 169.254.9.9
    "#]],
    );
    let is_peer = |cluster: &mut Cluster, node| cluster.show(node).contains("10.0.0.70");
    assert!(!is_peer(&mut cluster, "n2"));
    cluster.ingest(pod("n1", "web"));
    assert!(!is_peer(&mut cluster, "n1"));
}

#[test]
fn services_are_announced_by_those_that_serve_them() {
    let mut cluster = Cluster::new();
    cluster.bgp(
        "BGPConfiguration",
        "default",
        json!({
            "serviceClusterIPs": [{"cidr": "10.96.0.0/12"}],
            "serviceExternalIPs": [{"cidr": "203.0.113.0/28"}],
            "serviceLoadBalancerIPs": [{"cidr": "198.51.100.0/28"}, {"cidr": "198.51.100.99/32"}],
        }),
    );
    let service = |name: &str, policy: &str, balanced: &str| {
        json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "ns"},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"],
                "externalIPs": ["203.0.113.1", "203.0.114.1"], "externalTrafficPolicy": policy},
            "status": {"loadBalancer": {"ingress": [{"ip": balanced}]}}})
    };
    let slice = |node: &str, ready: bool| {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "local-x", "namespace": "ns",
                "labels": {"kubernetes.io/service-name": "local"}},
            "endpoints": [{"addresses": ["10.0.0.70"], "nodeName": node,
                "conditions": {"ready": ready}}],
            "ports": [{"port": 80, "protocol": "TCP"}]})
    };
    cluster.ingest(service("local", "Local", "198.51.100.3"));
    cluster.ingest(service("wide", "Cluster", "198.51.100.99"));
    cluster.ingest(slice("n1", true));
    cluster.check("n1", &expect![[r#"
        bgp as 64512 id 192.0.2.1 port 179
          mesh
          block 10.0.0.64/26
          pool 10.0.0.0/16
          services 10.96.0.0/12, 10.96.0.7/32, 198.51.100.0/28, 198.51.100.3/32, 198.51.100.99/32, 203.0.113.0/28, 203.0.113.1/32
          service-ranges 10.96.0.0/12, 198.51.100.0/28, 198.51.100.99/32, 203.0.113.0/28
    "#]]);
    cluster.check(
        "n2",
        &expect![[r#"
        bgp as 64512 id 192.0.2.2 port 179
          mesh
          block 10.0.0.128/26
          pool 10.0.0.0/16
          services 10.96.0.0/12, 198.51.100.0/28, 198.51.100.99/32, 203.0.113.0/28
          service-ranges 10.96.0.0/12, 198.51.100.0/28, 198.51.100.99/32, 203.0.113.0/28
    "#]],
    );
    cluster.ingest(slice("n2", true));
    let addresses = |cluster: &mut Cluster, node| cluster.show(node).contains("10.96.0.7/32");
    assert!(!addresses(&mut cluster, "n1") && addresses(&mut cluster, "n2"));
    cluster.ingest(slice("n2", false));
    assert!(!addresses(&mut cluster, "n2"));
    cluster.bgp(
        "BGPConfiguration",
        "default",
        json!({
            "serviceLoadBalancerIPs": [{"cidr": "198.51.100.0/24"}],
            "serviceLoadBalancerAggregation": "Disabled",
        }),
    );
    cluster.check(
        "n3",
        &expect![[r#"
        bgp as 64512 id 192.0.2.3 port 179
          mesh
          block 10.0.0.192/26
          pool 10.0.0.0/16
          services 198.51.100.99/32
          service-ranges 198.51.100.0/24
    "#]],
    );
}

#[test]
fn a_node_may_be_excluded_from_services() {
    let mut cluster = Cluster::new();
    let ranges = json!({"serviceClusterIPs": [{"cidr": "10.96.0.0/12"}]});
    cluster.bgp("BGPConfiguration", "default", ranges);
    assert!(cluster.show("n1").contains("\n  services 10.96.0.0/12"));
    let label = "node.kubernetes.io/exclude-from-external-load-balancers";
    let node = json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "n1", "labels": {label: "true"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}});
    cluster.ingest(node);
    let shown = cluster.show("n1");
    assert!(
        !shown.contains("\n  services") && shown.contains("service-ranges"),
        "{shown}"
    );
}

#[test]
fn a_node_that_a_peer_names_by_its_address_has_the_session_too() {
    let mut cluster = Cluster::new();
    cluster.bgp(
        "BGPConfiguration",
        "default",
        json!({"nodeToNodeMeshEnabled": false}),
    );
    cluster.bgp(
        "BGPPeer",
        "to-n2",
        json!({"peerIP": "192.0.2.2", "asNumber": 64512}),
    );
    let sessions = |cluster: &mut Cluster, node: &str| {
        let shown = cluster.show(node);
        let peers = shown
            .lines()
            .filter_map(|line| line.trim().strip_prefix("peer to-n2 "));
        let peers: Vec<&str> = peers.filter_map(|line| line.split(' ').next()).collect();
        peers.join(" ")
    };
    assert_eq!(sessions(&mut cluster, "n1"), "192.0.2.2:179");
    assert_eq!(sessions(&mut cluster, "n2"), "192.0.2.1:179 192.0.2.3:179");
    // Not the node that is meant: another AS number.
    cluster.bgp(
        "BGPPeer",
        "to-n2",
        json!({"peerIP": "192.0.2.2", "asNumber": 64513}),
    );
    assert_eq!(sessions(&mut cluster, "n2"), "");
}

#[test]
fn of_peers_with_one_address_the_one_for_all_nodes_has_effect() {
    let mut cluster = Cluster::new();
    cluster.bgp(
        "BGPPeer",
        "b",
        json!({"peerIP": "192.0.2.100", "asNumber": 65001, "node": "n1"}),
    );
    cluster.bgp(
        "BGPPeer",
        "c",
        json!({"peerIP": "192.0.2.100:1179", "asNumber": 65002}),
    );
    let shown = cluster.show("n1");
    assert!(
        shown.contains("peer c 192.0.2.100:1179 as 65002"),
        "{shown}"
    );
    assert!(
        shown.contains("BGPPeer b: spec.peerIP: 192.0.2.100: BGPPeer c has"),
        "{shown}"
    );
}

#[test]
fn peers_without_the_effect_that_they_describe_are_reported() {
    let mut cluster = Cluster::new();
    let peers = [
        (
            "filtered",
            json!({"peerIP": "192.0.2.100", "asNumber": 65001, "filters": ["gone"]}),
        ),
        (
            "lost",
            json!({"peerIP": "192.0.2.101", "asNumber": 65001, "node": "n9"}),
        ),
        ("nameless", json!({"peerIP": "192.0.2.102"})),
        ("of-node", json!({"peerIP": "192.0.2.2"})),
        (
            "twice",
            json!({"peerIP": "192.0.2.100", "asNumber": 65002, "node": "n1"}),
        ),
    ];
    for (name, spec) in peers {
        cluster.bgp("BGPPeer", name, spec);
    }
    cluster.check("n1", &expect![[r#"
        bgp as 64512 id 192.0.2.1 port 179
          mesh
          block 10.0.0.64/26
          pool 10.0.0.0/16
          peer of-node 192.0.2.2:179 as 64512 from 192.0.2.1
          peer filtered 192.0.2.100:179 as 65001 from 192.0.2.1
            in ip4 reject
            in ip6 reject
            out ip4 reject
            out ip6 reject
        BGPPeer filtered: spec.filters: "gone": there is no such BGPFilter, so no route passes; create it or correct the name
        BGPPeer lost: spec.node: "n9": there is no such node, so it has no session; correct the name or delete the peer
        BGPPeer nameless: spec.asNumber: missing, and the address of the peer is no node's, so it has no session; name the peer's AS number
        BGPPeer twice: spec.peerIP: 192.0.2.100: BGPPeer filtered has the same address on a node and is used there instead; delete one of them
    "#]]);
    cluster.0.set_bgp(false);
    let shown = cluster.show("n1");
    assert!(
        shown.starts_with("BGPPeer filtered: spec: BGP is disabled"),
        "{shown}"
    );
    assert_eq!(shown.lines().count(), 5, "{shown}");
    let record = cluster.0.record(&RecordId::Node("n1".to_owned()));
    assert!(matches!(record.as_deref(), Some(Record::Node(node)) if node.bgp.is_none()));
}

#[test]
fn a_node_that_joins_changes_no_record_but_its_own() {
    let mut cluster = Cluster::new();
    cluster.0.flush();
    cluster.node(4, "a", json!({}));
    let flush = cluster.0.flush();
    let change = &flush.records[&RecordId::Bgp];
    assert!(change.gained.contains("n4") && change.kept.is_empty() && change.lost.is_empty());
}
