use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::attributes::AsPath;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

#[test]
fn prefixes_are_compared_as_the_operator_says() {
    use MatchOperator::{Equal, In, NotEqual, NotIn};
    let ten = "10.0.0.0/8";
    let rows = [
        (ten, Equal, None, None, "10.0.0.0/8", true),
        (ten, Equal, None, None, "10.1.0.0/16", false),
        (ten, NotEqual, None, None, "10.0.0.0/8", false),
        (ten, NotEqual, None, None, "10.1.0.0/16", true),
        (ten, In, None, None, "10.0.0.0/8", true),
        (ten, In, None, None, "10.1.0.0/16", true),
        (ten, In, None, None, "0.0.0.0/0", false),
        (ten, In, None, None, "11.0.0.0/16", false),
        (ten, NotIn, None, None, "11.0.0.0/16", true),
        (ten, NotIn, None, None, "10.0.0.0/26", false),
        (ten, In, Some(24), Some(26), "10.1.2.0/24", true),
        (ten, In, Some(24), Some(26), "10.1.2.0/27", false),
        (ten, In, Some(24), None, "10.1.2.3/32", true),
        (ten, In, None, Some(16), "10.1.2.0/24", false),
        (ten, NotIn, Some(24), Some(26), "10.1.2.0/27", true),
        (ten, NotIn, Some(24), Some(26), "10.1.2.0/25", false),
        ("10.1.2.3/8", In, None, None, "10.9.0.0/16", true),
        ("2001:db8::/32", In, None, None, "2001:db8:1::/48", true),
        ("2001:db8::/32", In, None, None, "10.0.0.0/8", false),
        ("0.0.0.0/0", In, None, None, "192.0.2.7/32", true),
    ];
    for (cidr, operator, min, max, route, expected) in rows {
        let found = PrefixMatch::new(net(cidr), operator, min, max)
            .unwrap()
            .matches(&net(route));
        assert_eq!(
            found, expected,
            "{route} {operator:?} {cidr} {min:?} {max:?}"
        );
    }
    for (min, max) in [
        (Some(27), Some(26)),
        (None, Some(33)),
        (None, Some(7)),
        (Some(40), None),
    ] {
        let error = PrefixMatch::new(net(ten), In, min, max).unwrap_err();
        assert!(error.to_string().starts_with("prefixLength: "), "{error}");
    }
}

#[test]
fn interfaces_are_compared_with_wildcards() {
    let rows = [
        ("eth0", "eth0", true),
        ("eth0", "eth01", false),
        ("eth*", "eth0", true),
        ("eth*", "eth", true),
        ("*", "", true),
        ("*.cali", "vxlan.cali", true),
        ("*a*b*", "xaxxbx", true),
        ("*a*b", "xaxxbx", false),
        ("eth?", "eth", false),
        ("e?h0", "eth0", true),
        ("", "eth0", false),
    ];
    for (pattern, name, expected) in rows {
        assert_eq!(is_name_like(pattern, name), expected, "{pattern} {name}");
    }
}

/// Each row has one thing that a rule names, a route that has it and one that has not.
#[test]
fn a_rule_matches_what_has_all_that_it_names() {
    let mut attributes = Attributes::local(IpAddr::from(Ipv4Addr::LOCALHOST));
    attributes.as_path = AsPath::sequence(&[65001, 65002]);
    attributes.add_community("64512:1:2".parse().unwrap());
    let route = net("10.1.0.0/26");
    let candidate = Candidate {
        net: &route,
        attributes: &attributes,
        is_from_peer: true,
        interface: Some("eth0"),
        peer_type: PeerType::External,
        priority: 512,
    };
    let plain = || FilterRule::new(FilterAction::Reject);
    let rows = [
        ("nothing", plain(), true),
        (
            "source",
            FilterRule {
                from_peers: true,
                ..plain()
            },
            true,
        ),
        (
            "interface",
            FilterRule {
                interface: Some("eth*".into()),
                ..plain()
            },
            true,
        ),
        (
            "interface",
            FilterRule {
                interface: Some("bond*".into()),
                ..plain()
            },
            false,
        ),
        (
            "peer type",
            FilterRule {
                peer_type: Some(PeerType::External),
                ..plain()
            },
            true,
        ),
        (
            "peer type",
            FilterRule {
                peer_type: Some(PeerType::Internal),
                ..plain()
            },
            false,
        ),
        (
            "community",
            FilterRule {
                community: Some("64512:1:2".parse().unwrap()),
                ..plain()
            },
            true,
        ),
        (
            "community",
            FilterRule {
                community: Some("64512:1".parse().unwrap()),
                ..plain()
            },
            false,
        ),
        (
            "path",
            FilterRule {
                as_path_prefix: vec![65001],
                ..plain()
            },
            true,
        ),
        (
            "path",
            FilterRule {
                as_path_prefix: vec![65001, 65002],
                ..plain()
            },
            true,
        ),
        (
            "path",
            FilterRule {
                as_path_prefix: vec![65002],
                ..plain()
            },
            false,
        ),
        (
            "path",
            FilterRule {
                as_path_prefix: vec![65001, 65002, 1],
                ..plain()
            },
            false,
        ),
        (
            "priority",
            FilterRule {
                priority: Some(512),
                ..plain()
            },
            true,
        ),
        (
            "priority",
            FilterRule {
                priority: Some(1024),
                ..plain()
            },
            false,
        ),
        (
            "both",
            FilterRule {
                priority: Some(512),
                as_path_prefix: vec![65002],
                ..plain()
            },
            false,
        ),
    ];
    for (what, rule, expected) in rows {
        assert_eq!(
            super::matches(&rule, &candidate),
            expected,
            "{what}: {rule:?}"
        );
    }
    let unknown = Candidate {
        is_from_peer: false,
        interface: None,
        ..candidate
    };
    let rows = [
        FilterRule {
            from_peers: true,
            ..plain()
        },
        FilterRule {
            interface: Some("*".into()),
            ..plain()
        },
    ];
    assert!(rows.iter().all(|rule| !super::matches(rule, &unknown)));
}

#[test]
fn the_first_rule_that_matches_decides_and_only_for_its_family() {
    let attributes = Attributes::local(IpAddr::from(Ipv4Addr::LOCALHOST));
    let within = |cidr: &str, action| FilterRule {
        prefix: Some(PrefixMatch::new(net(cidr), MatchOperator::In, None, None).unwrap()),
        ..FilterRule::new(action)
    };
    let accept = FilterAction::Accept(vec![RouteOperation::SetPriority(7)]);
    let filters = Filters {
        ipv4: vec![
            within("10.1.0.0/16", FilterAction::Reject),
            within("10.0.0.0/8", accept.clone()),
        ],
        ipv6: Vec::new(),
    };
    let decide = |text: &str| {
        let route = net(text);
        let candidate = Candidate {
            net: &route,
            attributes: &attributes,
            is_from_peer: false,
            interface: None,
            peer_type: PeerType::Internal,
            priority: 1024,
        };
        super::decide(&filters, &candidate).cloned()
    };
    assert_eq!(decide("10.1.2.0/24"), Some(FilterAction::Reject));
    assert_eq!(decide("10.2.0.0/16"), Some(accept));
    assert_eq!(decide("11.0.0.0/8"), None);
    assert_eq!(decide("2001:db8::/32"), None);
}
