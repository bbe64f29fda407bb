use serde_json::json;

use super::*;
use crate::defaults;
use crate::inputs::Inputs;

fn problems(spec: Value) -> Vec<Problem> {
    let given: InstallationSpec = serde_json::from_value(spec).unwrap();
    let inputs = Inputs {
        pools: Some(Vec::new()),
        ..Inputs::default()
    };
    installation(&defaults::complete(&given, &inputs))
}

fn pool(fields: Value) -> Value {
    json!({ "calicoNetwork": { "ipPools": [fields] } })
}

#[test]
fn good_installations_have_no_problems() {
    for spec in [
        json!({}),
        json!({ "registry": "UseDefault" }),
        json!({ "registry": "a.example:5000/" }),
        json!({
            "calicoNetwork": {
                "linuxDataplane": "Iptables",
                "mtu": 0,
                "linuxPolicySetupTimeoutSeconds": 0,
            },
        }),
        json!({ "calicoNetwork": { "mtu": 9000, "ipPools": [] } }),
        json!({ "nodeUpdateStrategy": { "rollingUpdate": { "maxUnavailable": "10%" } } }),
        json!({ "typhaReplicas": { "minimum": 2, "maximum": 2 } }),
        json!({ "nodeMetricsPort": 9091, "typhaMetricsPort": 9093 }),
        pool(json!({ "cidr": "10.0.0.0/26", "blockSize": 26, "encapsulation": "None" })),
        pool(json!({
            "cidr": "fd00:10::/56",
            "encapsulation": "VXLANCrossSubnet",
            "natOutgoing": "Enabled",
        })),
        json!({
            "calicoNetwork": {
                "ipPools": [{ "cidr": "10.0.0.0/16" }, { "cidr": "fd00::/116", "blockSize": 128 }],
            },
        }),
        json!({
            "calicoNetwork": {
                "ipPools": [{ "cidr": "10.0.0.0/17" }, { "cidr": "10.0.128.0/17" }],
            },
        }),
    ] {
        assert_eq!(problems(spec.clone()), [], "{spec}");
    }
}

#[test]
fn each_bad_field_is_named_with_value_rule_and_remedy() {
    let table = [
        (
            json!({ "variant": "TigeraSecureEnterprise" }),
            "spec.variant is TigeraSecureEnterprise",
        ),
        (
            json!({ "registry": "a.example" }),
            "spec.registry is a.example: it must end with /; set a.example/",
        ),
        (
            json!({ "imagePullPolicy": "Sometimes" }),
            "spec.imagePullPolicy is Sometimes: it must be IfNotPresent or Always or Never",
        ),
        (
            json!({ "cni": { "type": "AmazonVPC" } }),
            "spec.cni.type is AmazonVPC",
        ),
        (
            json!({ "cni": { "ipam": { "type": "HostLocal" } } }),
            "spec.cni.ipam.type is HostLocal",
        ),
        (
            json!({ "cni": { "specVersion": "0.2.0" } }),
            "spec.cni.specVersion is 0.2.0: it must be Auto or 0.3.1 or 0.4.0 or 1.0.0 or 1.1.0",
        ),
        (
            json!({ "cni": { "binDir": "opt/cni" } }),
            "spec.cni.binDir is opt/cni: it must be an absolute path",
        ),
        (
            json!({ "cni": { "confDir": "/etc/../x" } }),
            "spec.cni.confDir is /etc/../x",
        ),
        (
            json!({ "calicoNetwork": { "linuxDataplane": "BPF" } }),
            "spec.calicoNetwork.linuxDataplane is BPF",
        ),
        (
            json!({ "calicoNetwork": { "bgp": "On" } }),
            "spec.calicoNetwork.bgp is On",
        ),
        (
            json!({ "calicoNetwork": { "mtu": 100 } }),
            "spec.calicoNetwork.mtu is 100: it must be 0 or from 576 to 65535",
        ),
        (
            json!({ "calicoNetwork": { "linuxPolicySetupTimeoutSeconds": -1 } }),
            "spec.calicoNetwork.linuxPolicySetupTimeoutSeconds is -1",
        ),
        (
            json!({ "nodeUpdateStrategy": { "type": "OnDelete" } }),
            "spec.nodeUpdateStrategy.type is OnDelete",
        ),
        (
            json!({ "nodeUpdateStrategy": { "rollingUpdate": { "maxUnavailable": 0 } } }),
            "spec.nodeUpdateStrategy.rollingUpdate.maxUnavailable is 0",
        ),
        (
            json!({ "nodeUpdateStrategy": { "rollingUpdate": { "maxUnavailable": "0%" } } }),
            "spec.nodeUpdateStrategy.rollingUpdate.maxUnavailable is \"0%\"",
        ),
        (json!({ "nodeMetricsPort": 0 }), "spec.nodeMetricsPort is 0"),
        (
            json!({ "typhaMetricsPort": 9098 }),
            "spec.typhaMetricsPort is 9098: Margay uses the ports",
        ),
        (
            json!({ "nodeMetricsPort": 9091, "typhaMetricsPort": 9091 }),
            "spec.typhaMetricsPort is 9091: it is nodeMetricsPort too",
        ),
        (
            json!({ "typhaReplicas": { "minimum": 0 } }),
            "spec.typhaReplicas.minimum is 0",
        ),
        (
            json!({ "typhaReplicas": { "minimum": 3, "maximum": 2 } }),
            "spec.typhaReplicas.maximum is 2: it must be at least the minimum, 3",
        ),
        (
            json!({
                "componentResources": [{ "componentName": "Node" }, { "componentName": "Whisker" }],
            }),
            "spec.componentResources[1].componentName is Whisker",
        ),
        (
            json!({
                "typhaDeployment": {
                    "spec": { "template": { "spec": { "containers": [{ "name": "x" }] } } },
                },
            }),
            "spec.typhaDeployment.spec.template.spec.containers[0].name is x: the workload has no \
             such container; name margay-typha",
        ),
        (
            json!({
                "typhaDeployment": {
                    "spec": { "template": { "spec": { "initContainers": [{ "name": "x" }] } } },
                },
            }),
            "spec.typhaDeployment.spec.template.spec.initContainers[0].name is x",
        ),
        (
            pool(json!({ "cidr": "10.0.0.0/33" })),
            "spec.calicoNetwork.ipPools[0].cidr is 10.0.0.0/33: it is not an address range",
        ),
        (
            pool(json!({ "cidr": "" })),
            "spec.calicoNetwork.ipPools[0].cidr is empty",
        ),
        (
            pool(json!({ "cidr": "fd00::1/48" })),
            "host bits must be zero; write fd00::/48",
        ),
        (
            pool(json!({ "cidr": "fe80::/64" })),
            "pods cannot have addresses in that range; use a private range like fd00",
        ),
        (
            pool(json!({ "cidr": "ff00::/16" })),
            "pods cannot have addresses in that range",
        ),
        (
            pool(json!({ "cidr": "fd00::/48", "blockSize": 64 })),
            "spec.calicoNetwork.ipPools[0].blockSize is 64: blocks of IPv6 pools have prefix \
             lengths from 116 to 128; set 122",
        ),
        (
            pool(json!({ "cidr": "fd00::/123" })),
            "spec.calicoNetwork.ipPools[0].blockSize is 122: one block would be larger than the \
             pool",
        ),
        (
            pool(json!({ "cidr": "fd00::/48", "encapsulation": "IPIP" })),
            "spec.calicoNetwork.ipPools[0].encapsulation is IPIP: IPIP carries IPv4 only",
        ),
        (
            json!({
                "calicoNetwork": {
                    "ipPools": [{ "cidr": "fd00::/48" }, { "cidr": "fd00:0:0:1::/64" }],
                },
            }),
            "spec.calicoNetwork.ipPools[1].cidr is fd00:0:0:1::/64: it overlaps ipPools[0] \
             (fd00::/48)",
        ),
        (
            pool(json!({ "cidr": "10.0.1.0/16" })),
            "host bits must be zero; write 10.0.0.0/16",
        ),
        (
            pool(json!({ "cidr": "169.254.0.0/16" })),
            "pods cannot have addresses in that range",
        ),
        (
            pool(json!({ "cidr": "224.0.0.0/8" })),
            "pods cannot have addresses in that range",
        ),
        (
            pool(json!({ "cidr": "10.0.0.0/16", "blockSize": 19 })),
            "spec.calicoNetwork.ipPools[0].blockSize is 19: blocks of IPv4 pools have prefix \
             lengths from 20 to 32",
        ),
        (
            pool(json!({ "cidr": "10.0.0.0/27" })),
            "spec.calicoNetwork.ipPools[0].blockSize is 26: one block would be larger than the \
             pool",
        ),
        (
            pool(json!({ "cidr": "10.0.0.0/16", "encapsulation": "GRE" })),
            "spec.calicoNetwork.ipPools[0].encapsulation is GRE: it must be VXLAN or \
             VXLANCrossSubnet or IPIP or IPIPCrossSubnet or None",
        ),
        (
            pool(json!({ "cidr": "10.0.0.0/16", "natOutgoing": "true" })),
            "spec.calicoNetwork.ipPools[0].natOutgoing is true",
        ),
        (
            pool(json!({ "cidr": "10.0.0.0/16", "nodeSelector": " " })),
            "spec.calicoNetwork.ipPools[0].nodeSelector is empty",
        ),
        (
            pool(json!({ "cidr": "10.0.0.0/16", "nodeSelector": "zone = 'a'" })),
            "spec.calicoNetwork.ipPools[0].nodeSelector is zone = 'a': ",
        ),
        (
            pool(json!({ "cidr": "10.0.0.0/16", "name": "Upper" })),
            "spec.calicoNetwork.ipPools[0].name is Upper",
        ),
        (
            pool(json!({ "cidr": "10.0.0.0/16", "allowedUses": ["LoadBalancer"] })),
            "spec.calicoNetwork.ipPools[0].allowedUses is LoadBalancer",
        ),
        (
            json!({
                "calicoNetwork": {
                    "ipPools": [{ "cidr": "10.0.0.0/16" }, { "cidr": "10.0.3.0/24" }],
                },
            }),
            "spec.calicoNetwork.ipPools[1].cidr is 10.0.3.0/24: it overlaps ipPools[0] \
             (10.0.0.0/16)",
        ),
        (
            json!({
                "calicoNetwork": {
                    "ipPools": [
                        { "cidr": "10.0.0.0/16", "name": "a" },
                        { "cidr": "10.1.0.0/16", "name": "a" },
                    ],
                },
            }),
            "spec.calicoNetwork.ipPools[1].name is a: another pool of the list has the same name",
        ),
    ];
    for (spec, wanted) in table {
        let found = problems(spec.clone());
        assert_eq!(found.len(), 1, "{spec}: {found:?}");
        assert!(
            found[0].to_string().contains(wanted),
            "{} lacks {wanted}",
            found[0]
        );
        assert!(!found[0].remedy.is_empty());
    }
}

#[test]
fn all_problems_are_found_at_once() {
    let found = problems(json!({
        "variant": "x",
        "calicoNetwork": {
            "mtu": 1,
            "ipPools": [{ "cidr": "a" }, { "cidr": "10.0.0.0/16", "blockSize": 33 }],
        },
    }));
    assert_eq!(found.len(), 4, "{found:?}");
}

#[test]
fn the_number_of_pools_is_limited() {
    let pools: Vec<Value> = (0..26)
        .map(|i| json!({ "cidr": format!("10.{i}.0.0/16") }))
        .collect();
    let found = problems(json!({ "calicoNetwork": { "ipPools": pools } }));
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].value, "26 pools long");
}
