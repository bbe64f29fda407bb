//! Whatever nodes do to each other, in whatever order: no address twice, none lost, no block that
//! overlaps another.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::idle_blocks::{IDLE_GRACE, SCAN_INTERVAL};

/// What one of the nodes does next.
#[derive(Clone, Debug)]
enum Step {
    Assign(usize, u8),
    Name(usize, u8, u8),
    Release(usize, u8),
    /// The view has come to know of all blocks.
    Notify,
    /// The pool is gone, or there again with blocks of this size.
    Pool(Option<u8>),
    /// The agent ends and starts again.
    Restart(usize),
    Wait,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = || 0..3usize;
    let step = prop_oneof![
        8 => (node(), 0..12u8).prop_map(|(node, handle)| Step::Assign(node, handle)),
        2 => (node(), 0..12u8, 0..32u8).prop_map(
            |(node, handle, host)| Step::Name(node, handle, host),
        ),
        6 => (node(), 0..12u8).prop_map(|(node, handle)| Step::Release(node, handle)),
        4 => Just(Step::Notify),
        1 => proptest::option::weighted(0.8, 28..=30u8).prop_map(Step::Pool),
        1 => node().prop_map(Step::Restart),
        1 => Just(Step::Wait),
    ];
    proptest::collection::vec(step, 1..60)
}

/// What pods have: by handle, the node and the address.
type Held = BTreeMap<String, (usize, Vec<IpNet>)>;

async fn play(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let contents = Memory::default();
    let names = ["n1", "n2", "n3"];
    let mut pools = vec![pool("10.0.0.0/27", 29)];
    let mut nodes: Vec<Node> = names
        .iter()
        .map(|name| mk_node(name, &contents, pools.clone()))
        .collect();
    let mut held = Held::new();
    for step in steps {
        match step {
            Step::Assign(node, handle) => {
                take(
                    &nodes[node],
                    node,
                    wanted(&format!("h{node}-{handle}")),
                    &mut held,
                )
                .await
            }
            Step::Name(node, handle, host) => {
                let named = exact(&format!("e{node}-{handle}"), &[&format!("10.0.0.{host}")]);
                take(&nodes[node], node, named, &mut held).await;
            }
            Step::Release(node, handle) => {
                for handle in [format!("h{node}-{handle}"), format!("e{node}-{handle}")] {
                    nodes[node]
                        .allocator
                        .release(handle.clone())
                        .await
                        .map_err(|error| TestCaseError::fail(error.to_string()))?;
                    held.remove(&handle);
                }
            }
            // A new pool is seen by the view before it is by nodes, or at the same time.
            Step::Pool(size) => {
                notify_all(&nodes.iter().collect::<Vec<_>>());
                pools = size.iter().map(|size| pool("10.0.0.0/27", *size)).collect();
                nodes
                    .iter()
                    .for_each(|node| drop(node.pools.send_replace(Some(Arc::new(pools.clone())))));
            }
            Step::Notify => notify_all(&nodes.iter().collect::<Vec<_>>()),
            Step::Restart(node) => {
                nodes[node] = mk_node(names[node], &contents, pools.clone());
                notify_all(&nodes.iter().collect::<Vec<_>>());
            }
            Step::Wait => tokio::time::sleep(IDLE_GRACE + SCAN_INTERVAL).await,
        }
        // What goes on behind, such as a spare block that is claimed, comes to its end.
        tokio::time::sleep(Duration::from_millis(1)).await;
        check(&contents, &held)?;
    }
    Ok(())
}

/// Asks, and takes back what failed, as the service does.
async fn take(node: &Node, number: usize, wanted: AddressRequest, held: &mut Held) {
    let handle = wanted.attribute.handle_id.clone().unwrap_or_default();
    if held.contains_key(&handle) {
        return;
    }
    match node.allocator.assign(wanted).await {
        Ok(given) => drop(held.insert(handle, (number, given))),
        Err(_) => node
            .allocator
            .release(handle)
            .await
            .expect("storage answers"),
    }
}

fn check(contents: &Memory, held: &Held) -> Result<(), TestCaseError> {
    let contents = contents.lock();
    let blocks: Vec<Block> = contents.blocks().into_values().collect();
    for one in &blocks {
        let overlaps =
            |other: &&Block| one.cidr() != other.cidr() && one.cidr().contains(&other.cidr());
        prop_assert!(
            !blocks.iter().any(|other| overlaps(&other)),
            "{} overlaps another block",
            one.cidr()
        );
    }
    let allocated: BTreeMap<String, Vec<IpNet>> = blocks
        .iter()
        .flat_map(|block| block.allocated())
        .map(|(address, attribute)| {
            (
                attribute.handle_id.clone().unwrap_or_default(),
                vec![IpNet::from(address)],
            )
        })
        .collect();
    let wanted: BTreeMap<String, Vec<IpNet>> = held
        .iter()
        .map(|(handle, (_, given))| (handle.clone(), given.clone()))
        .collect();
    prop_assert_eq!(&allocated, &wanted);
    let addresses: BTreeSet<&IpNet> = wanted.values().flatten().collect();
    prop_assert_eq!(addresses.len(), wanted.len());
    prop_assert_eq!(
        contents.handles().into_keys().collect::<Vec<_>>(),
        wanted.into_keys().collect::<Vec<_>>()
    );
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn nodes_that_meet_in_every_way_share_no_address(steps in steps()) {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().start_paused(true).build().expect("a runtime");
        runtime.block_on(play(steps))?;
    }
}
