mod blocks;

use super::*;

const LATER: Duration = NODE_GRACE;
const MUCH_LATER: Duration = LEAK_GRACE;

/// Returns the objects that are due at that time with default rules.
fn due(state: &IpamState, candidates: &mut LeakCandidates, now: Duration) -> CollectionPlan {
    plan(state, ScanRules::default(), candidates, now)
}

/// Returns the objects that are due in the second of two scans, after the longest grace period.
fn due_at_last(state: &IpamState) -> CollectionPlan {
    let mut candidates = LeakCandidates::default();
    assert_eq!(
        due(state, &mut candidates, Duration::ZERO),
        CollectionPlan::default(),
        "not at first sight"
    );
    due(state, &mut candidates, MUCH_LATER)
}

fn attribute(handle: &str, node: &str, pod: Option<&str>) -> AllocationAttribute {
    let mut secondary = BTreeMap::from([("node".to_owned(), node.to_owned())]);
    match pod {
        Some(pod) => secondary.extend([
            ("namespace".to_owned(), "x".to_owned()),
            ("pod".to_owned(), pod.to_owned()),
        ]),
        None => drop(secondary.insert("type".to_owned(), "vxlanTunnelAddress".to_owned())),
    }
    AllocationAttribute {
        handle_id: Some(handle.to_owned()),
        secondary: Some(secondary),
        ..Default::default()
    }
}

fn affinity(node: &str, cidr: &str) -> Affinity {
    let (name, version) = (format!("{node}-claim"), "1".to_owned());
    Affinity {
        name,
        node: node.to_owned(),
        cidr: cidr.parse().unwrap(),
        deleted: false,
        version,
    }
}

fn handle(id: &str, node: Option<&str>) -> Handle {
    let blocks = ["10.0.0.0/30", "10.0.0.4/30"]
        .map(|text| text.parse().unwrap())
        .into();
    let (name, version) = (id.to_owned(), "1".to_owned());
    Handle {
        name,
        id: id.to_owned(),
        node: node.map(str::to_owned),
        blocks,
        version,
    }
}

/// n1 has a block with its tunnel, `x/a` and, borrowed, `x/guest` of n2; n2 has one with `x/b`.
fn state() -> IpamState {
    let mut one = Block::new("10.0.0.0/30".parse().unwrap(), "n1", String::new());
    let mut two = Block::new("10.0.0.4/30".parse().unwrap(), "n2", String::new());
    for (handle, node, pod) in [
        ("tunnel", "n1", None),
        ("a", "n1", Some("a")),
        ("guest", "n2", Some("guest")),
    ] {
        one.assign(&attribute(handle, node, pod), |_| false)
            .unwrap();
    }
    two.assign(&attribute("b", "n2", Some("b")), |_| false)
        .unwrap();
    let pod = |node: &str, address: &str| PodFacts {
        node: node.to_owned(),
        addresses: [address.parse().unwrap()].into(),
        is_finished: false,
    };
    IpamState {
        nodes: ["n1", "n2"].map(str::to_owned).into(),
        pods: [
            ("x/a", pod("n1", "10.0.0.1")),
            ("x/guest", pod("n2", "10.0.0.2")),
            ("x/b", pod("n2", "10.0.0.4")),
        ]
        .map(|(name, pod)| (name.to_owned(), pod))
        .into(),
        blocks: vec![one, two],
        affinities: vec![affinity("n1", "10.0.0.0/30"), affinity("n2", "10.0.0.4/30")],
        handles: [("tunnel", "n1"), ("a", "n1"), ("guest", "n2"), ("b", "n2")]
            .map(|(id, node)| handle(id, Some(node)))
            .into(),
        pools: Some(vec!["10.0.0.0/24".parse().unwrap()]),
    }
}

/// Handles that are released, and blocks and affinities that are deleted.
fn shown(plan: &CollectionPlan) -> (Vec<&str>, Vec<String>, Vec<&str>) {
    let handles = plan
        .releases
        .values()
        .flatten()
        .map(|release| release.handle.as_str());
    let affinities = plan
        .affinities
        .iter()
        .map(|affinity| affinity.node.as_str());
    (
        handles.collect(),
        plan.blocks
            .iter()
            .map(|block| block.cidr.to_string())
            .collect(),
        affinities.collect(),
    )
}

#[test]
fn objects_in_use_stay() {
    let mut candidates = LeakCandidates::default();
    for moment in [Duration::ZERO, LATER, MUCH_LATER, 9 * MUCH_LATER] {
        assert_eq!(
            due(&state(), &mut candidates, moment),
            CollectionPlan::default()
        );
    }
}

#[test]
fn addresses_of_a_deleted_node_are_released_and_a_block_with_borrowed_ones_stays() {
    let mut candidates = LeakCandidates::default();
    let mut without_n2 = state();
    without_n2.nodes.remove("n2");
    without_n2.pods.retain(|_, pod| pod.node != "n2");
    assert_eq!(
        due(&without_n2, &mut candidates, Duration::ZERO),
        CollectionPlan::default(),
        "not at first sight"
    );
    let taken = due(&without_n2, &mut candidates, LATER);
    assert_eq!(
        shown(&taken),
        (
            vec!["guest", "b"],
            vec!["10.0.0.4/30".to_owned()],
            vec!["n2"]
        )
    );
    assert_eq!(taken.nodes(), ["n2"].into());
    assert_eq!(taken.pods(), ["x/b", "x/guest"].into());

    let mut without_n1 = state();
    without_n1.nodes.remove("n1");
    without_n1.pods.remove("x/a");
    let taken = due_at_last(&without_n1);
    assert_eq!(
        shown(&taken),
        (vec!["tunnel", "a"], vec![], vec![]),
        "the guest of n2 is still in the block of n1"
    );
}

#[test]
fn a_node_that_is_absent_while_its_pods_are_listed_keeps_everything() {
    for node in ["n1", "n2"] {
        let mut absent = state();
        absent.nodes.remove(node);
        let mut candidates = LeakCandidates::default();
        for moment in [Duration::ZERO, LATER, MUCH_LATER, 9 * MUCH_LATER] {
            assert_eq!(
                due(&absent, &mut candidates, moment),
                CollectionPlan::default(),
                "{node}"
            );
        }
        assert!(candidates.has_node(), "the next scan is soon");
    }
}

#[test]
fn pods_with_other_addresses_do_not_keep_an_absent_node() {
    let mut finished = state();
    finished.nodes.remove("n1");
    finished.pods.get_mut("x/a").unwrap().is_finished = true;
    assert_eq!(shown(&due_at_last(&finished)).0, vec!["tunnel", "a"]);

    let mut elsewhere = state();
    elsewhere.nodes.remove("n1");
    elsewhere.pods.get_mut("x/a").unwrap().node = "n2".to_owned();
    assert_eq!(shown(&due_at_last(&elsewhere)).0, vec!["tunnel", "a"]);

    // While one pod exists, the grace period of a gone one is that of any pod.
    let mut partly = state();
    partly.nodes.remove("n2");
    partly.pods.remove("x/guest");
    let mut candidates = LeakCandidates::default();
    for moment in [Duration::ZERO, LATER, MUCH_LATER - Duration::from_secs(1)] {
        assert_eq!(
            due(&partly, &mut candidates, moment),
            CollectionPlan::default()
        );
    }
    assert_eq!(
        shown(&due(&partly, &mut candidates, MUCH_LATER)),
        (vec!["guest"], vec![], vec![])
    );
}

#[test]
fn a_node_that_comes_back_is_no_candidate_any_more() {
    let mut candidates = LeakCandidates::default();
    let mut without = state();
    without.nodes.remove("n2");
    without.pods.clear();
    due(&without, &mut candidates, Duration::ZERO);
    due(&state(), &mut candidates, LATER);
    assert_eq!(
        due(&without, &mut candidates, 2 * LATER),
        CollectionPlan::default()
    );
}

#[test]
fn a_list_without_nodes_makes_nothing_due() {
    let mut candidates = LeakCandidates::default();
    let none = IpamState {
        nodes: BTreeSet::new(),
        ..state()
    };
    for moment in [Duration::ZERO, LATER, MUCH_LATER] {
        assert_eq!(
            due(&none, &mut candidates, moment),
            CollectionPlan::default()
        );
    }
}

#[test]
fn an_address_without_its_pod_is_due_after_the_grace_period() {
    let elsewhere = PodFacts {
        node: "n2".to_owned(),
        ..PodFacts::default()
    };
    let starts = PodFacts {
        node: "n1".to_owned(),
        ..PodFacts::default()
    };
    let other = PodFacts {
        addresses: ["10.0.0.3".parse().unwrap()].into(),
        ..starts.clone()
    };
    let finished = PodFacts {
        addresses: ["10.0.0.1".parse().unwrap()].into(),
        is_finished: true,
        ..starts.clone()
    };
    let cases = [
        (None, true),
        (Some(elsewhere), true),
        (Some(other), true),
        (Some(finished), true),
        (Some(starts), false),
    ];
    for (pod, is_leaked) in cases {
        let mut leaking = state();
        leaking.pods.remove("x/a");
        leaking
            .pods
            .extend(pod.clone().map(|pod| ("x/a".to_owned(), pod)));
        let mut candidates = LeakCandidates::default();
        for moment in [Duration::ZERO, LATER, MUCH_LATER - Duration::from_secs(1)] {
            assert_eq!(
                due(&leaking, &mut candidates, moment),
                CollectionPlan::default(),
                "{pod:?}"
            );
        }
        let taken = due(&leaking, &mut candidates, MUCH_LATER);
        let wanted = if is_leaked { vec!["a"] } else { vec![] };
        assert_eq!(shown(&taken), (wanted, vec![], vec![]), "{pod:?}");
    }
}

#[test]
fn the_grace_period_of_an_address_follows_the_settings() {
    let mut leaking = state();
    leaking.pods.remove("x/a");
    for (leak, is_taken) in [(Some(Duration::from_secs(60)), true), (None, false)] {
        let rules = ScanRules {
            leak,
            ..ScanRules::default()
        };
        let mut candidates = LeakCandidates::default();
        plan(&leaking, rules, &mut candidates, Duration::ZERO);
        assert_eq!(
            plan(&leaking, rules, &mut candidates, Duration::from_secs(59)),
            CollectionPlan::default()
        );
        let taken = plan(&leaking, rules, &mut candidates, Duration::from_secs(60));
        assert_eq!(!taken.releases.is_empty(), is_taken, "{leak:?}");
    }
}

#[test]
fn nodes_and_pods_that_exist_when_read_by_name_keep_everything() {
    let left = |retain: &dyn Fn(&mut CollectionPlan)| {
        let mut without = state();
        without.nodes.remove("n2");
        without.pods.retain(|_, pod| pod.node != "n2");
        without.pods.remove("x/a");
        let mut plan = due_at_last(&without);
        assert_eq!(shown(&plan).0, vec!["a", "guest", "b"]);
        retain(&mut plan);
        let (handles, blocks, affinities) = shown(&plan);
        (handles.join(" "), blocks.len(), affinities.len())
    };
    let gone = |pods: &[&str]| {
        pods.iter()
            .map(|pod| ((*pod).to_owned(), None))
            .collect::<BTreeMap<_, _>>()
    };
    let there = |pod: &str, node: &str| {
        let facts = PodFacts {
            node: node.to_owned(),
            ..PodFacts::default()
        };
        [(pod.to_owned(), Some(facts))]
            .into_iter()
            .collect::<BTreeMap<_, _>>()
    };
    let none = BTreeSet::new();
    let all = gone(&["x/a", "x/b", "x/guest"]);
    assert_eq!(
        left(&|plan| plan.retain_confirmed(&none, &all)),
        ("a guest b".to_owned(), 1, 1)
    );
    let back = ["n2".to_owned()].into();
    assert_eq!(
        left(&|plan| plan.retain_confirmed(&back, &all)),
        ("a".to_owned(), 0, 0),
        "the node is back"
    );
    assert_eq!(
        left(&|plan| plan.retain_confirmed(&none, &gone(&["x/b", "x/guest"]))).0,
        "guest b",
        "x/a could not be read"
    );
    let mut one = all.clone();
    one.extend(there("x/a", "n1"));
    assert_eq!(
        left(&|plan| plan.retain_confirmed(&none, &one)).0,
        "guest b",
        "the list lacked x/a"
    );
    let mut guest = all.clone();
    guest.extend(there("x/guest", "n2"));
    assert_eq!(
        left(&|plan| plan.retain_confirmed(&none, &guest)),
        ("a".to_owned(), 0, 0),
        "a pod of the node is there"
    );
    let mut moved = all;
    moved.extend(there("x/a", "n2"));
    assert_eq!(
        left(&|plan| plan.retain_confirmed(&none, &moved)).0,
        "a guest b",
        "another pod by that name, elsewhere"
    );
}

#[test]
fn an_address_that_was_assigned_again_is_a_new_candidate() {
    let mut leaking = state();
    leaking.pods.remove("x/a");
    let mut candidates = LeakCandidates::default();
    due(&leaking, &mut candidates, Duration::ZERO);
    leaking.blocks[0].release("a");
    let again = attribute("a", "n1", Some("a"));
    assert!(leaking.blocks[0].assign_address("10.0.0.1".parse().unwrap(), &again));
    assert_eq!(
        due(&leaking, &mut candidates, MUCH_LATER),
        CollectionPlan::default()
    );
}

#[test]
fn an_address_in_cooldown_is_released_when_its_node_does_not_end_it() {
    let mut resting = state();
    let rest = AllocationAttribute {
        released_at: Some("2026-01-01T00:00:00Z".to_owned()),
        ..Default::default()
    };
    assert!(resting.blocks[0].assign_address("10.0.0.3".parse().unwrap(), &rest));
    let mut candidates = LeakCandidates::default();
    for moment in [Duration::ZERO, LATER, MUCH_LATER] {
        assert_eq!(
            due(&resting, &mut candidates, moment),
            CollectionPlan::default()
        );
    }
    let taken = due(&resting, &mut candidates, COOLDOWN_GRACE);
    assert_eq!(
        taken
            .releases
            .values()
            .flatten()
            .map(|one| one.address.to_string())
            .collect::<Vec<_>>(),
        ["10.0.0.3"]
    );
    assert!(
        taken.nodes().is_empty() && taken.pods().is_empty(),
        "nothing to read by name"
    );
}

#[test]
fn a_handle_without_addresses_is_deleted_unless_it_is_written() {
    let mut state = state();
    let forgotten = handle("old", Some("n1"));
    state.handles.push(forgotten.clone());
    let taken = due_at_last(&state);
    assert_eq!(
        taken,
        CollectionPlan {
            handles: [forgotten].into(),
            ..CollectionPlan::default()
        }
    );
    let mut candidates = LeakCandidates::default();
    due(&state, &mut candidates, Duration::ZERO);
    state.handles.last_mut().unwrap().version = "2".to_owned();
    assert_eq!(
        due(&state, &mut candidates, MUCH_LATER),
        CollectionPlan::default()
    );
}

#[test]
fn begun_deletions_are_finished() {
    let mut begun = state();
    let mut spec = Block::new("10.0.0.8/30".parse().unwrap(), "n1", String::new())
        .spec()
        .clone();
    spec.deleted = true;
    begun.blocks.push(Block::parse(spec).unwrap());
    begun.affinities.push(Affinity {
        deleted: true,
        ..affinity("n1", "10.0.0.8/30")
    });
    let taken = due(&begun, &mut LeakCandidates::default(), Duration::ZERO);
    assert_eq!(
        shown(&taken),
        (vec![], vec!["10.0.0.8/30".to_owned()], vec!["n1"])
    );
}

#[test]
fn every_node_that_loses_objects_is_read_by_name() {
    let mut left = state();
    left.affinities.clear();
    left.blocks.push(Block::new(
        "10.0.0.8/30".parse().unwrap(),
        "n9",
        String::new(),
    ));
    let mut candidates = LeakCandidates::default();
    due(&left, &mut candidates, Duration::ZERO);
    let taken = due(&left, &mut candidates, LATER);
    assert_eq!(
        shown(&taken),
        (vec![], vec!["10.0.0.8/30".to_owned()], vec![])
    );
    assert_eq!(
        taken.nodes(),
        ["n9"].into(),
        "for an empty block without an affinity too"
    );
}

#[test]
fn a_handle_without_a_node_gets_the_node_that_has_its_addresses() {
    let nodes = |change: fn(&mut IpamState)| {
        let mut state = state();
        state
            .handles
            .iter_mut()
            .for_each(|handle| handle.node = None);
        change(&mut state);
        let plan = due(&state, &mut LeakCandidates::default(), Duration::ZERO);
        plan.handle_nodes
            .into_iter()
            .map(|(handle, node)| format!("{} {node}", handle.id))
            .collect::<Vec<_>>()
    };
    assert_eq!(nodes(|_| {}), ["a n1", "b n2", "guest n2", "tunnel n1"]);
    let posing = |state: &mut IpamState| {
        let _ = state.blocks[1].assign(&attribute("a", "n2", Some("z")), |_| false);
    };
    assert_eq!(
        nodes(posing),
        ["b n2", "guest n2", "tunnel n1"],
        "two nodes have addresses with it"
    );
    let elsewhere =
        |state: &mut IpamState| state.handles[1].blocks = ["10.0.0.4/30".parse().unwrap()].into();
    assert_eq!(
        nodes(elsewhere),
        ["b n2", "guest n2", "tunnel n1"],
        "it does not list that block"
    );
    let annotated = |state: &mut IpamState| {
        state
            .handles
            .retain_mut(|handle| handle.node.replace("n1".to_owned()).is_none())
    };
    assert_eq!(nodes(annotated), [""; 0], "an annotation is kept");
    assert_eq!(nodes(|state| state.blocks.clear()), [""; 0]);
}
