use serde_json::json;

use super::*;
use crate::defaults;

fn existing(name: &str, spec: Value, managed: bool) -> PoolFacts {
    PoolFacts {
        name: name.to_owned(),
        spec,
        managed,
        ..PoolFacts::default()
    }
}

fn planned(pools: Value, found: Vec<PoolFacts>) -> PoolPlan {
    let inputs = Inputs {
        pools: Some(found),
        ..Inputs::default()
    };
    let given = serde_json::from_value(json!({ "calicoNetwork": { "ipPools": pools } })).unwrap();
    plan(&defaults::complete(&given, &inputs), &inputs)
}

fn ours() -> Value {
    json!({
        "cidr": "10.0.0.0/16", "blockSize": 26, "vxlanMode": "Always", "ipipMode": "Never",
        "natOutgoing": true, "nodeSelector": "all()", "allowedUses": ["Workload", "Tunnel"],
    })
}

#[test]
fn a_pool_is_made_where_there_is_none() {
    let plan = planned(json!([{ "cidr": "10.0.0.0/16" }]), vec![]);
    assert_eq!(plan.conflicts, [""; 0]);
    assert_eq!(plan.objects[0].key.name, "default-ipv4-ippool");
    assert_eq!(plan.objects[0].body["spec"]["vxlanMode"], "Always");
}

#[test]
fn each_encapsulation_is_a_mode_of_the_pool() {
    for (encapsulation, vxlan, ipip) in [
        ("VXLAN", "Always", "Never"),
        ("VXLANCrossSubnet", "CrossSubnet", "Never"),
        ("IPIP", "Never", "Always"),
        ("IPIPCrossSubnet", "Never", "CrossSubnet"),
        ("None", "Never", "Never"),
    ] {
        let pools = json!([{ "cidr": "10.0.0.0/16", "encapsulation": encapsulation }]);
        let plan = planned(pools, vec![]);
        let spec = &plan.objects[0].body["spec"];
        assert_eq!(
            (&spec["vxlanMode"], &spec["ipipMode"]),
            (&json!(vxlan), &json!(ipip))
        );
    }
}

#[test]
fn an_identical_pool_is_adopted_and_then_left_alone() {
    let adopted = planned(
        json!([{ "cidr": "10.0.0.0/16" }]),
        vec![existing("theirs", ours(), false)],
    );
    assert_eq!(adopted.conflicts, [""; 0]);
    assert_eq!(adopted.objects[0].key.name, "theirs");
    let labels = &adopted.objects[0].body["metadata"]["labels"];
    assert_eq!(labels["app.kubernetes.io/managed-by"], "margay-operator");
    let unchanged = planned(
        json!([{ "cidr": "10.0.0.0/16" }]),
        vec![existing("theirs", ours(), true)],
    );
    assert_eq!(unchanged, PoolPlan::default());
}

#[test]
fn our_pool_follows_the_installation() {
    let plan = planned(
        json!([{ "cidr": "10.0.0.0/16", "natOutgoing": "Disabled" }]),
        vec![existing("default-ipv4-ippool", ours(), true)],
    );
    assert_eq!(plan.conflicts, [""; 0]);
    assert_eq!(plan.objects[0].body["spec"]["natOutgoing"], false);
}

#[test]
fn an_impossible_pool_is_reported_and_blocks_no_other_one() {
    let good = json!({ "cidr": "10.7.0.0/16" });
    let table = [
        (
            json!([{ "cidr": "10.0.0.0/16", "natOutgoing": "Disabled" }, good]),
            existing("theirs", ours(), false),
            "IPPool theirs (10.0.0.0/16) exists, was not created from the Installation, and \
             differs in natOutgoing",
        ),
        (
            json!([{ "cidr": "10.0.0.0/16", "blockSize": 28 }, good]),
            existing("mine", ours(), true),
            "IPPool mine has blockSize 26 and the Installation wants 28",
        ),
        (
            json!([{ "cidr": "10.0.0.0/16", "name": "other" }, good]),
            existing("mine", ours(), true),
            "IPPool mine has the range 10.0.0.0/16 that the Installation calls other",
        ),
        (
            json!([{ "cidr": "10.0.0.0/8", "name": "mine" }]),
            existing("mine", ours(), true),
            "IPPool mine exists with range 10.0.0.0/16",
        ),
        (
            json!([{ "cidr": "10.0.5.0/24" }, good]),
            existing("mine", ours(), true),
            "the Installation's pool 10.0.5.0/24 overlaps IPPool mine (10.0.0.0/16)",
        ),
    ];
    for (pools, found, wanted) in table {
        let others = pools.as_array().map_or(0, |list| list.len() - 1);
        let plan = planned(pools, vec![found]);
        assert_eq!(plan.conflicts.len(), 1, "{plan:?}");
        assert!(plan.conflicts[0].contains(wanted), "{}", plan.conflicts[0]);
        assert_eq!(plan.objects.len(), others, "the other pool is made");
    }
}
