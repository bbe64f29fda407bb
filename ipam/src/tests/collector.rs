//! The collector, and releases by hand, on the same storage as the nodes.

use super::*;
use crate::collector::Collector;
use crate::leak_scan::{NODE_GRACE, PodFacts, ScanRules};
use crate::release::release_address;

#[tokio::test(start_paused = true)]
async fn addresses_blocks_and_handles_of_a_node_that_left_are_collected() {
    let contents = Memory::default();
    let pools = vec![pool("10.0.0.0/26", 28)];
    let (gone, other) = (
        mk_node("n1", &contents, pools.clone()),
        mk_node("n2", &contents, pools),
    );
    let of = |node: &str, pod: &str| {
        let mut wanted = exact(pod, &[]);
        wanted
            .attribute
            .secondary
            .get_or_insert_default()
            .insert("node".to_owned(), node.to_owned());
        wanted
    };
    gone.allocator
        .assign(of("n1", "gone"))
        .await
        .expect("an address");
    notify_all(&[&gone, &other]);
    let stays = other
        .allocator
        .assign(of("n2", "stays"))
        .await
        .expect("an address");
    drop(gone);
    {
        let mut contents = contents.lock();
        let addresses = stays.iter().map(IpNet::addr).collect();
        let pod = PodFacts {
            node: "n2".to_owned(),
            addresses,
            is_finished: false,
        };
        contents.nodes.insert("n2".to_owned());
        contents.pods.insert("x/stays".to_owned(), pod);
        contents.pools.push("10.0.0.0/26".parse().expect("a range"));
    }
    let mut collector = Collector::new(contents.clone(), watch::Sender::new(Vec::new()));
    let is_soon = collector
        .collect(ScanRules::default())
        .await
        .expect("storage answers");
    assert!(is_soon, "a node is absent");
    assert_eq!(
        contents.lock().blocks().len(),
        2,
        "nothing is due at first sight"
    );
    tokio::time::advance(NODE_GRACE).await;
    collector
        .collect(ScanRules::default())
        .await
        .expect("storage answers");
    let contents = contents.lock();
    let owners: Vec<Option<String>> = contents
        .blocks()
        .values()
        .map(|block| block.node().map(str::to_owned))
        .collect();
    assert_eq!(owners, [Some("n2".to_owned())]);
    assert_eq!(
        contents.handles().into_keys().collect::<Vec<_>>(),
        ["stays"]
    );
    assert!(
        contents.affinities().keys().all(|(node, _)| node == "n2"),
        "{:?}",
        contents.affinities()
    );
}

#[tokio::test(start_paused = true)]
async fn an_address_is_released_by_hand_with_its_place_in_the_handle() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 28)]);
    let given = node
        .allocator
        .assign(exact("a", &[]))
        .await
        .expect("an address");
    let address = given[0].addr();
    let block = contents
        .lock()
        .blocks()
        .values()
        .next()
        .expect("a block")
        .clone();
    let sequence = block.sequence(address);
    let later = sequence.map(|sequence| sequence + 1);
    let release =
        async |sequence| release_address(&contents, block.cidr(), address, sequence).await;
    assert_eq!(release(later).await, Ok(false), "another allocation");
    assert_eq!(contents.lock().handles().len(), 1);
    assert_eq!(release(sequence).await, Ok(true));
    assert_eq!(release(sequence).await, Ok(false), "it is free already");
    assert!(contents.lock().handles().is_empty());
    assert!(
        contents
            .lock()
            .blocks()
            .values()
            .all(|block| block.allocated().next().is_none())
    );
}
