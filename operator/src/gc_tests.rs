use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + seconds).unwrap()
}

const LATER: i64 = 10;
const MUCH_LATER: i64 = 15 * 60;

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

/// n1 has a block with its tunnel, `x/a` and, borrowed, `x/guest` of n2; n2 has one with `x/b`.
fn seen() -> Seen {
    let mut one = Block::new("10.0.0.0/30".parse().unwrap(), "n1", String::new());
    let mut two = Block::new("10.0.0.4/30".parse().unwrap(), "n2", String::new());
    for (handle, node, pod) in [("tunnel", "n1", None), ("a", "n1", Some("a")), ("guest", "n2", Some("guest"))] {
        one.assign(&attribute(handle, node, pod), |_| false).unwrap();
    }
    two.assign(&attribute("b", "n2", Some("b")), |_| false).unwrap();
    let pod =
        |node: &str, address: &str| PodFacts { node: node.to_owned(), addresses: [address.parse().unwrap()].into() };
    Seen {
        nodes: ["n1", "n2"].map(str::to_owned).into(),
        pods: [("x/a", pod("n1", "10.0.0.1")), ("x/guest", pod("n2", "10.0.0.2")), ("x/b", pod("n2", "10.0.0.4"))]
            .map(|(name, pod)| (name.to_owned(), pod))
            .into(),
        blocks: vec![one, two],
        claims: vec![claim("n1", "10.0.0.0/30"), claim("n2", "10.0.0.4/30")],
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
    for moment in [0, LATER, MUCH_LATER, 9 * MUCH_LATER] {
        assert_eq!(plan(&seen(), &mut suspicions, at(moment)), Plan::default());
    }
}

#[test]
fn a_node_that_left_takes_nothing_along_and_a_block_with_guests_stays() {
    let mut suspicions = Suspicions::default();
    let mut without_n2 = seen();
    without_n2.nodes.remove("n2");
    without_n2.pods.retain(|_, pod| pod.node != "n2");
    assert_eq!(plan(&without_n2, &mut suspicions, at(0)), Plan::default(), "not at first sight");
    let due = plan(&without_n2, &mut suspicions, at(LATER));
    assert_eq!(shown(&due), (vec!["guest", "b"], vec!["10.0.0.4/30".to_owned()], vec!["n2"]));
    assert_eq!(due.nodes(), ["n2"].into());

    let mut without_n1 = seen();
    without_n1.nodes.remove("n1");
    without_n1.pods.remove("x/a");
    let mut suspicions = Suspicions::default();
    plan(&without_n1, &mut suspicions, at(0));
    let due = plan(&without_n1, &mut suspicions, at(LATER));
    assert_eq!(shown(&due), (vec!["tunnel", "a"], vec![], vec![]), "the guest of n2 is still in the block of n1");
}

#[test]
fn a_node_that_comes_back_is_not_suspected_any_more() {
    let mut suspicions = Suspicions::default();
    let mut without = seen();
    without.nodes.remove("n2");
    plan(&without, &mut suspicions, at(0));
    plan(&seen(), &mut suspicions, at(LATER));
    assert_eq!(plan(&without, &mut suspicions, at(2 * LATER)), Plan::default());
}

#[test]
fn a_list_without_nodes_is_an_error_and_no_reason() {
    let mut suspicions = Suspicions::default();
    let none = Seen { nodes: BTreeSet::new(), ..seen() };
    for moment in [0, LATER, MUCH_LATER] {
        assert_eq!(plan(&none, &mut suspicions, at(moment)), Plan::default());
    }
}

#[test]
fn an_address_whose_pod_is_gone_or_has_another_one_waits_out_the_grace() {
    let elsewhere = PodFacts { node: "n2".to_owned(), ..PodFacts::default() };
    let other = PodFacts { node: "n1".to_owned(), addresses: ["10.0.0.3".parse().unwrap()].into() };
    let starts = PodFacts { node: "n1".to_owned(), ..PodFacts::default() };
    for (pod, is_leaked) in [(None, true), (Some(elsewhere), true), (Some(other), true), (Some(starts), false)] {
        let mut leaking = seen();
        leaking.pods.remove("x/a");
        leaking.pods.extend(pod.clone().map(|pod| ("x/a".to_owned(), pod)));
        let mut suspicions = Suspicions::default();
        for moment in [0, LATER, MUCH_LATER - 1] {
            assert_eq!(plan(&leaking, &mut suspicions, at(moment)), Plan::default(), "{pod:?}");
        }
        let due = plan(&leaking, &mut suspicions, at(MUCH_LATER));
        let wanted = if is_leaked { vec!["a"] } else { vec![] };
        assert_eq!(shown(&due), (wanted, vec![], vec![]), "{pod:?}");
    }
}

#[test]
fn an_address_that_was_given_again_is_judged_anew() {
    let mut leaking = seen();
    leaking.pods.remove("x/a");
    let mut suspicions = Suspicions::default();
    plan(&leaking, &mut suspicions, at(0));
    leaking.blocks[0].release("a");
    let again = attribute("a2", "n1", Some("a"));
    assert!(leaking.blocks[0].assign_address("10.0.0.1".parse().unwrap(), &again));
    assert_eq!(plan(&leaking, &mut suspicions, at(MUCH_LATER)), Plan::default());
}

#[test]
fn deletions_that_were_begun_are_finished() {
    let mut begun = seen();
    let mut spec = Block::new("10.0.0.8/30".parse().unwrap(), "n1", String::new()).spec().clone();
    spec.deleted = true;
    begun.blocks.push(Block::parse(spec).unwrap());
    begun.claims.push(Claim { deleted: true, ..claim("n1", "10.0.0.8/30") });
    let due = plan(&begun, &mut Suspicions::default(), at(0));
    assert_eq!(shown(&due), (vec![], vec!["10.0.0.8/30".to_owned()], vec!["n1"]));
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
    plan(&left, &mut suspicions, at(0));
    let due = plan(&left, &mut suspicions, at(LATER));
    assert_eq!(shown(&due), (vec![], vec!["10.0.0.8/30".to_owned()], vec![]));
    assert_eq!(due.nodes(), ["n9"].into(), "for an empty block without a claim too");
}
