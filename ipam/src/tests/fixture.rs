//! Storage in memory that several nodes share, and nodes on it.

use super::*;

#[derive(Default)]
pub(super) struct Contents {
    pub(super) blocks: BTreeMap<IpNet, (u64, Block)>,
    pub(super) affinities: BTreeMap<(String, IpNet), AffinityState>,
    pub(super) handles: BTreeMap<String, BTreeSet<IpNet>>,
    pub(super) namespaces: BTreeMap<String, Namespace>,
    pub(super) writes: u64,
    /// The next so many block writes succeed, but their answers are lost.
    pub(super) lose_answers: u32,
    /// Requests about blocks are not answered.
    pub(super) is_silent: bool,
    /// Handles are not written.
    pub(super) refuses_handles: bool,
}

/// A node's end in the middle of its work: after so many steps, of which each request has one before and one after what it does.
#[derive(Clone, Debug, Default)]
pub(super) struct End(Arc<Mutex<Option<u32>>>);

impl End {
    /// The node ends after so many steps more.
    pub(super) fn after(steps: u32) -> Self {
        Self(Arc::new(Mutex::new(Some(steps))))
    }

    /// Whether it has come.
    pub(super) fn has_come(&self) -> bool {
        *self.0.lock().expect("no test panics with it") == Some(0)
    }

    async fn step(&self) {
        {
            let mut left = self.0.lock().expect("no test panics with it");
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
pub(super) struct Memory {
    pub(super) node: String,
    pub(super) end: End,
    pub(super) contents: Arc<Mutex<Contents>>,
}

impl Memory {
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Contents) -> T) -> T {
        work(&mut self.contents.lock().expect("no test panics with it"))
    }

    async fn answers(&self) {
        tokio::task::yield_now().await;
        self.end.step().await;
        if self.with(|contents| contents.is_silent) {
            std::future::pending().await
        }
    }

    fn put(&self, contents: &mut Contents, block: Block) -> Result<Stored<Block>, StoreError> {
        contents.writes += 1;
        let revision = contents.writes;
        contents.blocks.insert(block.cidr(), (revision, block.clone()));
        if contents.lose_answers > 0 {
            contents.lose_answers -= 1;
            return Err(StoreError::Failed("connection reset".to_owned()));
        }
        Ok(Stored { value: block, revision: revision.to_string() })
    }
}

impl Store for Memory {
    async fn block(&self, cidr: IpNet) -> Result<Option<Stored<Block>>, StoreError> {
        self.answers().await;
        Ok(self.with(|contents| {
            contents
                .blocks
                .get(&cidr)
                .map(|(revision, block)| Stored { value: block.clone(), revision: revision.to_string() })
        }))
    }

    async fn create_block(&self, block: Block) -> Result<Stored<Block>, StoreError> {
        self.answers().await;
        let done = self.with(|contents| {
            if contents.blocks.contains_key(&block.cidr()) {
                Err(StoreError::Conflict)
            } else {
                self.put(contents, block)
            }
        });
        self.end.step().await;
        done
    }

    async fn update_block(&self, block: Stored<Block>) -> Result<Stored<Block>, StoreError> {
        self.answers().await;
        let done = self.with(|contents| match contents.blocks.get(&block.value.cidr()) {
            Some((revision, _)) if revision.to_string() == block.revision => self.put(contents, block.value),
            _ => Err(StoreError::Conflict),
        });
        self.end.step().await;
        done
    }

    async fn delete_block(&self, block: Stored<Block>) -> Result<(), StoreError> {
        self.answers().await;
        let done = self.with(|contents| match contents.blocks.get(&block.value.cidr()) {
            Some((revision, _)) if revision.to_string() == block.revision => {
                contents.blocks.remove(&block.value.cidr());
                Ok(())
            }
            _ => Err(StoreError::Conflict),
        });
        self.end.step().await;
        done
    }

    async fn put_affinity(&self, cidr: IpNet, state: AffinityState) -> Result<(), StoreError> {
        self.end.step().await;
        self.with(|contents| contents.affinities.insert((self.node.clone(), cidr), state));
        self.end.step().await;
        Ok(())
    }

    async fn delete_affinity(&self, cidr: IpNet) -> Result<(), StoreError> {
        self.end.step().await;
        self.with(|contents| contents.affinities.remove(&(self.node.clone(), cidr)));
        self.end.step().await;
        Ok(())
    }

    async fn put_handle(&self, handle: String, blocks: Vec<IpNet>) -> Result<(), StoreError> {
        self.end.step().await;
        let done = self.with(|contents| match contents.refuses_handles {
            true => Err(StoreError::Failed("no handles today".to_owned())),
            false => {
                contents.handles.entry(handle).or_default().extend(blocks);
                Ok(())
            }
        });
        self.end.step().await;
        done
    }

    async fn handle_blocks(&self, handle: String) -> Result<Vec<IpNet>, StoreError> {
        self.end.step().await;
        Ok(self.with(|contents| contents.handles.get(&handle).into_iter().flatten().copied().collect()))
    }

    async fn delete_handle(&self, handle: String) -> Result<(), StoreError> {
        self.end.step().await;
        self.with(|contents| contents.handles.remove(&handle));
        self.end.step().await;
        Ok(())
    }

    async fn namespace(&self, name: String) -> Result<Namespace, StoreError> {
        self.answers().await;
        Ok(self.with(|contents| contents.namespaces.get(&name).cloned().unwrap_or_default()))
    }
}

pub(super) struct Node {
    pub(super) allocator: Allocator,
    pub(super) store: Memory,
    pub(super) map: watch::Sender<BlockMap>,
    pub(super) pools: watch::Sender<Pools>,
    pub(super) limits: watch::Sender<Known>,
}

impl Node {
    pub(super) fn limit(&self, change: impl FnOnce(&mut Limits)) {
        self.limits.send_modify(|known| change(Arc::make_mut(known.get_or_insert_default())));
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
        is_leaving: false,
    }
}

pub(super) fn named_pool(name: &str, cidr: &str, block_size: u8) -> NodePool {
    NodePool { name: name.to_owned(), ..pool(cidr, block_size) }
}

pub(super) fn mk_node(name: &str, contents: &Arc<Mutex<Contents>>, pools: Vec<NodePool>) -> Node {
    mk_mortal(name, contents, pools, End::default())
}

/// A node that ends in the middle.
pub(super) fn mk_mortal(name: &str, contents: &Arc<Mutex<Contents>>, pools: Vec<NodePool>, end: End) -> Node {
    let store = Memory { node: name.to_owned(), end, contents: contents.clone() };
    let (map, seen) = watch::channel(Some(Arc::default()));
    let (pools, pools_seen) = watch::channel(Some(Arc::new(pools)));
    let (limits, limits_seen) = watch::channel(Some(Arc::default()));
    let terms = Terms { map: seen, pools: pools_seen, limits: limits_seen };
    let allocator = Allocator::spawn(name.to_owned(), Arc::new(store.clone()), terms, clock);
    Node { allocator, store, map, pools, limits }
}

/// The time of day that goes with a test's clock.
pub(super) fn clock() -> String {
    thread_local!(static BEGIN: tokio::time::Instant = tokio::time::Instant::now());
    let elapsed = BEGIN.with(|begin| begin.elapsed());
    let begin: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
    (begin + elapsed).to_string()
}

/// Tells all nodes of all blocks, as typha does some time later.
pub(super) fn tell_all(nodes: &[&Node]) {
    let all: BTreeMap<IpNet, String> = nodes[0].store.with(|contents| {
        let owned = contents.blocks.iter().filter_map(|(cidr, (_, block))| Some((*cidr, block.node()?.to_owned())));
        owned.collect()
    });
    nodes.iter().for_each(|node| drop(node.map.send_replace(Some(Arc::new(all.clone())))));
}

pub(super) fn wanted(handle: &str) -> Wanted {
    Wanted {
        attribute: AllocationAttribute { handle_id: Some(handle.to_owned()), ..AllocationAttribute::default() },
        ipv4: Demand::IfPooled,
        ipv6: Demand::IfPooled,
        exact: Vec::new(),
        usage: Use::Workload,
        admitted: BTreeSet::new(),
    }
}

/// Names of the handle's blocks and the addresses that blocks have under it.
pub(super) fn held(contents: &Contents, handle: &str) -> (Vec<String>, Vec<String>) {
    let named = contents.handles.get(handle).into_iter().flatten().map(IpNet::to_string).collect();
    let addresses = contents.blocks.values().flat_map(|(_, block)| block.of_handle(handle));
    (named, addresses.map(|address| address.to_string()).collect())
}

/// Tells a node which blocks it has.
pub(super) fn tell_blocks(node: &Node, name: &str) {
    let own = node.store.with(|contents| {
        let own = contents.blocks.iter().filter(|(_, (_, block))| block.node() == Some(name));
        own.map(|(cidr, _)| (*cidr, name.to_owned())).collect()
    });
    node.map.send_replace(Some(Arc::new(own)));
}

pub(super) fn dual(node: &str, contents: &Arc<Mutex<Contents>>) -> Node {
    let six = named_pool("six", "fd00::/120", 122);
    mk_node(node, contents, vec![pool("10.0.0.0/24", 28), six])
}

pub(super) fn exact(handle: &str, addresses: &[&str]) -> Wanted {
    let secondary = [("namespace", "x"), ("pod", handle)].map(|(key, value)| (key.to_owned(), value.to_owned()));
    let mut wanted = wanted(handle);
    wanted.attribute.secondary = Some(secondary.into());
    wanted.exact = addresses.iter().map(|address| address.parse().expect("an address")).collect();
    wanted
}
