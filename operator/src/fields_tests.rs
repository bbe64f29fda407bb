use serde_json::{Value, json};

use super::*;
use crate::inputs::{PoolFacts, Request};

fn reported(spec: Value) -> Vec<String> {
    let request = Request {
        spec,
        owner: crate::manifest::Owner {
            name: "default".to_owned(),
            ..Default::default()
        },
        ..Request::default()
    };
    let found = report(&Inputs {
        request: Some(request),
        ..Inputs::default()
    })
    .calico;
    found
        .iter()
        .map(|one| format!("{} {one}", if one.is_unsafe { "unsafe" } else { "idle" }))
        .collect()
}

#[test]
fn fields_without_effect_are_reported_with_value_and_consequence() {
    let spec = json!({
        "variant": "Calico",
        "calicoNetwork": {
            "bgp": "Disabled", "hostPorts": "Enabled", "multiInterfaceMode": "None",
            "nodeAddressAutodetectionV4": {"interface": "eth7"},
            "nodeAddressAutodetectionV6": {"kubernetes": "NodeInternalIP"},
            "sysctl": [{"key": "net.ipv4.tcp_keepalive_time", "value": "40"}],
            "ipPools": [{"cidr": "10.0.0.0/16", "disableBGPExport": true, "blokSize": 27}],
        },
        "controlPlaneNodeSelecter": {"a": "b"},
        "controlPlaneNodeSelector": {"a": "b"},
        "calicoNodeDaemonSet": {
            "spec": {
                "template": {
                    "spec": {
                        "topologySpreadConstraints": [{"maxSkew": 1}],
                        "tolerations": [{"operator": "Exists"}],
                    },
                },
            },
        },
        "certificateManagement": {
            "caCert": "-----BEGIN CERTIFICATE-----MIIBszCCAVmgAwIBAgIUQ0Jc7x0b",
            "signerName": "a.b/c",
        },
        "fipsMode": "Disabled", "flexVolumePath": "None",
        "someFutureField": {"deep": true},
    });
    expect_test::expect![[r#"
        idle Installation default, spec.calicoNetwork.sysctl is [{"key":"net.ipv4.tcp_keepalive_time","value":"40"}]: no sysctls of pods are set; chain the tuning plugin in your own CNI configuration
        idle Installation default, spec.calicoNodeDaemonSet.spec.template.spec.topologySpreadConstraints is [{"maxSkew":1}]: the operator sets the spread of its pods
        idle Installation default, spec.someFutureField is {"deep":true}: this version does not know the field, and it has no effect
        unsafe Installation default, spec.calicoNetwork.ipPools[0].blokSize is 27: there is no such field, so it has no effect; did you mean blockSize?
        unsafe Installation default, spec.calicoNetwork.nodeAddressAutodetectionV4.interface is eth7: a node's address is the one that kubelet reports, so packets between nodes may use another network than configured here; start kubelet with --node-ip
        unsafe Installation default, spec.certificateManagement is {"caCert":"-----BEGIN CERTIFICATE-----MIIBszCCAVmgAwIBAgIUQ0...: certificates are signed by Margay's own CA, not by this one; remove the field
        unsafe Installation default, spec.controlPlaneNodeSelecter is {"a":"b"}: there is no such field, so it has no effect; did you mean controlPlaneNodeSelector?
    "#]]
    .assert_eq(&(reported(spec).join("\n") + "\n"));
}

#[test]
fn settings_of_other_kinds_are_reported_in_their_status() {
    let pool = |name: &str, spec: Value| PoolFacts {
        name: name.to_owned(),
        spec,
        ..PoolFacts::default()
    };
    let felix = [
        (
            "default",
            json!({
                "wireguardEnabled": true,
                "bpfEnabled": false,
                "vxlanVNI": 4097,
                "floatingIPs": "Disabled",
            }),
        ),
        (
            "node.n1",
            json!({"interfacePrefix": "tap", "natPortRange": "1:2"}),
        ),
    ];
    let inputs = Inputs {
        felix: Some(felix.map(|(name, spec)| (name.to_owned(), spec)).into()),
        controllers: Some(Some(json!({"spec": {"controllers": {
            "node": {"leakGracePeriod": "5m", "syncLabels": "Enabled", "reconcilerPeriod": "5m"},
            "loadBalancer": {"assignIPs": "None"},
        }}}))),
        bgp: Some(
            [(
                "default".to_owned(),
                json!({"asNumber": 64513, "logSeverityScreen": "Debug"}),
            )]
            .into(),
        ),
        pools: Some(vec![
            pool("a", json!({"cidr": "10.0.0.0/16", "ipipMode": "Always"})),
            pool(
                "b",
                json!({"cidr": "10.1.0.0/16", "ipipMode": "Never", "disableBGPExport": false}),
            ),
        ]),
        ipam: Some(json!({"strictAffinity": true, "kubeVirtVMAddressPersistence": "Enabled"})),
        ..Inputs::default()
    };
    let found = report(&inputs);
    let shown = |set: &BTreeSet<Ignored>| {
        set.iter()
            .map(|one| format!("{} {} {}", one.is_unsafe, one.object, one.field))
            .map(|line| line.trim_end().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        shown(&found.calico),
        [
            "false BGPConfiguration default spec.logSeverityScreen is Debug",
            "false FelixConfiguration node.n1 spec.natPortRange is 1:2",
            "false KubeControllersConfiguration default spec.controllers.loadBalancer.assignIPs is \
             None",
            "true FelixConfiguration default spec.wireguardEnabled is true",
            "true FelixConfiguration node.n1 spec.interfacePrefix is tap",
        ]
    );
    assert_eq!(
        shown(&found.ippools),
        ["false IPAMConfiguration default spec.kubeVirtVMAddressPersistence is Enabled"]
    );
}

#[test]
fn nothing_is_reported_for_a_default_installation() {
    let written = json!({
        "variant": "Calico", "registry": "margay.io/", "cni": {
            "type": "Calico",
            "ipam": {"type": "Calico"},
            "binDir": "/opt/cni/bin",
        },
        "calicoNetwork": {"linuxDataplane": "Nftables", "bgp": "Disabled", "hostPorts": "Disabled",
            "mtu": 0, "linuxPolicySetupTimeoutSeconds": 30,
            "ipPools": [{"name": "default-ipv4-ippool", "cidr": "10.244.0.0/16",
                "encapsulation": "VXLAN", "natOutgoing": "Enabled",
                "nodeSelector": "all()", "blockSize": 26, "allowedUses": ["Workload", "Tunnel"],
                "assignmentMode": "Automatic"}]},
        "nodeUpdateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
    });
    assert_eq!(reported(written), [""; 0]);
}
