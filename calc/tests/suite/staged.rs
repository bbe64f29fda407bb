//! Records and verdicts with staged policies, as text.

use expect_test::expect;

use crate::golden::check;

#[test]
fn staged_policies_are_sent_to_no_node_and_can_be_evaluated() {
    check(
        "
namespace red
tier default 1000 deny
tier late 2000 deny
pod red/a n1 10.0.0.1 app=a
pod red/b n1 10.0.0.2 app=b
policy NetworkPolicy red/open default 10 in app == 'b'
  in allow
policy StagedNetworkPolicy red/open default 10 in app == 'b'
  in allow from app == 'c'
policy StagedGlobalNetworkPolicy /extra late 1 in all()
  in deny
policy StagedKubernetesNetworkPolicy red/none ignore
flush
view n1
connect red/a red/b tcp 80
pending red/a red/b tcp 80
connect red/b red/a tcp 80
pending red/b red/a tcp 80
policy StagedNetworkPolicy red/open delete
flush
pending red/a red/b tcp 80
- policy StagedNetworkPolicy red/open
- policy StagedGlobalNetworkPolicy /extra
policy StagedNetworkPolicy red/more nowhere 1 in all()
  in allow from app == 'a'
flush
pending red/a red/b tcp 80
pending red/b red/a tcp 80
",
        expect![[r#"
            > flush
            settings gained by all
            policy NetworkPolicy red/open gained by n1
            endpoint red/a gained by n1
            endpoint red/b gained by n1

            > view n1
            settings no_namespace_names_pools true
            policy NetworkPolicy red/open
              in allow
            endpoint red/a cali86da7e87bf4 [10.0.0.1] else allow
            endpoint red/b cali32f7310dd65 [10.0.0.2] else allow
              tier default else deny
                in NetworkPolicy red/open

            > connect red/a red/b tcp 80
            egress
            no tier decided: allow
            ingress
            tier default: NetworkPolicy red/open rule 0: allow
            allowed

            > pending red/a red/b tcp 80
            egress
            no tier decided: allow
            ingress
            tier default: end: deny
            denied

            > connect red/b red/a tcp 80
            egress
            no tier decided: allow
            ingress
            no tier decided: allow
            allowed

            > pending red/b red/a tcp 80
            egress
            no tier decided: allow
            ingress
            tier late: StagedGlobalNetworkPolicy extra rule 0: deny
            denied

            > flush

            > pending red/a red/b tcp 80
            egress
            no tier decided: allow
            ingress
            tier late: StagedGlobalNetworkPolicy extra rule 0: deny
            denied

            > flush

            > pending red/a red/b tcp 80
            egress
            no tier decided: allow
            ingress
            tier default: NetworkPolicy red/open rule 0: allow
            allowed

            > pending red/b red/a tcp 80
            egress
            no tier decided: allow
            ingress
            tier nowhere: end: deny
            denied

        "#]],
    );
}
