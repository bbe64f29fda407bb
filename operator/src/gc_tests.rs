use super::*;

const LATER: Duration = NODE_GRACE;
const MUCH_LATER: Duration = LEAK_GRACE;

/// What is due at that time by the usual rules.
fn due(seen: &Seen, suspicions: &mut Suspicions, now: Duration) -> Plan {
    plan(seen, Rules::default(), suspicions, now)
}

/// What is due to somebody who has looked twice, with the longest grace between.
fn due_at_last(seen: &Seen) -> Plan {
    let mut suspicions = Suspicions::default();
    assert_eq!(due(seen, &mut suspicions, Duration::ZERO), Plan::default(), "not at first sight");
    due(seen, &mut suspicions, MUCH_LATER)
}

fn attribute(handle: &str, node: &str, pod: Option<&str>) -> AllocationAttribute {
    let mut secondary = BTreeMap::from([("node".to_owned(), node.to_owned())]);
    match pod {
        Some(pod) => secondary.extend([("namespace".to_owned(), "x".to_owned()), ("pod".to_owned(), pod.to_owned())]),
        None => drop(secondary.insert("type".to_owned(), "vxlanTunnelAddress".to_owned())),
    }
    AllocationAttribute { handle_id: Some(handle.to_owned()), secondary: Some(secondary), ..Default::default() }
}

fn claim(node: &str, cidr: &str) -> Claim {
    let (name, version) = (format!("{node}-claim"), "1".to_owned());
    Claim { name, node: node.to_owned(), cidr: cidr.parse().unwrap(), deleted: false, version }
}

fn handle(id: &str, node: Option<&str>) -> Handle {
    let blocks = ["10.0.0.0/30", "10.0.0.4/30"].map(|text| text.parse().unwrap()).into();
    let (name, version) = (id.to_owned(), "1".to_owned());
    Handle { name, id: id.to_owned(), node: node.map(str::to_owned), blocks, version }
}

/// n1 has a block with its tunnel, `x/a` and, borrowed, `x/guest` of n2; n2 has one with `x/b`.
fn seen() -> Seen {
    let mut one = Block::new("10.0.0.0/30".parse().unwrap(), "n1", String::new());
    let mut two = Block::new("10.0.0.4/30".parse().unwrap(), "n2", String::new());
    for (handle, node, pod) in [("tunnel", "n1", None), ("a", "n1", Some("a")), ("guest", "n2", Some("guest"))] {
        one.assign(&attribute(handle, node, pod), |_| false).unwrap();
    }
    two.assign(&attribute("b", "n2", Some("b")), |_| false).unwrap();
    let pod = |node: &str, address: &str| PodFacts {
        node: node.to_owned(),
        addresses: [address.parse().unwrap()].into(),
        is_finished: false,
    };
    Seen {
        nodes: ["n1", "n2"].map(str::to_owned).into(),
        pods: [("x/a", pod("n1", "10.0.0.1")), ("x/guest", pod("n2", "10.0.0.2")), ("x/b", pod("n2", "10.0.0.4"))]
            .map(|(name, pod)| (name.to_owned(), pod))
            .into(),
        blocks: vec![one, two],
        claims: vec![claim("n1", "10.0.0.0/30"), claim("n2", "10.0.0.4/30")],
        handles: [("tunnel", "n1"), ("a", "n1"), ("guest", "n2"), ("b", "n2")]
            .map(|(id, node)| handle(id, Some(node)))
            .into(),
        pools: Some(vec!["10.0.0.0/24".parse().unwrap()]),
    }
}

/// Handles that are released, blocks and claims that go.
fn shown(plan: &Plan) -> (Vec<&str>, Vec<String>, Vec<&str>) {
    let handles = plan.releases.values().flatten().map(|release| release.handle.as_str());
    let claims = plan.claims.iter().map(|claim| claim.node.as_str());
    (handles.collect(), plan.blocks.iter().map(|block| block.cidr.to_string()).collect(), claims.collect())
}

#[test]
fn what_is_in_use_stays_for_ever() {
    let mut suspicions = Suspicions::default();
    for moment in [Duration::ZERO, LATER, MUCH_LATER, 9 * MUCH_LATER] {
        assert_eq!(due(&seen(), &mut suspicions, moment), Plan::default());
    }
}

#[test]
fn a_node_that_left_takes_nothing_along_and_a_block_with_guests_stays() {
    let mut suspicions = Suspicions::default();
    let mut without_n2 = seen();
    without_n2.nodes.remove("n2");
    without_n2.pods.retain(|_, pod| pod.node != "n2");
    assert_eq!(due(&without_n2, &mut suspicions, Duration::ZERO), Plan::default(), "not at first sight");
    let taken = due(&without_n2, &mut suspicions, LATER);
    assert_eq!(shown(&taken), (vec!["guest", "b"], vec!["10.0.0.4/30".to_owned()], vec!["n2"]));
    assert_eq!(taken.nodes(), ["n2"].into());
    assert_eq!(taken.pods(), ["x/b", "x/guest"].into());

    let mut without_n1 = seen();
    without_n1.nodes.remove("n1");
    without_n1.pods.remove("x/a");
    let taken = due_at_last(&without_n1);
    assert_eq!(shown(&taken), (vec!["tunnel", "a"], vec![], vec![]), "the guest of n2 is still in the block of n1");
}

#[test]
fn a_node_that_is_absent_while_its_pods_are_listed_keeps_everything() {
    for node in ["n1", "n2"] {
        let mut absent = seen();
        absent.nodes.remove(node);
        let mut suspicions = Suspicions::default();
        for moment in [Duration::ZERO, LATER, MUCH_LATER, 9 * MUCH_LATER] {
            assert_eq!(due(&absent, &mut suspicions, moment), Plan::default(), "{node}");
        }
        assert!(suspicions.has_node(), "it is looked at soon");
    }
}

#[test]
fn pods_that_say_they_have_nothing_of_it_do_not_keep_an_absent_node() {
    let mut finished = seen();
    finished.nodes.remove("n1");
    finished.pods.get_mut("x/a").unwrap().is_finished = true;
    assert_eq!(shown(&due_at_last(&finished)).0, vec!["tunnel", "a"]);

    let mut elsewhere = seen();
    elsewhere.nodes.remove("n1");
    elsewhere.pods.get_mut("x/a").unwrap().node = "n2".to_owned();
    assert_eq!(shown(&due_at_last(&elsewhere)).0, vec!["tunnel", "a"]);

    // Beside a pod that is there, one that is gone has the grace of any pod.
    let mut partly = seen();
    partly.nodes.remove("n2");
    partly.pods.remove("x/guest");
    let mut suspicions = Suspicions::default();
    for moment in [Duration::ZERO, LATER, MUCH_LATER - Duration::from_secs(1)] {
        assert_eq!(due(&partly, &mut suspicions, moment), Plan::default());
    }
    assert_eq!(shown(&due(&partly, &mut suspicions, MUCH_LATER)), (vec!["guest"], vec![], vec![]));
}

#[test]
fn a_node_that_comes_back_is_not_suspected_any_more() {
    let mut suspicions = Suspicions::default();
    let mut without = seen();
    without.nodes.remove("n2");
    without.pods.clear();
    due(&without, &mut suspicions, Duration::ZERO);
    due(&seen(), &mut suspicions, LATER);
    assert_eq!(due(&without, &mut suspicions, 2 * LATER), Plan::default());
}

#[test]
fn a_list_without_nodes_is_an_error_and_no_reason() {
    let mut suspicions = Suspicions::default();
    let none = Seen { nodes: BTreeSet::new(), ..seen() };
    for moment in [Duration::ZERO, LATER, MUCH_LATER] {
        assert_eq!(due(&none, &mut suspicions, moment), Plan::default());
    }
}

#[test]
fn an_address_whose_pod_is_gone_or_has_another_one_waits_out_the_grace() {
    let elsewhere = PodFacts { node: "n2".to_owned(), ..PodFacts::default() };
    let starts = PodFacts { node: "n1".to_owned(), ..PodFacts::default() };
    let other = PodFacts { addresses: ["10.0.0.3".parse().unwrap()].into(), ..starts.clone() };
    let finished = PodFacts { addresses: ["10.0.0.1".parse().unwrap()].into(), is_finished: true, ..starts.clone() };
    let cases =
        [(None, true), (Some(elsewhere), true), (Some(other), true), (Some(finished), true), (Some(starts), false)];
    for (pod, is_leaked) in cases {
        let mut leaking = seen();
        leaking.pods.remove("x/a");
        leaking.pods.extend(pod.clone().map(|pod| ("x/a".to_owned(), pod)));
        let mut suspicions = Suspicions::default();
        for moment in [Duration::ZERO, LATER, MUCH_LATER - Duration::from_secs(1)] {
            assert_eq!(due(&leaking, &mut suspicions, moment), Plan::default(), "{pod:?}");
        }
        let taken = due(&leaking, &mut suspicions, MUCH_LATER);
        let wanted = if is_leaked { vec!["a"] } else { vec![] };
        assert_eq!(shown(&taken), (wanted, vec![], vec![]), "{pod:?}");
    }
}

#[test]
fn the_grace_of_an_address_is_as_settings_say() {
    let mut leaking = seen();
    leaking.pods.remove("x/a");
    for (leak, is_taken) in [(Some(Duration::from_secs(60)), true), (None, false)] {
        let rules = Rules { leak, ..Rules::default() };
        let mut suspicions = Suspicions::default();
        plan(&leaking, rules, &mut suspicions, Duration::ZERO);
        assert_eq!(plan(&leaking, rules, &mut suspicions, Duration::from_secs(59)), Plan::default());
        let taken = plan(&leaking, rules, &mut suspicions, Duration::from_secs(60));
        assert_eq!(!taken.releases.is_empty(), is_taken, "{leak:?}");
    }
}

#[test]
fn who_turns_out_to_be_there_when_asked_by_name_keeps_everything() {
    let left = |spare: &dyn Fn(&mut Plan)| {
        let mut without = seen();
        without.nodes.remove("n2");
        without.pods.retain(|_, pod| pod.node != "n2");
        without.pods.remove("x/a");
        let mut plan = due_at_last(&without);
        assert_eq!(shown(&plan).0, vec!["a", "guest", "b"]);
        spare(&mut plan);
        let (handles, blocks, claims) = shown(&plan);
        (handles.join(" "), blocks.len(), claims.len())
    };
    let gone = |pods: &[&str]| pods.iter().map(|pod| ((*pod).to_owned(), None)).collect::<BTreeMap<_, _>>();
    let there = |pod: &str, node: &str| {
        let facts = PodFacts { node: node.to_owned(), ..PodFacts::default() };
        [(pod.to_owned(), Some(facts))].into_iter().collect::<BTreeMap<_, _>>()
    };
    let nobody = BTreeSet::new();
    let all = gone(&["x/a", "x/b", "x/guest"]);
    assert_eq!(left(&|plan| plan.spare(&nobody, &all)), ("a guest b".to_owned(), 1, 1));
    let back = ["n2".to_owned()].into();
    assert_eq!(left(&|plan| plan.spare(&back, &all)), ("a".to_owned(), 0, 0), "the node is back");
    assert_eq!(
        left(&|plan| plan.spare(&nobody, &gone(&["x/b", "x/guest"]))).0,
        "guest b",
        "x/a could not be asked for"
    );
    let mut one = all.clone();
    one.extend(there("x/a", "n1"));
    assert_eq!(left(&|plan| plan.spare(&nobody, &one)).0, "guest b", "the list was short by x/a");
    let mut guest = all.clone();
    guest.extend(there("x/guest", "n2"));
    assert_eq!(left(&|plan| plan.spare(&nobody, &guest)), ("a".to_owned(), 0, 0), "a pod of the node is there");
    let mut moved = all;
    moved.extend(there("x/a", "n2"));
    assert_eq!(left(&|plan| plan.spare(&nobody, &moved)).0, "a guest b", "another pod by that name, elsewhere");
}

#[test]
fn an_address_that_was_given_again_is_judged_anew() {
    let mut leaking = seen();
    leaking.pods.remove("x/a");
    let mut suspicions = Suspicions::default();
    due(&leaking, &mut suspicions, Duration::ZERO);
    leaking.blocks[0].release("a");
    let again = attribute("a", "n1", Some("a"));
    assert!(leaking.blocks[0].assign_address("10.0.0.1".parse().unwrap(), &again));
    assert_eq!(due(&leaking, &mut suspicions, MUCH_LATER), Plan::default());
}

#[test]
fn an_address_that_rests_is_free_when_its_node_does_not_say_so() {
    let mut resting = seen();
    let rest = AllocationAttribute { released_at: Some("2026-01-01T00:00:00Z".to_owned()), ..Default::default() };
    assert!(resting.blocks[0].assign_address("10.0.0.3".parse().unwrap(), &rest));
    let mut suspicions = Suspicions::default();
    for moment in [Duration::ZERO, LATER, MUCH_LATER] {
        assert_eq!(due(&resting, &mut suspicions, moment), Plan::default());
    }
    let taken = due(&resting, &mut suspicions, REST_GRACE);
    assert_eq!(taken.releases.values().flatten().map(|one| one.address.to_string()).collect::<Vec<_>>(), ["10.0.0.3"]);
    assert!(taken.nodes().is_empty() && taken.pods().is_empty(), "nobody has to be asked");
}

/// An empty block of n1, and its claim.
fn with_empty(cidr: &str) -> Seen {
    let mut seen = seen();
    seen.blocks.push(Block::new(cidr.parse().unwrap(), "n1", String::new()));
    seen.claims.push(claim("n1", cidr));
    seen
}

#[test]
fn an_empty_block_without_a_pool_is_given_back_with_its_claim() {
    let stray = with_empty("10.9.0.0/30");
    let mut suspicions = Suspicions::default();
    assert_eq!(due(&stray, &mut suspicions, Duration::ZERO), Plan::default());
    let taken = due(&stray, &mut suspicions, DRAIN_GRACE);
    assert_eq!(shown(&taken), (vec![], vec!["10.9.0.0/30".to_owned()], vec!["n1"]));
    assert_eq!(taken.claims.first().map(|claim| claim.cidr), Some("10.9.0.0/30".parse().unwrap()));

    let unknown = Seen { pools: None, ..with_empty("10.9.0.0/30") };
    assert_eq!(shown(&due_at_last(&unknown)).1, vec!["10.9.0.0/30"], "as a spare one, later");
    let mut used = with_empty("10.9.0.0/30");
    used.blocks[2].assign(&attribute("c", "n1", Some("a")), |_| false).unwrap();
    used.pods.get_mut("x/a").unwrap().addresses.clear();
    assert_eq!(due_at_last(&used), Plan::default(), "one with addresses stays, whatever becomes of the pool");
}

#[test]
fn a_spare_block_is_given_back_and_the_last_one_of_a_node_stays() {
    let taken = due_at_last(&with_empty("10.0.0.8/30"));
    assert_eq!(shown(&taken), (vec![], vec!["10.0.0.8/30".to_owned()], vec!["n1"]));
    assert_eq!(due_at_last(&with_empty("fd00::/126")).blocks.len(), 1, "its pool is not there");

    let mut only = with_empty("10.0.0.8/30");
    only.blocks.remove(0);
    only.handles.clear();
    assert_eq!(due_at_last(&only), Plan::default(), "the last one");
    let rules = Rules { gives_back_spare: false, ..Rules::default() };
    let mut suspicions = Suspicions::default();
    plan(&with_empty("10.0.0.8/30"), rules, &mut suspicions, Duration::ZERO);
    assert_eq!(plan(&with_empty("10.0.0.8/30"), rules, &mut suspicions, 9 * MUCH_LATER), Plan::default());
}

#[test]
fn a_block_that_was_used_meanwhile_is_judged_anew() {
    let mut stray = with_empty("10.9.0.0/30");
    let mut suspicions = Suspicions::default();
    due(&stray, &mut suspicions, Duration::ZERO);
    stray.blocks[2].assign(&attribute("c", "n1", Some("c")), |_| false).unwrap();
    stray.blocks[2].release("c");
    assert_eq!(due(&stray, &mut suspicions, DRAIN_GRACE), Plan::default());
}

#[test]
fn a_handle_that_names_nothing_goes_unless_it_is_written() {
    let mut seen = seen();
    let forgotten = handle("old", Some("n1"));
    seen.handles.push(forgotten.clone());
    let taken = due_at_last(&seen);
    assert_eq!(taken, Plan { handles: [forgotten].into(), ..Plan::default() });
    let mut suspicions = Suspicions::default();
    due(&seen, &mut suspicions, Duration::ZERO);
    seen.handles.last_mut().unwrap().version = "2".to_owned();
    assert_eq!(due(&seen, &mut suspicions, MUCH_LATER), Plan::default());
}

#[test]
fn deletions_that_were_begun_are_finished() {
    let mut begun = seen();
    let mut spec = Block::new("10.0.0.8/30".parse().unwrap(), "n1", String::new()).spec().clone();
    spec.deleted = true;
    begun.blocks.push(Block::parse(spec).unwrap());
    begun.claims.push(Claim { deleted: true, ..claim("n1", "10.0.0.8/30") });
    let taken = due(&begun, &mut Suspicions::default(), Duration::ZERO);
    assert_eq!(shown(&taken), (vec![], vec!["10.0.0.8/30".to_owned()], vec!["n1"]));
}

#[test]
fn a_block_that_is_another_one_by_now_stays() {
    let block = |node: &str, deleted: bool| {
        let mut spec = Block::new("10.0.0.8/30".parse().unwrap(), node, String::new()).spec().clone();
        spec.deleted = deleted;
        Block::parse(spec).unwrap()
    };
    let mut taken = block("n9", false);
    taken.assign(&attribute("a", "n9", Some("a")), |_| false).unwrap();
    let judged = Doomed::new(&block("n9", false));
    assert!(judged.is_still(&block("n9", false)));
    assert!(!judged.is_still(&taken), "somebody took an address");
    assert!(!judged.is_still(&block("n1", false)), "claimed by a node that nobody has judged");
    assert!(!Doomed::new(&block("n9", true)).is_still(&block("n9", false)), "its deletion was taken back");
}

#[test]
fn of_every_node_that_loses_something_it_is_asked_again() {
    let mut left = seen();
    left.claims.clear();
    left.blocks.push(Block::new("10.0.0.8/30".parse().unwrap(), "n9", String::new()));
    let mut suspicions = Suspicions::default();
    due(&left, &mut suspicions, Duration::ZERO);
    let taken = due(&left, &mut suspicions, LATER);
    assert_eq!(shown(&taken), (vec![], vec!["10.0.0.8/30".to_owned()], vec![]));
    assert_eq!(taken.nodes(), ["n9"].into(), "for an empty block without a claim too");
}

#[test]
fn a_handle_that_does_not_say_whose_it_is_belongs_to_the_node_that_has_its_addresses() {
    let owners = |change: fn(&mut Seen)| {
        let mut seen = seen();
        seen.handles.iter_mut().for_each(|handle| handle.node = None);
        change(&mut seen);
        let plan = due(&seen, &mut Suspicions::default(), Duration::ZERO);
        plan.owners.into_iter().map(|(handle, node)| format!("{} {node}", handle.id)).collect::<Vec<_>>()
    };
    assert_eq!(owners(|_| {}), ["a n1", "b n2", "guest n2", "tunnel n1"]);
    let posing = |seen: &mut Seen| {
        let _ = seen.blocks[1].assign(&attribute("a", "n2", Some("z")), |_| false);
    };
    assert_eq!(owners(posing), ["b n2", "guest n2", "tunnel n1"], "two say that it is theirs");
    let elsewhere = |seen: &mut Seen| seen.handles[1].blocks = ["10.0.0.4/30".parse().unwrap()].into();
    assert_eq!(owners(elsewhere), ["b n2", "guest n2", "tunnel n1"], "it does not name that block");
    let said = |seen: &mut Seen| {
        seen.handles.retain_mut(|handle| std::mem::replace(&mut handle.node, Some("n1".to_owned())).is_none())
    };
    assert_eq!(owners(said), [""; 0], "who says is believed");
    assert_eq!(owners(|seen| seen.blocks.clear()), [""; 0]);
}

#[test]
fn an_empty_block_of_nobody_goes_and_one_that_is_not_a_nodes_stays() {
    let left = |affinity: Option<&str>| {
        let mut spec = Block::new("10.0.0.8/30".parse().unwrap(), "n1", String::new()).spec().clone();
        spec.affinity = affinity.map(str::to_owned);
        let mut seen = seen();
        seen.blocks.push(Block::parse(spec).unwrap());
        due_at_last(&seen).blocks.len()
    };
    assert_eq!(left(None), 1);
    assert_eq!(left(Some("virtual:load-balancer")), 0);
}
