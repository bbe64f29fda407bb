//! Test layer 4: nodes and pods as network namespaces, without Kubernetes. Objects as users write
//! them go straight into typha's graph, its frames over the real stream to real agents, pods are
//! attached by the real CNI binary, and packets are real.
//!
//! What is left out is the API server and kubelet: [`Lab::apply`] and [`Lab::delete`] replace the
//! former (with the events of its watches), [`Lab::add_pod`] and [`Lab::remove_pod`] the latter.
//! IPAM works on blocks in memory behind the same trait as those of the API.
//!
//! Reading order: [`objects`] (what is applied), [`control`] (typha), [`node`], [`pod`],
//! [`storage`], [`fabric`] (the network between nodes). It is synchronous, so that a scenario reads
//! from top to bottom: not for use inside an async runtime.

pub mod control;
pub mod fabric;
pub mod node;
pub mod objects;
pub mod pod;
pub mod storage;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use margay_api::rule::IpVersion;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use self::control::Control;
use self::fabric::{Fabric, Topology};
use self::node::Node;
use self::pod::Pod;
use self::storage::Blocks;

/// Longest wait for what must happen; it takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Nothing listens there.
const NOBODY: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1));
/// Name of the pool that a lab has from its start.
pub const POOL: &str = "lab";

/// Waits until the condition holds.
pub fn wait(what: &str, condition: impl Fn() -> Result<bool>) -> Result<()> {
    let since = Instant::now();
    while !condition()? {
        ensure!(since.elapsed() < PATIENCE, "waited for {what}");
        std::thread::yield_now();
    }
    Ok(())
}

/// Options of a lab.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of nodes: `n1`, `n2`, ...
    pub nodes: u8,
    /// Topology.
    pub topology: Topology,
    /// The IP version of the nodes' addresses: they have none of the other one.
    pub version: IpVersion,
    /// `spec` of the IPPool that pods get addresses from.
    pub pool: Value,
    /// Nodes have BGP speakers.
    pub bgp: bool,
}

impl Default for Options {
    /// Three nodes, `n3` behind a router: packets to it are encapsulated, those between the others
    /// are not.
    fn default() -> Self {
        let pool = json!({"cidr": "10.65.0.0/16", "vxlanMode": "CrossSubnet", "natOutgoing": true});
        Self {
            nodes: 3,
            topology: Topology::Routed,
            version: IpVersion::V4,
            pool,
            bgp: false,
        }
    }
}

impl Options {
    /// The same with addresses of IPv6 alone, of nodes and of pods.
    pub fn ipv6() -> Self {
        let pool =
            json!({"cidr": "fd00:10:65::/56", "vxlanMode": "CrossSubnet", "natOutgoing": true});
        Self {
            version: IpVersion::V6,
            pool,
            ..Self::default()
        }
    }
}

/// Nodes, pods and typha. Everything ends with it.
pub struct Lab {
    nodes: BTreeMap<String, Node>,
    pods: BTreeMap<String, Pod>,
    control: Control,
    blocks: Blocks,
    fabric: Fabric,
    runtime: Runtime,
}

impl Lab {
    /// Brings nodes up that enforce the view of a cluster without pods. Needs root.
    pub fn new(options: &Options) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let control = runtime.block_on(Control::start(options.bgp))?;
        let blocks = Blocks::new(&runtime, control.events());
        let fabric = Fabric::new(options.topology, options.version)?;
        let mut lab = Self {
            nodes: BTreeMap::new(),
            pods: BTreeMap::new(),
            control,
            blocks,
            fabric,
            runtime,
        };
        for object in objects::initial(&options.pool) {
            lab.apply(&object)?;
        }
        for number in 1..=options.nodes {
            lab.add_node(number)?;
        }
        lab.claim_tunnels()?;
        lab.wait_enforced()?;
        Ok(lab)
    }

    /// Creates an object or replaces it, as the API has it: a manifest with `apiVersion`, `kind`
    /// and `metadata`. Does not wait until nodes enforce it; see [`Lab::wait_enforced`]. Returns
    /// why it is not enforced as written; an object that cannot be decoded is an error.
    pub fn apply(&self, object: &Value) -> Result<Vec<String>> {
        let (kind, observed) = objects::observe(object)?;
        let problems = observed.problems.clone();
        if object["kind"] == "IPPool" {
            self.blocks.set_pool(
                &observed.key.name,
                Some(serde_json::from_value(object["spec"].clone())?),
            );
        }
        self.runtime
            .block_on(self.control.observe(kind, observed))?;
        Ok(problems)
    }

    /// Deletes the object of that `apiVersion`, `kind`, namespace and name. Does not wait.
    pub fn delete(&self, object: &Value) -> Result<()> {
        let (kind, key) = objects::identity(object)?;
        if object["kind"] == "IPPool" {
            self.blocks.set_pool(&key.name, None);
        }
        self.runtime.block_on(self.control.delete(kind, key))
    }

    /// Waits until every node with an agent has everything that was applied so far in its kernel,
    /// routes included.
    pub fn wait_enforced(&self) -> Result<()> {
        self.runtime.block_on(async {
            for node in self.nodes.values() {
                let waited =
                    tokio::time::timeout(PATIENCE, node.wait_enforced(&self.control)).await;
                waited.with_context(|| {
                    format!("{} does not enforce what it was sent", node.name)
                })??;
            }
            Ok(())
        })
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .get(name)
            .with_context(|| format!("no node is named {name}"))
    }

    /// Every node, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// A pod by `namespace/name`.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods
            .get(name)
            .with_context(|| format!("no pod is named {name}"))
    }

    /// Every pod, by name.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// IPAM storage.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// The network between the nodes.
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// Schedules a pod to a node and starts it: when this returns, it has an address and its policy
    /// is in force. `object` is its manifest; the namespace has to have been applied.
    pub fn add_pod(&mut self, node: &str, object: &Value) -> Result<&Pod> {
        let scheduled = pod::scheduled(object, node)?;
        self.apply(&scheduled)?;
        let pod = Pod::start(self.node(node)?, &scheduled)?;
        self.apply(&pod.object())?;
        let name = pod.name.clone();
        self.pods.insert(name.clone(), pod);
        self.pod(&name)
    }

    /// Gives a pod other labels.
    pub fn label_pod(&mut self, name: &str, labels: &Value) -> Result<()> {
        let pod = self
            .pods
            .get_mut(name)
            .with_context(|| format!("no pod is named {name}"))?;
        pod.manifest["metadata"]["labels"] = labels.clone();
        let object = pod.object();
        self.apply(&object).map(drop)
    }

    /// Stops a pod and deletes it.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let pod = self
            .pods
            .remove(name)
            .with_context(|| format!("no pod is named {name}"))?;
        pod.stop(self.node(&pod.node)?)?;
        self.delete(&pod.object())
    }

    /// Removes the network of a pod without a DEL, as a runtime does that ends pods while the agent
    /// is away. The object stays.
    pub fn lose_pod(&mut self, name: &str) -> Result<()> {
        self.pods
            .remove(name)
            .map(drop)
            .with_context(|| format!("no pod is named {name}"))
    }

    /// Ends the agent of a node as if it were killed. What it enforced stays in the kernel.
    pub fn stop_agent(&mut self, node: &str) -> Result<()> {
        let node = self
            .nodes
            .get_mut(node)
            .with_context(|| format!("no node is named {node}"))?;
        node.stop(&self.runtime)
    }

    /// Restarts the agent of a node on the state folder of its predecessor.
    pub fn start_agent(&mut self, node: &str) -> Result<()> {
        self.start_agent_at(node, self.control.address())
    }

    /// The same while typha is away: nothing listens at the address that the agent connects to.
    pub fn start_agent_alone(&mut self, node: &str) -> Result<()> {
        self.start_agent_at(node, NOBODY)
    }

    fn start_agent_at(&mut self, node: &str, server: SocketAddr) -> Result<()> {
        let Self {
            nodes,
            control,
            blocks,
            runtime,
            ..
        } = self;
        let node = nodes
            .get_mut(node)
            .with_context(|| format!("no node is named {node}"))?;
        node.start(runtime, control, server, blocks)
    }

    fn add_node(&mut self, number: u8) -> Result<()> {
        let mut node = self.fabric.join(number)?;
        self.apply(&node.object())?;
        node.start(
            &self.runtime,
            &self.control,
            self.control.address(),
            &self.blocks,
        )?;
        self.nodes.insert(node.name.clone(), node);
        Ok(())
    }

    /// Assigns every node an address for its tunnel, and reports it in the Node, as agents do with
    /// an API.
    fn claim_tunnels(&mut self) -> Result<()> {
        self.wait_enforced()?;
        let mut nodes = std::mem::take(&mut self.nodes);
        for node in nodes.values_mut() {
            node.claim_tunnel(&self.runtime)?;
            self.apply(&node.object())?;
        }
        self.nodes = nodes;
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in self.nodes.values_mut() {
            if let Err(error) = node.stop(&self.runtime) {
                tracing::warn!(
                    node = node.name,
                    error = format!("{error:#}"),
                    "an agent does not end"
                );
            }
        }
    }
}

/// Fails if nodes could not enforce something.
pub fn check_enforced(lab: &Lab) -> Result<()> {
    for node in lab.nodes() {
        let errors = node
            .status()
            .map(|status| status.errors)
            .unwrap_or_default();
        ensure!(
            errors.is_empty(),
            "{} does not enforce everything as it is written: {errors:?}",
            node.name
        );
    }
    Ok(())
}
