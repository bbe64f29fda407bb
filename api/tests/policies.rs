//! Conversion of Calico's policies, as tables of text: rewritten selectors, defaults, refusals.

#![allow(clippy::unwrap_used)]

use expect_test::{Expect, expect};
use margay_api::rule::{Action, Rule};
use margay_api::v3::{self, GlobalNetworkPolicy, NetworkPolicy};
use serde_json::{Value, json};

mod support;

use support::show;

/// Makes a policy of namespace `ns` from its `spec` as YAML.
fn mk_namespaced(spec: &str) -> NetworkPolicy {
    mk(
        "NetworkPolicy",
        json!({ "name": "p", "namespace": "ns" }),
        spec,
    )
}

fn mk_global(spec: &str) -> GlobalNetworkPolicy {
    mk("GlobalNetworkPolicy", json!({ "name": "p" }), spec)
}

fn mk<T: serde::de::DeserializeOwned>(kind: &str, metadata: Value, spec: &str) -> T {
    let spec: Value = serde_yaml_ng::from_str(spec).unwrap();
    let spec = if spec.is_null() { json!({}) } else { spec };
    serde_json::from_value(json!({
        "apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": metadata, "spec": spec,
    }))
    .unwrap()
}

/// A policy's spec, its parser, and the result.
type Case<'a> = (&'a str, fn(&str) -> String, Expect);

fn check(cases: &[Case]) {
    for (spec, parse, expected) in cases {
        expected.assert_eq(&parse(spec));
    }
}

fn namespaced(spec: &str) -> String {
    show(v3::parse::policy::network_policy(&mk_namespaced(spec)))
}

fn global(spec: &str) -> String {
    show(v3::parse::policy::global_network_policy(&mk_global(spec)))
}

#[test]
fn defaults_and_selectors_of_policies() {
    check(&[
        (
            "",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{tier: '', egress: [{action: Allow}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            egress
              Allow
        "#]],
        ),
        (
            "{order: 1.5, tier: t, ingress: [{action: Pass}], egress: [{action: Log}]}",
            namespaced,
            expect![[r#"
            t Some(1.5) projectcalico.org/namespace == "ns"
            ingress
              Pass
            egress
              Log
        "#]],
        ),
        (
            "{types: [Egress], selector: a == 'b' || has(c), serviceAccountSelector: role == 'x'}",
            namespaced,
            expect![[r#"
            default None (projectcalico.org/namespace == "ns" && (a == "b" || has(c)) && pcsa.role == "x")
            egress
        "#]],
        ),
        (
            "{serviceAccountSelector: all()}",
            namespaced,
            expect![[r#"
            default None (projectcalico.org/namespace == "ns" && has(projectcalico.org/serviceaccount))
            ingress
        "#]],
        ),
        (
            "",
            global,
            expect![[r#"
            default None all()
            ingress
        "#]],
        ),
        (
            "{selector: has(a), namespaceSelector: has(b), serviceAccountSelector: has(c)}",
            global,
            expect![[r#"
            default None (has(a) && has(pcns.b) && has(pcsa.c))
            ingress
        "#]],
        ),
        (
            "{namespaceSelector: all(), serviceAccountSelector: all()}",
            global,
            expect![[r#"
            default None (has(projectcalico.org/namespace) && has(projectcalico.org/serviceaccount))
            ingress
        "#]],
        ),
        (
            "{namespaceSelector: global()}",
            global,
            expect![[r#"
            default None !has(projectcalico.org/namespace)
            ingress
        "#]],
        ),
        (
            "{applyOnForward: true}",
            global,
            expect![[r#"
            default None all() Forwarded
            ingress
        "#]],
        ),
        (
            "{applyOnForward: true, preDNAT: false, doNotTrack: false}",
            global,
            expect![[r#"
            default None all() Forwarded
            ingress
        "#]],
        ),
        (
            "{applyOnForward: true, preDNAT: true, ingress: [{action: Deny}]}",
            global,
            expect![[r#"
                default None all() PreDnat
                ingress
                  Deny
            "#]],
        ),
        (
            "{applyOnForward: true, doNotTrack: true}",
            global,
            expect![[r#"
                default None all() Untracked
                ingress
            "#]],
        ),
    ]);
}

#[test]
fn sides_of_rules_reach_only_the_namespaces_that_they_select() {
    check(&[
        (
            "{ingress: [{action: Allow, source: {selector: has(a)}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; from selector (projectcalico.org/namespace == "ns" && has(a))
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {notSelector: has(a)}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; from selector projectcalico.org/namespace == "ns", not selector has(a)
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {namespaceSelector: all()}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; from selector has(projectcalico.org/namespace)
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {namespaceSelector: global(), selector: has(a)}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; from selector (!has(projectcalico.org/namespace) && has(a))
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {namespaceSelector: 'has(a) && !all()', selector: \
             'b == \"c\" && has(d)'}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; from selector (has(pcns.a) && !has(projectcalico.org/namespace) && b == "c" && has(d))
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {serviceAccounts: {names: [b, a], selector: \
             has(x)}, selector: has(y)}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; from selector (projectcalico.org/namespace == "ns" && has(pcsa.x) && projectcalico.org/serviceaccount in {"a", "b"} && has(y))
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {nets: [10.1.2.3/8, 10.0.0.1], notNets: \
             [10.2.0.0/16]}, destination: {ports: [80]}, protocol: tcp}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; protocol 6; from nets 10.0.0.0/8 10.0.0.1/32, not nets 10.2.0.0/16; to ports 80-80
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {selector: has(a)}}]}",
            global,
            expect![[r#"
            default None all()
            ingress
              Allow; from selector has(a)
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {serviceAccounts: {names: [a]}}}]}",
            global,
            expect![[r#"
            default None all()
            ingress
              Allow; from selector projectcalico.org/serviceaccount in {"a"}
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {serviceAccounts: {}}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {services: {name: s}}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; from service ns/s
        "#]],
        ),
        (
            "{egress: [{action: Allow, destination: {services: {name: s, namespace: other}}}]}",
            global,
            expect![[r#"
            default None all()
            egress
              Allow; to service other/s
        "#]],
        ),
    ]);
}

#[test]
fn protocols_ports_and_icmp() {
    check(&[
        (
            "{ingress: [{action: Deny, protocol: UDPLite, ipVersion: 6}, {action: Log, \
             notProtocol: 47}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Deny; version V6; protocol 136
              Log; not protocol 47
        "#]],
        ),
        (
            "{ingress: [{action: Allow, protocol: 6, source: {ports: [1, '2:3', name-x]}, \
             destination: {notPorts: ['4']}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; protocol 6; from ports 1-1 2-3 name-x; to not ports 4-4
        "#]],
        ),
        (
            "{ingress: [{action: Allow, destination: {ports: [http]}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; to ports http
        "#]],
        ),
        (
            "{ingress: [{action: Allow, protocol: ICMP, icmp: {type: 8, code: 0}}, {action: Allow, \
             protocol: ICMPv6, notICMP: {type: 128}}]}",
            namespaced,
            expect![[r#"
            default None projectcalico.org/namespace == "ns"
            ingress
              Allow; protocol 1; icmp Some(8) Some(0)
              Allow; protocol 58; not icmp Some(128) None
        "#]],
        ),
    ]);
}

#[test]
fn refusals_name_everything_and_never_open() {
    check(&[
        (
            "{selector: 'a =', ingress: [{action: Deny}]}",
            namespaced,
            expect![[r#"
                spec.selector: "a =": not a selector: at character 3: expected an operator after a label, found '='; use ==, !=, in, not in, contains, starts with or ends with, or has(label)
                instead: default None projectcalico.org/namespace == "ns"
                ingress
                  Deny
            "#]],
        ),
        (
            "{selector: global()}",
            global,
            expect![[r#"
                spec.selector: "global()": global() is only for namespace selectors; use it alone in a namespaceSelector
                instead: default None all()
                ingress
            "#]],
        ),
        (
            "{namespaceSelector: 'global() || has(a)'}",
            global,
            expect![[r#"
                spec.namespaceSelector: "global() || has(a)": global() combined with something else; use global() alone
                instead: default None all()
                ingress
            "#]],
        ),
        (
            "{types: [Ingres]}",
            namespaced,
            expect![[r#"
            spec.types[0]: "Ingres": not a direction; use Ingress or Egress
            instead: default None projectcalico.org/namespace == "ns"
            ingress
            egress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {nets: [10.0.0.0/33]}}, {action: Allow}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].source.nets[0]: "10.0.0.0/33": not an address or range; write it like 10.0.0.0/8, 10.1.2.3, fd00::/8 or fd00::1
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{selector: has(x), ingress: [{action: Allow}, {action: Deny, source: {selector: \
             '!'}}], egress: [{action: Allow}]}",
            namespaced,
            expect![[r#"
            spec.ingress[1].source.selector: "!": not a selector: at character 2: expected a label, `has(label)`, `all()`, `global()`, `!` or `(`, found the end; label names have letters, digits, `_`, `.`, `/` and `-`; values are in quotes
            instead: default None (projectcalico.org/namespace == "ns" && has(x))
            ingress
              Deny
            egress
        "#]],
        ),
        (
            "{ingress: [{action: Pass, protocol: FOO}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].protocol: "FOO": not a protocol; use TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite or a number from 1 to 255
            instead: default None projectcalico.org/namespace == "ns"
            ingress
              Deny
        "#]],
        ),
        (
            "{ingress: [{action: Drop}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].action: "Drop": not an action; use Allow, Deny, Log or Pass
            instead: default None projectcalico.org/namespace == "ns"
            ingress
              Deny
        "#]],
        ),
        (
            "{ingress: [{action: Allow, http: {methods: [GET]}}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].http: "http": HTTP rules are not supported; remove http, or match by port
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, protocl: TCP, source: {net: [10.0.0.0/8]}}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].protocl: "protocl": not a known field, and ignoring it could widen the rule; remove the field or correct its name
            spec.ingress[0].source.net: "net": not a known field, and ignoring it could widen the rule; remove the field or correct its name
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, destination: {ports: [80]}}, {action: Allow, protocol: \
             ICMP, destination: {ports: [a]}}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].destination.ports[0]: "80": ports need a protocol that has them; set protocol to TCP, UDP or SCTP
            spec.ingress[1].destination.ports[0]: "a": ports need a protocol that has them; set protocol to TCP, UDP or SCTP
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, protocol: TCP, destination: {ports: ['2:1', 70000, -1, 'a \
             b', '']}}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].destination.ports[0]: "2:1": not a port; use a number from 0 to 65535, a range like 8000:8080, or a port name
            spec.ingress[0].destination.ports[1]: "70000": not a port; use a number from 0 to 65535, a range like 8000:8080, or a port name
            spec.ingress[0].destination.ports[2]: "-1": not a port; use a number from 0 to 65535, a range like 8000:8080, or a port name
            spec.ingress[0].destination.ports[3]: "a b": not a port; use a number from 0 to 65535, a range like 8000:8080, or a port name
            spec.ingress[0].destination.ports[4]: "": not a port; use a number from 0 to 65535, a range like 8000:8080, or a port name
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, icmp: {type: 8}}, {action: Allow, protocol: ICMP, \
             ipVersion: 6, icmp: {code: 1}}, {action: Allow, protocol: ICMP, icmp: {type: 255, \
             code: 256}}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].icmp: "icmp": ICMP types need the protocol; set protocol to ICMP or ICMPv6
            spec.ingress[1].icmp.code: "1": an ICMP code needs an ICMP type; set the type, too
            spec.ingress[1].ipVersion: "6": does not go with the protocol; ICMP is for ipVersion 4, ICMPv6 for 6; leave ipVersion out
            spec.ingress[2].icmp.type: "255": not an ICMP type; use a number from 0 to 254
            spec.ingress[2].icmp.code: "256": not an ICMP code; use a number from 0 to 255
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {nets: [10.0.0.0/8]}, destination: {notNets: \
             ['fd00::/8']}}, {action: Allow, ipVersion: 6, source: {nets: [10.0.0.0/8]}}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0]: "10.0.0.0/8 and fd00::/8": IPv4 and IPv6 in one rule; write one rule for each
            spec.ingress[1].ipVersion: "6": does not go with 10.0.0.0/8; leave ipVersion out
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {notNets: [0.0.0.0/0]}}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].source.notNets: "0.0.0.0/0": leaves no address to match; remove the rule, or name smaller ranges
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, ipVersion: 5}, {action: Allow, protocol: 0}, {action: \
             Allow, protocol: 256}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].ipVersion: "5": not an IP version; use 4 or 6
            spec.ingress[1].protocol: "0": not a protocol; use TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite or a number from 1 to 255
            spec.ingress[2].protocol: "256": not a protocol; use TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite or a number from 1 to 255
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, source: {selector: global()}}, {action: Allow, source: \
             {namespaceSelector: 'global() && has(a)'}}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].source.selector: "global()": global() is only for namespace selectors; use it alone in namespaceSelector
            spec.ingress[1].source.namespaceSelector: "global() && has(a)": global() combined with something else; use global() alone
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{ingress: [{action: Allow, destination: {services: {name: s}}}, {action: Allow, \
             source: {services: {name: ''}, selector: has(a)}}]}",
            namespaced,
            expect![[r#"
            spec.ingress[0].destination.services: "s": not allowed on this side of the rule; use Services in the source of ingress rules and the destination of egress rules
            spec.ingress[1].source.services: "": combined with selectors, serviceAccounts, nets or notNets; put them in a rule of their own
            spec.ingress[1].source.services.name: "": empty; give the name of the Service
            instead: default None projectcalico.org/namespace == "ns"
            ingress
        "#]],
        ),
        (
            "{egress: [{action: Allow, protocol: TCP, destination: {services: {name: s}, ports: \
             [80]}}]}",
            global,
            expect![[r#"
            spec.egress[0].destination.services: "s": combined with ports, which the Service determines; remove ports and notPorts
            spec.egress[0].destination.services.namespace: "": needed in a cluster-wide policy; give the namespace of the Service
            instead: default None all()
            egress
        "#]],
        ),
        (
            "{doNotTrack: true, preDNAT: true, egress: [{action: Deny}]}",
            global,
            expect![[r#"
                spec.preDNAT: "true": doNotTrack and preDNAT exclude each other; set only one of them
                spec.doNotTrack: "true": needs applyOnForward: true; set applyOnForward: true
                spec.preDNAT: "true": needs applyOnForward: true; set applyOnForward: true
                spec.egress: "Egress": preDNAT policies apply to incoming packets only; remove the egress rules and the type Egress
                instead: default None all() Untracked
                egress
                  Deny
            "#]],
        ),
    ]);
}

#[test]
fn an_entity_that_restricts_nothing_is_empty() {
    let parsed = v3::parse::policy::network_policy(&mk_namespaced(
        "{ingress: [{action: Allow, source: {}, destination: {}}]}",
    ))
    .unwrap();
    assert_eq!(parsed.ingress, [Rule::any(Action::Allow)]);
}

#[test]
fn specs_round_trip_unchanged() {
    let text = r#"{"tier":"t","order":1.5,"selector":"has(a)","types":["Ingress"],"ingress":[{"action":"Allow","ipVersion":4,"protocol":"TCP","source":{"nets":["10.0.0.0/8"],"selector":"x"},"destination":{"ports":[80,"http","1:2"],"serviceAccounts":{"names":["a"]},"services":{"name":"s"}},"metadata":{"annotations":{"a":"b"}}},{"action":"Deny","notICMP":{"type":1}}]}"#;
    let spec: v3::policy::NetworkPolicySpec = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&spec).unwrap(), text);
}
