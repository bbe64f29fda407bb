//! Empty blocks: which are deleted, and when.

use super::*;

/// An empty block of n1, and its affinity.
fn with_empty(cidr: &str) -> IpamState {
    let mut state = state();
    state
        .blocks
        .push(Block::new(cidr.parse().unwrap(), "n1", String::new()));
    state.affinities.push(affinity("n1", cidr));
    state
}

#[test]
fn an_empty_block_without_a_pool_is_deleted_with_its_affinity() {
    let stray = with_empty("10.9.0.0/30");
    let mut candidates = LeakCandidates::default();
    assert_eq!(
        due(&stray, &mut candidates, Duration::ZERO),
        CollectionPlan::default()
    );
    let taken = due(&stray, &mut candidates, DRAIN_GRACE);
    assert_eq!(
        shown(&taken),
        (vec![], vec!["10.9.0.0/30".to_owned()], vec!["n1"])
    );
    assert_eq!(
        taken.affinities.first().map(|affinity| affinity.cidr),
        Some("10.9.0.0/30".parse().unwrap())
    );

    let unknown = IpamState {
        pools: None,
        ..with_empty("10.9.0.0/30")
    };
    assert_eq!(
        shown(&due_at_last(&unknown)).1,
        vec!["10.9.0.0/30"],
        "as a spare one, later"
    );
    let mut used = with_empty("10.9.0.0/30");
    used.blocks[2]
        .assign(&attribute("c", "n1", Some("a")), |_| false)
        .unwrap();
    used.pods.get_mut("x/a").unwrap().addresses.clear();
    assert_eq!(
        due_at_last(&used),
        CollectionPlan::default(),
        "a block with addresses stays without a pool"
    );
}

#[test]
fn a_spare_block_is_deleted_and_the_last_one_of_a_node_stays() {
    let taken = due_at_last(&with_empty("10.0.0.8/30"));
    assert_eq!(
        shown(&taken),
        (vec![], vec!["10.0.0.8/30".to_owned()], vec!["n1"])
    );
    assert_eq!(
        due_at_last(&with_empty("fd00::/126")).blocks.len(),
        1,
        "its pool is not there"
    );

    let mut only = with_empty("10.0.0.8/30");
    only.blocks.remove(0);
    only.handles.clear();
    assert_eq!(
        due_at_last(&only),
        CollectionPlan::default(),
        "the last one"
    );
    let rules = ScanRules {
        releases_spare_blocks: false,
        ..ScanRules::default()
    };
    let mut candidates = LeakCandidates::default();
    plan(
        &with_empty("10.0.0.8/30"),
        rules,
        &mut candidates,
        Duration::ZERO,
    );
    assert_eq!(
        plan(
            &with_empty("10.0.0.8/30"),
            rules,
            &mut candidates,
            9 * MUCH_LATER
        ),
        CollectionPlan::default()
    );
}

#[test]
fn a_block_that_was_used_meanwhile_is_a_new_candidate() {
    let mut stray = with_empty("10.9.0.0/30");
    let mut candidates = LeakCandidates::default();
    due(&stray, &mut candidates, Duration::ZERO);
    stray.blocks[2]
        .assign(&attribute("c", "n1", Some("c")), |_| false)
        .unwrap();
    stray.blocks[2].release("c");
    assert_eq!(
        due(&stray, &mut candidates, DRAIN_GRACE),
        CollectionPlan::default()
    );
}

#[test]
fn a_block_that_has_changed_stays() {
    let block = |node: &str, deleted: bool| {
        let mut spec = Block::new("10.0.0.8/30".parse().unwrap(), node, String::new())
            .spec()
            .clone();
        spec.deleted = deleted;
        Block::parse(spec).unwrap()
    };
    let mut taken = block("n9", false);
    taken
        .assign(&attribute("a", "n9", Some("a")), |_| false)
        .unwrap();
    let scanned = BlockToDelete::new(&block("n9", false));
    assert!(scanned.is_unchanged(&block("n9", false)));
    assert!(!scanned.is_unchanged(&taken), "an address was assigned");
    assert!(
        !scanned.is_unchanged(&block("n1", false)),
        "of another node"
    );
    assert!(
        !BlockToDelete::new(&block("n9", true)).is_unchanged(&block("n9", false)),
        "its deletion was reverted"
    );
}

#[test]
fn an_empty_block_without_affinity_is_deleted_and_one_for_services_stays() {
    let left = |affinity: Option<&str>| {
        let mut spec = Block::new("10.0.0.8/30".parse().unwrap(), "n1", String::new())
            .spec()
            .clone();
        spec.affinity = affinity.map(str::to_owned);
        let mut state = state();
        state.blocks.push(Block::parse(spec).unwrap());
        due_at_last(&state).blocks.len()
    };
    assert_eq!(left(None), 1);
    assert_eq!(left(Some("virtual:load-balancer")), 0);
}
