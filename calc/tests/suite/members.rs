//! Members of a set that several objects contribute.

use expect_test::expect;

use crate::golden::check;

/// Two pods share an address for a moment, a pod moves to another node with its address, and a
/// network set contains the address of a pod.
#[test]
fn an_address_is_a_member_as_long_as_anything_selected_has_it() {
    check(
        "
namespace red
tier default 1000000 deny
pod red/server n1 10.0.0.9 app=server
pod red/old n1 10.0.0.1 app=web
policy NetworkPolicy red/p default 1 in app == 'server'
  in allow from app == 'web'
flush
pod red/new n2 10.0.0.1 app=web
flush
- pod red/old
flush
pod red/new n1 10.0.0.1 app=web
flush
netset red/nets 10.0.0.1/32 app=web
flush
- pod red/new
flush
- netset red/nets
flush
view n1
",
        expect![[r#"
            > flush
            settings gained by all
            set {app == 'web'} gained by n1
            policy NetworkPolicy red/p gained by n1
            endpoint red/old gained by n1
            endpoint red/server gained by n1

            > flush
            endpoint red/new gained by n2

            > flush
            endpoint red/old lost by n1

            > flush
            endpoint red/new gained by n1 lost by n2

            > flush

            > flush
            endpoint red/new lost by n1

            > flush
            set {app == 'web'} kept by n1 (-10.0.0.1)

            > view n1
            settings no_namespace_names_pools true
            set {app == 'web'} net []
            policy NetworkPolicy red/p
              in allow from set {app == 'web'}
            endpoint red/server cali28140eeaead [10.0.0.9] else allow
              tier default else deny
                in NetworkPolicy red/p

        "#]],
    );
}
