//! Host endpoints: policies that apply to them, verdicts on their packets, and the nodes that hold
//! them.

use expect_test::expect;

use crate::golden::check;

#[test]
fn global_policies_apply_to_hosts_each_to_its_kind_of_traffic() {
    check(
        "
namespace red team=a
tier default 1000000 deny
tier last - pass
pod red/web n1 10.0.0.1 app=web
host edge n1 eth0 192.0.2.1 role=edge profile:allow port:http:tcp:8080
host other n2 * -
policy GlobalNetworkPolicy /own default 10 in,out role == 'edge'
  in allow tcp from net 192.0.2.0/24 to port 80,http
policy GlobalNetworkPolicy /through default 20 in,forward has(role) || app == 'web'
  in allow tcp from app == 'web' || role == 'edge'
policy GlobalNetworkPolicy /early default 30 in,prednat role == 'edge'
  in deny tcp to port 9
policy GlobalNetworkPolicy /raw last 40 in,out,untracked role == 'edge'
  in allow udp to port 99
policy NetworkPolicy red/all default 10 in all()
flush
view n1
view n2
",
        expect![[r#"
            > flush
            settings gained by all
            set n:490e310faf9b81509e7591119f584137b41d61a5 gained by n1
            set {app == 'web' || role == 'edge'} gained by n1
            policy NetworkPolicy red/all gained by n1
            policy GlobalNetworkPolicy early gained by n1
            policy GlobalNetworkPolicy own gained by n1
            policy GlobalNetworkPolicy raw gained by n1
            policy GlobalNetworkPolicy through gained by n1
            endpoint red/web gained by n1
            host-endpoint edge gained by n1
            host-endpoint other gained by n2

            > view n1
            settings no_namespace_names_pools true
            set n:490e310faf9b81509e7591119f584137b41d61a5 address-port [192.0.2.1:tcp:8080]
            set {app == 'web' || role == 'edge'} net [10.0.0.1, 192.0.2.1]
            policy NetworkPolicy red/all
            policy GlobalNetworkPolicy early
              in deny tcp to port 9
            policy GlobalNetworkPolicy own
              in allow tcp from net 192.0.2.0/24 to port 80,n:490e310faf9b81509e7591119f584137b41d61a5
            policy GlobalNetworkPolicy raw
              in allow udp to port 99
            policy GlobalNetworkPolicy through
              in allow tcp from set {app == 'web' || role == 'edge'}
            endpoint red/web calif45b743d7ae [10.0.0.1] else allow
              tier default else deny
                in NetworkPolicy red/all, GlobalNetworkPolicy through
            host-endpoint edge eth0 else allow
              untracked tier last
                in GlobalNetworkPolicy raw
                out GlobalNetworkPolicy raw
              pre-dnat tier default
                in GlobalNetworkPolicy early
              tier default else deny
                in GlobalNetworkPolicy own, GlobalNetworkPolicy through
                out GlobalNetworkPolicy own
              forward tier default else deny
                in GlobalNetworkPolicy through

            > view n2
            settings no_namespace_names_pools true
            host-endpoint other * else deny

        "#]],
    );
}

#[test]
fn packets_meet_a_host_endpoint_in_stages() {
    check(
        "
tier default 1000000 deny
host edge n1 eth0 192.0.2.1 role=edge profile:allow
policy GlobalNetworkPolicy /own default 10 in role == 'edge'
  in allow tcp to port 80
policy GlobalNetworkPolicy /through default 20 out,forward role == 'edge'
  out deny tcp to port 25
policy GlobalNetworkPolicy /early default 30 in,prednat role == 'edge'
  in deny tcp to port 9
policy GlobalNetworkPolicy /raw default 40 in,untracked role == 'edge'
  in deny tcp to port 22
  in allow udp to port 99
flush
meet edge untracked in 192.0.2.9 192.0.2.1 tcp 22
meet edge untracked in 192.0.2.9 192.0.2.1 udp 99
meet edge untracked in 192.0.2.9 192.0.2.1 tcp 80
meet edge prednat in 192.0.2.9 192.0.2.1 tcp 9
meet edge prednat in 192.0.2.9 192.0.2.1 tcp 80
meet edge normal in 192.0.2.9 192.0.2.1 tcp 80
meet edge normal in 192.0.2.9 192.0.2.1 tcp 81
meet edge normal in 192.0.2.9 192.0.2.1 tcp 22
meet edge normal out 192.0.2.1 192.0.2.9 tcp 80
meet edge forward in 192.0.2.9 10.0.0.1 tcp 81
meet edge forward out 10.0.0.1 192.0.2.9 tcp 25
meet edge forward out 10.0.0.1 192.0.2.9 tcp 22
meet nobody normal in 192.0.2.9 192.0.2.1 tcp 80
",
        expect![[r#"
            > flush
            settings gained by all
            policy GlobalNetworkPolicy early gained by n1
            policy GlobalNetworkPolicy own gained by n1
            policy GlobalNetworkPolicy raw gained by n1
            policy GlobalNetworkPolicy through gained by n1
            host-endpoint edge gained by n1

            > meet edge untracked in 192.0.2.9 192.0.2.1 tcp 22
            failsafe port: pass

            > meet edge untracked in 192.0.2.9 192.0.2.1 udp 99
            tier default: GlobalNetworkPolicy raw rule 1: allow

            > meet edge untracked in 192.0.2.9 192.0.2.1 tcp 80
            tier default: end: pass
            no tier decided: pass

            > meet edge prednat in 192.0.2.9 192.0.2.1 tcp 9
            tier default: GlobalNetworkPolicy early rule 0: deny

            > meet edge prednat in 192.0.2.9 192.0.2.1 tcp 80
            tier default: end: pass
            no tier decided: pass

            > meet edge normal in 192.0.2.9 192.0.2.1 tcp 80
            tier default: GlobalNetworkPolicy own rule 0: allow

            > meet edge normal in 192.0.2.9 192.0.2.1 tcp 81
            tier default: end: deny

            > meet edge normal in 192.0.2.9 192.0.2.1 tcp 22
            failsafe port: allow

            > meet edge normal out 192.0.2.1 192.0.2.9 tcp 80
            tier default: end: deny

            > meet edge forward in 192.0.2.9 10.0.0.1 tcp 81
            no tier decided: allow

            > meet edge forward out 10.0.0.1 192.0.2.9 tcp 25
            tier default: GlobalNetworkPolicy through rule 0: deny

            > meet edge forward out 10.0.0.1 192.0.2.9 tcp 22
            tier default: end: deny

            > meet nobody normal in 192.0.2.9 192.0.2.1 tcp 80
            host-endpoint nobody is missing: deny

        "#]],
    );
}

#[test]
fn profiles_decide_in_order_after_policies_and_contribute_labels() {
    check(
        "
tier default 1000000 deny
namespace red team=a
account red/robot role=admin
host none n1 eth0 192.0.2.1
host allow n1 eth0 192.0.2.2 profile:allow
host red n1 eth0 192.0.2.3 profile:red
host robot n1 eth0 192.0.2.4 profile:red/robot
host both n1 eth0 192.0.2.5 profile:red/robot profile:red
host gone n1 eth0 192.0.2.6 profile:blue profile:allow
host stranger n1 eth0 192.0.2.7 profile:unknown profile:allow
pod red/web n1 10.0.0.1 app=web
policy NetworkPolicy red/web default 10 in app == 'web'
  in allow from pcns.team == 'a'
  in allow from pcsa.role == 'admin'
  in allow from projectcalico.org/namespace == 'red'
flush
view n1
- namespace red
flush
- account red/robot
flush
namespace blue team=a
flush
view n1
",
        expect![[r#"
            > flush
            settings gained by all
            set {pcns.team == 'a'} gained by n1
            set {projectcalico.org/namespace == 'red'} gained by n1
            set {pcsa.role == 'admin'} gained by n1
            policy NetworkPolicy red/web gained by n1
            endpoint red/web gained by n1
            host-endpoint allow gained by n1
            host-endpoint both gained by n1
            host-endpoint gone gained by n1
            host-endpoint none gained by n1
            host-endpoint red gained by n1
            host-endpoint robot gained by n1
            host-endpoint stranger gained by n1

            > view n1
            settings no_namespace_names_pools true
            set {pcns.team == 'a'} net [10.0.0.1, 192.0.2.3, 192.0.2.5]
            set {projectcalico.org/namespace == 'red'} net [10.0.0.1]
            set {pcsa.role == 'admin'} net [192.0.2.4, 192.0.2.5]
            policy NetworkPolicy red/web
              in allow from set {pcns.team == 'a'}
              in allow from set {pcsa.role == 'admin'}
              in allow from set {projectcalico.org/namespace == 'red'}
            endpoint red/web calif45b743d7ae [10.0.0.1] else allow
              tier default else deny
                in NetworkPolicy red/web
            host-endpoint allow eth0 else allow
            host-endpoint both eth0 else allow
            host-endpoint gone eth0 else deny
            host-endpoint none eth0 else deny
            host-endpoint red eth0 else allow
            host-endpoint robot eth0 else deny
            host-endpoint stranger eth0 else deny

            > flush
            set {pcns.team == 'a'} kept by n1 (-10.0.0.1 -192.0.2.3 -192.0.2.5)
            endpoint red/web kept by n1 (value)
            host-endpoint both kept by n1 (value)
            host-endpoint red kept by n1 (value)

            > flush
            set {pcsa.role == 'admin'} kept by n1 (-192.0.2.4 -192.0.2.5)

            > flush
            set {pcns.team == 'a'} kept by n1 (+192.0.2.6)
            host-endpoint gone kept by n1 (value)

            > view n1
            settings no_namespace_names_pools true
            set {pcns.team == 'a'} net [192.0.2.6]
            set {projectcalico.org/namespace == 'red'} net [10.0.0.1]
            set {pcsa.role == 'admin'} net []
            policy NetworkPolicy red/web
              in allow from set {pcns.team == 'a'}
              in allow from set {pcsa.role == 'admin'}
              in allow from set {projectcalico.org/namespace == 'red'}
            endpoint red/web calif45b743d7ae [10.0.0.1] else deny
              tier default else deny
                in NetworkPolicy red/web
            host-endpoint allow eth0 else allow
            host-endpoint both eth0 else deny
            host-endpoint gone eth0 else allow
            host-endpoint none eth0 else deny
            host-endpoint red eth0 else deny
            host-endpoint robot eth0 else deny
            host-endpoint stranger eth0 else deny

        "#]],
    );
}

#[test]
fn a_policy_that_changes_its_kind_of_traffic_is_unbound_where_it_no_longer_applies() {
    check(
        "
namespace red
tier default 1000000 deny
pod red/web n1 10.0.0.1 at=here
host edge n2 - 192.0.2.1 at=here
policy GlobalNetworkPolicy /p default 10 in at == 'here'
flush
policy GlobalNetworkPolicy /p default 10 in,prednat at == 'here'
flush
policy GlobalNetworkPolicy /p default 10 in,forward at == 'here'
flush
host edge n3 - 192.0.2.1 at=here
flush
- host edge
flush
",
        expect![[r#"
            > flush
            settings gained by all
            policy GlobalNetworkPolicy p gained by n1,n2
            endpoint red/web gained by n1
            host-endpoint edge gained by n2

            > flush
            policy GlobalNetworkPolicy p kept by n2 (same) lost by n1
            endpoint red/web kept by n1 (value)
            host-endpoint edge kept by n2 (value)

            > flush
            policy GlobalNetworkPolicy p gained by n1 kept by n2 (same)
            endpoint red/web kept by n1 (value)
            host-endpoint edge kept by n2 (value)

            > flush
            policy GlobalNetworkPolicy p gained by n3 kept by n1 (same) lost by n2
            host-endpoint edge gained by n3 lost by n2

            > flush
            policy GlobalNetworkPolicy p kept by n1 (same) lost by n3
            host-endpoint edge lost by n3

        "#]],
    );
}

/// See [`margay_calc::digest`]: nodes and servers of different versions compare these.
#[test]
fn digests_are_fixed() {
    check(
        "
tier default 1000000 deny
host a n1 * 192.0.2.1 role=edge profile:allow
host b n1 eth0 - role=edge
host c n1 - 192.0.2.1,fd00::1
policy GlobalNetworkPolicy /own default 10 in,out role == 'edge'
policy GlobalNetworkPolicy /through default 20 in,forward role == 'edge'
policy GlobalNetworkPolicy /early default 30 in,prednat role == 'edge'
policy GlobalNetworkPolicy /raw default 40 in,untracked role == 'edge'
flush
digests n1
",
        expect![[r#"
            > flush
            settings gained by all
            policy GlobalNetworkPolicy early gained by n1
            policy GlobalNetworkPolicy own gained by n1
            policy GlobalNetworkPolicy raw gained by n1
            policy GlobalNetworkPolicy through gained by n1
            host-endpoint a gained by n1
            host-endpoint b gained by n1
            host-endpoint c gained by n1

            > digests n1
            38bbcacdd67d672d   3 settings
            7667deb613273f49 226 policy GlobalNetworkPolicy early
            4f1de6ed0ea4c537 202 policy GlobalNetworkPolicy own
            de06a46ccc9cc7ae  84 policy GlobalNetworkPolicy raw
            0cb30f93fbcab4b6 131 policy GlobalNetworkPolicy through
            a897c01fda4724bb 106 host-endpoint a
            71eb1a13cf7301de 198 host-endpoint b
            60344828f9ad77e0 104 host-endpoint c

        "#]],
    );
}
