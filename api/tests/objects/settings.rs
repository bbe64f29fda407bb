//! FelixConfigurations as settings and overrides.

use expect_test::expect;
use margay_api::meta::Labels;
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::Protocol;
use margay_api::settings::{Failsafe, FelixSettings, LogRate, TimeUnit, log_prefix};
use margay_api::v3::{self, FelixConfiguration};

use super::mk_v3;

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
    let metrics = "prometheusMetricsEnabled: true, prometheusMetricsHost: 192.0.2.1";
    let node = overrides("node.n1", &format!("vxlanPort: 9, {metrics}")).unwrap();
    assert!(node.is_for("n1", None) && !node.is_for("n2", Some(&Labels::new())));
    let node = node.over(all.clone());
    assert_eq!(
        node,
        FelixSettings {
            vxlan_port: 9,
            metrics_enabled: true,
            metrics_host: "192.0.2.1".to_owned(),
            ..all
        }
    );
    let refusal = overrides(
        "default",
        "vxlanVNI: 0, vxlanPort: 65536, defaultEndpointToHostAction: Explode, \
         natOutgoingExclusions: x, vxlanMTU: 1300, logActionRateLimit: 0/day, \
         logActionRateLimitBurst: 10000, prometheusMetricsHost: here, prometheusMetricsPort: 0",
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
        spec.prometheusMetricsHost: "here": not an IP address; write an address of the node, or remove the field to listen on all of them
        spec.prometheusMetricsPort: "0": not from 1 to 65535; use a number in that range, or remove the field
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
