//! Verdicts of the API server by the CEL rules of the CRDs, with the messages that users read.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use kube_cel::Validator;
use margay_api::crds;
use serde_json::{Value, json};

/// Schemas as the API server has them, by kind.
fn schemas() -> BTreeMap<String, Value> {
    let schema =
        |definition: &Value| definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
    crds::all()
        .iter()
        .map(|definition| serde_json::to_value(definition).unwrap())
        .map(|definition| {
            (
                definition["spec"]["names"]["kind"]
                    .as_str()
                    .unwrap()
                    .to_owned(),
                schema(&definition),
            )
        })
        .collect()
}

fn mk(name: &str, spec: &str) -> Value {
    let spec: Value = serde_yaml_ng::from_str(spec).unwrap();
    json!({ "metadata": { "name": name }, "spec": spec })
}

/// Kind, name, spec, and a part of every message; none means that the object is accepted.
#[rustfmt::skip]
const CREATED: &[(&str, &str, &str, &[&str])] = &[
    ("Tier", "default", "{order: 1000000}", &[]),
    ("Tier", "default", "{order: 1000000, defaultAction: Pass}", &["tier default is built in"]),
    ("Tier", "default", "{}", &["tier default is built in"]),
    ("Tier", "kube-admin", "{order: 1000, defaultAction: Pass}", &[]),
    ("Tier", "kube-admin", "{order: 1001, defaultAction: Pass}", &["tier kube-admin is built in"]),
    ("Tier", "kube-baseline", "{order: 10000000, defaultAction: Pass}", &[]),
    ("Tier", "kube-baseline", "{order: 10000000}", &["tier kube-baseline is built in"]),
    ("Tier", "mine", "{}", &[]),
    ("Tier", "a.b", "{}", &["a tier's name is a DNS label"]),

    ("NetworkPolicy", "p", "{}", &[]),
    ("NetworkPolicy", "default.p", "{}", &[]),
    ("NetworkPolicy", "a.b.c", "{}", &["the name of a policy"]),
    ("NetworkPolicy", "knp.default.a.b", "{}", &[]),
    ("NetworkPolicy", "ossg.default.a", "{}", &[]),
    ("GlobalNetworkPolicy", "tier.p", "{}", &[]),
    ("GlobalNetworkPolicy", "knp.default.p", "{}", &["the name of a policy"]),

    (
        "NetworkPolicy",
        "p",
        "{ingress: [{action: Allow, protocol: ICMP, icmp: {type: 8, code: 0}}]}",
        &[],
    ),
    ("NetworkPolicy", "p", "{ingress: [{action: Allow, protocol: 58, notICMP: {type: 8}}]}", &[]),
    (
        "NetworkPolicy",
        "p",
        "{ingress: [{action: Allow, protocol: TCP, icmp: {type: 8}}]}",
        &["need protocol ICMP or ICMPv6"],
    ),
    (
        "NetworkPolicy",
        "p",
        "{egress: [{action: Allow, notICMP: {code: 8}}]}",
        &["need protocol ICMP or ICMPv6", "needs an ICMP type"],
    ),
    (
        "NetworkPolicy",
        "p",
        "{ingress: [{action: Deny, http: {methods: [GET]}}]}",
        &["only allowed in rules with action Allow"],
    ),
    (
        "NetworkPolicy",
        "p",
        "{ingress: [{action: Allow, source: {services: {name: s}, selector: has(a)}}]}",
        &["services cannot be combined"],
    ),
    (
        "NetworkPolicy",
        "p",
        "{ingress: [{action: Allow, protocol: TCP, source: {services: {name: s}}, destination: \
         {ports: [1]}}]}",
        &[],
    ),
    (
        "NetworkPolicy",
        "p",
        "{egress: [{action: Allow, protocol: TCP, destination: {services: {name: s}, ports: \
         [1]}}]}",
        &["the Service determines its ports"],
    ),

    (
        "GlobalNetworkPolicy",
        "p",
        "{applyOnForward: true, preDNAT: true, ingress: [{action: Deny}]}",
        &[],
    ),
    ("GlobalNetworkPolicy", "p", "{preDNAT: true}", &["preDNAT needs applyOnForward"]),
    (
        "GlobalNetworkPolicy",
        "p",
        "{doNotTrack: true, applyOnForward: false}",
        &["doNotTrack needs applyOnForward"],
    ),
    (
        "GlobalNetworkPolicy",
        "p",
        "{doNotTrack: true, preDNAT: true, applyOnForward: true}",
        &["exclude each other"],
    ),
    (
        "GlobalNetworkPolicy",
        "p",
        "{preDNAT: true, applyOnForward: true, types: [Ingress, Egress]}",
        &["no egress rules"],
    ),
    (
        "GlobalNetworkPolicy",
        "p",
        "{preDNAT: true, applyOnForward: true, egress: [{action: Deny}]}",
        &["no egress rules"],
    ),

    ("IPPool", "p", "{cidr: 10.0.0.0/16}", &[]),
    ("IPPool", "p", "{cidr: 10.0.0.0/26}", &[]),
    ("IPPool", "p", "{cidr: 10.0.0.0/27}", &["smaller than one block"]),
    ("IPPool", "p", "{cidr: 10.0.0.0/27, blockSize: 32}", &[]),
    ("IPPool", "p", "{cidr: 10.0.0.0/8, blockSize: 19}", &["blockSize is 20 to 32"]),
    ("IPPool", "p", "{cidr: 'fd00::/48'}", &[]),
    ("IPPool", "p", "{cidr: 'fd00::/48', blockSize: 115}", &["blockSize is 20 to 32"]),
    ("IPPool", "p", "{cidr: 'fd00::/48', ipipMode: Always}", &["IPv4 only"]),
    ("IPPool", "p", "{cidr: 10.0.0.1/16}", &["bits behind its prefix"]),
    ("IPPool", "p", "{cidr: 169.254.1.0/24}", &["link-local"]),
    ("IPPool", "p", "{cidr: 'fe80::/64'}", &["link-local"]),
    (
        "IPPool",
        "p",
        "{cidr: 10.0.0.0/16, ipipMode: Always, vxlanMode: CrossSubnet}",
        &["exclude each other"],
    ),
    ("IPPool", "p", "{cidr: 10.0.0.0/16, ipipMode: Never, vxlanMode: CrossSubnet}", &[]),
    ("IPPool", "p", "{cidr: 10.0.0.0/16, allowedUses: [LoadBalancer], nodeSelector: all()}", &[]),
    (
        "IPPool",
        "p",
        "{cidr: 10.0.0.0/16, allowedUses: [LoadBalancer, Workload]}",
        &["must be set alone"],
    ),
    (
        "IPPool",
        "p",
        "{cidr: 10.0.0.0/16, allowedUses: [LoadBalancer], vxlanMode: Always}",
        &["a pool for LoadBalancer has"],
    ),
    (
        "IPPool",
        "p",
        "{cidr: 10.0.0.0/16, allowedUses: [LoadBalancer], disableBGPExport: true}",
        &["a pool for LoadBalancer has"],
    ),
    (
        "IPPool",
        "p",
        "{cidr: 10.0.0.0/16, namespaceSelector: has(a)}",
        &["cannot have the use Tunnel"],
    ),
    ("IPPool", "p", "{cidr: 10.0.0.0/16, namespaceSelector: has(a), allowedUses: [Workload]}", &[]),
];

/// Kind, spec before, spec after, and a part of every message.
#[rustfmt::skip]
const CHANGED: &[(&str, &str, &str, &[&str])] = &[
    ("IPPool", "{cidr: 10.0.0.0/16}", "{cidr: 10.0.0.0/16, disabled: true}", &[]),
    ("IPPool", "{cidr: 10.0.0.0/16}", "{cidr: 10.1.0.0/16}", &["cidr cannot change"]),
    (
        "IPPool",
        "{cidr: 10.0.0.0/16, blockSize: 26}",
        "{cidr: 10.0.0.0/16, blockSize: 28}",
        &["blockSize cannot change"],
    ),
    (
        "IPPool",
        "{cidr: 10.0.0.0/16, blockSize: 26}",
        "{cidr: 10.0.0.0/16}",
        &["blockSize cannot change"],
    ),
    ("IPPool", "{cidr: 10.0.0.0/16}", "{cidr: 10.0.0.0/16, blockSize: 26}", &[]),
];

fn check(what: &str, schema: &Value, new: &Value, old: Option<&Value>, wanted: &[&str]) {
    let found: Vec<String> = match Validator::new().validate(schema, new, old) {
        Ok(()) => vec![],
        Err(errors) => errors.into_vec().iter().map(ToString::to_string).collect(),
    };
    let is_same = found.len() == wanted.len()
        && wanted
            .iter()
            .all(|part| found.iter().any(|message| message.contains(part)));
    assert!(is_same, "{what}: wanted {wanted:?}, found {found:#?}");
}

#[test]
fn creations_are_accepted_or_refused_by_the_rules() {
    let schemas = schemas();
    for (kind, name, spec, wanted) in CREATED {
        check(
            &format!("{kind} {name} {spec}"),
            &schemas[*kind],
            &mk(name, spec),
            None,
            wanted,
        );
    }
}

#[test]
fn changes_are_accepted_or_refused_by_the_rules() {
    let schemas = schemas();
    for (kind, before, after, wanted) in CHANGED {
        let what = format!("{kind} {before} to {after}");
        check(
            &what,
            &schemas[*kind],
            &mk("p", after),
            Some(&mk("p", before)),
            wanted,
        );
    }
}
