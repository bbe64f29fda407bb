//! Pods, nodes, slices, sets, pools, blocks and settings in parsed form.

#![allow(clippy::unwrap_used)]

mod settings;

use expect_test::expect;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use margay_api::network::{Encapsulation, Mac};
use margay_api::v3::{self, GlobalNetworkSet, IPAMBlock, IPPool, NetworkSet};
use margay_api::{ipam, k8s};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// A Kubernetes object from YAML.
fn mk<T: DeserializeOwned>(yaml: &str) -> T {
    serde_yaml_ng::from_str(yaml).unwrap()
}

/// An object of Calico's kinds from YAML without type.
fn mk_v3<T: DeserializeOwned>(yaml: &str) -> T {
    let mut value: Value = serde_yaml_ng::from_str(yaml).unwrap();
    let object = value.as_object_mut().unwrap();
    object.insert("apiVersion".to_owned(), json!("projectcalico.org/v3"));
    object.insert("kind".to_owned(), json!("any"));
    object.entry("metadata").or_insert(json!({}));
    serde_json::from_value(value).unwrap()
}

/// A pod `ns/p` on node `n1` with more metadata, spec and status.
fn mk_pod(metadata: &str, spec: &str, status: &str) -> Pod {
    mk(&format!(
        "{{metadata: {{namespace: ns, name: p, {metadata}}}, spec: {{nodeName: n1, containers: [], \
         {spec}}}, status: {{{status}}}}}"
    ))
}

#[test]
fn a_pod_is_an_endpoint() {
    let pod = mk_pod(
        "labels: {app: web, projectcalico.org/namespace: other, projectcalico.org/serviceaccount: \
         root, pcns.a: b, pcsa.a: b}",
        "serviceAccountName: sa, initContainers: [{name: i, ports: [{containerPort: 9, name: side, \
         protocol: UDP}]}], containers: [{name: c, ports: [{containerPort: 80, name: http}, \
         {containerPort: 81}, {containerPort: 0, name: bad}]}]",
        "podIP: 10.0.0.5, podIPs: [{ip: 10.0.0.5}, {ip: 'fd00::5'}]",
    );
    let (key, endpoint) = k8s::pod::workload_endpoint(&pod).unwrap();
    expect![[r#"
        ns/p WorkloadEndpoint {
            node: "n1",
            labels: {
                "app": "web",
                "projectcalico.org/namespace": "ns",
                "projectcalico.org/orchestrator": "k8s",
                "projectcalico.org/serviceaccount": "sa",
            },
            service_account: "sa",
            addresses: [
                10.0.0.5,
                fd00::5,
            ],
            ports: [
                NamedPort {
                    name: "http",
                    protocol: Protocol(
                        6,
                    ),
                    port: 80,
                },
                NamedPort {
                    name: "side",
                    protocol: Protocol(
                        17,
                    ),
                    port: 9,
                },
            ],
            uid: "",
            interface: "cali0ad56bf5e97",
        }
    "#]]
    .assert_eq(&format!("{key} {endpoint:#?}\n"));
}

/// Metadata, status, addresses.
const ADDRESSES: &[(&str, &str, &[&str])] = &[
    ("", "", &[]),
    ("", "podIP: 10.0.0.5", &["10.0.0.5"]),
    (
        "annotations: {cni.projectcalico.org/podIP: 10.0.0.6/32}",
        "",
        &["10.0.0.6"],
    ),
    (
        "annotations: {cni.projectcalico.org/podIP: 10.0.0.6/32}",
        "podIP: 10.0.0.5",
        &["10.0.0.5"],
    ),
    (
        "annotations: {cni.projectcalico.org/podIPs: 'fd00::6/128'}",
        "podIP: 10.0.0.5, podIPs: [{ip: 10.0.0.5}]",
        &["10.0.0.5"],
    ),
    (
        "annotations: {cni.projectcalico.org/podIP: 10.0.0.6/32, cni.projectcalico.org/podIPs: \
         '10.0.0.7/32, fd00::7/128'}",
        "",
        &["10.0.0.7", "fd00::7"],
    ),
    (
        "annotations: {cni.projectcalico.org/podIP: nonsense}",
        "podIP: 10.0.0.5",
        &["10.0.0.5"],
    ),
    (
        "annotations: {cni.projectcalico.org/podIP: ''}",
        "podIP: 10.0.0.5",
        &["10.0.0.5"],
    ),
    (
        "deletionTimestamp: '2026-01-01T00:00:00Z'",
        "podIP: 10.0.0.5",
        &["10.0.0.5"],
    ),
    (
        "deletionTimestamp: '2026-01-01T00:00:00Z', annotations: {cni.projectcalico.org/podIP: ''}",
        "podIP: 10.0.0.5",
        &[],
    ),
    ("", "podIP: 10.0.0.5, phase: Running", &["10.0.0.5"]),
    ("", "podIP: 10.0.0.5, phase: Succeeded", &[]),
    (
        "annotations: {cni.projectcalico.org/podIP: 10.0.0.6/32}",
        "podIP: 10.0.0.5, phase: Failed",
        &[],
    ),
];

#[test]
fn addresses_of_pods() {
    for (metadata, status, wanted) in ADDRESSES {
        let (_, endpoint) = k8s::pod::workload_endpoint(&mk_pod(metadata, "", status)).unwrap();
        let found: Vec<String> = endpoint.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(found, *wanted, "{metadata} {status}");
    }
}

#[test]
fn pods_of_the_host_network_are_no_endpoints() {
    assert!(k8s::pod::workload_endpoint(&mk_pod("", "hostNetwork: true", "")).is_none());
    assert!(k8s::pod::workload_endpoint(&mk_pod("", "nodeName: ''", "")).is_none());
}

#[test]
fn names_of_parents_are_the_true_ones() {
    let namespace: Namespace =
        mk("{metadata: {name: a, labels: {x: y, projectcalico.org/name: b}}}");
    let account: ServiceAccount = mk("{metadata: {name: s, namespace: a}}");
    expect![[r#"
        ("a", {"projectcalico.org/name": "a", "x": "y"})
        (NamespacedName { namespace: "a", name: "s" }, {"projectcalico.org/name": "s"})
    "#]]
    .assert_eq(&format!(
        "{:?}\n{:?}\n",
        k8s::namespace(&namespace),
        k8s::service_account(&account)
    ));
}

/// Annotations and addresses of a node, and its parsed form.
#[test]
fn nodes() {
    let node = |annotations: &str, addresses: &str| {
        let node: Node = mk(&format!(
            "{{metadata: {{name: n, labels: {{a: b}}, annotations: {{{annotations}}}}}, status: \
             {{addresses: [{addresses}]}}}}"
        ));
        let info = k8s::node::node_info(&node);
        format!(
            "{:?} {:?} {:?} {:?} {:?}",
            info.ipv4, info.ipv6, info.vtep, info.vtep6, info.ipip
        )
    };
    let kubelet = "{type: Hostname, address: n}, {type: ExternalIP, address: 1.2.3.4}, {type: \
                   InternalIP, address: 'fd00::1'}, {type: InternalIP, address: 192.168.0.1}";
    assert_eq!(node("", ""), "None None None None None");
    assert_eq!(
        node("", kubelet),
        "Some(192.168.0.1/32) Some(fd00::1/128) None None None"
    );
    let ours = "projectcalico.org/IPv4Address: 192.168.0.2/24, \
                projectcalico.org/IPv4VXLANTunnelAddr: 10.0.0.1, \
                projectcalico.org/VXLANTunnelMACAddr: '66:00:00:00:0a:FF', \
                projectcalico.org/IPv4IPIPTunnelAddr: 10.0.0.2";
    assert_eq!(
        node(ours, kubelet),
        "Some(192.168.0.2/24) Some(fd00::1/128) Some(Vtep { address: 10.0.0.1, mac: Mac([102, 0, \
         0, 0, 10, 255]) }) None Some(10.0.0.2)"
    );
    let sixth = "projectcalico.org/IPv6Address: 'fd00::2/64', \
                 projectcalico.org/IPv6VXLANTunnelAddr: 'fd00:10::1', \
                 projectcalico.org/VXLANTunnelMACAddrV6: '66:00:00:00:00:01'";
    assert_eq!(
        node(sixth, kubelet),
        "Some(192.168.0.1/32) Some(fd00::2/64) None Some(Vtep { address: fd00:10::1, mac: \
         Mac([102, 0, 0, 0, 0, 1]) }) None"
    );
    let half = "projectcalico.org/IPv4Address: x, projectcalico.org/IPv4VXLANTunnelAddr: 10.0.0.1, \
                projectcalico.org/VXLANTunnelMACAddr: '66', \
                projectcalico.org/IPv4IPIPTunnelAddr: 0.0.0.0";
    assert_eq!(
        node(half, kubelet),
        "Some(192.168.0.1/32) Some(fd00::1/128) None None None"
    );
}

#[test]
fn mac_addresses_are_read_as_they_are_written() {
    let mac = Mac([0x66, 0, 1, 0xab, 0xff, 9]);
    assert_eq!(mac.to_string(), "66:00:01:ab:ff:09");
    assert_eq!(mac.to_string().parse(), Ok(mac));
    for bad in [
        "",
        "66:00:01:ab:ff",
        "66:00:01:ab:ff:09:00",
        "66:0:01:ab:ff:09",
        "6g:00:01:ab:ff:09",
    ] {
        assert!(bad.parse::<Mac>().is_err(), "{bad}");
    }
}

#[test]
fn slices_are_backends_of_their_service() {
    let slice: EndpointSlice = mk(
        "{metadata: {namespace: ns, name: s-1, labels: {kubernetes.io/service-name: s}}, \
         addressType: IPv4, endpoints: [{addresses: [10.0.0.2], conditions: {ready: false}}, \
         {addresses: [10.0.0.1]}, {addresses: [a.example]}], ports: [{port: 80, protocol: TCP}, \
         {port: 53, protocol: UDP}, {name: x}]}",
    );
    let shown: Vec<String> = k8s::service::backends(&slice)
        .iter()
        .map(|backend| {
            format!(
                "{} {} {}",
                backend.address, backend.protocol.0, backend.port
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            "10.0.0.1 6 80",
            "10.0.0.1 17 53",
            "10.0.0.2 6 80",
            "10.0.0.2 17 53"
        ]
    );
    assert_eq!(
        k8s::service::service_of(&slice).unwrap().to_string(),
        "ns/s"
    );
}

#[test]
fn network_sets_keep_valid_members() {
    let set: NetworkSet = mk_v3(
        "{metadata: {namespace: ns, name: s, labels: {a: b, projectcalico.org/namespace: other, \
         pcns.x: y}}, spec: {nets: [10.1.2.3/8, 10.0.0.1, nonsense, 'fd00::1']}}",
    );
    let refusal = v3::parse::netset::network_set(&set).unwrap_err();
    let global: GlobalNetworkSet = mk_v3("{metadata: {name: s, labels: {a: b}}, spec: {}}");
    expect![[r#"
        metadata.labels[pcns.x]: "y": this label identifies the object and is set by the system only; remove the label
        metadata.labels[projectcalico.org/namespace]: "other": this label identifies the object and is set by the system only; remove the label
        spec.nets[2]: "nonsense": not an address or range; write it like 10.0.0.0/8, 10.1.2.3, fd00::/8 or fd00::1
        Some(NetworkSet { labels: {"a": "b", "projectcalico.org/namespace": "ns"}, nets: [10.0.0.0/8, 10.0.0.1/32, fd00::1/128] })
        Ok(NetworkSet { labels: {"a": "b"}, nets: [] })
    "#]].assert_eq(&format!(
        "{refusal}\n{:?}\n{:?}\n",
        refusal.closed,
        v3::parse::netset::global_network_set(&global)
    ));
}

/// A pool's spec and its encapsulation.
const ENCAPSULATIONS: &[(&str, Encapsulation)] = &[
    ("", Encapsulation::None),
    ("vxlanMode: Never, ipipMode: Never", Encapsulation::None),
    ("vxlanMode: Always, ipipMode: Never", Encapsulation::Vxlan),
    ("vxlanMode: CrossSubnet", Encapsulation::VxlanCrossSubnet),
    ("ipipMode: Always", Encapsulation::Ipip),
    (
        "ipipMode: CrossSubnet, disabled: true",
        Encapsulation::IpipCrossSubnet,
    ),
];

#[test]
fn pools() {
    for (spec, wanted) in ENCAPSULATIONS {
        let pool: IPPool = mk_v3(&format!("{{spec: {{cidr: 10.0.0.0/16, {spec}}}}}"));
        assert_eq!(
            v3::parse::pool::pool(&pool).unwrap().encapsulation,
            *wanted,
            "{spec}"
        );
    }
    let pool: IPPool =
        mk_v3("{spec: {cidr: 10.0.0.9/16, natOutgoing: true, vxlanMode: Sometimes}}");
    let nonsense: IPPool = mk_v3("{spec: {cidr: nonsense}}");
    let [parsed, refused] = [&pool, &nonsense].map(v3::parse::pool::pool);
    expect![[r#"
        Err(Refusal { problems: [Problem { field: "spec.vxlanMode", value: "Sometimes", rule: "not a mode", remedy: "use Never, Always or CrossSubnet" }], closed: Some(Pool { cidr: 10.0.0.0/16, encapsulation: None, nat_outgoing: true, block_size: 26, is_exported: true, created: 0 }), prefers_former: true })
        Err(Refusal { problems: [Problem { field: "spec.cidr", value: "nonsense", rule: "not a range", remedy: "write it like 10.244.0.0/16" }], closed: None, prefers_former: true })
    "#]].assert_eq(&format!("{parsed:?}\n{refused:?}\n"));
}

#[test]
fn blocks() {
    let block = |spec: &str| {
        let block: IPAMBlock = mk_v3(&format!(
            "{{metadata: {{name: 10-0-0-0-30}}, spec: {{cidr: 10.0.0.0/30, unallocated: [], \
             {spec}}}}}"
        ));
        format!("{:?}\n", ipam::info::block_info(&block))
    };
    let attributes = "attributes: [{handle_id: a, secondary: {node: n1}}, {handle_id: b, \
                      secondary: {node: n2}}, {secondary: {node: n3}, releasedAt: \
                      '2026-01-01T00:00:00Z'}]";
    let shown = [
        block(&format!(
            "affinity: 'host:n1', allocations: [0, 1, 2, null], {attributes}"
        )),
        block(&format!(
            "affinity: 'virtual:load-balancer', allocations: [0, null, null, null], {attributes}"
        )),
        block("deleted: true, allocations: [], attributes: []"),
        block("allocations: [0, null, null, null], attributes: []"),
    ];
    expect![[r#"
        Ok(Some((10.0.0.0/30, BlockInfo { node: Some("n1"), borrowed: [(10.0.0.1, "n2")], tunnels: [], created: 0 })))
        Ok(Some((10.0.0.0/30, BlockInfo { node: None, borrowed: [(10.0.0.0, "n1")], tunnels: [], created: 0 })))
        Ok(None)
        Err(Attribute { cidr: 10.0.0.0/30, ordinal: 0, index: 0 })
    "#]]
    .assert_eq(&shown.concat());
}

#[test]
fn invalid_parts_of_a_host_endpoint_are_left_out() {
    let parse = |metadata: &str, spec: &str| {
        let yaml = format!("{{metadata: {{name: h, {metadata}}}, spec: {{{spec}}}}}");
        match v3::parse::host::host_endpoint(&mk_v3(&yaml)) {
            Ok(endpoint) => format!("{endpoint:?}\n"),
            Err(refusal) => format!("{refusal}\n{:?}\n", refusal.closed),
        }
    };
    let shown = [
        parse(
            "labels: {host: a}",
            "node: n1, interfaceName: '*', expectedIPs: ['fd00::1', 192.0.2.1, 192.0.2.1], \
             profiles: [kns.a, ksa.a.b.c, kns.a, projectcalico-default-allow]",
        ),
        parse(
            "labels: {host: a, projectcalico.org/namespace: kube-system, pcns.team: a}",
            "node: n1, expectedIPs: [192.0.2.1, x], profiles: [kns., kns.a], ports: [{name: http, \
             protocol: TCP, port: 80}, {name: x, protocol: x, port: 0}]",
        ),
        parse("", "node: n1, expectedIPs: [x]"),
        parse("", "interfaceName: eth0/1"),
    ];
    expect![[r#"
        HostEndpoint { node: "n1", labels: {"host": "a"}, interface: All, addresses: [192.0.2.1, fd00::1], ports: [], profiles: [Namespace("a"), ServiceAccount(NamespacedName { namespace: "a", name: "b.c" }), Allow] }
        metadata.labels[pcns.team]: "a": this label identifies the object and is set by the system only; remove the label
        metadata.labels[projectcalico.org/namespace]: "kube-system": this label identifies the object and is set by the system only; remove the label
        spec.expectedIPs[1]: "x": not an address; write it like 192.0.2.1 or 2001:db8::1, without a prefix length
        spec.ports[1].protocol: "x": not a protocol that has ports; use TCP, UDP, SCTP or UDPLite
        spec.ports[1].port: "0": not from 1 to 65535; use a number in that range
        spec.profiles[0]: "kns.": there is no such profile, which denies; use kns.NAMESPACE, ksa.NAMESPACE.SERVICEACCOUNT or projectcalico-default-allow
        Some(HostEndpoint { node: "n1", labels: {"host": "a"}, interface: All, addresses: [192.0.2.1], ports: [NamedPort { name: "http", protocol: Protocol(6), port: 80 }], profiles: [Unknown, Namespace("a")] })
        spec.expectedIPs[0]: "x": not an address; write it like 192.0.2.1 or 2001:db8::1, without a prefix length
        Some(HostEndpoint { node: "n1", labels: {}, interface: All, addresses: [], ports: [], profiles: [] })
        spec.node: "": a host endpoint belongs to one node; write the name of the node
        spec.interfaceName: "eth0/1": an interface has a name of at most 15 letters, digits, '_', '.' and '-'; write the name of the interface on the node, or * for all interfaces
        None
    "#]].assert_eq(&shown.concat());
}
