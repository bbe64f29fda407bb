mod reports;

use std::net::IpAddr;

use margay_api::endpoint::WorkloadEndpoint;
use margay_api::meta::Labels;
use margay_api::network::{BlockInfo, Encapsulation, Pool};
use proptest::prelude::*;

use super::*;
use crate::object::{BLOCK, POD};
use crate::overlay::MAX_UNKNOWN;

const NAMESPACE: &str = "Namespace";

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("ns", name)
}

fn mk_endpoint(name: &str, addresses: &[&str]) -> Update {
    let endpoint = WorkloadEndpoint {
        node: "n1".to_owned(),
        labels: Labels::new(),
        service_account: String::new(),
        addresses: mk_addresses(addresses),
        ports: Vec::new(),
        uid: String::new(),
        interface: "cali".to_owned(),
    };
    Update::Endpoint(key(name), Some(endpoint))
}

fn mk_addresses(addresses: &[&str]) -> Vec<IpAddr> {
    let parse = |text: &&str| text.parse().expect("an address");
    addresses.iter().map(parse).collect()
}

fn observed(name: &str, uid: &str, update: Update) -> Observed {
    Observed {
        key: key(name),
        uid: uid.to_owned(),
        update: Some(update),
        prefers_former: false,
        problems: Vec::new(),
    }
}

fn mk_namespace(name: &str, label: &str) -> Observed {
    let labels = Labels::from([("l".to_owned(), label.to_owned())]);
    let update = Update::Namespace(name.to_owned(), Some(labels.into()));
    observed(name, "u", update)
}

fn report(name: &str, uid: &str, addresses: &[&str]) -> LocalEndpoint {
    LocalEndpoint {
        key: key(name),
        addresses: mk_addresses(addresses),
        uid: uid.to_owned(),
    }
}

#[test]
fn only_changes_pass() {
    let mut cache = Cache::new([NAMESPACE]);
    let first = mk_namespace("a", "1");
    assert_eq!(cache.apply(NAMESPACE, first.clone()).len(), 1);
    assert_eq!(cache.apply(NAMESPACE, first), []);
    assert_eq!(cache.apply(NAMESPACE, mk_namespace("a", "2")).len(), 1);
    let gone = Update::Namespace("a".to_owned(), None);
    assert_eq!(cache.delete(NAMESPACE, &key("a")), Some(gone));
    assert_eq!(cache.delete(NAMESPACE, &key("a")), None);
}

#[test]
fn in_sync_when_every_kind_was_listed() {
    let mut cache = Cache::new([POD, NAMESPACE]);
    cache.start_list(POD);
    cache.sweep(POD);
    assert!(!cache.is_synced());
    assert_eq!(cache.unsynced(), [NAMESPACE]);
    cache.start_list(NAMESPACE);
    cache.apply(NAMESPACE, mk_namespace("a", "1"));
    assert!(!cache.is_synced(), "the list has not ended");
    cache.sweep(NAMESPACE);
    assert!(cache.is_synced());
}

#[test]
fn a_short_list_removes_nothing_before_the_sweep() {
    let mut cache = Cache::new([NAMESPACE]);
    cache.start_list(NAMESPACE);
    for name in ["a", "b", "c", "d", "e"] {
        cache.apply(NAMESPACE, mk_namespace(name, "1"));
    }
    assert_eq!(cache.missing(NAMESPACE, 2), Missing::default());
    cache.sweep(NAMESPACE);
    cache.start_list(NAMESPACE);
    cache.apply(NAMESPACE, mk_namespace("c", "1"));
    let missing = cache.missing(NAMESPACE, 2);
    assert_eq!(missing.total, 4);
    assert_eq!(missing.sample, [key("a"), key("d")], "spread over all");
    let counts: Vec<_> = cache.counts().collect();
    assert_eq!(counts, [(NAMESPACE, 5, 0)]);
    // The incomplete list was an error: the next one is complete, and nothing was removed.
    cache.start_list(NAMESPACE);
    for name in ["a", "b", "c", "d", "e"] {
        assert_eq!(cache.apply(NAMESPACE, mk_namespace(name, "1")), []);
    }
    assert_eq!(cache.sweep(NAMESPACE), []);
    cache.start_list(NAMESPACE);
    assert_eq!(cache.sweep(NAMESPACE).len(), 5, "confirmed");
}

#[test]
fn an_unreadable_object_keeps_its_former_value() {
    let mut cache = Cache::new([NAMESPACE]);
    cache.apply(NAMESPACE, mk_namespace("a", "1"));
    let unreadable = Observed {
        update: None,
        prefers_former: true,
        problems: vec!["spec: a number".to_owned()],
        ..mk_namespace("a", "1")
    };
    assert_eq!(cache.apply(NAMESPACE, unreadable), []);
    assert_eq!(cache.problems().count(), 1);
    assert_eq!(cache.counts().next(), Some((NAMESPACE, 1, 1)));
    assert_eq!(cache.apply(NAMESPACE, mk_namespace("a", "1")), []);
    assert_eq!(cache.problems().count(), 0);
    assert_eq!(cache.counts().next(), Some((NAMESPACE, 1, 0)));
}

/// A policy of the namespace, or the substitute for a refused one.
fn mk_policy(order: u8, uid: &str, prefers_former: bool) -> Observed {
    let problems = if prefers_former {
        vec!["spec.selector".to_owned()]
    } else {
        Vec::new()
    };
    Observed {
        uid: uid.to_owned(),
        prefers_former,
        problems,
        ..mk_stored_policy("p", order)
    }
}

#[test]
fn a_refused_policy_keeps_its_former_value_unless_it_is_another_object() {
    const POLICY: &str = "NetworkPolicy";
    let mut cache = Cache::new([POLICY]);
    let updates = |cache: &mut Cache, observed: Observed| cache.apply(POLICY, observed);
    let (sound, substitute) = (mk_policy(1, "u", false), mk_policy(9, "u", true));
    assert_eq!(
        updates(&mut cache, sound.clone()),
        sound.update.iter().cloned().collect::<Vec<_>>()
    );
    assert_eq!(
        updates(&mut cache, substitute.clone()),
        [],
        "its former value stays"
    );
    assert!(cache.problems_of(POLICY, &key("p"))[1].contains("its previous version stays"));
    assert_eq!(
        updates(&mut cache, substitute.clone()),
        [],
        "however often it is received"
    );
    cache.start_list(POLICY);
    assert_eq!(updates(&mut cache, substitute.clone()), []);
    assert_eq!(cache.sweep(POLICY), []);
    let corrected = mk_policy(2, "u", false);
    assert_eq!(updates(&mut cache, corrected.clone()).len(), 1);
    assert_eq!(cache.problems().count(), 0);

    let other = mk_policy(9, "other", true);
    assert_eq!(
        updates(&mut cache, other.clone()),
        other.update.iter().cloned().collect::<Vec<_>>(),
        "another object"
    );
    assert!(cache.problems_of(POLICY, &key("p"))[1].contains("is denied"));
    assert!(cache.delete(POLICY, &key("p")).is_some());
    assert_eq!(
        updates(&mut cache, substitute.clone()).len(),
        1,
        "never read: the substitute"
    );

    let mut fresh = Cache::new([POLICY]);
    assert_eq!(
        updates(&mut fresh, substitute.clone()),
        substitute.update.into_iter().collect::<Vec<_>>()
    );
    let nothing = Observed {
        update: None,
        ..mk_policy(1, "u", true)
    };
    assert_eq!(Cache::new([POLICY]).apply(POLICY, nothing), []);
}

#[derive(Clone, Debug)]
enum Step {
    Apply(u8, u8),
    Delete(u8),
    Local(u8, u8),
    Relist(Vec<(u8, u8)>),
}

fn step() -> impl Strategy<Value = Step> {
    let address = 1..4_u8;
    prop_oneof![
        (0..4_u8, 0..4_u8).prop_map(|(pod, address)| Step::Apply(pod, address)),
        (0..4_u8).prop_map(Step::Delete),
        (0..4_u8, address).prop_map(|(pod, address)| Step::Local(pod, address)),
        proptest::collection::vec((0..4_u8, 0..4_u8), 0..4).prop_map(Step::Relist),
    ]
}

fn mk_pod(pod: u8, address: u8) -> Observed {
    let name = format!("p{pod}");
    let addresses: &[&str] = match address {
        0 => &[],
        1 => &["10.0.0.1"],
        2 => &["10.0.0.2"],
        _ => &["10.0.0.3"],
    };
    observed(&name, "u", mk_endpoint(&name, addresses))
}

proptest! {
    /// The updates, applied in order, always give the latest state of each object, and none repeats
    /// the previous one.
    #[test]
    fn updates_add_up(steps in proptest::collection::vec(step(), 0..40)) {
        let mut cache = Cache::new([POD]);
        let mut api: BTreeMap<u8, u8> = BTreeMap::new();
        let mut overlay: BTreeMap<u8, u8> = BTreeMap::new();
        let mut state: BTreeMap<String, Update> = BTreeMap::new();
        for step in steps {
            let mut seen = Vec::new();
            let updates = match step {
                Step::Apply(pod, address) => {
                    seen.push((pod, address));
                    cache.apply(POD, mk_pod(pod, address))
                }
                Step::Delete(pod) => {
                    if api.remove(&pod).is_some() {
                        overlay.remove(&pod);
                    }
                    cache.delete(POD, &key(&format!("p{pod}"))).into_iter().collect()
                }
                Step::Local(pod, address) => {
                    overlay.insert(pod, address);
                    if api.get(&pod) == Some(&address) {
                        overlay.remove(&pod);
                    }
                    let Observed {
                        update: Some(Update::Endpoint(key, Some(endpoint))),
                        uid,
                        ..
                    } = mk_pod(pod, address) else {
                        unreachable!("pods are endpoints")
                    };
                    let report = LocalEndpoint { key, addresses: endpoint.addresses, uid };
                    cache.apply_local("n1", report).expect("few")
                }
                Step::Relist(pods) => {
                    cache.start_list(POD);
                    let listed: BTreeMap<u8, u8> = pods.iter().copied().collect();
                    let mut updates = Vec::new();
                    for (pod, address) in &listed {
                        seen.push((*pod, *address));
                        updates.extend(cache.apply(POD, mk_pod(*pod, *address)));
                    }
                    updates.extend(cache.sweep(POD));
                    for gone in api.keys().filter(|pod| !listed.contains_key(pod)) {
                        overlay.remove(gone);
                    }
                    api.retain(|pod, _| listed.contains_key(pod));
                    updates
                }
            };
            for (pod, address) in seen {
                api.insert(pod, address);
                if overlay.get(&pod) == Some(&address) {
                    overlay.remove(&pod);
                }
            }
            for update in updates {
                let Update::Endpoint(key, value) = &update else { unreachable!("only pods") };
                let former = match value {
                    Some(_) => state.insert(key.name.clone(), update.clone()),
                    None => state.remove(&key.name),
                };
                prop_assert_ne!(former, Some(update));
            }
            let wanted: BTreeMap<String, Update> = api
                .iter()
                .map(|(pod, address)| {
                    let address = overlay.get(pod).unwrap_or(address);
                    let Some(update) = mk_pod(*pod, *address).update else {
                        unreachable!("readable")
                    };
                    (format!("p{pod}"), update)
                })
                .collect();
            prop_assert_eq!(&state, &wanted);
        }
    }
}

/// A policy of the default tier, stored with or without the prefix of that tier; `order`
/// distinguishes versions.
fn mk_stored_policy(stored: &str, order: u8) -> Observed {
    use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, Traffic};
    let name = stored.strip_prefix("default.").unwrap_or(stored);
    let key = PolicyKey {
        kind: PolicyKind::NetworkPolicy,
        namespace: "ns".to_owned(),
        name: name.to_owned(),
    };
    let policy = Policy {
        tier: "default".to_owned(),
        order: Order(Some(f64::from(order))),
        selector: margay_api::selector::Selector::all(),
        traffic: Traffic::Normal,
        applies_ingress: true,
        applies_egress: false,
        ingress: Vec::new(),
        egress: Vec::new(),
    };
    observed(stored, "u", Update::Policy(key, Some(policy)))
}

const POLICY: &str = "NetworkPolicy";

proptest! {
    /// Of a policy that is stored twice the unprefixed one wins, in whatever order they change, and
    /// while one is stored there is never none.
    #[test]
    fn one_policy_stored_twice_is_one(
        steps in proptest::collection::vec((0..3_u8, any::<bool>(), 0..4_u8), 0..30),
    ) {
        let mut cache = Cache::new([POLICY]);
        let mut api: BTreeMap<&str, u8> = BTreeMap::new();
        let mut state: Option<Update> = None;
        for (step, prefixed, order) in steps {
            let stored = if prefixed { "default.p" } else { "p" };
            let updates = match step {
                0 => {
                    api.remove(stored);
                    cache.delete(POLICY, &key(stored)).into_iter().collect()
                }
                1 => {
                    api.insert(stored, order);
                    cache.apply(POLICY, mk_stored_policy(stored, order))
                }
                _ => {
                    cache.start_list(POLICY);
                    api = BTreeMap::from([(stored, order)]);
                    let mut updates = cache.apply(POLICY, mk_stored_policy(stored, order));
                    updates.extend(cache.sweep(POLICY));
                    updates
                }
            };
            for update in updates {
                let Update::Policy(key, policy) = &update else { unreachable!("only policies") };
                prop_assert_eq!(key.name.as_str(), "p");
                state = policy.is_some().then_some(update);
            }
            let counts = ["p", "default.p"].into_iter().find_map(
                |stored| Some((stored, *api.get(stored)?)),
            );
            let wanted = counts.and_then(|(stored, order)| mk_stored_policy(stored, order).update);
            prop_assert_eq!(&state, &wanted);
        }
    }
}
