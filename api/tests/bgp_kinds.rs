//! Objects of BGP that are accepted or refused: by the rules of the definitions, and by the code
//! that parses them.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kube_cel::Validator;
use margay_api::bgp::{
    BgpFilter, BgpNextHopMode, FilterAction, NodePeers, PeerTarget, RouteOperation,
};
use margay_api::problem::Refusal;
use margay_api::v3::{self, parse};
use margay_api::{crds, v3::BGPPeer};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn object(kind: &str, spec: &str) -> Value {
    let spec: Value =
        serde_yaml_ng::from_str(spec).unwrap_or_else(|error| panic!("{error}\n{spec}"));
    json!({
        "apiVersion": "projectcalico.org/v3",
        "kind": kind,
        "metadata": { "name": "default" },
        "spec": spec,
    })
}

fn problems<K: DeserializeOwned, T>(
    object: &Value,
    parse: fn(&K) -> Result<T, Refusal<T>>,
) -> Vec<String> {
    match parse(&serde_json::from_value(object.clone()).unwrap()) {
        Ok(_) => vec![],
        Err(refusal) => refusal.problems.iter().map(ToString::to_string).collect(),
    }
}

/// Each row is a kind, a specification, and the field that the code names if it refuses it.
#[test]
fn what_is_accepted_and_what_is_refused() {
    let rows = [
        ("BGPPeer", "{ peerIP: 192.0.2.1, asNumber: 65001 }", ""),
        (
            "BGPPeer",
            "{ peerIP: '[fd00::1]:1179', asNumber: '1.10', nodeSelector: rack == 'a' }",
            "",
        ),
        (
            "BGPPeer",
            "{ peerIP: fd00::1, reachableBy: fd00::2, maxRestartTime: 2m, keepaliveTime: 10s }",
            "",
        ),
        (
            "BGPPeer",
            "{ peerSelector: has(reflector), node: a, nextHopMode: Self }",
            "",
        ),
        (
            "BGPPeer",
            "{ localWorkloadSelector: app == 'router', asNumber: 65001 }",
            "",
        ),
        ("BGPPeer", "{}", "spec.peerIP"),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, peerSelector: all() }",
            "spec.peerIP",
        ),
        ("BGPPeer", "{ peerIP: router.example }", "spec.peerIP"),
        ("BGPPeer", "{ peerIP: '192.0.2.1:0' }", "spec.peerIP"),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, node: a, nodeSelector: all() }",
            "spec.nodeSelector",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, nodeSelector: 'all(' }",
            "spec.nodeSelector",
        ),
        (
            "BGPPeer",
            "{ peerSelector: all(), asNumber: 65001 }",
            "spec.asNumber",
        ),
        (
            "BGPPeer",
            "{ localWorkloadSelector: all() }",
            "spec.asNumber",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, asNumber: 0 }",
            "spec.asNumber",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, asNumber: '65536.1' }",
            "spec.asNumber",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, localASNumber: 4294967295 }",
            "spec.localASNumber",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, numAllowedLocalASNumbers: 256 }",
            "spec.numAllowedLocalASNumbers",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, nextHopMode: Me }",
            "spec.nextHopMode",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, nextHopMode: Auto, keepOriginalNextHop: true }",
            "spec.nextHopMode",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, password: {} }",
            "spec.password",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, sourceAddress: Node }",
            "spec.sourceAddress",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, maxRestartTime: 4096s }",
            "spec.maxRestartTime",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, keepaliveTime: 500ms }",
            "spec.keepaliveTime",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, ttlSecurity: 0 }",
            "spec.ttlSecurity",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, reachableBy: fd00::1 }",
            "spec.reachableBy",
        ),
        (
            "BGPPeer",
            "{ peerSelector: all(), reachableBy: 192.0.2.1 }",
            "spec.reachableBy",
        ),
        (
            "BGPPeer",
            "{ peerIP: 192.0.2.1, reversePeering: Never }",
            "spec.reversePeering",
        ),
        ("BGPFilter", "{}", ""),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, cidr: 10.0.0.0/8, matchOperator: In, prefixLength: { \
             max: 26 } }] }",
            "",
        ),
        (
            "BGPFilter",
            "{ exportV6: [{ action: Reject, cidr: 'fd00::/8', matchOperator: NotIn }] }",
            "",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Reject, source: RemotePeers, interface: 'eth*', peerType: \
             eBGP, priority: 512 }] }",
            "",
        ),
        (
            "BGPFilter",
            "{ exportV4: [{ action: Accept, communities: { values: ['1:2:3'] }, asPathPrefix: \
             [65001], operations: \
          [{ addCommunity: { value: '64512:1' } }, { prependASPath: { prefix: [1, 2] } }, { \
          setPriority: { value: 7 } }] }] }",
            "",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Permit }] }",
            "spec.importV4[0].action",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept }, { action: Accept, cidr: 10.0.0.0/8 }] }",
            "spec.importV4[1].cidr",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, cidr: ten, matchOperator: In }] }",
            "spec.importV4[0].cidr",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, cidr: 'fd00::/8', matchOperator: In }] }",
            "spec.importV4[0].cidr",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, cidr: 10.0.0.0/8, matchOperator: Within }] }",
            "spec.importV4[0].matchOperator",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, prefixLength: { min: 8 } }] }",
            "spec.importV4[0].prefixLength",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, cidr: 10.0.0.0/8, matchOperator: In, prefixLength: { \
             min: 28, max: 26 } }] }",
            "spec.importV4[0].prefixLength",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, source: Kernel }] }",
            "spec.importV4[0].source",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, peerType: both }] }",
            "spec.importV4[0].peerType",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, interface: a-name-that-is-long }] }",
            "spec.importV4[0].interface",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, communities: { values: ['1:2', '3:4'] } }] }",
            "spec.importV4[0].communities.values",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, communities: { values: ['1:65536'] } }] }",
            "spec.importV4[0].communities.values[0]",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, asPathPrefix: [0] }] }",
            "spec.importV4[0].asPathPrefix[0]",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, priority: 0 }] }",
            "spec.importV4[0].priority",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Reject, operations: [{ setPriority: { value: 1 } }] }] }",
            "spec.importV4[0].operations",
        ),
        (
            "BGPFilter",
            "{ importV4: [{ action: Accept, operations: [{}] }] }",
            "spec.importV4[0].operations[0]",
        ),
        ("BGPConfiguration", "{}", ""),
        (
            "BGPConfiguration",
            "{ asNumber: 64512, nodeToNodeMeshEnabled: false, listenPort: 1179, bindMode: NodeIP }",
            "",
        ),
        (
            "BGPConfiguration",
            "{ serviceClusterIPs: [{ cidr: 10.96.0.0/12 }], serviceLoadBalancerAggregation: \
             Disabled }",
            "",
        ),
        (
            "BGPConfiguration",
            "{ communities: [{ name: rack, value: '1:2' }], prefixAdvertisements: [{ cidr: \
             10.65.0.0/16, communities: [rack, '3:4:5'] }] }",
            "",
        ),
        (
            "BGPConfiguration",
            "{ nodeMeshPassword: { secretKeyRef: { name: bgp, key: mesh } }, \
             nodeMeshMaxRestartTime: 90s }",
            "",
        ),
        ("BGPConfiguration", "{ asNumber: many }", "spec.asNumber"),
        (
            "BGPConfiguration",
            "{ listenPort: 65536 }",
            "spec.listenPort",
        ),
        ("BGPConfiguration", "{ bindMode: All }", "spec.bindMode"),
        (
            "BGPConfiguration",
            "{ serviceExternalIPs: [{ cidr: all }] }",
            "spec.serviceExternalIPs[0].cidr",
        ),
        (
            "BGPConfiguration",
            "{ communities: [{ name: rack, value: '1:2' }] }",
            "spec.communities",
        ),
        (
            "BGPConfiguration",
            "{ prefixAdvertisements: [{ cidr: 10.65.0.0/16, communities: [rack] }] }",
            "spec.prefixAdvertisements[0].communities[0]",
        ),
        (
            "BGPConfiguration",
            "{ nodeToNodeMeshEnabled: false, nodeMeshMaxRestartTime: 90s }",
            "spec.nodeMeshMaxRestartTime",
        ),
        (
            "BGPConfiguration",
            "{ localWorkloadPeeringIPV6: 192.0.2.1 }",
            "spec.localWorkloadPeeringIPV6",
        ),
        (
            "BGPConfiguration",
            "{ ipv4NormalRoutePriority: 0 }",
            "spec.ipv4NormalRoutePriority",
        ),
    ];
    for (kind, spec, field) in rows {
        let object = object(kind, spec);
        let found = match kind {
            "BGPPeer" => problems(&object, parse::bgp::peer),
            "BGPFilter" => problems(&object, parse::bgp::filter),
            _ => problems(&object, parse::bgp::settings),
        };
        let expected = if field.is_empty() {
            vec![]
        } else {
            vec![format!("{field}: ")]
        };
        let is_as_expected = found.len() == expected.len()
            && found
                .iter()
                .zip(&expected)
                .all(|(found, expected)| found.starts_with(expected));
        assert!(is_as_expected, "{kind} {spec}: {found:#?}");
        let definition = crds::all()
            .into_iter()
            .find(|definition| definition.spec.names.kind == kind)
            .unwrap();
        let schema = serde_json::to_value(&definition.spec.versions[0].schema).unwrap();
        // What the definition refuses, the code refuses as well.
        if let Err(errors) = Validator::new().validate(&schema["openAPIV3Schema"], &object, None) {
            assert!(!field.is_empty(), "{kind} {spec}: {:?}", errors.into_vec());
        }
    }
}

#[test]
fn what_is_parsed_is_what_is_written() {
    let object = object(
        "BGPPeer",
        "{ peerIP: '192.0.2.1:1179', node: a, asNumber: '1.10', localASNumber: 64999, \
         numAllowedLocalASNumbers: 2, \
         filters: [one, two], keepOriginalNextHop: true, password: { secretKeyRef: { name: bgp, \
         key: rack } }, \
         sourceAddress: None, maxRestartTime: 2m, keepaliveTime: 10s, ttlSecurity: 1, \
         reachableBy: 192.0.2.9, \
         reversePeering: Manual }",
    );
    let peer: BGPPeer = serde_json::from_value(object).unwrap();
    let parsed = parse::bgp::peer(&peer).unwrap();
    assert_eq!(parsed.nodes, NodePeers::Node("a".into()));
    assert_eq!(
        parsed.target,
        PeerTarget::Address("192.0.2.1:1179".parse().unwrap())
    );
    assert_eq!(
        (parsed.asn, parsed.local_asn, parsed.allowed_local_asn),
        (Some(65546), Some(64999), 2)
    );
    assert_eq!(
        (parsed.filters, parsed.next_hop_mode),
        (vec!["one".into(), "two".into()], BgpNextHopMode::Keep)
    );
    assert_eq!(parsed.password.unwrap().key, "rack");
    assert_eq!(
        (
            parsed.uses_node_address,
            parsed.is_reversed,
            parsed.ttl_security
        ),
        (false, false, Some(1))
    );
    let times = (parsed.restart_time, parsed.keepalive);
    assert_eq!(
        times,
        (
            Some(Duration::from_secs(120)),
            Some(Duration::from_secs(10))
        )
    );
    assert_eq!(parsed.reachable_by, "192.0.2.9".parse().ok());
    let object = self::object(
        "BGPFilter",
        "{ exportV6: [{ action: Accept, peerType: iBGP, operations: [{ setPriority: { value: 7 } \
         }] }] }",
    );
    let filter: v3::BGPFilter = serde_json::from_value(object).unwrap();
    let BgpFilter { import, export } = parse::bgp::filter(&filter).unwrap();
    assert!(import.is_empty() && export.ipv4.is_empty());
    assert_eq!(
        export.ipv6[0].action,
        FilterAction::Accept(vec![RouteOperation::SetPriority(7)])
    );
    let object = self::object(
        "BGPConfiguration",
        "{ communities: [{ name: rack, value: '1:2' }], \
         prefixAdvertisements: [{ cidr: 10.65.0.0/16, communities: [rack, '3:4:5'] }] }",
    );
    let configuration: v3::BGPConfiguration = serde_json::from_value(object).unwrap();
    let settings = parse::bgp::settings(&configuration).unwrap();
    let communities: Vec<String> = settings
        .communities
        .values()
        .flatten()
        .map(ToString::to_string)
        .collect();
    assert_eq!(communities, ["1:2", "3:4:5"]);
}
