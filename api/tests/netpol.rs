//! Conversion of Kubernetes network policies, as tables of text.

#![allow(clippy::unwrap_used)]

use expect_test::{Expect, expect};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use margay_api::k8s::netpol;
use serde_json::{Value, json};

mod support;

use support::show;

/// Makes a policy of namespace `ns` from its `spec` as YAML.
fn mk(spec: &str) -> NetworkPolicy {
    let spec: Value = serde_yaml_ng::from_str(spec).unwrap();
    serde_json::from_value(json!({ "metadata": { "name": "p", "namespace": "ns" }, "spec": spec }))
        .unwrap()
}

fn check(cases: &[(&str, Expect)]) {
    for (spec, expected) in cases {
        expected.assert_eq(&show(netpol::policy(&mk(spec)).map(|(_, policy)| policy)));
    }
}

#[test]
fn pods_and_directions() {
    check(&[
        (
            "{}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
        "#]],
        ),
        (
            "{podSelector: {matchLabels: {b: y, a: x}, matchExpressions: [{key: c, operator: In, \
             values: [v, u]}, {key: d, operator: NotIn, values: [w]}, {key: e, operator: Exists}, \
             {key: f, operator: DoesNotExist}]}, policyTypes: [Ingress]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s" && a == "x" && b == "y" && c in {"u", "v"} && d not in {"w"} && has(e) && !has(f))
            ingress
        "#]],
        ),
        (
            "{podSelector: {}, egress: [{}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
            egress
              Allow
        "#]],
        ),
        (
            "{podSelector: {}, policyTypes: [Egress], ingress: [{}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress (does not apply)
              Allow
            egress
        "#]],
        ),
        (
            "{podSelector: {}, policyTypes: [Ingress, Egress]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
            egress
        "#]],
        ),
    ]);
}

#[test]
fn peers() {
    check(&[
        (
            "{ingress: [{from: []}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
              Allow
        "#]],
        ),
        (
            "{ingress: [{from: [{podSelector: {}}]}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
              Allow; from selector (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
        "#]],
        ),
        (
            "{ingress: [{from: [{podSelector: {matchLabels: {a: b}}}, {namespaceSelector: {}}]}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
              Allow; from selector (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s" && a == "b")
              Allow; from selector (has(projectcalico.org/namespace) && projectcalico.org/orchestrator == "k8s")
        "#]],
        ),
        (
            "{ingress: [{from: [{namespaceSelector: {matchLabels: {a: b}}, podSelector: \
             {matchExpressions: [{key: c, operator: DoesNotExist}]}}]}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
              Allow; from selector (pcns.a == "b" && projectcalico.org/orchestrator == "k8s" && !has(c))
        "#]],
        ),
        (
            "{egress: [{to: [{ipBlock: {cidr: 10.0.0.1/8, except: [10.1.0.0/16, 10.2.3.4/32]}}, \
             {ipBlock: {cidr: 'fd00::/8'}}]}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
            egress
              Allow; to nets 10.0.0.0/8, not nets 10.1.0.0/16 10.2.3.4/32
              Allow; to nets fd00::/8
        "#]],
        ),
    ]);
}

#[test]
fn ports() {
    check(&[
        (
            "{ingress: [{ports: [{port: 80}, {port: http, protocol: TCP}, {port: 53, protocol: \
             UDP}, {port: 1000, endPort: 2000}, {protocol: SCTP}]}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
              Allow; protocol 6; to ports 80-80 http 1000-2000
              Allow; protocol 17; to ports 53-53
              Allow; protocol 132
        "#]],
        ),
        (
            "{ingress: [{ports: [{port: 80}, {protocol: TCP}]}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
              Allow; protocol 6
        "#]],
        ),
        (
            "{egress: [{to: [{podSelector: {}}, {ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: 1}, \
             {port: 2, protocol: UDP}]}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
            egress
              Allow; protocol 6; to selector (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s"), ports 1-1
              Allow; protocol 17; to selector (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s"), ports 2-2
              Allow; protocol 6; to nets 10.0.0.0/8, ports 1-1
              Allow; protocol 17; to nets 10.0.0.0/8, ports 2-2
        "#]],
        ),
        (
            "{ingress: [{ports: []}]}",
            expect![[r#"
            default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
              Allow
        "#]],
        ),
    ]);
}

#[test]
fn invalid_rules_are_left_out_and_the_rest_stays() {
    check(&[
        (
            "{podSelector: {matchExpressions: [{key: a, operator: Like}]}, ingress: [{}]}",
            expect![[r#"
                spec.podSelector.matchExpressions[0].operator: "Like": not an operator; use In, NotIn, Exists or DoesNotExist
                instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
                ingress
            "#]],
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: In}]}}",
            expect![[r#"
                spec.podSelector.matchExpressions[0].values: "": In and NotIn need values; name at least one value
                instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
                ingress
            "#]],
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/40}}, {podSelector: {}}]}]}",
            expect![[r#"
            spec.ingress[0].from[0].ipBlock.cidr: "10.0.0.0/40": not a range; write it like 10.0.0.0/8 or fd00::/8
            instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
              Allow; from selector (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
        "#]],
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}",
            expect![[r#"
            spec.ingress[0].from[0].ipBlock.except[0]: "11.0.0.0/16": not a smaller range inside 10.0.0.0/8; name ranges inside the cidr only
            instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
        "#]],
        ),
        (
            "{ingress: [{from: [{}]}]}",
            expect![[r#"
            spec.ingress[0].from[0]: "{}": a peer without selectors or ranges; give a podSelector, namespaceSelector or ipBlock
            instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
        "#]],
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}",
            expect![[r#"
            spec.ingress[0].from[0].ipBlock: "10.0.0.0/8": combined with selectors; write a peer of its own for the ipBlock
            instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
        "#]],
        ),
        (
            "{ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: \
             x}]}}]}]}",
            expect![[r#"
            spec.ingress[0].from[0].namespaceSelector.matchExpressions[0].operator: "x": not an operator; use In, NotIn, Exists or DoesNotExist
            instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
        "#]],
        ),
        (
            "{ingress: [{ports: [{port: 0}, {port: 65536}, {port: 5, endPort: 4}, {port: a, \
             endPort: 5}, {endPort: 5}, {port: NOT_A_NAME}, {port: 1, protocol: ICMP}]}]}",
            expect![[r#"
            spec.ingress[0].ports[0].port: "0": not a port; use a number from 1 to 65535, with an endPort that is not smaller, or a port name without endPort
            spec.ingress[0].ports[1].port: "65536": not a port; use a number from 1 to 65535, with an endPort that is not smaller, or a port name without endPort
            spec.ingress[0].ports[2].port: "5 to 4": not a port; use a number from 1 to 65535, with an endPort that is not smaller, or a port name without endPort
            spec.ingress[0].ports[3].port: "a to 5": not a port; use a number from 1 to 65535, with an endPort that is not smaller, or a port name without endPort
            spec.ingress[0].ports[4].port: " to 5": not a port; use a number from 1 to 65535, with an endPort that is not smaller, or a port name without endPort
            spec.ingress[0].ports[5].port: "NOT_A_NAME": not a port; use a number from 1 to 65535, with an endPort that is not smaller, or a port name without endPort
            spec.ingress[0].ports[6].protocol: "ICMP": not a protocol with ports; use TCP, UDP or SCTP
            instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
        "#]],
        ),
        (
            "{ingress: [{ports: [{port: 0}, {port: 80}]}]}",
            expect![[r#"
            spec.ingress[0].ports[0].port: "0": not a port; use a number from 1 to 65535, with an endPort that is not smaller, or a port name without endPort
            instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
              Allow; protocol 6; to ports 80-80
        "#]],
        ),
        (
            "{policyTypes: [Sideways]}",
            expect![[r#"
            spec.policyTypes[0]: "Sideways": not a direction; use Ingress or Egress
            instead: default Some(1000.0) (projectcalico.org/namespace == "ns" && projectcalico.org/orchestrator == "k8s")
            ingress
            egress
        "#]],
        ),
    ]);
}
