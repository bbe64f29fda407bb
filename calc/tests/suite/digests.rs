//! Digests that agents and servers of other versions compute too.

use margay_api::rule::Protocol;
use margay_api::settings::{EndpointToHostAction, Failsafe, FelixSettings, LogRate, TimeUnit};
use margay_calc::digest;
use margay_calc::model::{Record, RecordId};
use margay_calc::text;

/// The digest of settings of which each has another value than the default. It never changes: a new
/// setting has its default here.
#[test]
fn settings_keep_their_digest() {
    let ssh = Failsafe {
        protocol: Protocol::TCP,
        port: 22,
        net: Some("10.0.0.0/8".parse().expect("a range")),
    };
    let settings = FelixSettings {
        endpoint_to_host: EndpointToHostAction::Drop,
        vxlan_vni: 7,
        vxlan_port: 8,
        vxlan_mtu: 1400,
        nat_exclude_hosts: true,
        allow_conntrack_invalid: true,
        log_prefix: "x".to_owned(),
        log_rate: Some(LogRate {
            count: 10,
            unit: TimeUnit::Minute,
        }),
        log_burst: 9,
        ipv6: false,
        vxlan_mtu_v6: 1380,
        checksum_offload_broken: true,
        no_namespace_names_pools: false,
        failsafe_inbound: vec![ssh],
        failsafe_outbound: Vec::new(),
        metrics_enabled: false,
        metrics_host: String::new(),
        metrics_port: 9091,
        ipip_mtu: 0,
    };
    let digest = |settings| digest::digest(&RecordId::Settings, &Record::Settings(settings));
    assert_eq!(digest(FelixSettings::default()), 0x0005_3078_af78_3ab5);
    assert_eq!(digest(settings), 0x1a2b_a9be_df2e_048d);
}

#[test]
fn settings_are_printed_where_they_differ_from_their_defaults() {
    let text = |settings| text::record(&RecordId::Settings, &Record::Settings(settings));
    assert_eq!(text(FelixSettings::default()), "settings\n");
    let settings = FelixSettings {
        vxlan_mtu_v6: 1380,
        ipv6: false,
        log_rate: Some(LogRate {
            count: 10,
            unit: TimeUnit::Minute,
        }),
        failsafe_outbound: Vec::new(),
        ..FelixSettings::default()
    };
    let expected =
        "settings log_rate 10/minute ipv6 false vxlan_mtu_v6 1380 failsafe_outbound []\n";
    assert_eq!(text(settings), expected);
}
