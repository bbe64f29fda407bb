//! Every rule of a chain has the rules of policies that it comes from.

use margay_api::endpoint::interface_name;
use margay_api::rule::{Action, PortRange, Protocol};
use margay_calc::model::{EndpointRecord, Member, RuleRecord, SetKind, SideMatch, TierBinding};
use proptest::prelude::*;

use super::*;
use crate::nftables::origin::RuleOrigin;
use crate::nftables::sample::{self, NODE, mk_net, mk_pod, mk_policy_key, mk_rule, mk_set_id};
use crate::nftables::stage::Direction;

fn compile(records: &Records) -> Compiler {
    let mut compiler = Compiler::new(NODE);
    compiler.apply(
        records,
        &Dirty {
            records: records.keys().cloned().collect(),
            members: BTreeMap::new(),
        },
    );
    compiler
}

/// Every rule of the policies of a class, by position; a policy that is not there is one as a
/// whole.
fn rules_of(class: &Class, records: &Records) -> Vec<RuleRef> {
    let mut all = Vec::new();
    for (tier, binding) in class.tiers.iter().enumerate() {
        for (position, key) in binding.policies.iter().enumerate() {
            let Some(policy) = records.policy(key) else {
                all.push(RuleRef::new(tier, position, None));
                continue;
            };
            let rules = if class.direction == Direction::Ingress {
                &policy.ingress
            } else {
                &policy.egress
            };
            all.extend((0..rules.len()).map(|rule| RuleRef::new(tier, position, Some(rule))));
        }
    }
    all
}

proptest! {
    #[test]
    fn every_rule_of_a_class_is_in_the_origins_of_one_item(records in sample::host_view()) {
        let compiler = compile(&records);
        for (class, state) in &compiler.classes {
            let mut origins: Vec<RuleRef> = state.origins.iter().flatten().copied().collect();
            origins.sort_unstable();
            prop_assert_eq!(origins, rules_of(class, &records));
            for (chain, items) in &state.chains {
                prop_assert_eq!(items.len(), compiler.wanted.chains[chain].rules.len());
                for (rule, item) in items.iter().enumerate() {
                    prop_assert_eq!(compiler.origins(chain, rule).is_empty(), item.is_none());
                }
            }
        }
    }
}

#[test]
fn a_joined_rule_names_the_rules_of_every_policy() {
    const POLICIES: usize = 4;
    let from = |number: usize| RuleRecord {
        protocol: Some(Protocol::TCP),
        source: SideMatch {
            sets: vec![mk_set_id(number)],
            ..SideMatch::default()
        },
        destination: SideMatch {
            ports: [PortRange::single(80)].into(),
            ..SideMatch::default()
        },
        ..mk_rule(Action::Allow)
    };
    let mut records = Records::new();
    for number in 0..POLICIES {
        let members = BTreeSet::from([Member::Net(mk_net(&format!("10.0.0.{number}/32")))]);
        let set = Record::IpSet(IpSetRecord {
            kind: SetKind::Net,
            members,
        });
        records.insert(RecordId::IpSet(mk_set_id(number)), set);
        let ingress = [mk_rule(Action::Log), from(number)];
        let policy = Record::Policy(PolicyRecord {
            ingress: ingress[usize::from(number > 0)..].to_vec(),
            egress: Vec::new(),
        });
        records.insert(RecordId::Policy(mk_policy_key(number)), policy);
    }
    let (pod, addresses) = mk_pod(0);
    let tier = TierBinding {
        name: "t".to_owned(),
        default_action: Action::Deny,
        ingress: (0..=POLICIES).map(mk_policy_key).collect(),
        egress: Vec::new(),
    };
    let endpoint = EndpointRecord {
        interface: interface_name(&pod),
        uid: String::new(),
        addresses,
        tiers: vec![tier],
        unmatched: Action::Allow,
    };
    records.insert(RecordId::Endpoint(pod), Record::Endpoint(endpoint));
    let compiler = compile(&records);

    let (class, _) = compiler
        .classes
        .iter()
        .find(|(class, _)| !class.tiers.is_empty())
        .expect("the pod's class");
    let chain = class.chain(Family::Ipv4);
    let origin = |policy: usize, rule: Option<usize>| RuleOrigin {
        tier: "t".to_owned(),
        policy: mk_policy_key(policy),
        direction: Direction::Ingress,
        rule,
    };
    let joined: Vec<RuleOrigin> = (0..POLICIES)
        .map(|policy| origin(policy, Some(usize::from(policy == 0))))
        .collect();
    let closed = vec![origin(POLICIES, None)];
    let expected = [
        vec![origin(0, Some(0))],
        joined,
        closed,
        Vec::new(),
        Vec::new(),
    ];
    for (rule, expected) in expected.into_iter().enumerate() {
        assert_eq!(compiler.origins(&chain, rule), expected, "rule {rule}");
    }
    let text = compiler.describe_origins();
    let joined = (0..POLICIES).map(|policy| {
        format!(
            "NetworkPolicy x/policy{policy} rule {}",
            usize::from(policy == 0)
        )
    });
    for line in [
        format!(
            "# {chain} 1: tier t, ingress of {}\n",
            joined.collect::<Vec<_>>().join(", ")
        ),
        format!("# {chain} 2: tier t, ingress of NetworkPolicy x/policy4 as a whole\n"),
    ] {
        assert!(text.contains(&line), "{line}{text}");
    }
}
