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
    let update = Update::Namespace(name.to_owned(), Some(labels));
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

#[test]
fn reports_of_a_disconnected_node_expire() {
    let mut cache = Cache::new([POD]);
    cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"])));
    cache.apply(POD, observed("b", "u2", mk_endpoint("b", &[])));
    assert_eq!(
        cache.apply_local("n1", report("a", "u1", &[])),
        Ok(vec![mk_endpoint("a", &[])]),
        "its sandbox is created again"
    );
    assert_eq!(
        cache.apply_local("n1", report("b", "u2", &["10.0.0.2"])),
        Ok(vec![mk_endpoint("b", &["10.0.0.2"])])
    );
    // Further reports go to another replica.
    assert_eq!(
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.3"]))),
        [],
        "the report applies"
    );
    let updates = cache.expire_reports("n1");
    assert_eq!(
        updates,
        [mk_endpoint("a", &["10.0.0.3"]), mk_endpoint("b", &[])],
        "until it expires"
    );
    assert_eq!(cache.expire_reports("n1"), []);
    assert_eq!(
        cache
            .apply(POD, observed("b", "u2", mk_endpoint("b", &["10.0.0.2"])))
            .len(),
        1
    );
}

#[test]
fn a_node_is_ahead_of_the_api_for_its_own_pods() {
    let mut cache = Cache::new([POD]);
    cache.apply(POD, observed("a", "u1", mk_endpoint("a", &[])));
    let updates = cache.apply_local("n1", report("a", "u1", &["10.0.0.1"]));
    assert_eq!(updates, Ok(vec![mk_endpoint("a", &["10.0.0.1"])]));
    let updates = cache.apply_local("n2", report("a", "u1", &["10.0.0.2"]));
    assert_eq!(updates, Ok(vec![]), "it is not the pod of n2");
    // The API shows another change of the pod, but not yet its address: the report stays.
    assert_eq!(
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &[]))),
        []
    );
    // Now the API shows it, and the API applies from here on.
    assert_eq!(
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"]))),
        []
    );
    let updates = cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.3"])));
    assert_eq!(updates, [mk_endpoint("a", &["10.0.0.3"])]);
}

#[test]
fn a_report_applies_to_one_pod_and_not_to_its_successor() {
    let mut cache = Cache::new([POD]);
    // Reported before the API shows the pod.
    assert_eq!(
        cache.apply_local("n1", report("a", "u2", &["10.0.0.2"])),
        Ok(vec![])
    );
    let updates = cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"])));
    assert_eq!(
        updates,
        [mk_endpoint("a", &["10.0.0.1"])],
        "this is its predecessor"
    );
    cache.delete(POD, &key("a"));
    let updates = cache.apply(POD, observed("a", "u2", mk_endpoint("a", &[])));
    assert_eq!(updates, [mk_endpoint("a", &["10.0.0.2"])]);
    // No address any more, while the API still shows one.
    cache.apply(POD, observed("a", "u2", mk_endpoint("a", &["10.0.0.2"])));
    let updates = cache.apply_local("n1", report("a", "u2", &[]));
    assert_eq!(updates, Ok(vec![mk_endpoint("a", &[])]));
    cache.delete(POD, &key("a"));
    let updates = cache.apply(POD, observed("a", "u2", mk_endpoint("a", &["10.0.0.2"])));
    assert_eq!(
        updates,
        [mk_endpoint("a", &["10.0.0.2"])],
        "removed with the pod"
    );
}

#[test]
fn a_node_cannot_take_the_address_of_another() {
    let mut cache = Cache::new([POD, BLOCK]);
    let mut block = |borrowed: &[&str]| {
        let lend = |address: &&str| (address.parse().expect("an address"), "n1".to_owned());
        let borrowed = borrowed.iter().map(lend).collect();
        let info = BlockInfo {
            node: Some("n2".to_owned()),
            borrowed,
            ..BlockInfo::default()
        };
        let range = "10.0.0.0/26".parse().expect("a range");
        let pool = Pool {
            cidr: "10.0.0.0/16".parse().expect("a range"),
            encapsulation: Encapsulation::None,
            nat_outgoing: false,
            block_size: 26,
            created: 0,
        };
        cache.apply(
            "IPPool",
            observed("pool", "u", Update::Pool("pool".to_owned(), Some(pool))),
        );
        cache.apply(
            BLOCK,
            observed("block", "u", Update::Block(range, Some(info))),
        );
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &[])));
        cache.apply_local("n1", report("a", "u1", &["10.0.0.1"]))
    };
    let refused = block(&[]).expect_err("the block is of n2").to_string();
    assert!(
        refused.contains("10.0.0.1 in a block of node \"n2\""),
        "{refused}"
    );
    assert_eq!(
        block(&["10.0.0.1"]),
        Ok(vec![mk_endpoint("a", &["10.0.0.1"])])
    );
    let elsewhere = cache.apply_local("n1", report("a", "u1", &["10.0.0.64"]));
    assert_eq!(elsewhere, Ok(vec![mk_endpoint("a", &["10.0.0.64"])]));
}

#[test]
fn a_node_cannot_fill_the_memory() {
    let mut cache = Cache::new([POD]);
    let mut refused = 0;
    for pod in 0..5000 {
        let addresses = report(&format!("p{pod}"), "u", &["10.0.0.1"]);
        refused += usize::from(cache.apply_local("n1", addresses).is_err());
    }
    assert_eq!(refused, 5000 - 1024);
    assert!(
        cache
            .apply_local("n2", report("a", "u", &["10.0.0.1"]))
            .is_ok()
    );
    cache.start_list(POD);
    for pod in 0..1000 {
        cache.apply(
            POD,
            observed(
                &format!("p{pod}"),
                "u",
                mk_endpoint(&format!("p{pod}"), &[]),
            ),
        );
    }
    cache.sweep(POD);
    let mut refused = 0;
    for pod in 0..500 {
        refused += usize::from(
            cache
                .apply_local("n1", report(&format!("q{pod}"), "u", &["10.0.0.1"]))
                .is_err(),
        );
        refused += usize::from(
            cache
                .apply_local("n3", report(&format!("q{pod}"), "u", &["10.0.0.1"]))
                .is_err(),
        );
    }
    assert_eq!(
        refused,
        500 + 500 - MAX_UNKNOWN,
        "one has reached its limit, the other part of it"
    );
    assert!(
        cache
            .apply_local("n3", report("p7", "u", &["10.0.0.7"]))
            .is_ok(),
        "the API knows it"
    );
}

#[test]
fn reports_without_address_about_unknown_pods_are_not_kept() {
    let mut cache = Cache::new([POD]);
    let report_end = |cache: &mut Cache, node: &str, name: &str, uid: &str| {
        cache
            .apply_local(node, report(name, uid, &[]))
            .expect("accepted");
    };
    // Before the first list every pod counts as known.
    cache.start_list(POD);
    report_end(&mut cache, "n1", "listed", "u1");
    report_end(&mut cache, "n1", "unlisted", "u1");
    assert_eq!(cache.overlays.reports("n1"), 2);
    let updates = cache.apply(
        POD,
        observed("listed", "u1", mk_endpoint("listed", &["10.0.0.1"])),
    );
    assert_eq!(updates, [mk_endpoint("listed", &[])]);
    cache.sweep(POD);
    assert_eq!(cache.overlays.reports("n1"), 1, "of the pod that is there");
    cache.delete(POD, &key("listed"));
    // Deleted in the API first, then on its node; or replaced by another of the same name, on the
    // same node or elsewhere.
    cache.apply(
        POD,
        observed("other", "u2", mk_endpoint("other", &["10.0.0.3"])),
    );
    for pod in 0..5000 {
        report_end(&mut cache, "n1", &format!("p{pod}"), "u1");
    }
    report_end(&mut cache, "n1", "other", "u1");
    let ended = Observed {
        update: None,
        ..observed("ended", "u1", mk_endpoint("ended", &[]))
    };
    cache.apply(POD, ended);
    report_end(&mut cache, "n1", "ended", "u1");
    report_end(&mut cache, "n2", "other", "u1");
    // Reported and revoked before the API shows it; a report about its predecessor does not revoke
    // it.
    assert_eq!(
        cache.apply_local("n1", report("a", "u2", &["10.0.0.2"])),
        Ok(vec![])
    );
    report_end(&mut cache, "n1", "a", "u1");
    assert_eq!(cache.overlays.reports("n1"), 1);
    report_end(&mut cache, "n1", "a", "u2");
    assert_eq!(
        (cache.overlays.reports("n1"), cache.overlays.reports("n2")),
        (0, 0)
    );
}

#[test]
fn reports_of_a_deleted_node_are_kept_for_existing_pods_only() {
    let node = |name: &str| {
        let update = Update::Node(
            name.to_owned(),
            Some(margay_api::network::NodeInfo::default()),
        );
        Observed {
            key: ObjectKey::new("", name),
            ..observed(name, "u", update)
        }
    };
    for is_swept in [false, true] {
        let mut cache = Cache::new([POD, "Node"]);
        for name in ["n1", "n2"] {
            cache.apply("Node", node(name));
        }
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"])));
        cache
            .apply_local("n1", report("a", "u1", &["10.0.0.2"]))
            .expect("accepted");
        cache
            .apply_local("n1", report("unknown", "u1", &["10.0.0.3"]))
            .expect("accepted");
        cache
            .apply_local("n2", report("unknown", "u1", &["10.0.0.4"]))
            .expect("accepted");
        if is_swept {
            cache.start_list("Node");
            cache.apply("Node", node("n2"));
            cache.sweep("Node");
        } else {
            cache.delete("Node", &ObjectKey::new("", "n1"));
        }
        assert_eq!(
            (cache.overlays.reports("n1"), cache.overlays.reports("n2")),
            (1, 1)
        );
        assert_eq!(
            cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"]))),
            []
        );
        cache.delete(POD, &key("a"));
        assert_eq!(cache.overlays.reports("n1"), 0);
    }
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
                    let Observed { update: Some(Update::Endpoint(key, Some(endpoint))), uid, .. } = mk_pod(pod, address) else {
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
                    let Some(update) = mk_pod(*pod, *address).update else { unreachable!("readable") };
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
    fn one_policy_stored_twice_is_one(steps in proptest::collection::vec((0..3_u8, any::<bool>(), 0..4_u8), 0..30)) {
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
            let counts = ["p", "default.p"].into_iter().find_map(|stored| Some((stored, *api.get(stored)?)));
            let wanted = counts.and_then(|(stored, order)| mk_stored_policy(stored, order).update);
            prop_assert_eq!(&state, &wanted);
        }
    }
}
