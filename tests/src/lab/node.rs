//! A node: a network namespace, and an agent in it that starts, ends as if killed, and restarts.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use margay_api::meta::{
    ANNOTATION_NODE_IPV4, ANNOTATION_NODE_IPV6, ANNOTATION_VXLAN_IPV4, ANNOTATION_VXLAN_IPV6,
    ANNOTATION_VXLAN_MAC, ANNOTATION_VXLAN_MAC_V6,
};
use margay_api::network::TunnelKind;
use margay_api::rule::IpVersion;
use margay_calc::model::{Record, RecordId};
use margay_dataplane::nftables::{Netfilter, Nftables};
use margay_dataplane::routes::addresses::AddressWatch;
use margay_dataplane::routes::learned::has_routes_of_ours;
use margay_dataplane::routes::plan::{LocalPods, Plan};
use margay_dataplane::routes::worker::{Network, Progress};
use margay_ipam::addresses::NodeAddresses;
use margay_netlink::route::RouteSocket;
use margay_node::agent::{self, AgentHandle, Routes, Status, watch_drift, watch_links};
use margay_node::bgp::metrics::BgpMetrics;
use margay_node::bgp::passwords::{SecretSource, SecretState};
use margay_node::bgp::report::BgpReport;
use margay_node::bgp::{self, BgpParts};
use margay_node::cni::attachment::{Attachment, Attachments};
use margay_node::cni::ports::Announcer;
use margay_node::metrics::Metrics;
use margay_node::pods::{self, Dependencies, Settings};
use margay_node::problems::Problems;
use margay_node::store::ViewStore;
use margay_node::upstream::Upstream;
use margay_node::upstream::notices::Notices;
use margay_proto::sync::NodeProblem;
use margay_runtime::backoff::jitter;
use margay_runtime::shutdown::Shutdown;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::PATIENCE;
use super::control::Control;
use super::storage::Blocks;
use crate::namespace::Namespace;

/// A node, and its agent if it runs.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its network.
    pub host: Namespace,
    /// Its address with that of its subnet.
    pub address: IpNet,
    /// Folder of its agent's state and of the CNI socket.
    folder: TempDir,
    /// Address of its tunnel, once claimed.
    tunnel: Option<String>,
    running: Option<Running>,
}

/// A running agent.
struct Running {
    /// All its threads are in the node's namespace.
    runtime: Runtime,
    agent: AgentHandle,
    /// Ends with the agent's thread.
    fatal: oneshot::Receiver<agent::RetriesExhausted>,
    network: Network,
    /// Generation of the newest plan of routes.
    planned: Arc<AtomicU64>,
    addresses: NodeAddresses,
    problems: Problems,
    sessions: watch::Receiver<Option<BgpReport>>,
    upstream: JoinHandle<()>,
}

/// Parts that are created on a thread in the node's namespace.
struct Made {
    agent: AgentHandle,
    fatal: oneshot::Receiver<agent::RetriesExhausted>,
    network: Network,
    planned: Arc<AtomicU64>,
    addresses: NodeAddresses,
    sessions: watch::Receiver<Option<BgpReport>>,
}

impl Node {
    /// A node whose agent does not run yet.
    pub(super) fn new(name: String, host: Namespace, address: IpNet) -> Result<Self> {
        Ok(Self {
            name,
            host,
            address,
            folder: TempDir::new()?,
            tunnel: None,
            running: None,
        })
    }

    /// The Node object, with the annotations that its agent would have written.
    pub fn object(&self) -> Value {
        let [own, inner, mac] = match self.version() {
            IpVersion::V4 => [
                ANNOTATION_NODE_IPV4,
                ANNOTATION_VXLAN_IPV4,
                ANNOTATION_VXLAN_MAC,
            ],
            IpVersion::V6 => [
                ANNOTATION_NODE_IPV6,
                ANNOTATION_VXLAN_IPV6,
                ANNOTATION_VXLAN_MAC_V6,
            ],
        };
        let mut annotations = json!({own: self.address.to_string()});
        if let Some(tunnel) = &self.tunnel {
            annotations[inner] = json!(tunnel);
            annotations[mac] = json!(format!("66:00:{}", mac_tail(self.address)));
        }
        let labels = json!({"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux"});
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.name, "labels": labels, "annotations": annotations},
            "status": {"addresses": [{"type": "InternalIP", "address": self.address.addr()}]},
        })
    }

    fn version(&self) -> IpVersion {
        IpVersion::of(self.address.addr())
    }

    /// Path of the CNI socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("run/cni.sock")
    }

    /// Folder of its agent's state.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Names of the files of what its agent knows of pods' interfaces.
    pub fn attachments(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(self.folder.path().join("attachments"))?;
        let mut names = entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    /// Progress of its agent; none: it does not run.
    pub fn status(&self) -> Option<Status> {
        self.running.as_ref().map(|running| running.agent.status())
    }

    /// Problems that its agent reports.
    pub fn problems(&self) -> Vec<NodeProblem> {
        self.running
            .as_ref()
            .map(|running| running.problems.list())
            .unwrap_or_default()
    }

    /// State of its BGP speaker; none: it has none, or no agent runs.
    pub fn bgp(&self) -> Option<BgpReport> {
        self.running
            .as_ref()
            .and_then(|running| running.sessions.borrow().clone())
    }

    /// Its agent.
    pub fn agent(&self) -> Result<&AgentHandle> {
        self.running
            .as_ref()
            .map(|running| &running.agent)
            .with_context(|| format!("{} has no agent", self.name))
    }

    /// Table in its kernel, as `nft` prints it.
    pub fn ruleset(&self) -> Result<String> {
        self.host
            .command("nft", &["-n", "list", "table", "inet", "margay"], "")
    }

    /// The view that its agent has saved last; empty: none.
    pub fn saved(&self) -> BTreeMap<RecordId, Record> {
        ViewStore::new(self.folder.path()).load()
    }

    /// `server` is where its agent looks for typha.
    pub(super) fn start(
        &mut self,
        main: &Runtime,
        control: &Control,
        server: SocketAddr,
        blocks: &Blocks,
    ) -> Result<()> {
        if self.running.is_some() {
            bail!("the agent of {} runs already", self.name);
        }
        // Threads begin in the namespace of the thread that starts them.
        let runtime = self.host.run(|| {
            Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
        })?;
        let (notices, problems) = (Notices::default(), Problems::default());
        let settings = Settings {
            node: self.name.clone(),
            addresses: self
                .address
                .addr()
                .to_string()
                .parse()
                .map_err(anyhow::Error::msg)?,
            run_dir: self.folder.path().join("run"),
            policy_timeout: PATIENCE,
            mtu: 0,
            problems: problems.clone(),
        };
        let folder = self.folder.path().to_owned();
        let making = runtime.spawn(make(
            settings,
            folder,
            blocks.clone(),
            notices.clone(),
            main.handle().clone(),
        ));
        let Made {
            agent,
            fatal,
            network,
            planned,
            addresses,
            sessions,
        } = main.block_on(making)??;
        let upstream = Upstream {
            connector: control.connector(&self.name, server)?,
            server: server.to_string(),
            agent: agent.clone(),
            notices,
            problems: problems.clone(),
            jitter,
        };
        let upstream = main.spawn(upstream.run(Shutdown::default()));
        self.running = Some(Running {
            runtime,
            agent,
            fatal,
            network,
            planned,
            addresses,
            problems,
            sessions,
            upstream,
        });
        Ok(())
    }

    /// Ends the agent as if it were killed; a success when it does not run.
    pub(super) fn stop(&mut self, main: &Runtime) -> Result<()> {
        let Some(Running {
            runtime,
            agent,
            fatal,
            network,
            addresses,
            upstream,
            planned: _,
            problems: _,
            sessions: _,
        }) = self.running.take()
        else {
            return Ok(());
        };
        upstream.abort();
        main.block_on(async {
            // It ends as aborted.
            let _ = upstream.await;
        });
        drop((agent, network, addresses));
        runtime.shutdown_timeout(PATIENCE);
        match main.block_on(async { tokio::time::timeout(PATIENCE, fatal).await }) {
            Err(_) => bail!("the agent of {} does not end", self.name),
            Ok(Ok(fatal)) => bail!("the agent of {} had ended: {fatal}", self.name),
            Ok(Err(_)) => Ok(()),
        }
    }

    pub(super) async fn wait_enforced(&self, control: &Control) -> Result<()> {
        let Some(running) = &self.running else {
            return Ok(());
        };
        let mut acks = running.agent.acks();
        loop {
            running.agent.wait_in_sync().await;
            let sent = control.sent(&self.name).await?;
            let committed = acks
                .wait_for(|ack| {
                    ack.as_ref()
                        .is_some_and(|ack| ack.revision >= sent.revision)
                })
                .await;
            committed.with_context(|| format!("the agent of {} has ended", self.name))?;
            if sent.pending == 0 {
                break;
            }
        }
        let progress = running
            .network
            .wait_applied(running.planned.load(Ordering::SeqCst))
            .await;
        if !progress.failed.is_empty() {
            bail!(
                "routes of {} are not as wanted: {:?}",
                self.name,
                progress.failed
            );
        }
        Ok(())
    }

    pub(super) fn claim_tunnel(&mut self, main: &Runtime) -> Result<()> {
        let running = self
            .running
            .as_ref()
            .with_context(|| format!("{} has no agent", self.name))?;
        let addresses = running.addresses.clone();
        let kind = TunnelKind::Vxlan(self.version());
        let claimed = main.block_on(
            running
                .runtime
                .spawn(async move { addresses.tunnel(kind).await }),
        )??;
        self.tunnel = claimed.first().map(|net| net.addr().to_string());
        Ok(())
    }
}

/// Makes what a node runs, in the order in which its parts need each other. The agent's thread has
/// its timers from `timers`, which outlive the node's runtime: the thread ends when the tasks of
/// that one are gone, and their handles with them.
async fn make(
    settings: Settings,
    folder: PathBuf,
    blocks: Blocks,
    notices: Notices,
    timers: Handle,
) -> Result<Made> {
    let attachments = Attachments::load(&folder.join("attachments"))?;
    let store = ViewStore::new(&folder);
    let mut kernel = Netfilter::open()?;
    let table = kernel.watch()?;
    let had_routes = has_routes_of_ours(&mut RouteSocket::open()?)?;
    let network = Network::spawn()?;
    let (bgp, bgp_inputs) = watch::channel(None);
    let (report, sessions) = watch::channel(None);
    tokio::spawn(bgp::run(BgpParts {
        inputs: bgp_inputs,
        routes: network.learned(),
        secrets: LabSecrets,
        problems: settings.problems.clone(),
        metrics: BgpMetrics::default(),
        report,
        had_routes,
        jitter,
    }));
    let planned = Arc::new(AtomicU64::new(0));
    let mut interfaces = AddressWatch::open()?;
    let links = interfaces.read()?;
    let parts = agent::AgentParts {
        node: settings.node.clone(),
        view: store.load(),
        attached: pods::load_attached(&attachments)?,
        links: links.clone(),
        dataplane: Box::new(Nftables::new(&settings.node, Box::new(kernel))),
        routes: Some(Box::new(Planner {
            network: network.clone(),
            planned: planned.clone(),
        })),
        bgp,
        store: Some(store),
        metrics: Metrics::new(&mut Default::default()),
    };
    let (agent, fatal) = {
        let _entered = timers.enter();
        agent::spawn(parts)?
    };
    watch_drift(table, agent.clone())?;
    watch_links(interfaces, links, agent.clone(), |_| ())?;
    let ports: Dependencies<Blocks, _, _> = Dependencies {
        store: Arc::new(blocks.clone()),
        pools: |labels| blocks.pools(labels),
        limits: blocks.limits(),
        announcer: Nobody,
    };
    let pods = pods::start(settings, ports, agent.clone(), attachments, notices)?;
    Ok(Made {
        agent,
        fatal,
        network,
        planned,
        addresses: pods.addresses,
        sessions,
    })
}

/// Remembers which plan is the newest.
struct Planner {
    network: Network,
    planned: Arc<AtomicU64>,
}

impl Routes for Planner {
    fn set_plan(&mut self, plan: Plan) -> u64 {
        let generation = self.network.set_plan(plan);
        self.planned.store(generation, Ordering::SeqCst);
        generation
    }

    fn set_pods(&mut self, pods: LocalPods) -> u64 {
        let generation = self.network.set_pods(pods);
        self.planned.store(generation, Ordering::SeqCst);
        generation
    }

    fn progress(&self) -> watch::Receiver<Progress> {
        self.network.watch()
    }
}

/// Nobody has passwords here.
struct LabSecrets;

impl SecretSource for LabSecrets {
    fn follow(&self, _: &str) -> watch::Receiver<SecretState> {
        watch::channel(Some(Err("it does not exist".to_owned()))).1
    }
}

/// Pods' annotations are written by the lab, which has the answer of the plugin.
struct Nobody;

impl Announcer for Nobody {
    fn announce(&self, _: &Attachment) {}

    fn withdraw(&self, _: &Attachment) {}
}

/// End of a MAC address: the bytes of an address that differ between nodes.
fn mac_tail(address: IpNet) -> String {
    let bytes = match address.addr() {
        IpAddr::V4(address) => address.octets(),
        // Subnet and number: see the addresses of the fabric.
        IpAddr::V6(address) => {
            let [.., subnet, _, _, _, number] = address.segments();
            ((u32::from(subnet) << 16) | u32::from(number)).to_be_bytes()
        }
    };
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}
