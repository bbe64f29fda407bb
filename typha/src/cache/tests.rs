use std::net::IpAddr;

use margay_api::endpoint::WorkloadEndpoint;
use margay_api::meta::Labels;
use margay_api::network::{BlockInfo, Encapsulation, Pool};
use proptest::prelude::*;

use super::*;
use crate::kinds::{BLOCK, POD};
use crate::overlay::UNKNOWN;

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
    Observed { key: key(name), uid: uid.to_owned(), update: Some(update), prefers_former: false, problems: Vec::new() }
}

fn mk_namespace(name: &str, label: &str) -> Observed {
    let labels = Labels::from([("l".to_owned(), label.to_owned())]);
    let update = Update::Namespace(name.to_owned(), Some(labels));
    observed(name, "u", update)
}

fn said(name: &str, uid: &str, addresses: &[&str]) -> LocalEndpoint {
    LocalEndpoint { key: key(name), addresses: mk_addresses(addresses), uid: uid.to_owned() }
}

#[test]
fn only_news_passes() {
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
    cache.begin(POD);
    cache.sweep(POD);
    assert!(!cache.is_synced());
    assert_eq!(cache.unsynced(), [NAMESPACE]);
    cache.begin(NAMESPACE);
    cache.apply(NAMESPACE, mk_namespace("a", "1"));
    assert!(!cache.is_synced(), "the list has not ended");
    cache.sweep(NAMESPACE);
    assert!(cache.is_synced());
}

#[test]
fn a_short_list_removes_nothing_before_the_sweep() {
    let mut cache = Cache::new([NAMESPACE]);
    cache.begin(NAMESPACE);
    for name in ["a", "b", "c", "d", "e"] {
        cache.apply(NAMESPACE, mk_namespace(name, "1"));
    }
    assert_eq!(cache.missing(NAMESPACE, 2), Missing::default());
    cache.sweep(NAMESPACE);
    cache.begin(NAMESPACE);
    cache.apply(NAMESPACE, mk_namespace("c", "1"));
    let missing = cache.missing(NAMESPACE, 2);
    assert_eq!(missing.total, 4);
    assert_eq!(missing.sample, [key("a"), key("d")], "spread over all");
    let counts: Vec<_> = cache.counts().collect();
    assert_eq!(counts, [(NAMESPACE, 5, 0)]);
    // The list was wrong: the next one is complete, and nothing ever left.
    cache.begin(NAMESPACE);
    for name in ["a", "b", "c", "d", "e"] {
        assert_eq!(cache.apply(NAMESPACE, mk_namespace(name, "1")), []);
    }
    assert_eq!(cache.sweep(NAMESPACE), []);
    cache.begin(NAMESPACE);
    assert_eq!(cache.sweep(NAMESPACE).len(), 5, "confirmed");
}

#[test]
fn what_cannot_be_read_keeps_its_meaning() {
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

/// A policy of the namespace, as it is written or as what stands in its place.
fn mk_policy(order: u8, uid: &str, prefers_former: bool) -> Observed {
    let problems = if prefers_former { vec!["spec.selector".to_owned()] } else { Vec::new() };
    Observed { uid: uid.to_owned(), prefers_former, problems, ..mk_stored_policy("p", order) }
}

#[test]
fn a_policy_that_is_refused_keeps_its_meaning_until_it_is_another_object() {
    const POLICY: &str = "NetworkPolicy";
    let mut cache = Cache::new([POLICY]);
    let news = |cache: &mut Cache, observed: Observed| cache.apply(POLICY, observed);
    let (sound, stand_in) = (mk_policy(1, "u", false), mk_policy(9, "u", true));
    assert_eq!(news(&mut cache, sound.clone()), sound.update.iter().cloned().collect::<Vec<_>>());
    assert_eq!(news(&mut cache, stand_in.clone()), [], "its former meaning stays");
    assert!(cache.problems_of(POLICY, &key("p"))[1].contains("what it said before stays"));
    assert_eq!(news(&mut cache, stand_in.clone()), [], "however often it is seen");
    cache.begin(POLICY);
    assert_eq!(news(&mut cache, stand_in.clone()), []);
    assert_eq!(cache.sweep(POLICY), []);
    let mended = mk_policy(2, "u", false);
    assert_eq!(news(&mut cache, mended.clone()).len(), 1);
    assert_eq!(cache.problems().count(), 0);

    let other = mk_policy(9, "other", true);
    assert_eq!(news(&mut cache, other.clone()), other.update.iter().cloned().collect::<Vec<_>>(), "another object");
    assert!(cache.problems_of(POLICY, &key("p"))[1].contains("is closed"));
    assert!(cache.delete(POLICY, &key("p")).is_some());
    assert_eq!(news(&mut cache, stand_in.clone()).len(), 1, "never read: what stands in its place");

    let mut fresh = Cache::new([POLICY]);
    assert_eq!(news(&mut fresh, stand_in.clone()), stand_in.update.into_iter().collect::<Vec<_>>());
    let nothing = Observed { update: None, ..mk_policy(1, "u", true) };
    assert_eq!(Cache::new([POLICY]).apply(POLICY, nothing), []);
}

#[test]
fn the_words_of_a_node_that_has_gone_elsewhere_give_way_to_the_api() {
    let mut cache = Cache::new([POD]);
    cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"])));
    cache.apply(POD, observed("b", "u2", mk_endpoint("b", &[])));
    assert_eq!(cache.local("n1", said("a", "u1", &[])), Ok(vec![mk_endpoint("a", &[])]), "its sandbox is made anew");
    assert_eq!(cache.local("n1", said("b", "u2", &["10.0.0.2"])), Ok(vec![mk_endpoint("b", &["10.0.0.2"])]));
    // What follows it says to another replica.
    assert_eq!(cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.3"]))), [], "its word counts");
    let news = cache.silence("n1");
    assert_eq!(news, [mk_endpoint("a", &["10.0.0.3"]), mk_endpoint("b", &[])], "until it is silent");
    assert_eq!(cache.silence("n1"), []);
    assert_eq!(cache.apply(POD, observed("b", "u2", mk_endpoint("b", &["10.0.0.2"]))).len(), 1);
}

#[test]
fn a_node_is_ahead_of_the_api_for_its_own_pods() {
    let mut cache = Cache::new([POD]);
    cache.apply(POD, observed("a", "u1", mk_endpoint("a", &[])));
    let news = cache.local("n1", said("a", "u1", &["10.0.0.1"]));
    assert_eq!(news, Ok(vec![mk_endpoint("a", &["10.0.0.1"])]));
    let news = cache.local("n2", said("a", "u1", &["10.0.0.2"]));
    assert_eq!(news, Ok(vec![]), "it is not the pod of n2");
    // The API knows another thing of the pod, not yet its address: what the node says stays.
    assert_eq!(cache.apply(POD, observed("a", "u1", mk_endpoint("a", &[]))), []);
    // Now it knows, and from here on it is believed.
    assert_eq!(cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"]))), []);
    let news = cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.3"])));
    assert_eq!(news, [mk_endpoint("a", &["10.0.0.3"])]);
}

#[test]
fn what_a_node_says_is_about_one_pod_and_not_its_successor() {
    let mut cache = Cache::new([POD]);
    // Said before the API shows the pod.
    assert_eq!(cache.local("n1", said("a", "u2", &["10.0.0.2"])), Ok(vec![]));
    let news = cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"])));
    assert_eq!(news, [mk_endpoint("a", &["10.0.0.1"])], "this is its predecessor");
    cache.delete(POD, &key("a"));
    let news = cache.apply(POD, observed("a", "u2", mk_endpoint("a", &[])));
    assert_eq!(news, [mk_endpoint("a", &["10.0.0.2"])]);
    // No address any more, while the API still shows one.
    cache.apply(POD, observed("a", "u2", mk_endpoint("a", &["10.0.0.2"])));
    let news = cache.local("n1", said("a", "u2", &[]));
    assert_eq!(news, Ok(vec![mk_endpoint("a", &[])]));
    cache.delete(POD, &key("a"));
    let news = cache.apply(POD, observed("a", "u2", mk_endpoint("a", &["10.0.0.2"])));
    assert_eq!(news, [mk_endpoint("a", &["10.0.0.2"])], "forgotten with the pod");
}

#[test]
fn a_node_cannot_take_the_address_of_another() {
    let mut cache = Cache::new([POD, BLOCK]);
    let mut block = |borrowed: &[&str]| {
        let lend = |address: &&str| (address.parse().expect("an address"), "n1".to_owned());
        let borrowed = borrowed.iter().map(lend).collect();
        let info = BlockInfo { node: Some("n2".to_owned()), borrowed, ..BlockInfo::default() };
        let range = "10.0.0.0/26".parse().expect("a range");
        let pool = Pool {
            cidr: "10.0.0.0/16".parse().expect("a range"),
            encapsulation: Encapsulation::None,
            nat_outgoing: false,
            block_size: 26,
            created: 0,
        };
        cache.apply("IPPool", observed("pool", "u", Update::Pool("pool".to_owned(), Some(pool))));
        cache.apply(BLOCK, observed("block", "u", Update::Block(range, Some(info))));
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &[])));
        cache.local("n1", said("a", "u1", &["10.0.0.1"]))
    };
    let refused = block(&[]).expect_err("the block is of n2").to_string();
    assert!(refused.contains("10.0.0.1 of a block of node \"n2\""), "{refused}");
    assert_eq!(block(&["10.0.0.1"]), Ok(vec![mk_endpoint("a", &["10.0.0.1"])]));
    let elsewhere = cache.local("n1", said("a", "u1", &["10.0.0.64"]));
    assert_eq!(elsewhere, Ok(vec![mk_endpoint("a", &["10.0.0.64"])]));
}

#[test]
fn a_node_cannot_fill_the_memory() {
    let mut cache = Cache::new([POD]);
    let mut refused = 0;
    for pod in 0..5000 {
        let said = said(&format!("p{pod}"), "u", &["10.0.0.1"]);
        refused += usize::from(cache.local("n1", said).is_err());
    }
    assert_eq!(refused, 5000 - 1024);
    assert!(cache.local("n2", said("a", "u", &["10.0.0.1"])).is_ok());
    cache.begin(POD);
    for pod in 0..1000 {
        cache.apply(POD, observed(&format!("p{pod}"), "u", mk_endpoint(&format!("p{pod}"), &[])));
    }
    cache.sweep(POD);
    let mut refused = 0;
    for pod in 0..500 {
        refused += usize::from(cache.local("n1", said(&format!("q{pod}"), "u", &["10.0.0.1"])).is_err());
        refused += usize::from(cache.local("n3", said(&format!("q{pod}"), "u", &["10.0.0.1"])).is_err());
    }
    assert_eq!(refused, 500 + 500 - UNKNOWN, "one has said all that it may, the other some");
    assert!(cache.local("n3", said("p7", "u", &["10.0.0.7"])).is_ok(), "the API knows it");
}

#[test]
fn farewells_of_pods_that_the_api_has_forgotten_are_not_kept() {
    let mut cache = Cache::new([POD]);
    let farewell = |cache: &mut Cache, node: &str, name: &str, uid: &str| {
        cache.local(node, said(name, uid, &[])).expect("taken");
    };
    // Before the pods are known nobody can tell whether the API has forgotten one.
    cache.begin(POD);
    farewell(&mut cache, "n1", "listed", "u1");
    farewell(&mut cache, "n1", "unlisted", "u1");
    assert_eq!(cache.overlays.words("n1"), 2);
    let news = cache.apply(POD, observed("listed", "u1", mk_endpoint("listed", &["10.0.0.1"])));
    assert_eq!(news, [mk_endpoint("listed", &[])]);
    cache.sweep(POD);
    assert_eq!(cache.overlays.words("n1"), 1, "of the pod that is there");
    cache.delete(POD, &key("listed"));
    // Deleted in the API first, then on its node; or in the place of another of its name, there or elsewhere.
    cache.apply(POD, observed("other", "u2", mk_endpoint("other", &["10.0.0.3"])));
    for pod in 0..5000 {
        farewell(&mut cache, "n1", &format!("p{pod}"), "u1");
    }
    farewell(&mut cache, "n1", "other", "u1");
    let ended = Observed { update: None, ..observed("ended", "u1", mk_endpoint("ended", &[])) };
    cache.apply(POD, ended);
    farewell(&mut cache, "n1", "ended", "u1");
    farewell(&mut cache, "n2", "other", "u1");
    // Told before the API showed it, and taken back before that too; not by a farewell of its predecessor.
    assert_eq!(cache.local("n1", said("a", "u2", &["10.0.0.2"])), Ok(vec![]));
    farewell(&mut cache, "n1", "a", "u1");
    assert_eq!(cache.overlays.words("n1"), 1);
    farewell(&mut cache, "n1", "a", "u2");
    assert_eq!((cache.overlays.words("n1"), cache.overlays.words("n2")), (0, 0));
}

#[test]
fn a_node_that_is_gone_leaves_only_what_its_pods_need() {
    let node = |name: &str| {
        let update = Update::Node(name.to_owned(), Some(margay_api::network::NodeInfo::default()));
        Observed { key: ObjectKey::new("", name), ..observed(name, "u", update) }
    };
    for is_swept in [false, true] {
        let mut cache = Cache::new([POD, "Node"]);
        for name in ["n1", "n2"] {
            cache.apply("Node", node(name));
        }
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"])));
        cache.local("n1", said("a", "u1", &["10.0.0.2"])).expect("taken");
        cache.local("n1", said("unknown", "u1", &["10.0.0.3"])).expect("taken");
        cache.local("n2", said("unknown", "u1", &["10.0.0.4"])).expect("taken");
        if is_swept {
            cache.begin("Node");
            cache.apply("Node", node("n2"));
            cache.sweep("Node");
        } else {
            cache.delete("Node", &ObjectKey::new("", "n1"));
        }
        assert_eq!((cache.overlays.words("n1"), cache.overlays.words("n2")), (1, 1));
        assert_eq!(cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"]))), []);
        cache.delete(POD, &key("a"));
        assert_eq!(cache.overlays.words("n1"), 0);
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
    /// The news, applied one after another, always give what the last of each object gives, and never tell the same twice.
    #[test]
    fn news_add_up(steps in proptest::collection::vec(step(), 0..40)) {
        let mut cache = Cache::new([POD]);
        let mut api: BTreeMap<u8, u8> = BTreeMap::new();
        let mut overlay: BTreeMap<u8, u8> = BTreeMap::new();
        let mut told: BTreeMap<String, Update> = BTreeMap::new();
        for step in steps {
            let mut seen = Vec::new();
            let news = match step {
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
                    let said = LocalEndpoint { key, addresses: endpoint.addresses, uid };
                    cache.local("n1", said).expect("few")
                }
                Step::Relist(pods) => {
                    cache.begin(POD);
                    let listed: BTreeMap<u8, u8> = pods.iter().copied().collect();
                    let mut news = Vec::new();
                    for (pod, address) in &listed {
                        seen.push((*pod, *address));
                        news.extend(cache.apply(POD, mk_pod(*pod, *address)));
                    }
                    news.extend(cache.sweep(POD));
                    for gone in api.keys().filter(|pod| !listed.contains_key(pod)) {
                        overlay.remove(gone);
                    }
                    api.retain(|pod, _| listed.contains_key(pod));
                    news
                }
            };
            for (pod, address) in seen {
                api.insert(pod, address);
                if overlay.get(&pod) == Some(&address) {
                    overlay.remove(&pod);
                }
            }
            for update in news {
                let Update::Endpoint(key, value) = &update else { unreachable!("only pods") };
                let former = match value {
                    Some(_) => told.insert(key.name.clone(), update.clone()),
                    None => told.remove(&key.name),
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
            prop_assert_eq!(&told, &wanted);
        }
    }
}

/// A policy of the default tier stored with and without that tier's name in front; `order` tells versions of it apart.
fn mk_stored_policy(stored: &str, order: u8) -> Observed {
    use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, Traffic};
    let name = stored.strip_prefix("default.").unwrap_or(stored);
    let key = PolicyKey { kind: PolicyKind::NetworkPolicy, namespace: "ns".to_owned(), name: name.to_owned() };
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
    /// Of a policy that is stored twice the form without the prefix counts, whatever happens in which order; never is there none while one is stored.
    #[test]
    fn one_policy_stored_twice_is_one(steps in proptest::collection::vec((0..3_u8, any::<bool>(), 0..4_u8), 0..30)) {
        let mut cache = Cache::new([POLICY]);
        let mut api: BTreeMap<&str, u8> = BTreeMap::new();
        let mut told: Option<Update> = None;
        for (step, prefixed, order) in steps {
            let stored = if prefixed { "default.p" } else { "p" };
            let news = match step {
                0 => {
                    api.remove(stored);
                    cache.delete(POLICY, &key(stored)).into_iter().collect()
                }
                1 => {
                    api.insert(stored, order);
                    cache.apply(POLICY, mk_stored_policy(stored, order))
                }
                _ => {
                    cache.begin(POLICY);
                    api = BTreeMap::from([(stored, order)]);
                    let mut news = cache.apply(POLICY, mk_stored_policy(stored, order));
                    news.extend(cache.sweep(POLICY));
                    news
                }
            };
            for update in news {
                let Update::Policy(key, policy) = &update else { unreachable!("only policies") };
                prop_assert_eq!(key.name.as_str(), "p");
                told = policy.is_some().then_some(update);
            }
            let counts = ["p", "default.p"].into_iter().find_map(|stored| Some((stored, *api.get(stored)?)));
            let wanted = counts.and_then(|(stored, order)| mk_stored_policy(stored, order).update);
            prop_assert_eq!(&told, &wanted);
        }
    }
}
