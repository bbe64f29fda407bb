//! What agents write about their nodes and blocks takes nothing from other nodes.

use expect_test::expect;
use margay_api::hosts::{CREATED_BY, LABEL_CREATED_BY};

use crate::golden::check;

#[test]
fn a_block_outside_pools_or_over_another_is_no_route_but_a_problem() {
    check(
        "
node n1 192.0.2.1/24
node n9 192.0.2.9/24
pool main 10.0.0.0/16 vxlan since:1
block 10.0.0.0/26 n1 since:3
flush
block 10.0.0.5/32 n9 since:4
block 10.0.0.0/25 n9 since:4
block 8.8.8.8/32 n9 since:4
block 0.0.0.0/0 n9 since:0
block 10.0.0.64/26 n9 since:4
flush
problems
",
        expect![[r#"
            > flush
            settings gained by all
            pool 10.0.0.0/16 gained by all
            node n1 gained by all
            node n9 gained by all
            route 10.0.0.0/26 gained by all

            > flush
            route 10.0.0.64/26 gained by all

            > problems
            IPAMBlock 0-0-0-0-0: spec.cidr: 0.0.0.0/0 of n9: no IPPool has this range, so other nodes have no route to it; create such a pool, or delete the block once no pod uses it
            IPAMBlock 8-8-8-8-32: spec.cidr: 8.8.8.8/32 of n9: no IPPool has this range, so other nodes have no route to it; create such a pool, or delete the block once no pod uses it
            IPAMBlock 10-0-0-0-25: spec.cidr: 10.0.0.0/25 of n9: IPPool main is divided into blocks of /26, and this is not one of them, so it gets no route; delete it, and find out what created it
            IPAMBlock 10-0-0-5-32: spec.cidr: 10.0.0.5/32 of n9: IPPool main is divided into blocks of /26, and this is not one of them, so it gets no route; delete it, and find out what created it

        "#]],
    );
}

#[test]
fn blocks_of_a_missing_pool_have_no_route_and_those_of_another_size_keep_theirs_until_empty() {
    check(
        "
node n1 192.0.2.1/24
pool main 10.0.0.0/16 vxlan since:1
block 10.0.0.0/26 n1 since:2 10.0.0.1=n2
flush
- pool main
flush
problems
pool again 10.0.0.0/16 vxlan size:28 since:9
flush
block 10.0.0.16/28 n2 since:10
flush
problems
- block 10.0.0.0/26
flush
problems
",
        expect![[r#"
            > flush
            settings gained by all
            pool 10.0.0.0/16 gained by all
            node n1 gained by all
            route 10.0.0.0/26 gained by all
            route 10.0.0.1/32 gained by all

            > flush
            pool 10.0.0.0/16 lost by all
            route 10.0.0.0/26 lost by all
            route 10.0.0.1/32 lost by all

            > problems
            IPAMBlock 10-0-0-0-26: spec.cidr: 10.0.0.0/26 of n1: no IPPool has this range, so other nodes have no route to it; create such a pool, or delete the block once no pod uses it

            > flush
            pool 10.0.0.0/16 gained by all
            route 10.0.0.0/26 gained by all
            route 10.0.0.1/32 gained by all

            > flush

            > problems
            IPAMBlock 10-0-0-16-28: spec.cidr: 10.0.0.16/28 of n2: it overlaps the older block 10.0.0.0/26, so it gets no route; delete it, and recreate its pods

            > flush
            route 10.0.0.0/26 lost by all
            route 10.0.0.1/32 lost by all
            route 10.0.0.16/28 gained by all

            > problems

        "#]],
    );
}

#[test]
fn an_address_belongs_to_the_node_that_kubelet_reports_with_it_else_to_the_older_one() {
    check(
        "
node n1 192.0.2.1/24 since:5 reported
node n9 192.0.2.1/24 since:1
flush
view n1
problems
node n1 192.0.2.1/24 since:5
flush
problems
- node n9
flush
problems
",
        expect![[r#"
            > flush
            settings gained by all
            node n1 gained by all
            node n9 gained by all

            > view n1
            settings no_namespace_names_pools true
            node n1 192.0.2.1/24
            node n9

            > problems
            Node n9: projectcalico.org/IPv4Address: 192.0.2.1: node n1 has that address, so other nodes do not use it for this node; if the node has changed, delete the annotation and restart its agent; else find out what wrote it

            > flush
            node n1 kept by all (value)
            node n9 kept by all (value)

            > problems
            Node n1: projectcalico.org/IPv4Address: 192.0.2.1: node n9 has that address, so other nodes do not use it for this node; if the node has changed, delete the annotation and restart its agent; else find out what wrote it

            > flush
            node n1 kept by all (value)
            node n9 lost by all

            > problems

        "#]],
    );
}

#[test]
fn a_tunnel_ends_in_a_block_of_its_node_or_under_its_handle() {
    check(
        "
pool main 10.0.0.0/16 vxlan since:1
node n1 192.0.2.1/24 since:5 10.0.0.1@66:00:00:00:00:01
node n2 192.0.2.2/24 since:5 10.0.0.2@66:00:00:00:00:02
node n9 192.0.2.9/24 since:1 10.0.0.1@66:00:00:00:00:09
node n10 192.0.2.10/24 since:9 10.0.9.9@66:00:00:00:00:10
node n11 192.0.2.11/24 since:8 10.0.9.9@66:00:00:00:00:11
flush
problems
block 10.0.0.0/26 n1 since:3 10.0.0.1@n1 10.0.0.2@n2
flush
view n3
problems
",
        expect![[r#"
            > flush
            settings gained by all
            pool 10.0.0.0/16 gained by all
            node n1 gained by all
            node n10 gained by all
            node n11 gained by all
            node n2 gained by all
            node n9 gained by all

            > problems
            Node n1: projectcalico.org/IPv4VXLANTunnelAddr: 10.0.0.1: node n9 has that address, so other nodes do not use it for this node; if the node has changed, delete the annotation and restart its agent; else find out what wrote it
            Node n10: projectcalico.org/IPv4VXLANTunnelAddr: 10.0.9.9: node n11 has that address, so other nodes do not use it for this node; if the node has changed, delete the annotation and restart its agent; else find out what wrote it

            > flush
            node n1 kept by all (value)
            node n9 kept by all (value)
            route 10.0.0.0/26 gained by all

            > view n3
            settings no_namespace_names_pools true
            pool 10.0.0.0/16 vxlan
            node n1 192.0.2.1/24 vtep 10.0.0.1 66:00:00:00:00:01
            node n10 192.0.2.10/24
            node n11 192.0.2.11/24 vtep 10.0.9.9 66:00:00:00:00:11
            node n2 192.0.2.2/24 vtep 10.0.0.2 66:00:00:00:00:02
            node n9 192.0.2.9/24
            route 10.0.0.0/26 via n1 vxlan

            > problems
            Node n10: projectcalico.org/IPv4VXLANTunnelAddr: 10.0.9.9: node n11 has that address, so other nodes do not use it for this node; if the node has changed, delete the annotation and restart its agent; else find out what wrote it
            Node n9: projectcalico.org/IPv4VXLANTunnelAddr: 10.0.0.1: node n1 has that address, so other nodes do not use it for this node; if the node has changed, delete the annotation and restart its agent; else find out what wrote it

        "#]],
    );
}

#[test]
fn blocks_beyond_the_quota_of_a_node_have_no_route_and_are_one_problem() {
    let most = margay_calc::blocks::MAX_PER_NODE;
    let mut script = String::from(
        "node n1 192.0.2.1/24\nnode n9 192.0.2.9/24\npool main 10.0.0.0/8 vxlan size:32 since:1\n",
    );
    let range = |number: usize| format!("10.0.{}.{}/32", number / 256, number % 256);
    for number in 0..most + 2 {
        script += &format!("block {} n9 since:{}\n", range(number), most + 9 - number);
    }
    let printed = crate::notation::run(&format!("{script}flush\nproblems\nview n1\n"));
    assert_eq!(
        printed
            .lines()
            .filter(|line| line.starts_with("route ") && line.ends_with("via n9 vxlan"))
            .count(),
        most
    );
    for (number, is_there) in [(0, false), (1, false), (2, true), (most + 1, true)] {
        assert_eq!(
            printed.contains(&format!("route {} via", range(number))),
            is_there,
            "{number}"
        );
    }
    let problems: Vec<&str> = printed
        .lines()
        .filter(|line| line.starts_with("Node n9: "))
        .collect();
    let wanted = format!(
        "Node n9: it has {} IPAMBlocks of IPv4, of which the {most} oldest are accepted",
        most + 2
    );
    assert!(
        problems.len() == 1 && problems[0].starts_with(&wanted),
        "{problems:?}"
    );
}

#[test]
fn an_address_that_a_block_gives_to_others_is_in_no_automatic_host_endpoint() {
    let created = format!("{LABEL_CREATED_BY}={CREATED_BY}");
    let host =
        |name: &str, addresses: &str| format!("host {name} n9 * {addresses} role=host {created}\n");
    // Whom the address belongs to, and whether the host endpoint of n9 has it.
    let table = [
        ("nobody: it is in no block", "", true),
        ("a pod of n1", "block 10.0.0.0/26 n1 since:3", false),
        (
            "the tunnel of n1",
            "block 10.0.0.0/26 n1 10.0.0.5@n1 since:3",
            false,
        ),
        (
            "the tunnel of n9 in a block of n1",
            "block 10.0.0.0/26 n1 10.0.0.5=n9 10.0.0.5@n9 since:3",
            true,
        ),
        (
            "the tunnel of n9 in a block of n9",
            "block 10.0.0.0/26 n9 10.0.0.5@n9 since:3",
            true,
        ),
        ("n9, in a block of n9", "block 10.0.0.0/26 n9 since:3", true),
        (
            "a pod of n1, in a block of n9",
            "block 10.0.0.0/26 n9 10.0.0.5=n1 since:3",
            false,
        ),
        (
            "nobody: the block is in no pool",
            "block 10.9.0.0/26 n1 since:3",
            true,
        ),
        (
            "n9, as kubelet reports",
            "block 10.0.0.0/26 n1 since:3\nnode n9 10.0.0.5/24 since:1 reported",
            true,
        ),
        (
            "not n9: only its agent says so",
            "block 10.0.0.0/26 n1 since:3\nnode n9 10.0.0.5/24 since:1",
            false,
        ),
    ];
    let before = "pool main 10.0.0.0/16 vxlan since:1\n\
                  pod red/web n1 10.0.7.1\n\
                  policy GlobalNetworkPolicy /p default 10 in !has(role)\n  in allow tcp from role \
                  == 'host'\n";
    for (owner, objects, has) in table {
        let hosts = host("auto", "192.0.2.9,10.0.0.5");
        // The endpoint before the block and behind it, and a block that goes again.
        for script in [
            format!("{before}{hosts}{objects}\n"),
            format!("{before}{objects}\n{hosts}"),
        ] {
            let view = crate::notation::run(&format!("{script}flush\nview n1\nproblems\n"));
            let set = if has {
                "[10.0.0.5, 192.0.2.9]"
            } else {
                "[192.0.2.9]"
            };
            assert!(
                view.contains(&format!("set {{role == 'host'}} net {set}")),
                "{owner}: {view}"
            );
            assert_eq!(
                view.contains("HostEndpoint auto: spec.expectedIPs: 10.0.0.5"),
                !has,
                "{owner}: {view}"
            );
        }
    }
    let by_hand = format!(
        "{before}host mine n9 * 10.0.0.5 role=host\nblock 10.0.0.0/26 n1 since:3\nflush\nview n1\n"
    );
    let view = crate::notation::run(&by_hand);
    assert!(
        view.contains("set {role == 'host'} net [10.0.0.5]"),
        "what a person writes is used: {view}"
    );
}

#[test]
fn an_address_of_a_pod_is_no_nodes_unless_kubelet_reports_it() {
    check(
        "
pool main 10.0.0.0/16 vxlan since:1
block 10.0.0.0/26 n1 since:3
node n9 10.0.0.5/24 since:1
flush
view n1
problems
node n9 10.0.0.5/24 since:1 reported
flush
problems
",
        expect![[r#"
            > flush
            settings gained by all
            pool 10.0.0.0/16 gained by all
            node n9 gained by all
            route 10.0.0.0/26 gained by all

            > view n1
            settings no_namespace_names_pools true
            pool 10.0.0.0/16 vxlan
            node n9
            route 10.0.0.0/26 via n1 vxlan

            > problems
            Node n9: projectcalico.org/IPv4Address: 10.0.0.5: it is in a block of another node, and not under the handle of this node's tunnel, so other nodes do not use it for this node; if the node has changed, delete the annotation and restart its agent; else find out what wrote it

            > flush
            node n9 kept by all (value)

            > problems

        "#]],
    );
}
