use serde_json::json;

use super::*;

fn cluster(subnets: &[&str], pools: Option<Vec<PoolFacts>>) -> Inputs {
    Inputs {
        pod_subnets: subnets.iter().map(|s| (*s).to_owned()).collect(),
        pools,
        ..Inputs::default()
    }
}

fn pool(name: &str, spec: Value) -> PoolFacts {
    PoolFacts {
        name: name.to_owned(),
        spec,
        ..PoolFacts::default()
    }
}

fn pools_of(spec: Value, inputs: &Inputs) -> Value {
    let given: InstallationSpec = serde_json::from_value(spec).unwrap();
    json!(complete(&given, inputs))["calicoNetwork"]["ipPools"].clone()
}

#[test]
fn everything_that_has_a_default_gets_it() {
    let given = InstallationSpec::default();
    let completed = complete(&given, &cluster(&[], Some(vec![])));
    assert_eq!(
        json!(completed),
        json!({
            "variant": "Calico",
            "imagePullPolicy": "IfNotPresent",
            "cni": {
                "type": "Calico", "ipam": { "type": "Calico" },
                "binDir": "/opt/cni/bin", "confDir": "/etc/cni/net.d",
            },
            "calicoNetwork": {
                "linuxDataplane": "Nftables", "bgp": "Disabled", "hostPorts": "Enabled",
                "linuxPolicySetupTimeoutSeconds": 30,
                "ipPools": [{
                    "name": "default-ipv4-ippool", "cidr": "192.168.0.0/16",
                    "encapsulation": "VXLAN",
                    "natOutgoing": "Enabled", "nodeSelector": "all()", "blockSize": 26,
                }],
            },
            "nodeUpdateStrategy": {
                "type": "RollingUpdate",
                "rollingUpdate": { "maxUnavailable": 1 },
            },
        })
    );
}

#[test]
fn bgp_is_for_packets_that_other_networks_route() {
    let existing = |spec: Value| Some(vec![pool("a", spec)]);
    let pools = |encapsulations: &[&str]| {
        let pools = encapsulations.iter().enumerate();
        let pools = pools.map(|(index, encapsulation)| {
            json!({ "cidr": format!("10.{index}.0.0/16"), "encapsulation": encapsulation })
        });
        json!({ "calicoNetwork": { "ipPools": pools.collect::<Vec<_>>() } })
    };
    let table = [
        (json!({}), Some(vec![]), json!("Disabled")),
        (json!({}), None, Value::Null),
        (
            pools(&["VXLAN", "VXLANCrossSubnet"]),
            Some(vec![]),
            json!("Disabled"),
        ),
        (pools(&["VXLAN", "None"]), Some(vec![]), json!("Enabled")),
        (pools(&["IPIP"]), Some(vec![]), json!("Enabled")),
        (pools(&["IPIPCrossSubnet"]), Some(vec![]), json!("Enabled")),
        (
            json!({}),
            existing(json!({ "cidr": "10.0.0.0/16", "ipipMode": "Always" })),
            json!("Enabled"),
        ),
        (
            json!({}),
            existing(json!({ "cidr": "10.0.0.0/16", "vxlanMode": "Always" })),
            json!("Disabled"),
        ),
        (
            json!({ "calicoNetwork": { "bgp": "Enabled" } }),
            Some(vec![]),
            json!("Enabled"),
        ),
    ];
    for (spec, existing, bgp) in table {
        let given: InstallationSpec = serde_json::from_value(spec.clone()).unwrap();
        let completed = json!(complete(&given, &cluster(&[], existing)));
        assert_eq!(completed["calicoNetwork"]["bgp"], bgp, "{spec}");
    }
}

#[test]
fn completion_is_idempotent() {
    let inputs = cluster(&["10.244.0.0/16"], Some(vec![]));
    let once = complete(&InstallationSpec::default(), &inputs);
    assert_eq!(complete(&once, &inputs), once);
}

#[test]
fn the_default_pools_are_the_platforms_ranges() {
    let table: [(&[&str], &[&str]); 6] = [
        (
            &["10.244.0.0/16"],
            &["default-ipv4-ippool 10.244.0.0/16 26 Enabled"],
        ),
        (
            &["fd00:10::/56", "10.12.0.0/14", "fd00:11::/56"],
            &[
                "default-ipv4-ippool 10.12.0.0/14 26 Enabled",
                "default-ipv6-ippool fd00:10::/56 122 Disabled",
            ],
        ),
        (
            &["fd00:10::7/56"],
            &["default-ipv6-ippool fd00:10::/56 122 Disabled"],
        ),
        (
            &["10.244.7.9/16"],
            &["default-ipv4-ippool 10.244.0.0/16 26 Enabled"],
        ),
        (
            &["nonsense"],
            &["default-ipv4-ippool 192.168.0.0/16 26 Enabled"],
        ),
        (&[], &["default-ipv4-ippool 192.168.0.0/16 26 Enabled"]),
    ];
    for (subnets, wanted) in table {
        let pools = pools_of(json!({}), &cluster(subnets, Some(vec![])));
        let shown = |pool: &Value| {
            let field = |name: &str| pool[name].to_string().replace('"', "");
            ["name", "cidr", "blockSize", "natOutgoing"]
                .map(field)
                .join(" ")
        };
        let found: Vec<String> = pools.as_array().unwrap().iter().map(shown).collect();
        assert_eq!(found, wanted, "{subnets:?}");
    }
}

#[test]
fn existing_pools_are_not_changed() {
    let existing = pool("theirs", json!({ "cidr": "10.9.0.0/16" }));
    let inputs = cluster(&["10.244.0.0/16"], Some(vec![existing]));
    assert_eq!(pools_of(json!({}), &inputs), json!([]));
}

#[test]
fn nothing_is_decided_about_pools_before_they_are_known() {
    assert_eq!(pools_of(json!({}), &cluster(&[], None)), Value::Null);
    let given = json!({ "calicoNetwork": { "ipPools": [{ "cidr": "10.0.0.0/16" }] } });
    assert_eq!(
        pools_of(given, &cluster(&[], None)),
        json!([{ "cidr": "10.0.0.0/16" }])
    );
}

#[test]
fn a_pool_gets_its_defaults_from_the_existing_one_of_its_range() {
    let existing = pool(
        "old",
        json!({
            "cidr": "10.9.0.0/16",
            "vxlanMode": "CrossSubnet",
            "blockSize": 28,
            "nodeSelector": "a == 'b'",
        }),
    );
    let inputs = cluster(&[], Some(vec![existing]));
    let given = json!({
        "calicoNetwork": { "ipPools": [{ "cidr": "10.9.0.0/16" }, { "cidr": "10.8.0.0/16" }] },
    });
    assert_eq!(
        pools_of(given, &inputs),
        json!([
            {
                "name": "old", "cidr": "10.9.0.0/16", "encapsulation": "VXLANCrossSubnet",
                "natOutgoing": "Disabled", "nodeSelector": "a == 'b'", "blockSize": 28,
            },
            {
                "name": "ippool-10-8-0-0-16", "cidr": "10.8.0.0/16", "encapsulation": "VXLAN",
                "natOutgoing": "Enabled", "nodeSelector": "all()", "blockSize": 26,
            },
        ])
    );
}

#[test]
fn only_what_was_missing_is_written_back() {
    let given =
        json!({ "variant": "Calico", "calicoNetwork": { "mtu": 1400 }, "fipsMode": "Disabled" });
    let completed =
        json!({ "variant": "Calico", "calicoNetwork": { "mtu": 1400, "bgp": "Disabled" } });
    assert_eq!(
        write_back(&given, &completed, &Value::Null),
        Some(json!({ "calicoNetwork": { "bgp": "Disabled" } }))
    );
    assert_eq!(write_back(&completed, &completed, &Value::Null), None);
}

#[test]
fn what_was_written_earlier_is_written_again_with_what_is_new() {
    let given = json!({
        "variant": "Calico",
        "calicoNetwork": {
            "mtu": 1400,
            "ipPools": [
                { "cidr": "10.0.0.0/16", "encapsulation": "None", "blockSize": 26 },
                { "cidr": "10.1.0.0/16" },
            ],
        },
    });
    let written = json!({
        "f:variant": {},
        "f:calicoNetwork": {
            "f:ipPools": {
                "k:{\"cidr\":\"10.0.0.0/16\"}": { ".": {}, "f:cidr": {}, "f:blockSize": {} },
            },
        },
    });
    let mut completed = given.clone();
    completed["calicoNetwork"]["ipPools"][1]["blockSize"] = json!(26);
    completed["calicoNetwork"]["bgp"] = json!("Disabled");
    assert_eq!(
        write_back(&given, &completed, &written),
        Some(json!({
            "variant": "Calico",
            "calicoNetwork": {
                "bgp": "Disabled",
                "ipPools": [
                    { "cidr": "10.0.0.0/16", "blockSize": 26 },
                    { "cidr": "10.1.0.0/16", "blockSize": 26 },
                ],
            },
        }))
    );
}

#[test]
fn a_list_once_written_empty_does_not_own_later_entries() {
    let given = json!({ "calicoNetwork": { "ipPools": [{ "cidr": "10.1.0.0/16" }] } });
    let mut completed = given.clone();
    completed["variant"] = json!("Calico");
    let written = json!({ "f:calicoNetwork": { "f:ipPools": {} } });
    assert_eq!(
        write_back(&given, &completed, &written),
        Some(json!({ "variant": "Calico", "calicoNetwork": { "ipPools": [] } }))
    );
}

/// Applies a patch as the API server does, as far as pools and plain fields go.
fn applied(stored: &Value, body: &Value) -> Value {
    merge(stored.clone(), body.clone())
}

#[test]
fn one_write_back_is_enough() {
    for spec in [
        json!({}),
        json!({
            "calicoNetwork": {
                "ipPools": [{ "cidr": "10.1.0.0/16" }, { "cidr": "10.2.0.0/16", "blockSize": 28 }],
            },
        }),
        json!({ "cni": { "binDir": "/x" }, "unknown": { "a": [1, 2] } }),
    ] {
        let inputs = cluster(&[], Some(vec![]));
        let given: InstallationSpec = serde_json::from_value(spec.clone()).unwrap();
        let completed = json!(complete(&given, &inputs));
        let body = write_back(&spec, &completed, &Value::Null).unwrap();
        let stored = applied(&spec, &body);
        let read: InstallationSpec = serde_json::from_value(stored.clone()).unwrap();
        let again = json!(complete(&read, &inputs));
        assert_eq!(again, completed);
        assert_eq!(write_back(&stored, &again, &Value::Null), None, "{spec}");
        assert_eq!(stored["unknown"], spec["unknown"]);
    }
}
