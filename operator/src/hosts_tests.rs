use expect_test::{Expect, expect};
use margay_api::hosts::NodeInterface;
use proptest::prelude::*;

use super::*;

fn node(name: &str, labels: &[(&str, &str)], addresses: &[&str]) -> NodeFacts {
    NodeFacts {
        name: name.to_owned(),
        usable: true,
        is_linux: true,
        labels: labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        addresses: addresses
            .iter()
            .map(|address| address.parse().unwrap())
            .collect(),
        ..NodeFacts::default()
    }
}

fn interface(name: &str, addresses: &[&str]) -> NodeInterface {
    let addresses = addresses
        .iter()
        .map(|address| address.parse().unwrap())
        .collect();
    NodeInterface {
        name: name.to_owned(),
        addresses,
    }
}

fn outer(nets: &[&str]) -> Value {
    json!({
        "autoCreate": "Enabled", "createDefaultHostEndpoint": "Disabled",
        "templates": [{
            "generateName": "outer",
            "interfaceCIDRs": nets,
            "interfacePattern": "eth|^bond",
            "annotations": { "note": "b" },
        }],
    })
}

fn nodes() -> Vec<NodeFacts> {
    vec![
        node(
            "n1",
            &[("zone", "a"), ("pcns.team", "a")],
            &["192.0.2.1", "10.0.0.1", "fd00::1"],
        ),
        node("n2", &[("zone", "b")], &["192.0.2.2"]),
        NodeFacts {
            is_linux: false,
            ..node("w1", &[], &["192.0.2.3"])
        },
    ]
}

fn configuration(of_hosts: Value) -> Option<Value> {
    Some(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "KubeControllersConfiguration", "metadata": {
            "name": "default",
        },
        "spec": {
            "healthChecks": "Enabled",
            "controllers": { "node": { "hostEndpoint": of_hosts } },
        },
    }))
}

fn inputs(of_hosts: Option<Value>, present: Vec<HostFacts>) -> Inputs {
    Inputs {
        nodes: nodes(),
        controllers: Some(of_hosts.and_then(configuration)),
        host_endpoints: Some(present),
        ..Inputs::default()
    }
}

/// Returns the objects in the API after the plan.
fn execute(plan: &HostPlan, mut present: Vec<HostFacts>) -> Vec<HostFacts> {
    let gone = plan
        .delete
        .iter()
        .chain(plan.of_absent_nodes.values().flatten());
    present.retain(|found| gone.clone().all(|(key, _)| key.name != found.name));
    present.retain(|found| {
        plan.replace
            .iter()
            .all(|object| object.key.name != found.name)
    });
    let written = plan.create.iter().chain(&plan.replace).map(|object| {
        let metadata = &object.body["metadata"];
        HostFacts {
            name: object.key.name.clone(),
            uid: "u".to_owned(),
            version: "2".to_owned(),
            labels: serde_json::from_value(metadata["labels"].clone()).unwrap(),
            annotations: serde_json::from_value(metadata["annotations"].clone())
                .unwrap_or_default(),
            spec: object.body["spec"].clone(),
        }
    });
    present.extend(written);
    present
}

fn text(plan: &HostPlan) -> String {
    let body = |verb: &str, object: &Object| {
        format!(
            "{verb} {} {} {}\n",
            object.key, object.body["metadata"], object.body["spec"]
        )
    };
    let mut text: String = plan
        .create
        .iter()
        .map(|object| body("create", object))
        .collect();
    text.extend(plan.replace.iter().map(|object| body("replace", object)));
    text.extend(plan.delete.iter().map(|(key, _)| format!("delete {key}\n")));
    for (node, theirs) in &plan.of_absent_nodes {
        text.extend(
            theirs
                .iter()
                .map(|(key, _)| format!("delete {key} if {node} has left\n")),
        );
    }
    text.extend(
        plan.problems
            .iter()
            .map(|problem| format!("problem {problem}\n")),
    );
    text
}

fn check(plan: &HostPlan, expected: Expect) {
    expected.assert_eq(&text(plan));
}

fn templates() -> Value {
    json!({
        "autoCreate": "Enabled", "createDefaultHostEndpoint": "Disabled",
        "templates": [
            {
                "generateName": "inner",
                "interfaceCIDRs": ["10.0.0.0/8", "fd00::/8"],
                "labels": { "side": "in", "zone": "x" },
            },
            {
                "generateName": "all",
                "nodeSelector": "zone == 'b'",
                "annotations": { "note": "b" },
            },
        ],
    })
}

#[test]
fn every_node_gets_one_for_all_of_its_interfaces() {
    let inputs = inputs(Some(json!({ "autoCreate": "Enabled" })), vec![]);
    let plan = plan(&inputs);
    check(
        &plan,
        expect![[r#"
        create HostEndpoint n1-auto-hep {"labels":{"projectcalico.org/created-by":"calico-kube-controllers","zone":"a"},"name":"n1-auto-hep"} {"expectedIPs":["10.0.0.1","192.0.2.1","fd00::1"],"interfaceName":"*","node":"n1","profiles":["projectcalico-default-allow"]}
        create HostEndpoint n2-auto-hep {"labels":{"projectcalico.org/created-by":"calico-kube-controllers","zone":"b"},"name":"n2-auto-hep"} {"expectedIPs":["192.0.2.2"],"interfaceName":"*","node":"n2","profiles":["projectcalico-default-allow"]}
    "#]],
    );
}

#[test]
fn templates_choose_nodes_and_addresses() {
    check(
        &plan(&inputs(Some(templates()), vec![])),
        expect![[r#"
        create HostEndpoint n1-inner-auto-hep {"labels":{"projectcalico.org/created-by":"calico-kube-controllers","side":"in","zone":"x"},"name":"n1-inner-auto-hep"} {"expectedIPs":["10.0.0.1","fd00::1"],"node":"n1","profiles":["projectcalico-default-allow"]}
        create HostEndpoint n2-all-auto-hep {"annotations":{"note":"b"},"labels":{"projectcalico.org/created-by":"calico-kube-controllers","zone":"b"},"name":"n2-all-auto-hep"} {"expectedIPs":["192.0.2.2"],"node":"n2","profiles":["projectcalico-default-allow"]}
    "#]],
    );
}

#[test]
fn each_interface_that_a_pattern_matches_gets_one() {
    let mut inputs = inputs(Some(outer(&["10.0.0.0/8"])), vec![]);
    inputs.nodes[0].interfaces = Some(Ok(vec![
        interface("bond0.100", &["198.51.100.1"]),
        interface("Eth_0", &[]),
        interface("eth0", &["192.0.2.1", "fd00::1"]),
        interface("myeth_1", &[]),
        interface("wlan0", &["203.0.113.1"]),
    ]));
    inputs.nodes[1].interfaces = Some(Ok(vec![interface("eth0", &[])]));
    check(
        &plan(&inputs),
        expect![[r#"
        create HostEndpoint n1-outer-bond0.100-auto-hep {"annotations":{"note":"b"},"labels":{"projectcalico.org/created-by":"calico-kube-controllers","zone":"a"},"name":"n1-outer-bond0.100-auto-hep"} {"expectedIPs":["10.0.0.1","198.51.100.1"],"interfaceName":"bond0.100","node":"n1","profiles":["projectcalico-default-allow"]}
        create HostEndpoint n1-outer-eth0-auto-hep {"annotations":{"note":"b"},"labels":{"projectcalico.org/created-by":"calico-kube-controllers","zone":"a"},"name":"n1-outer-eth0-auto-hep"} {"expectedIPs":["10.0.0.1","192.0.2.1","fd00::1"],"interfaceName":"eth0","node":"n1","profiles":["projectcalico-default-allow"]}
        create HostEndpoint n2-outer-eth0-auto-hep {"annotations":{"note":"b"},"labels":{"projectcalico.org/created-by":"calico-kube-controllers","zone":"b"},"name":"n2-outer-eth0-auto-hep"} {"interfaceName":"eth0","node":"n2","profiles":["projectcalico-default-allow"]}
        problem HostEndpoint n1-outer-myeth_1-auto-hep would belong to interface myeth_1 of node n1: it is not a valid name; exclude the interface by interfacePattern of template outer, and create one for it
    "#]],
    );
}

#[test]
fn host_endpoints_of_a_node_with_unknown_interfaces_stay() {
    let mut inputs = inputs(Some(outer(&[])), vec![]);
    let eth = || {
        Some(Ok(vec![
            interface("eth0", &["192.0.2.1"]),
            interface("eth1", &[]),
        ]))
    };
    (inputs.nodes[0].interfaces, inputs.nodes[1].interfaces) = (eth(), eth());
    let made = execute(&plan(&inputs), vec![]);
    assert_eq!(made.len(), 4);
    inputs.host_endpoints = Some(made);
    inputs.nodes[0].interfaces = None;
    inputs.nodes[1].interfaces = Some(Err("\"[\": EOF".to_owned()));
    check(
        &plan(&inputs),
        expect![[r#"
        problem Node n2: annotation projectcalico.org/Interfaces: "[": EOF; delete it, and the node's agent writes it again when it starts
    "#]],
    );
    inputs.nodes[0].interfaces = Some(Ok(vec![interface("eth1", &[])]));
    inputs.controllers = Some(configuration(json!({ "autoCreate": "Disabled" })));
    assert_eq!(plan(&inputs).delete.len(), 4, "none are wanted");
}

#[test]
fn names_are_calicos_also_where_they_would_be_too_long() {
    assert_eq!(
        object_name(&["n1", "in", "eth0.5"]),
        "n1-in-eth0.5-auto-hep"
    );
    let long = object_name(&["n", &"x".repeat(MAX_NAME)]);
    // URL-safe base64 of SHA-256, letters and digits only, in lower case.
    assert_eq!(long, "nyz5ig5v2v7s1qwajgy0wfgxrnjmxeeokd3sze3ea-auto-hep");
    assert!(is_object_name(&long) && is_object_name("n1-in-eth0.5-auto-hep"));
    for bad in [
        "n1-in-eth_0-auto-hep",
        "n1-in-.x-auto-hep",
        "n1-in-x.-auto-hep",
        "n1-in-a..b-auto-hep",
        "n1-in-E-auto-hep",
    ] {
        assert!(!is_object_name(bad), "{bad}");
    }
}

#[test]
fn two_host_endpoints_of_one_name_are_reported() {
    let mut inputs = inputs(
        Some(json!({ "autoCreate": "Enabled", "templates": [{ "generateName": "in" }] })),
        vec![],
    );
    inputs.nodes = vec![node("n1", &[], &["192.0.2.1"]), node("n1-in", &[], &[])];
    check(
        &plan(&inputs),
        expect![[r#"
        create HostEndpoint n1-auto-hep {"labels":{"projectcalico.org/created-by":"calico-kube-controllers"},"name":"n1-auto-hep"} {"expectedIPs":["192.0.2.1"],"interfaceName":"*","node":"n1","profiles":["projectcalico-default-allow"]}
        create HostEndpoint n1-in-auto-hep {"labels":{"projectcalico.org/created-by":"calico-kube-controllers"},"name":"n1-in-auto-hep"} {"expectedIPs":["192.0.2.1"],"node":"n1","profiles":["projectcalico-default-allow"]}
        problem HostEndpoint n1-in-auto-hep would belong to node n1 and, by a template, to node n1-in; give the template another generateName
    "#]],
    );
}

#[test]
fn unwanted_host_endpoints_are_deleted_and_those_of_users_stay() {
    let made = execute(
        &plan(&inputs(Some(json!({ "autoCreate": "Enabled" })), vec![])),
        vec![],
    );
    let mut present = made;
    present[0]
        .labels
        .insert("zone".to_owned(), "old".to_owned());
    present[1].labels.remove(LABEL_CREATED_BY);
    present.push(HostFacts {
        name: "mine".to_owned(),
        ..HostFacts::default()
    });
    let gone = |name: &str, spec: Value| {
        let labels = Labels::from([(LABEL_CREATED_BY.to_owned(), CREATED_BY.to_owned())]);
        HostFacts {
            name: name.to_owned(),
            labels,
            spec,
            ..HostFacts::default()
        }
    };
    present.push(gone("n3-auto-hep", json!({ "node": "n3" })));
    present.push(gone("of-nobody", json!({})));
    check(
        &plan(&inputs(
            Some(json!({ "autoCreate": "Enabled" })),
            present.clone(),
        )),
        expect![[r#"
        replace HostEndpoint n1-auto-hep {"labels":{"projectcalico.org/created-by":"calico-kube-controllers","zone":"a"},"name":"n1-auto-hep","resourceVersion":"2"} {"expectedIPs":["10.0.0.1","192.0.2.1","fd00::1"],"interfaceName":"*","node":"n1","profiles":["projectcalico-default-allow"]}
        delete HostEndpoint of-nobody
        delete HostEndpoint n3-auto-hep if n3 has left
        problem HostEndpoint n2-auto-hep was not created by the operator; rename it, or add the label projectcalico.org/created-by=calico-kube-controllers
    "#]],
    );
    check(
        &plan(&inputs(None, present.clone())),
        expect![[r#"
        delete HostEndpoint n1-auto-hep
        delete HostEndpoint of-nobody
        delete HostEndpoint n3-auto-hep if n3 has left
    "#]],
    );
    check(
        &plan(&inputs(
            Some(json!({ "autoCreate": "Disabled", "templates": [{ "generateName": "a" }] })),
            present,
        )),
        expect![[r#"
            delete HostEndpoint n1-auto-hep
            delete HostEndpoint of-nobody
            delete HostEndpoint n3-auto-hep if n3 has left
        "#]],
    );
}

#[test]
fn nothing_is_changed_before_the_inputs_are_known() {
    let present = || {
        vec![HostFacts {
            name: "n9-auto-hep".to_owned(),
            labels: Labels::from([(LABEL_CREATED_BY.to_owned(), CREATED_BY.to_owned())]),
            ..HostFacts::default()
        }]
    };
    let known = inputs(None, present());
    assert_eq!(plan(&known).delete.len(), 1);
    for unknown in [
        Inputs {
            nodes: vec![],
            ..known.clone()
        },
        Inputs {
            controllers: None,
            ..known.clone()
        },
        Inputs {
            host_endpoints: None,
            ..known.clone()
        },
    ] {
        assert_eq!(text(&plan(&unknown)), "");
    }
    let bad = json!({
        "autoCreate": "On", "createDefaultHostEndpoint": "No",
        "templates": [
            {
                "generateName": "-a",
                "interfaceCIDRs": ["10"],
                "nodeSelector": "zone =",
                "interfacePattern": "eth(",
            },
            { "generateName": "b", "labels": { "projectcalico.org/namespace": "kube-system" } },
            { "generateName": "b" },
        ],
    });
    check(
        &plan(&inputs(Some(bad), present())),
        expect![[r#"
        problem KubeControllersConfiguration default: spec.controllers.node.hostEndpoint.autoCreate: "On": neither Enabled nor Disabled; use Enabled or Disabled
        problem KubeControllersConfiguration default: spec.controllers.node.hostEndpoint.createDefaultHostEndpoint: "No": neither Enabled nor Disabled; use Enabled or Disabled
        problem KubeControllersConfiguration default: spec.controllers.node.hostEndpoint.templates[0].generateName: "-a": must have lower case letters, digits and '-', and not begin or end with '-'; rename the template
        problem KubeControllersConfiguration default: spec.controllers.node.hostEndpoint.templates[0].interfacePattern: "eth(": not a regular expression: unclosed group; write it like ^eth or eth0|eth1
        problem KubeControllersConfiguration default: spec.controllers.node.hostEndpoint.templates[0].interfaceCIDRs[0]: "10": not an address range; write it like 10.0.0.0/8 or fd00::/8
        problem KubeControllersConfiguration default: spec.controllers.node.hostEndpoint.templates[0].nodeSelector: "zone =": not a selector: at character 6: expected an operator after a label, found '='; use ==, !=, in, not in, contains, starts with or ends with, or has(label)
        problem KubeControllersConfiguration default: spec.controllers.node.hostEndpoint.templates[1].labels[projectcalico.org/namespace]: "kube-system": this label identifies the object and is set by the system only; remove the label
        problem KubeControllersConfiguration default: spec.controllers.node.hostEndpoint.templates[2].generateName: "b": another template creates host endpoints of the same names; give each template a different one
    "#]],
    );
    check(
        &plan(&inputs(Some(json!({ "templates": 1 })), present())),
        expect![[r#"
        problem KubeControllersConfiguration default: invalid type: integer `1`, expected a sequence
    "#]],
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_a_plan_there_is_nothing_to_do(
        before in 0..5_usize,
        after in 0..5_usize,
        labels in proptest::collection::btree_map("[a-c]", "[a-c]", 0..3),
        interfaces in proptest::collection::vec(
            proptest::collection::btree_set("eth[0-3]", 0..3),
            4,
        ),
        absent in 0..3_usize,
    ) {
        let settings = [
            None,
            Some(json!({ "autoCreate": "Enabled" })),
            Some(templates()),
            Some(json!({ "autoCreate": "Disabled" })),
            Some(outer(&["10.0.0.0/8"])),
        ];
        let reported = |at: usize| Some(
            Ok(interfaces[at].iter().map(|name| interface(name, &["192.0.2.7"])).collect()),
        );
        let mut first = inputs(settings[before].clone(), vec![]);
        (first.nodes[0].interfaces, first.nodes[1].interfaces) = (reported(0), reported(1));
        let present = execute(&plan(&first), vec![]);
        let mut second = inputs(settings[after].clone(), present.clone());
        second.nodes[0].labels = labels;
        (second.nodes[0].interfaces, second.nodes[1].interfaces) = (reported(2), reported(3));
        second.nodes.remove(absent);
        let present = execute(&plan(&second), present);
        second.host_endpoints = Some(present.clone());
        prop_assert_eq!(text(&plan(&second)), "");
        // The former state does not matter.
        let fresh = execute(
            &plan(&Inputs { host_endpoints: Some(vec![]), ..second.clone() }),
            vec![],
        );
        let by_name = |list: Vec<HostFacts>| list
            .into_iter()
            .map(|found| (found.name.clone(), found)).collect::<BTreeMap<_, _>>();
        prop_assert_eq!(by_name(present), by_name(fresh));
    }
}
