use margay_api::network::{NodeBgp, NodeInfo};
use margay_bgp::attributes::Family;
use margay_calc::model::BgpMesh;

use super::*;

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn socket(text: &str) -> SocketAddr {
    text.parse().expect("an address with port")
}

fn mk_record() -> BgpRecord {
    BgpRecord {
        asn: 64512,
        router_id: [10, 0, 0, 1].into(),
        cluster_id: None,
        listen_port: 1179,
        binds_node_address: false,
        ignored_interfaces: ["eth9".to_owned()].into(),
        priorities: [512, 768],
        mesh: None,
        blocks: [(net("10.65.0.0/26"), true), (net("10.65.1.0/26"), false)].into(),
        pools: [(net("10.65.0.0/16"), true)].into(),
        services: [net("10.96.0.0/12")].into(),
        service_ranges: [net("10.96.0.0/12")].into(),
        communities: BTreeMap::new(),
        peers: Vec::new(),
    }
}

fn mk_inputs(record: BgpRecord) -> BgpInputs {
    BgpInputs {
        record: Some(record),
        addresses: [ip("10.0.0.1"), ip("fd00::1")].into(),
        pods: [
            (ip("10.65.0.5"), "cali1".to_owned()),
            (ip("10.65.9.5"), "cali2".to_owned()),
        ]
        .into(),
        ..BgpInputs::default()
    }
}

fn wanted(inputs: &BgpInputs) -> WantedSpeaker {
    let without = |key: &SecretKey| Err(format!("no {}", key.name));
    wanted_speaker(inputs, &without).expect("a speaker").0
}

#[test]
fn without_a_record_there_is_no_speaker() {
    let no_password = |_: &SecretKey| Err(String::new());
    assert_eq!(wanted_speaker(&BgpInputs::default(), &no_password), None);
    let inputs = BgpInputs::new("n1", &BTreeMap::new(), &LocalPods::new());
    assert_eq!(inputs, BgpInputs::default());
}

#[test]
fn the_speaker_is_what_the_record_says() {
    let found = wanted(&mk_inputs(mk_record()));
    let speaker = &found.speaker;
    assert_eq!(
        (speaker.asn, speaker.router_id),
        (64512, [10, 0, 0, 1].into())
    );
    assert_eq!((speaker.ipv4_priority, speaker.ipv6_priority), (512, 768));
    assert!(!speaker.is_restarting);
    assert_eq!(
        found.listen,
        [socket("0.0.0.0:1179"), socket("[::]:1179")].into()
    );
    assert_eq!(found.ignored_interfaces, ["eth9".to_owned()].into());
    let bound = wanted(&mk_inputs(BgpRecord {
        binds_node_address: true,
        ..mk_record()
    }));
    assert_eq!(
        bound.listen,
        [socket("10.0.0.1:1179"), socket("[fd00::1]:1179")].into()
    );
}

#[test]
fn blocks_services_and_borrowed_addresses_are_announced() {
    let found = wanted(&mk_inputs(mk_record()));
    let announced = found
        .local
        .keys()
        .filter(|net| found.policy.exports(net, false));
    let announced: Vec<String> = announced.map(IpNet::to_string).collect();
    assert_eq!(announced, ["10.65.0.0/26", "10.65.9.5/32", "10.96.0.0/12"]);
    let links = found
        .local
        .values()
        .filter_map(|route| route.interface.as_deref());
    assert_eq!(links.collect::<Vec<_>>(), ["cali1", "cali2"]);
    assert!(!found.policy.installs(&net("10.96.1.0/24")));
}

#[test]
fn a_peer_has_what_its_record_has_and_the_defaults() {
    let mut peer = BgpPeerRecord::new("tor", socket("10.0.0.254:179"), 65001);
    let plain = wanted(&mk_inputs(BgpRecord {
        peers: vec![peer.clone()],
        ..mk_record()
    }));
    let config = &plain.peers[&peer.address].config;
    assert_eq!(config.families, [Family::Ipv4].into());
    assert_eq!(config.restart_time, Some(DEFAULT_RESTART_TIME));
    assert_eq!(config.transport, Default::default());
    peer.local_asn = Some(65009);
    peer.allowed_local_asn = 2;
    peer.next_hop_mode = BgpNextHopMode::Keep;
    peer.source = Some(ip("10.0.0.1"));
    peer.restart_time = Some(Duration::from_secs(7));
    peer.keepalive = Some(Duration::from_secs(9));
    peer.ttl_security = Some(1);
    peer.reachable_by = Some(ip("10.0.0.9"));
    peer.is_reflector_client = true;
    let full = wanted(&mk_inputs(BgpRecord {
        peers: vec![peer.clone()],
        ..mk_record()
    }));
    let WantedPeer { name, config } = &full.peers[&peer.address];
    assert_eq!((name.as_str(), config.asn), ("tor", 65001));
    assert_eq!(
        (config.local_asn, config.allowed_local_asn),
        (Some(65009), 2)
    );
    assert_eq!(config.next_hop_mode, NextHopMode::Keep);
    assert_eq!(config.restart_time, Some(Duration::from_secs(7)));
    assert_eq!(config.keepalive, Some(Duration::from_secs(9)));
    assert!(config.is_reflector_client);
    let transport = &config.transport;
    assert_eq!(
        (transport.source, transport.ttl_security),
        (Some(ip("10.0.0.1")), Some(1))
    );
    assert_eq!(full.gateways, [(ip("10.0.0.254"), ip("10.0.0.9"))].into());
}

#[test]
fn a_peer_whose_password_is_not_known_has_no_session() {
    let key = |name: &str| SecretKey {
        name: name.to_owned(),
        key: "password".to_owned(),
    };
    let peer = |last: &str, secret: &str| BgpPeerRecord {
        password: Some(key(secret)),
        ..BgpPeerRecord::new(secret, socket(&format!("10.0.0.{last}:179")), 65001)
    };
    let inputs = mk_inputs(BgpRecord {
        peers: vec![peer("2", "known"), peer("3", "gone")],
        ..mk_record()
    });
    assert_eq!(inputs.secrets(), [key("known"), key("gone")].into());
    let find = |key: &SecretKey| match key.name.as_str() {
        "known" => Password::new("moss".to_owned()).map_err(|error| error.to_string()),
        _ => Err("there is no such Secret".to_owned()),
    };
    let (found, without) = wanted_speaker(&inputs, &find).expect("a speaker");
    let peers: Vec<&str> = found
        .peers
        .values()
        .map(|peer| peer.name.as_str())
        .collect();
    assert_eq!(peers, ["known"]);
    let reasons: Vec<&str> = without.values().map(String::as_str).collect();
    assert_eq!(reasons, ["gone: there is no such Secret"]);
}

#[test]
fn the_nodes_of_a_mesh_are_peers_and_the_addresses_those_of_the_node() {
    let info = |last: u8| NodeInfo {
        ipv4: format!("10.0.0.{last}/24").parse().ok(),
        bgp: Some(NodeBgp {
            asn: 64512,
            cluster_id: None,
            listen_port: 179,
        }),
        ..NodeInfo::default()
    };
    let record = BgpRecord {
        mesh: Some(BgpMesh::default()),
        ..mk_record()
    };
    let node = |name: &str, last| (RecordId::Node(name.to_owned()), Record::Node(info(last)));
    let records = BTreeMap::from([
        node("n1", 1),
        node("n2", 2),
        (RecordId::Bgp, Record::Bgp(Box::new(record))),
    ]);
    let inputs = BgpInputs::new("n1", &records, &LocalPods::new());
    assert_eq!(inputs.addresses, [ip("10.0.0.1")].into());
    let found = wanted(&inputs);
    let peers: Vec<(SocketAddr, &str)> = found
        .peers
        .iter()
        .map(|(address, peer)| (*address, peer.name.as_str()))
        .collect();
    assert_eq!(peers, [(socket("10.0.0.2:179"), "n2")]);
}
