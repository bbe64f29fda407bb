use super::*;

/// A pod with its address, one address that its pod has left behind, and one that its node has.
fn data() -> IpamData {
    let mut block = Block::new("10.0.0.0/28".parse().expect("a range"), "n1", String::new());
    let attribute = |pod: Option<&str>| {
        let mut secondary = BTreeMap::from([("node".to_owned(), "n1".to_owned())]);
        match pod {
            Some(pod) => secondary.extend([
                ("namespace".to_owned(), "x".to_owned()),
                ("pod".to_owned(), pod.to_owned()),
            ]),
            None => secondary.extend([("type".to_owned(), "vxlanTunnelAddress".to_owned())]),
        }
        let handle_id = Some(format!("h-{}", pod.unwrap_or("tunnel")));
        AllocationAttribute {
            handle_id,
            secondary: Some(secondary),
            ..Default::default()
        }
    };
    for pod in [Some("here"), Some("gone"), None] {
        block
            .assign(&attribute(pod), |_| false)
            .expect("an address");
    }
    let handle = |name: &str| {
        json!({
            "kind": "IPAMHandle", "metadata": {"name": name},
            "spec": {"handleID": name, "block": {"10.0.0.0/28": 1}},
        })
    };
    let objects = [
        json!({"kind": "IPAMBlock", "metadata": {"name": "10-0-0-0-28"}, "spec": block.spec()}),
        json!({
            "kind": "BlockAffinity", "metadata": {"name": "a"},
            "spec": {"cidr": "10.0.0.0/28", "node": "n1", "state": "confirmed"},
        }),
        handle("h-here"),
        handle("h-gone"),
        handle("h-tunnel"),
        json!({"kind": "IPPool", "metadata": {"name": "default"}, "spec": {"cidr": "10.0.0.0/16"}}),
        json!({
            "kind": "IPReservation", "metadata": {"name": "r"},
            "spec": {"reservedCIDRs": ["10.0.255.0/24"]},
        }),
        json!({"kind": "Node", "metadata": {"name": "n1"}}),
        json!({
            "kind": "Pod", "metadata": {"name": "here", "namespace": "x"},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.0"}]},
        }),
    ];
    let mut data = IpamData::default();
    objects
        .into_iter()
        .for_each(|object| data.add(object).expect("an object"));
    data
}

fn show_args() -> ShowArgs {
    ShowArgs {
        ip: None,
        show_blocks: true,
        show_borrowed: false,
        show_configuration: false,
        source: SourceArgs::default(),
    }
}

#[test]
fn usage_is_shown_by_pool_and_block() {
    expect_test::expect![[r#"
        +----------+-------------+-----------+------------+--------------+--------------+-------------+
        | GROUPING | CIDR        | IPS TOTAL | IPS IN USE | IPS RESERVED | IPS FREE     | IPS COOLING |
        +----------+-------------+-----------+------------+--------------+--------------+-------------+
        | IP Pool  | 10.0.0.0/16 |     65536 |     3 (0%) |     256 (0%) | 65277 (100%) |      0 (0%) |
        | Block    | 10.0.0.0/28 |        16 |    3 (19%) |       0 (0%) |     13 (81%) |      0 (0%) |
        +----------+-------------+-----------+------------+--------------+--------------+-------------+
    "#]]
    .assert_eq(&show(&data(), &show_args()));
}

#[test]
fn an_address_is_shown_with_its_owner() {
    let asked = |text: &str| {
        show(
            &data(),
            &ShowArgs {
                ip: Some(text.parse().expect("an address")),
                ..show_args()
            },
        )
    };
    assert_eq!(
        asked("10.0.0.0"),
        "IP 10.0.0.0 is in use\nHandle ID: h-here\nActive Owner Attributes:\n  namespace: x\n  \
         node: n1\n  pod: here\n"
    );
    assert_eq!(asked("10.0.0.9"), "10.0.0.9 is not assigned\n");
    assert_eq!(asked("192.0.2.1"), "192.0.2.1 is not assigned\n");
}

#[test]
fn a_check_finds_what_has_no_owner() {
    let data = data();
    let leaks = data.leaks();
    let (text, problems) = checked(&data, &leaks, true);
    assert_eq!(problems, 1, "{text}");
    assert!(
        text.contains("problem: address 10.0.0.1 of pod x/gone has no owner any more\n"),
        "{text}"
    );
    assert!(
        text.contains("10.0.0.2 vxlanTunnelAddress on node n1\n"),
        "{text}"
    );
    assert!(
        text.ends_with("Check complete; found 1 problems.\n"),
        "{text}"
    );
    assert_eq!(
        serde_json::from_value::<Vec<Leak>>(json!(leaks)).expect("a report"),
        leaks
    );
}

#[test]
fn an_incomplete_state_has_no_leaks() {
    let mut data = data();
    data.state.nodes.clear();
    assert_eq!(data.leaks(), []);
}

#[test]
fn only_what_has_no_owner_is_released() {
    let data = data();
    let address = |text: &str| text.parse::<IpAddr>().expect("an address");
    let leak = to_release(&data, address("10.0.0.1"), false).expect("it has no owner");
    assert_eq!(leak.handle, "h-gone");
    let error = to_release(&data, address("10.0.0.0"), false)
        .expect_err("in use")
        .to_string();
    assert!(error.contains("in use by pod x/here on node n1"), "{error}");
    assert!(
        to_release(&data, address("10.0.0.0"), true).is_ok(),
        "forced"
    );
    assert!(
        to_release(&data, address("10.0.0.9"), true).is_err(),
        "not assigned"
    );
}

#[test]
fn reports_are_believed_as_far_as_they_are_still_true() {
    let data = data();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("report");
    let [leak] = <[Leak; 1]>::try_from(data.leaks()).expect("one leak");
    let later = Leak {
        sequence: Some(99),
        ..leak.clone()
    };
    std::fs::write(&path, json!({"leaks": [leak, later]}).to_string()).expect("written");
    let wanted = reported(std::slice::from_ref(&path), &data, false).expect("a report");
    assert_eq!(wanted, [leak]);
    std::fs::write(&path, "{}").expect("written");
    assert!(reported(&[path], &data, false).is_err());
}

#[test]
fn settings_are_those_that_are_given() {
    let mut args = ConfigureArgs {
        strictaffinity: None,
        max_blocks_per_host: None,
        ip_cooldown_seconds: None,
        connection: ConnectionArgs::default(),
    };
    assert!(settings(&args).is_err());
    (args.strictaffinity, args.max_blocks_per_host) = (Some(false), Some(4));
    let wanted = [
        ("strictAffinity", json!(false)),
        ("maxBlocksPerHost", json!(4)),
    ];
    assert_eq!(settings(&args).expect("settings"), wanted);
}
