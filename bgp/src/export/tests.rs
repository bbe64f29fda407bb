use super::*;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn policy() -> ExportPolicy {
    let mut policy = ExportPolicy::default();
    for (cidr, exported) in [
        ("10.65.0.0/16", true),
        ("10.66.0.0/16", false),
        ("fd00:65::/48", true),
    ] {
        policy.pools.insert(net(cidr), exported);
    }
    for (cidr, confirmed) in [
        ("10.65.1.0/26", true),
        ("10.65.1.64/26", false),
        ("fd00:65::/122", true),
    ] {
        policy.blocks.insert(net(cidr), confirmed);
    }
    policy.services.insert(net("10.96.0.0/12"), ());
    policy.services.insert(net("10.96.3.4/32"), ());
    policy.service_ranges.insert(net("10.96.0.0/12"), ());
    let communities = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    policy
        .communities
        .insert(net("10.65.0.0/16"), communities(&["64512:1"]));
    policy
        .communities
        .insert(net("10.65.1.0/24"), communities(&["64512:1", "64512:2:3"]));
    policy
}

#[test]
fn blocks_go_whole_and_pools_services_and_nothing_else() {
    let rows = [
        ("10.65.1.0/26", false, true),
        ("10.65.1.64/26", false, false),
        ("10.65.1.7/32", false, false),
        ("10.65.1.7/32", true, true),
        ("10.65.9.7/32", false, true),
        ("10.65.2.0/26", false, true),
        ("10.65.0.0/16", false, true),
        ("10.64.0.0/15", false, false),
        ("10.66.2.0/26", false, false),
        ("10.66.2.1/32", true, false),
        ("10.96.0.0/12", false, true),
        ("10.96.3.4/32", false, true),
        ("10.96.3.5/32", false, false),
        ("192.0.2.0/24", false, false),
        ("0.0.0.0/0", false, false),
        ("fd00:65::/122", false, true),
        ("fd00:65::1/128", false, false),
        ("fd00:65:0:1::1/128", false, true),
        ("::/0", false, false),
    ];
    for (text, is_preferred, expected) in rows {
        assert_eq!(
            policy().exports(&net(text), is_preferred),
            expected,
            "{text} {is_preferred}"
        );
    }
}

#[test]
fn communities_are_those_of_every_prefix_around() {
    let rows = [
        ("10.65.1.0/26", "64512:1 64512:2:3"),
        ("10.65.2.0/26", "64512:1"),
        ("10.65.0.0/16", "64512:1"),
        ("10.0.0.0/8", ""),
    ];
    for (text, expected) in rows {
        let found: BTreeSet<CommunityValue> = policy().communities(&net(text)).collect();
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found.join(" "), expected, "{text}");
    }
}

#[test]
fn services_of_others_are_not_for_the_kernel() {
    assert!(!policy().installs(&net("10.96.3.4/32")));
    assert!(policy().installs(&net("10.65.2.0/26")));
}
