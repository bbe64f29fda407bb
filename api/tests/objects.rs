//! Pods, nodes, slices, sets, pools, blocks and settings in parsed form.

#![allow(clippy::unwrap_used)]

use expect_test::expect;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use margay_api::meta::Labels;
use margay_api::network::{Encapsulation, Mac};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::Protocol;
use margay_api::settings::{Failsafe, FelixSettings, LogRate, TimeUnit, log_prefix};
use margay_api::v3::{self, FelixConfiguration, GlobalNetworkSet, IPAMBlock, IPPool, NetworkSet};
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
            "{:?} {:?} {:?} {:?}",
            info.ipv4, info.ipv6, info.vtep, info.vtep6
        )
    };
    let kubelet = "{type: Hostname, address: n}, {type: ExternalIP, address: 1.2.3.4}, {type: \
                   InternalIP, address: 'fd00::1'}, {type: InternalIP, address: 192.168.0.1}";
    assert_eq!(node("", ""), "None None None None");
    assert_eq!(
        node("", kubelet),
        "Some(192.168.0.1/32) Some(fd00::1/128) None None"
    );
    let ours = "projectcalico.org/IPv4Address: 192.168.0.2/24, \
                projectcalico.org/IPv4VXLANTunnelAddr: 10.0.0.1, \
                projectcalico.org/VXLANTunnelMACAddr: '66:00:00:00:0a:FF'";
    assert_eq!(
        node(ours, kubelet),
        "Some(192.168.0.2/24) Some(fd00::1/128) Some(Vtep { address: 10.0.0.1, mac: Mac([102, 0, \
         0, 0, 10, 255]) }) None"
    );
    let sixth = "projectcalico.org/IPv6Address: 'fd00::2/64', \
                 projectcalico.org/IPv6VXLANTunnelAddr: 'fd00:10::1', \
                 projectcalico.org/VXLANTunnelMACAddrV6: '66:00:00:00:00:01'";
    assert_eq!(
        node(sixth, kubelet),
        "Some(192.168.0.1/32) Some(fd00::2/64) None Some(Vtep { address: fd00:10::1, mac: \
         Mac([102, 0, 0, 0, 0, 1]) })"
    );
    let half = "projectcalico.org/IPv4Address: x, projectcalico.org/IPv4VXLANTunnelAddr: 10.0.0.1, \
                projectcalico.org/VXLANTunnelMACAddr: '66'";
    assert_eq!(
        node(half, kubelet),
        "Some(192.168.0.1/32) Some(fd00::1/128) None None"
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
    expect![[r#"
        Err(Refusal { problems: [Problem { field: "spec.vxlanMode", value: "Sometimes", rule: "not a mode", remedy: "use Never, Always or CrossSubnet" }], closed: Some(Pool { cidr: 10.0.0.0/16, encapsulation: None, nat_outgoing: true, block_size: 26, created: 0 }), prefers_former: true })
        Err(Refusal { problems: [Problem { field: "spec.cidr", value: "nonsense", rule: "not a range", remedy: "write it like 10.244.0.0/16" }], closed: None, prefers_former: true })
    "#]].assert_eq(&format!("{:?}\n{:?}\n", v3::parse::pool::pool(&pool), v3::parse::pool::pool(&nonsense)));
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

fn mk_settings(name: &str, spec: &str) -> FelixConfiguration {
    mk_v3(&format!("{{metadata: {{name: {name}}}, spec: {{{spec}}}}}"))
}

#[test]
fn of_features_that_are_overridden_one_is_followed() {
    for (list, wanted) in [
        ("", Ok(false)),
        ("ChecksumOffloadBroken=true", Ok(true)),
        (
            "SNATFullyRandom=false, checksumOffloadBroken = TRUE",
            Ok(true),
        ),
        (
            "ChecksumOffloadBroken=true,ChecksumOffloadBroken=false",
            Ok(false),
        ),
        ("ChecksumOffloadBroken=,MASQFullyRandom=true", Ok(false)),
        ("ChecksumOffloadBroken", Err("ChecksumOffloadBroken")),
        (
            "SNATFullyRandom=maybe,ChecksumOffloadBroken=true",
            Err("SNATFullyRandom=maybe"),
        ),
    ] {
        let parsed = v3::parse::felix::overrides(&mk_settings(
            "default",
            &format!("featureDetectOverride: '{list}'"),
        ));
        let found = parsed.map(|overrides| {
            overrides
                .over(FelixSettings::default())
                .checksum_offload_broken
        });
        let found = found.map_err(|refusal| refusal.problems[0].value.clone());
        assert_eq!(found, wanted.map_err(str::to_owned), "{list}");
    }
}

#[test]
fn settings_override_weaker_ones_and_invalid_values_count_as_unset() {
    let overrides = |name: &str, spec: &str| v3::parse::felix::overrides(&mk_settings(name, spec));
    let nothing = overrides("default", "").unwrap();
    assert_eq!(
        nothing.over(FelixSettings::default()),
        FelixSettings::default()
    );
    let all = overrides(
        "default",
        "vxlanVNI: 7, vxlanPort: 8, vxlanMTU: 1400, natOutgoingExclusions: IPPoolsAndHostIPs, \
         disableConntrackInvalidCheck: true, logPrefix: x, logActionRateLimit: 10/minute, \
         logActionRateLimitBurst: 0, ipv6Support: false, defaultEndpointToHostAction: Drop, \
         bpfEnabled: true",
    );
    let all = all.unwrap().over(FelixSettings::default());
    assert_eq!(
        all.log_rate,
        Some(LogRate {
            count: 10,
            unit: TimeUnit::Minute
        })
    );
    assert_eq!(all.log_burst, LogRate::BURST);
    assert_eq!(nothing.over(all.clone()), all);
    let node = overrides("node.n1", "vxlanPort: 9").unwrap();
    assert!(node.is_for("n1", None) && !node.is_for("n2", Some(&Labels::new())));
    let node = node.over(all.clone());
    assert_eq!(
        node,
        FelixSettings {
            vxlan_port: 9,
            ..all
        }
    );
    let refusal = overrides(
        "default",
        "vxlanVNI: 0, vxlanPort: 65536, defaultEndpointToHostAction: Explode, \
         natOutgoingExclusions: x, vxlanMTU: 1300, logActionRateLimit: 0/day, \
         logActionRateLimitBurst: 10000",
    );
    let refusal = refusal.unwrap_err();
    let closed = refusal.closed.clone().unwrap();
    assert_eq!(
        closed.over(node.clone()),
        FelixSettings {
            vxlan_mtu: 1300,
            ..node
        }
    );
    expect![[r#"
        spec.defaultEndpointToHostAction: "Explode": not an action; use Accept, Drop or Return
        spec.vxlanVNI: "0": not from 1 to 16777215; use a number in that range, or remove the field
        spec.vxlanPort: "65536": not from 1 to 65535; use a number in that range, or remove the field
        spec.natOutgoingExclusions: "x": not a known value; use IPPoolsOnly or IPPoolsAndHostIPs
        spec.logActionRateLimit: "0/day": not a rate; write it like 10/second, with a number from 1 to 9999 and second, minute, hour or day
        spec.logActionRateLimitBurst: "10000": not from 0 to 9999; use a number in that range, or remove the field
    "#]].assert_eq(&format!("{refusal}\n"));
}

#[test]
fn failsafe_ports_are_kept_disabled_or_replaced_but_not_by_mistake() {
    let of = |spec: &str| match v3::parse::felix::overrides(&mk_settings("default", spec)) {
        Ok(overrides) => overrides.over(FelixSettings::default()),
        Err(refusal) => refusal.closed.unwrap().over(FelixSettings::default()),
    };
    let default = FelixSettings::default();
    assert_eq!(of(""), default);
    assert_eq!(of("failsafeInboundHostPorts: []").failsafe_inbound, []);
    assert_eq!(
        of("failsafeInboundHostPorts: []").failsafe_outbound,
        default.failsafe_outbound
    );
    let ssh = Failsafe {
        protocol: Protocol::TCP,
        port: 22,
        net: None,
    };
    let dns = Failsafe {
        protocol: Protocol::UDP,
        port: 53,
        net: Some("10.1.0.0/16".parse().unwrap()),
    };
    let written = "failsafeOutboundHostPorts: [{protocol: UDP, port: 53, net: 10.1.2.3/16}, {port: \
                   22}, {protocol: tcp, port: 22}]";
    assert_eq!(of(written).failsafe_outbound, [ssh, dns]);
    // A list with an invalid entry counts as unset.
    assert_eq!(of("failsafeInboundHostPorts: [{port: 0}]"), default);
    assert_eq!(
        of("failsafeInboundHostPorts: [{port: 2222}, {port: 22, net: here}]"),
        default
    );
    for list in [Failsafe::default_inbound(), Failsafe::default_outbound()] {
        assert!(list.is_sorted(), "as what is written: {list:?}");
    }
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

#[test]
fn settings_apply_to_nodes_by_name_or_label() {
    let labels = Labels::from([("zone".to_owned(), "a".to_owned())]);
    let selected =
        v3::parse::felix::overrides(&mk_settings("east", "nodeSelector: zone == 'a'")).unwrap();
    assert!(
        selected.is_for("n1", Some(&labels))
            && !selected.is_for("n1", Some(&Labels::new()))
            && !selected.is_for("n1", None)
    );
    let mut shown = String::new();
    for (name, spec) in [
        ("east", ""),
        ("east", "nodeSelector: 'zone = a'"),
        ("default", "nodeSelector: has(zone)"),
        ("node.n1", "nodeSelector: has(zone)"),
    ] {
        let refusal = v3::parse::felix::overrides(&mk_settings(name, spec)).unwrap_err();
        assert_eq!(refusal.closed, None);
        shown += &format!("{refusal}\n");
    }
    expect![[r#"
        spec.nodeSelector: "": FelixConfiguration east applies to no node; give a nodeSelector, or name the object default or node.NAME
        spec.nodeSelector: "zone = a": not a selector: at character 6: expected an operator after a label, found '='; use ==, !=, in, not in, contains, starts with or ends with, or has(label)
        spec.nodeSelector: "has(zone)": the names default and node.NAME already determine the nodes; remove nodeSelector, or give the object another name
        spec.nodeSelector: "has(zone)": the names default and node.NAME already determine the nodes; remove nodeSelector, or give the object another name
    "#]].assert_eq(&shown);
}

#[test]
fn rate_limits_of_log_lines() {
    for text in ["1/second", "10/minute", "9999/hour", "3/day"] {
        assert_eq!(text.parse::<LogRate>().unwrap().to_string(), text);
    }
    for text in [
        "",
        "1",
        "0/second",
        "10000/second",
        "-1/day",
        "+1/day",
        "1/week",
        "1/seconds",
        "1 /second",
        "1/second ",
    ] {
        let error = text.parse::<LogRate>().unwrap_err();
        assert!(
            error.to_string().contains("write it like 10/second"),
            "{text}"
        );
    }
}

/// A template, and the prefix that it results in.
#[test]
fn templates_of_log_prefixes() {
    let key = |kind, namespace: &str| PolicyKey {
        kind,
        namespace: namespace.to_owned(),
        name: "web".to_owned(),
    };
    let cases = [
        ("calico-packet", PolicyKind::NetworkPolicy, "calico-packet"),
        (
            "%t %k %n %p",
            PolicyKind::NetworkPolicy,
            "tier np web ns/web",
        ),
        ("%t%k%n%p", PolicyKind::GlobalNetworkPolicy, "tiergnpwebweb"),
        ("%k", PolicyKind::KubernetesNetworkPolicy, "knp"),
        ("%k", PolicyKind::KubernetesClusterNetworkPolicy, "kcnp"),
        (
            "a%n%%t %k %p",
            PolicyKind::GlobalNetworkPolicy,
            "aweb%tier gnp web",
        ),
        ("100% %x %", PolicyKind::GlobalNetworkPolicy, "100% %x %"),
        ("%ü", PolicyKind::GlobalNetworkPolicy, "%ü"),
        ("", PolicyKind::GlobalNetworkPolicy, ""),
    ];
    for (template, kind, wanted) in cases {
        let namespace = if kind == PolicyKind::NetworkPolicy {
            "ns"
        } else {
            ""
        };
        assert_eq!(
            log_prefix(template, "tier", &key(kind, namespace)),
            wanted,
            "{template}"
        );
    }
}
