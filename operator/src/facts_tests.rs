use serde_json::json;

use super::*;

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_node_is_usable_if_pods_can_run_on_it() {
    let node = |labels: Value, spec: Value| {
        node_facts(&object(
            json!({ "metadata": { "name": "n", "labels": labels }, "spec": spec }),
        ))
    };
    assert!(node(json!({ "kubernetes.io/os": "linux" }), json!({})).usable);
    assert!(node(json!({}), json!({})).usable);
    assert!(!node(json!({ "kubernetes.io/os": "windows" }), json!({})).usable);
    assert!(!node(json!({}), json!({ "unschedulable": true })).usable);
}

#[test]
fn addresses_of_a_node_include_those_of_its_tunnels() {
    let node = object(json!({
        "metadata": { "name": "n", "annotations": {
            "projectcalico.org/IPv4Address": "192.0.2.1/24",
            "projectcalico.org/IPv4VXLANTunnelAddr": "10.0.0.1",
            "projectcalico.org/IPv4IPIPTunnelAddr": "10.0.0.2",
            "projectcalico.org/IPv6VXLANTunnelAddr": "none",
            "projectcalico.org/Interfaces": r#"[{"name":"eth0","addresses":["192.0.2.1"]},{"name":"eth1","addresses":["198.51.100.1"]},{"name":"eth2"}]"#,
            "other": "10.9.9.9",
        } },
        "status": { "addresses": [
            { "type": "InternalIP", "address": "192.0.2.1" },
            { "type": "InternalIP", "address": "fd00::1" },
            { "type": "ExternalIP", "address": "203.0.113.1" },
            { "type": "Hostname", "address": "n" },
        ] },
    }));
    let facts = node_facts(&node);
    let wanted = [
        "10.0.0.1",
        "10.0.0.2",
        "192.0.2.1",
        "198.51.100.1",
        "fd00::1",
    ]
    .map(|address| address.parse().unwrap());
    assert_eq!(facts.addresses, BTreeSet::from(wanted));
    let names = |interfaces: Vec<NodeInterface>| {
        interfaces
            .into_iter()
            .map(|interface| interface.name)
            .collect()
    };
    assert_eq!(
        facts.interfaces.map(|reported| reported.map(names)),
        Some(Ok(["eth0", "eth1", "eth2"].map(str::to_owned).to_vec()))
    );
    let interfaces_of = |text: &str| {
        let annotations = json!({ ANNOTATION_NODE_INTERFACES: text });
        node_facts(&object(
            json!({ "metadata": { "name": "n", "annotations": annotations } }),
        ))
        .interfaces
    };
    let error = interfaces_of("[{")
        .expect("the annotation")
        .expect_err("half a list");
    assert!(error.starts_with("\"[{\": EOF"), "{error}");
    assert_eq!(
        node_facts(&object(json!({ "metadata": { "name": "n" } }))).interfaces,
        None
    );
}

#[test]
fn our_own_fields_are_those_of_our_applies() {
    let entry = |manager: &str, operation: &str, subresource: &str, field: &str| {
        json!({
            "manager": manager, "operation": operation, "subresource": subresource,
            "apiVersion": "v1",
            "fieldsType": "FieldsV1", "fieldsV1": { "f:spec": { field: {} } },
        })
    };
    let installation = object(json!({
        "metadata": {
            "name": "default", "uid": "u", "generation": 4,
            "managedFields": [
                entry("kubectl", "Apply", "", "f:theirs"),
                entry("margay-operator", "Update", "", "f:other"),
                entry("margay-operator", "Apply", "status", "f:status"),
                entry("margay-operator", "Apply", "", "f:ours"),
            ],
        },
        "spec": { "variant": "Calico" },
        "status": { "conditions": [{
            "type": "Ready", "status": "True", "lastTransitionTime": "2026-11-23T00:00:00Z",
        }] },
    }));
    let request = request_of(&installation);
    assert_eq!(request.written, json!({ "f:ours": {} }));
    assert_eq!((request.owner.uid.as_str(), request.generation), ("u", 4));
    assert_eq!(request.conditions[0].kind, "Ready");
}
