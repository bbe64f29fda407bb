//! Records and verdicts for given objects, as text. `UPDATE_EXPECT=1 cargo test -p margay-calc`
//! rewrites the expected texts.

use expect_test::{Expect, expect};

use crate::notation::run;

pub fn check(script: &str, expected: Expect) {
    expected.assert_eq(&run(script));
}

#[test]
fn a_policy_between_two_nodes() {
    check(
        "
namespace red team=a
namespace blue
tier default 1000000 deny
pod red/web n1 10.0.0.1 app=web
pod red/db n2 10.0.0.65 app=db
pod blue/web n2 10.0.0.66 app=web
policy NetworkPolicy red/db default 10 in projectcalico.org/namespace == 'red' && app == 'db'
  in allow tcp from projectcalico.org/namespace == 'red' && app == 'web' to port 5432
flush
view n1
view n2
connect red/web red/db tcp 5432
connect red/web red/db tcp 80
connect blue/web red/db tcp 5432
connect red/db blue/web tcp 80
",
        expect![[r#"
            > flush
            settings gained by all
            set {projectcalico.org/namespace == 'red' && app == 'web'} gained by n2
            policy NetworkPolicy red/db gained by n2
            endpoint blue/web gained by n2
            endpoint red/db gained by n2
            endpoint red/web gained by n1

            > view n1
            settings no_namespace_names_pools true
            endpoint red/web calif45b743d7ae [10.0.0.1] else allow

            > view n2
            settings no_namespace_names_pools true
            set {projectcalico.org/namespace == 'red' && app == 'web'} net [10.0.0.1]
            policy NetworkPolicy red/db
              in allow tcp from set {projectcalico.org/namespace == 'red' && app == 'web'} to port 5432
            endpoint blue/web caliadfd4e7a9f7 [10.0.0.66] else allow
            endpoint red/db cali67e01828fd7 [10.0.0.65] else allow
              tier default else deny
                in NetworkPolicy red/db

            > connect red/web red/db tcp 5432
            egress
            no tier decided: allow
            ingress
            tier default: NetworkPolicy red/db rule 0: allow
            allowed

            > connect red/web red/db tcp 80
            egress
            no tier decided: allow
            ingress
            tier default: end: deny
            denied

            > connect blue/web red/db tcp 5432
            egress
            no tier decided: allow
            ingress
            tier default: end: deny
            denied

            > connect red/db blue/web tcp 80
            egress
            no tier decided: allow
            ingress
            no tier decided: allow
            allowed

        "#]],
    );
}

#[test]
fn a_flush_has_changed_records_and_affected_nodes_only() {
    check(
        "
namespace red
tier default 1000000 deny
pod red/db n2 10.0.0.65 app=db
policy NetworkPolicy red/db default 10 in app == 'db'
  in allow from app == 'web'
flush
pod red/a n1 10.0.0.1 app=web
flush
pod red/a n1 10.0.0.2 app=web
flush
pod red/a n1 10.0.0.2 app=other
flush
pod red/db n3 10.0.0.65 app=db
flush
- policy NetworkPolicy red/db
flush
",
        expect![[r#"
            > flush
            settings gained by all
            set {app == 'web'} gained by n2
            policy NetworkPolicy red/db gained by n2
            endpoint red/db gained by n2

            > flush
            set {app == 'web'} kept by n2 (+10.0.0.1)
            endpoint red/a gained by n1

            > flush
            set {app == 'web'} kept by n2 (+10.0.0.2 -10.0.0.1)
            endpoint red/a kept by n1 (value)

            > flush
            set {app == 'web'} kept by n2 (-10.0.0.2)

            > flush
            set {app == 'web'} gained by n3 lost by n2
            policy NetworkPolicy red/db gained by n3 lost by n2
            endpoint red/db gained by n3 lost by n2

            > flush
            set {app == 'web'} lost by n3
            policy NetworkPolicy red/db lost by n3
            endpoint red/db kept by n3 (value)

        "#]],
    );
}

#[test]
fn tiers_and_policies_in_order() {
    check(
        "
namespace red
tier default 1000000 deny
tier early 10 pass
pod red/a n1 10.0.0.1
policy NetworkPolicy red/b default - in all()
  in allow
policy NetworkPolicy red/a default - in,out all()
  in log
policy GlobalNetworkPolicy /a default 5 in all()
policy KubernetesNetworkPolicy red/a default - in all()
policy NetworkPolicy red/z early 1 in all()
  in pass from net 10.0.0.0/8
policy NetworkPolicy red/x nowhere 1 in all()
policy StagedNetworkPolicy red/s staged 1 in all()
  in allow
flush
view n1
connect red/a red/a tcp 80
",
        expect![[r#"
            > flush
            settings gained by all
            policy NetworkPolicy red/a gained by n1
            policy NetworkPolicy red/b gained by n1
            policy NetworkPolicy red/x gained by n1
            policy NetworkPolicy red/z gained by n1
            policy GlobalNetworkPolicy a gained by n1
            policy KubernetesNetworkPolicy red/a gained by n1
            endpoint red/a gained by n1

            > view n1
            settings no_namespace_names_pools true
            policy NetworkPolicy red/a
              in log
            policy NetworkPolicy red/b
              in allow
            policy NetworkPolicy red/x
            policy NetworkPolicy red/z
              in pass from net 10.0.0.0/8
            policy GlobalNetworkPolicy a
            policy KubernetesNetworkPolicy red/a
            endpoint red/a cali86da7e87bf4 [10.0.0.1] else allow
              tier early else pass
                in NetworkPolicy red/z
              tier default else deny
                in GlobalNetworkPolicy a, KubernetesNetworkPolicy red/a, NetworkPolicy red/a, NetworkPolicy red/b
                out NetworkPolicy red/a
              tier nowhere else deny
                in NetworkPolicy red/x

            > connect red/a red/a tcp 80
            egress
            tier default: end: deny
            ingress
            tier early: NetworkPolicy red/z rule 0: pass
            tier default: NetworkPolicy red/a rule 0: log
            tier default: NetworkPolicy red/b rule 0: allow
            denied

        "#]],
    );
}

#[test]
fn what_does_not_exist_allows_nothing() {
    check(
        "
tier default 1000000 deny
namespace red
pod red/a n1 10.0.0.1 app=a
pod lost/b n1 10.0.0.2
policy NetworkPolicy red/a default 1 in,out app == 'a'
  in allow from service red/nobody
  in allow from app == 'nobody'
  in allow tcp to port nothing
  out allow to service red/nobody
flush
view n1
connect lost/b red/a tcp 80
connect red/a lost/b tcp 80
service red/nobody 10.0.0.2:tcp:80
namespace lost
flush
connect red/a lost/b tcp 80
connect red/a lost/b tcp 81
connect lost/b red/a tcp 99
",
        expect![[r#"
            > flush
            settings gained by all
            set n:409fe7dba3d1e978383aaa7c40f2ce74d2dfaf52 gained by n1
            set {app == 'nobody'} gained by n1
            set svc:red/nobody gained by n1
            set svcaddr:red/nobody gained by n1
            policy NetworkPolicy red/a gained by n1
            endpoint lost/b gained by n1
            endpoint red/a gained by n1

            > view n1
            settings no_namespace_names_pools true
            set n:409fe7dba3d1e978383aaa7c40f2ce74d2dfaf52 address-port []
            set {app == 'nobody'} net []
            set svc:red/nobody address-port []
            set svcaddr:red/nobody net []
            policy NetworkPolicy red/a
              in allow from set svcaddr:red/nobody
              in allow from set {app == 'nobody'}
              in allow tcp to port n:409fe7dba3d1e978383aaa7c40f2ce74d2dfaf52
              out allow to service svc:red/nobody
            endpoint lost/b cali1ed88d534ff [10.0.0.2] else deny
            endpoint red/a cali86da7e87bf4 [10.0.0.1] else allow
              tier default else deny
                in NetworkPolicy red/a
                out NetworkPolicy red/a

            > connect lost/b red/a tcp 80
            egress
            no tier decided: deny
            ingress
            tier default: end: deny
            denied

            > connect red/a lost/b tcp 80
            egress
            tier default: end: deny
            ingress
            no tier decided: deny
            denied

            > flush
            set svc:red/nobody kept by n1 (+10.0.0.2:tcp:80)
            set svcaddr:red/nobody kept by n1 (+10.0.0.2)
            endpoint lost/b kept by n1 (value)

            > connect red/a lost/b tcp 80
            egress
            tier default: NetworkPolicy red/a rule 0: allow
            ingress
            no tier decided: allow
            allowed

            > connect red/a lost/b tcp 81
            egress
            tier default: end: deny
            ingress
            no tier decided: allow
            denied

            > connect lost/b red/a tcp 99
            egress
            no tier decided: allow
            ingress
            tier default: NetworkPolicy red/a rule 0: allow
            allowed

        "#]],
    );
}

#[test]
fn labels_of_parents_reach_endpoints_and_sets() {
    check(
        "
namespace red team=a
account red/robot role=admin
tier default 1000000 deny
pod red/a n1 10.0.0.1 sa:robot port:http:tcp:8080
netset red/nets 10.1.0.0/24
netset /world 0.0.0.0/0 kind=any
policy GlobalNetworkPolicy /p default 1 in all()
  in allow tcp from pcns.team == 'a' to port http
  in allow from pcsa.role == 'admin'
  in allow from kind == 'any' && !has(projectcalico.org/namespace)
flush
view n1
namespace red team=b
flush
- account red/robot
flush
",
        expect![[r#"
            > flush
            settings gained by all
            set n:51f3fa0fee680ecbb781cf6f1f37bf2c6f258934 gained by n1
            set {kind == 'any' && !has(projectcalico.org/namespace)} gained by n1
            set {pcns.team == 'a'} gained by n1
            set {pcsa.role == 'admin'} gained by n1
            policy GlobalNetworkPolicy p gained by n1
            endpoint red/a gained by n1

            > view n1
            settings no_namespace_names_pools true
            set n:51f3fa0fee680ecbb781cf6f1f37bf2c6f258934 address-port [10.0.0.1:tcp:8080]
            set {kind == 'any' && !has(projectcalico.org/namespace)} net [0.0.0.0/0]
            set {pcns.team == 'a'} net [10.0.0.1, 10.1.0.0/24]
            set {pcsa.role == 'admin'} net [10.0.0.1]
            policy GlobalNetworkPolicy p
              in allow tcp from set {pcns.team == 'a'} to port n:51f3fa0fee680ecbb781cf6f1f37bf2c6f258934
              in allow from set {pcsa.role == 'admin'}
              in allow from set {kind == 'any' && !has(projectcalico.org/namespace)}
            endpoint red/a cali86da7e87bf4 [10.0.0.1] else allow
              tier default else deny
                in GlobalNetworkPolicy p

            > flush
            set {pcns.team == 'a'} kept by n1 (-10.0.0.1 -10.1.0.0/24)

            > flush
            set {pcsa.role == 'admin'} kept by n1 (-10.0.0.1)

        "#]],
    );
}

#[test]
fn routes_follow_blocks_and_pools() {
    check(
        "
node n1 192.0.2.1/24
pool all 10.0.0.0/8 none
pool some 10.0.0.0/24 vxlan nat
block 10.0.0.0/26 n1 10.0.0.5=n2
block 10.1.0.0/26 n2
block 10.2.0.0/26
flush
view n9
- pool some
block 10.0.0.0/26 n2
flush
",
        expect![[r#"
            > flush
            settings gained by all
            pool 10.0.0.0/8 gained by all
            pool 10.0.0.0/24 gained by all
            node n1 gained by all
            route 10.0.0.0/26 gained by all
            route 10.0.0.5/32 gained by all
            route 10.1.0.0/26 gained by all

            > view n9
            settings no_namespace_names_pools true
            pool 10.0.0.0/8
            pool 10.0.0.0/24 vxlan nat
            node n1 192.0.2.1/24
            route 10.0.0.0/26 via n1 vxlan
            route 10.0.0.5/32 via n2 vxlan
            route 10.1.0.0/26 via n2

            > flush
            pool 10.0.0.0/24 lost by all
            route 10.0.0.0/26 kept by all (value)
            route 10.0.0.5/32 lost by all

        "#]],
    );
}

#[test]
fn both_families_have_pools_routes_and_tunnels_of_their_own() {
    check(
        "
node n1 192.0.2.1/24 fd01::1/64 10.0.0.1@66:00:00:00:00:01 fd00::1@66:00:00:00:00:02
node n2 fd01::2/64
pool four 10.0.0.0/16 vxlan nat
pool six fd00::/48 vxlan-cross-subnet
pool six-near fd00::1:0/112 none
block 10.0.0.0/26 n1
block fd00::/122 n1 fd00::5=n2
block fd00::1:40/122 n2
flush
view n1
node n1 192.0.2.1/24 fd01::1/64 10.0.0.1@66:00:00:00:00:01
- pool six-near
flush
",
        expect![[r#"
            > flush
            settings gained by all
            pool 10.0.0.0/16 gained by all
            pool fd00::/48 gained by all
            pool fd00::1:0/112 gained by all
            node n1 gained by all
            node n2 gained by all
            route 10.0.0.0/26 gained by all
            route fd00::/122 gained by all
            route fd00::5/128 gained by all
            route fd00::1:40/122 gained by all

            > view n1
            settings no_namespace_names_pools true
            pool 10.0.0.0/16 vxlan nat
            pool fd00::/48 vxlan-cross-subnet
            pool fd00::1:0/112
            node n1 192.0.2.1/24 fd01::1/64 vtep 10.0.0.1 66:00:00:00:00:01 vtep fd00::1 66:00:00:00:00:02
            node n2 fd01::2/64
            route 10.0.0.0/26 via n1 vxlan
            route fd00::/122 via n1 vxlan-cross-subnet
            route fd00::5/128 via n2 vxlan-cross-subnet
            route fd00::1:40/122 via n2

            > flush
            pool fd00::1:0/112 lost by all
            node n1 kept by all (value)
            route fd00::1:40/122 kept by all (value)

        "#]],
    );
}

#[test]
fn an_endpoint_without_node_or_address() {
    check(
        "
namespace red
pod red/pending - 10.0.0.1 app=a
pod red/new n1 - app=a
policy NetworkPolicy red/p default 1 in app == 'a'
  in allow from app == 'a'
flush
view n1
",
        expect![[r#"
            > flush
            settings gained by all
            set {app == 'a'} gained by n1
            policy NetworkPolicy red/p gained by n1
            endpoint red/new gained by n1

            > view n1
            settings no_namespace_names_pools true
            set {app == 'a'} net [10.0.0.1]
            policy NetworkPolicy red/p
              in allow from set {app == 'a'}
            endpoint red/new cali096df7b4854 [] else allow
              tier default else deny
                in NetworkPolicy red/p

        "#]],
    );
}

/// Server and agent compute digests and may be of different versions. If this changes, nodes of the
/// former version get everything again; a record must never have the digest of a former record with
/// another meaning.
#[test]
fn digests_are_fixed() {
    check(
        "
namespace red
node n1 192.0.2.1/24
pool all 10.0.0.0/8 vxlan nat
block 10.0.0.0/26 n1
tier default 1000000 deny
pod red/a n1 10.0.0.1,fd00::1 app=a port:http:tcp:80
service red/svc 10.0.0.1:tcp:80
policy NetworkPolicy red/p default 1 in,out app == 'a'
  in allow tcp from app == 'a' to port http,81
  out pass to service red/svc
  out log to net 10.0.0.0/8
flush
digests n1
",
        expect![[r#"
            > flush
            settings gained by all
            pool 10.0.0.0/8 gained by all
            node n1 gained by all
            route 10.0.0.0/26 gained by all
            set n:632948cde580d3aac271b25bbb5a268695f925f7 gained by n1
            set {app == 'a'} gained by n1
            set svc:red/svc gained by n1
            policy NetworkPolicy red/p gained by n1
            endpoint red/a gained by n1

            > digests n1
            38bbcacdd67d672d   3 settings
            f9af71e3d6292561 186 pool 10.0.0.0/8
            6a1bbacd100f5636  45 node n1
            d321b28a728195f2 142 route 10.0.0.0/26
            7a0f1ca28a430509 242 set n:632948cde580d3aac271b25bbb5a268695f925f7
            7787e3671b8fb2ac  94 set {app == 'a'}
            2a4724a123c9deeb  41 set svc:red/svc
            fd29bf227b5f41cf 163 policy NetworkPolicy red/p
            6890b77a938e41ca 194 endpoint red/a

        "#]],
    );
}

#[test]
fn conflicts_are_reported_until_they_are_resolved() {
    check(
        "
node n1 192.0.2.1/24
tier default 1000000 deny
pool one 10.0.0.0/16
pool other 10.0.0.0/16
pod red/web n9 10.0.0.1 app=web
host edge n1 eth0 192.0.2.1
problems
host lost n9 * -
host edge n8 eth0 192.0.2.1
policy NetworkPolicy red/late other 10 in app == 'web'
policy StagedGlobalNetworkPolicy /later other 10 in app == 'web'
problems
node n9 192.0.2.9/24
tier other 5 pass
- host edge
problems
- node n9
problems
",
        expect![[r#"
            > problems
            IPPool other: spec.cidr: IPPool one has the same range and is used instead; delete one of them

            > problems
            NetworkPolicy red/late: spec.tier: "other": there is no such tier, so the policy comes after all tiers and denies what it does not allow; create the tier or correct the name
            StagedGlobalNetworkPolicy later: spec.tier: "other": there is no such tier, so the policy comes after all tiers and denies what it does not allow; create the tier or correct the name
            IPPool other: spec.cidr: IPPool one has the same range and is used instead; delete one of them
            HostEndpoint edge: spec.node: "n8": there is no such node, so it is not enforced; correct the name or delete the host endpoint
            HostEndpoint lost: spec.node: "n9": there is no such node, so it is not enforced; correct the name or delete the host endpoint

            > problems
            IPPool other: spec.cidr: IPPool one has the same range and is used instead; delete one of them

            > problems
            IPPool other: spec.cidr: IPPool one has the same range and is used instead; delete one of them
            HostEndpoint lost: spec.node: "n9": there is no such node, so it is not enforced; correct the name or delete the host endpoint

        "#]],
    );
}
