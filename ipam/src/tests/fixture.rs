//! Storage in memory that several nodes share, and nodes on it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use margay_api::ipam::names;

use super::*;

/// A node's end in the middle of its work: after so many steps, of which each request has one
/// before and one after what it does.
#[derive(Clone, Debug, Default)]
pub(super) struct End(Arc<Mutex<Option<u32>>>);

impl End {
    /// The node ends after so many steps more.
    pub(super) fn after(steps: u32) -> Self {
        Self(Arc::new(Mutex::new(Some(steps))))
    }

    /// Whether it has come.
    pub(super) fn has_come(&self) -> bool {
        *self.0.lock() == Some(0)
    }

    async fn step(&self) {
        {
            let mut left = self.0.lock();
            match left.as_mut() {
                Some(0) => {}
                Some(left) => {
                    *left -= 1;
                    return;
                }
                None => return,
            }
        }
        std::future::pending().await
    }
}

/// One storage, seen by one node.
#[derive(Clone)]
pub(super) struct NodeMemory {
    pub(super) node: String,
    pub(super) end: End,
    pub(super) storage: Memory,
}

impl NodeMemory {
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Contents) -> T) -> T {
        work(&mut self.storage.lock())
    }

    /// Returns true when the API server lets the node delete the object: of blocks, its own only.
    fn may_delete<K: Kept>(&self, metadata: &ObjectMeta) -> bool {
        let cidr = metadata
            .name
            .as_deref()
            .and_then(names::block_range)
            .filter(|_| K::is_block());
        let block = cidr.and_then(|cidr| self.with(|contents| contents.block(cidr)));
        block.is_none_or(|block| {
            block.spec().affinity.as_deref() == Some(&format!("host:{}", self.node))
        })
    }
}

impl<K: Kept> Objects<K> for NodeMemory {
    async fn get(&self, name: String) -> Result<Option<K>, StoreError> {
        self.end.step().await;
        Objects::<K>::get(&self.storage, name).await
    }

    async fn list<T: Send>(&self, keep: fn(K) -> T) -> Result<Vec<T>, StoreError> {
        self.end.step().await;
        self.storage.list(keep).await
    }

    async fn create(&self, object: K) -> Result<K, StoreError> {
        self.end.step().await;
        let done = self.storage.create(object).await;
        self.end.step().await;
        done
    }

    async fn replace(&self, object: K) -> Result<K, StoreError> {
        self.end.step().await;
        let done = self.storage.replace(object).await;
        self.end.step().await;
        done
    }

    async fn delete(&self, metadata: ObjectMeta) -> Result<bool, StoreError> {
        self.end.step().await;
        if !self.may_delete::<K>(&metadata) {
            return Err(StoreError::Refused("the block of another node".to_owned()));
        }
        let done = Objects::<K>::delete(&self.storage, metadata).await;
        self.end.step().await;
        done
    }
}

impl Store for NodeMemory {
    async fn namespace(&self, name: String) -> Result<Namespace, StoreError> {
        self.end.step().await;
        self.storage.namespace(name).await
    }
}

pub(super) struct Node {
    pub(super) allocator: Allocator,
    pub(super) store: NodeMemory,
    pub(super) map: watch::Sender<BlockMap>,
    pub(super) pools: watch::Sender<Pools>,
    pub(super) limits: watch::Sender<KnownLimits>,
    pub(super) no_namespace_names_pools: watch::Sender<bool>,
}

impl Node {
    pub(super) fn limit(&self, change: impl FnOnce(&mut Limits)) {
        self.limits
            .send_modify(|known| change(Arc::make_mut(known.get_or_insert_default())));
    }
}

pub(super) fn pool(cidr: &str, block_size: u8) -> NodePool {
    NodePool {
        name: "default".to_owned(),
        cidr: cidr.parse().expect("a range"),
        block_size,
        manual: false,
        selected: true,
        namespaces: None,
        workloads: true,
        tunnels: true,
        closed: None,
        is_terminating: false,
    }
}

pub(super) fn named_pool(name: &str, cidr: &str, block_size: u8) -> NodePool {
    NodePool {
        name: name.to_owned(),
        ..pool(cidr, block_size)
    }
}

pub(super) fn mk_node(name: &str, contents: &Memory, pools: Vec<NodePool>) -> Node {
    mk_mortal(name, contents, pools, End::default())
}

/// A node that ends in the middle.
pub(super) fn mk_mortal(name: &str, contents: &Memory, pools: Vec<NodePool>, end: End) -> Node {
    let store = NodeMemory {
        node: name.to_owned(),
        end,
        storage: contents.clone(),
    };
    let (map, seen) = watch::channel(Some(Arc::default()));
    let (pools, pools_seen) = watch::channel(Some(Arc::new(pools)));
    let (limits, limits_seen) = watch::channel(Some(Arc::default()));
    let (no_namespace_names_pools, unnamed_seen) = watch::channel(false);
    let inputs = Inputs {
        map: seen,
        pools: pools_seen,
        limits: limits_seen,
        no_namespace_names_pools: unnamed_seen,
    };
    let allocator = Allocator::spawn(name.to_owned(), Arc::new(store.clone()), inputs, clock);
    Node {
        allocator,
        store,
        map,
        pools,
        limits,
        no_namespace_names_pools,
    }
}

/// The time of day that goes with a test's clock.
pub(super) fn clock() -> String {
    thread_local!(static BEGIN: tokio::time::Instant = tokio::time::Instant::now());
    let elapsed = BEGIN.with(|begin| begin.elapsed());
    let begin: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
    (begin + elapsed).to_string()
}

/// Sends all blocks to all nodes, as typha does some time later.
pub(super) fn notify_all(nodes: &[&Node]) {
    let all: BTreeMap<IpNet, String> = nodes[0].store.with(|contents| {
        let owned = contents
            .blocks()
            .into_iter()
            .filter_map(|(cidr, block)| Some((cidr, block.node()?.to_owned())));
        owned.collect()
    });
    nodes
        .iter()
        .for_each(|node| drop(node.map.send_replace(Some(Arc::new(all.clone())))));
}

pub(super) fn wanted(handle: &str) -> AddressRequest {
    AddressRequest {
        attribute: AllocationAttribute {
            handle_id: Some(handle.to_owned()),
            ..AllocationAttribute::default()
        },
        ..AddressRequest::default()
    }
}

/// Names of the handle's blocks and the addresses that blocks have under it.
pub(super) fn held(contents: &Contents, handle: &str) -> (Vec<String>, Vec<String>) {
    let named = contents
        .handles()
        .get(handle)
        .into_iter()
        .flatten()
        .map(IpNet::to_string)
        .collect();
    let addresses = contents
        .blocks()
        .into_values()
        .flat_map(|block| block.of_handle(handle));
    (
        named,
        addresses.map(|address| address.to_string()).collect(),
    )
}

/// Sends a node the list of its blocks.
pub(super) fn notify_blocks(node: &Node, name: &str) {
    let own = node.store.with(|contents| {
        let own = contents
            .blocks()
            .into_iter()
            .filter(|(_, block)| block.node() == Some(name));
        own.map(|(cidr, _)| (cidr, name.to_owned())).collect()
    });
    node.map.send_replace(Some(Arc::new(own)));
}

pub(super) fn dual(node: &str, contents: &Memory) -> Node {
    let six = named_pool("six", "fd00::/120", 122);
    mk_node(node, contents, vec![pool("10.0.0.0/24", 28), six])
}

pub(super) fn exact(handle: &str, addresses: &[&str]) -> AddressRequest {
    let secondary = [("namespace", "x"), ("pod", handle)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let mut wanted = wanted(handle);
    wanted.attribute.secondary = Some(secondary.into());
    wanted.exact = addresses
        .iter()
        .map(|address| address.parse().expect("an address"))
        .collect();
    wanted
}
