//! A real Kubernetes on one machine: every part of it, built from its source modules.
//!
//! A node is a set of namespaces whose process 1 runs containerd, kube-proxy and kubelet; killing
//! that process is like a power failure of the node. The control plane runs in a network namespace
//! of its own, and a port on 127.0.0.1 leads to it. No network plugin is installed: nodes stay
//! NotReady until somebody brings one.
//!
//! Reading order: [`layout`] (names and addresses), [`fabric`] (the network between machines),
//! [`control`], [`node`] (a node from outside), [`init`] (from inside), [`state`] (what is
//! remembered on disk).

pub mod binaries;
pub mod cgroup;
pub mod control;
pub mod fabric;
pub mod forward;
pub mod images;
pub mod init;
pub mod layout;
pub mod node;
pub mod pki;
pub mod preflight;
pub mod process;
pub mod state;
mod steps;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde::{Deserialize, Serialize};

use self::cgroup::Group;
use self::layout::{Layout, Topology};
use self::node::Node;
use self::pki::Pki;
use self::process::Process;
use self::state::State;
use self::steps::{clear, empty};

/// Options of a cluster.
#[derive(Debug, Clone)]
pub struct Options {
    /// Prefix of its namespaces; two clusters at a time need two names.
    pub name: String,
    /// Number of nodes.
    pub nodes: u8,
    /// Topology.
    pub topology: Topology,
    /// True if machines, Services and pods have IPv6 addresses beside IPv4 ones.
    pub dual_stack: bool,
    /// Folder of everything the cluster writes; made when missing, emptied when used before.
    pub state: PathBuf,
    /// Image archives that every node has before its kubelet starts.
    pub images: Vec<PathBuf>,
    /// Mode of kube-proxy.
    pub proxy: ProxyMode,
    /// True if the API server writes `logs/audit.log`.
    pub audit: bool,
    /// True if the conformance suite is built too.
    pub suite: bool,
}

/// A mode of kube-proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// A table of nftables.
    Nftables,
    /// Chains of iptables, which are in nftables too where iptables is iptables-nft. The default.
    Iptables,
    /// Virtual servers of the kernel.
    Ipvs,
}

impl ProxyMode {
    /// The value of kube-proxy's flag.
    pub const fn flag(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "margay".into(),
            nodes: 3,
            topology: Topology::Routed,
            dual_stack: false,
            state: "target/cluster".into(),
            images: Vec::new(),
            proxy: ProxyMode::Nftables,
            audit: false,
            suite: false,
        }
    }
}

/// A running cluster. It is taken down when dropped, unless [`keep`](Self::keep) was called.
#[derive(Debug)]
pub struct Cluster {
    folder: PathBuf,
    state: State,
    owned: bool,
}

/// Time limit for a killed process to end, with its children.
const ENDING: Duration = Duration::from_secs(30);

// -- from nothing to a running cluster, and back

impl Cluster {
    /// Brings a cluster up and waits until every node is registered. `progress` receives lines for
    /// people.
    pub fn up(options: &Options, progress: &dyn Fn(&str)) -> Result<Self> {
        let layout = Layout::new(&options.name, options.nodes, options.topology)?;
        let layout = if options.dual_stack {
            layout.with_ipv6()
        } else {
            layout
        };
        std::fs::create_dir_all(&options.state)
            .with_context(|| format!("cannot make {}", options.state.display()))?;
        let folder = std::fs::canonicalize(&options.state)?;
        preflight::check(&folder, progress)?;
        clear(&folder, &layout)?;
        let kube_bin = binaries::ensure_built(options.suite, progress)?;
        let tool = tool()?;
        std::fs::create_dir_all(folder.join("logs"))?;
        let cache = binaries::cache()?.join("images");
        images::provide(
            &folder.join("images"),
            &cache,
            &tool,
            &kube_bin,
            &options.images,
        )?;

        let begin = Instant::now();
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let group =
            |host: &layout::Host| Ok((host.name.clone(), Group::plan(&layout.netns(&host.name))?));
        let groups = layout.nodes.iter().map(group).collect::<Result<_>>()?;
        let port = listener.local_addr()?.port();
        let state = State {
            layout,
            kube_bin,
            tool,
            port,
            proxy: options.proxy,
            audit: options.audit,
            groups,
            starting: Some(Process::current()?),
            processes: Vec::new(),
        };
        // From here on, an error takes down what exists.
        let mut cluster = Self {
            folder,
            state,
            owned: true,
        };
        cluster.save()?;
        cluster
            .start(listener)
            .with_context(|| format!("logs are in {}", cluster.folder.join("logs").display()))?;
        cluster.state.starting = None;
        cluster.save()?;
        progress(&format!(
            "{} nodes registered {:.1} s after the start",
            options.nodes,
            begin.elapsed().as_secs_f32()
        ));
        Ok(cluster)
    }

    /// Returns whether a state folder has a cluster, or what is left of one.
    pub fn exists(folder: &Path) -> bool {
        folder.join("cluster.json").exists()
    }

    /// The cluster in a state folder, brought up by another process. Dropping it leaves it running.
    pub fn attach(folder: &Path) -> Result<Self> {
        let folder = std::fs::canonicalize(folder)
            .with_context(|| format!("no folder {}", folder.display()))?;
        let state =
            State::load(&folder)?.with_context(|| format!("no cluster in {}", folder.display()))?;
        Ok(Self {
            folder,
            state,
            owned: false,
        })
    }

    /// Leaves the cluster running when this handle is dropped.
    pub fn keep(mut self) -> Self {
        self.owned = false;
        self
    }

    /// Ends every process, and removes every namespace, control group and file of the cluster
    /// except its logs.
    pub fn down(mut self) -> Result<()> {
        self.owned = false;
        self.take_down()
    }

    fn start(&mut self, listener: TcpListener) -> Result<()> {
        let layout = self.state.layout.clone();
        let pki = Pki::create(&self.folder.join("pki"))?;
        control::credentials(&pki, &layout, &self.folder, self.state.port)?;
        std::fs::write(control::audit_policy(&self.folder), control::AUDIT_POLICY)?;
        fabric::create(&layout)?;
        self.start_forward(listener)?;
        self.start_control("etcd")?;
        self.start_control("apiserver")?;
        for host in &layout.nodes {
            node::prepare(&self.folder, &layout, host, &pki)?;
            self.start_node(host)?;
        }
        self.wait_for_api()?;
        self.start_control("controller-manager")?;
        self.start_control("scheduler")?;
        self.wait_for_nodes()
    }

    fn take_down(&mut self) -> Result<()> {
        // Nodes first: what runs in them is ended by the kernel, and would otherwise complain about
        // a missing server.
        let mut processes = self.state.processes.clone();
        processes.reverse();
        processes.extend(process::marked(&self.folder));
        processes.iter().for_each(Process::kill);
        // An error in one step must not prevent the next.
        let ended = processes.iter().map(|process| process.gone(ENDING));
        let network = std::iter::once_with(|| fabric::remove(&self.state.layout));
        let groups = self.state.groups.values().map(Group::remove);
        let steps: Vec<Result<()>> = ended.chain(network).chain(groups).collect();
        steps.into_iter().collect::<Result<()>>()?;
        empty(&self.folder, &["logs"])
    }

    fn save(&self) -> Result<()> {
        self.state.save(&self.folder)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = self.take_down()
        {
            eprintln!(
                "cluster {} is not completely down: {error:#}",
                self.state.layout.name
            );
        }
    }
}

// -- using it

impl Cluster {
    /// The state folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names and addresses.
    pub fn layout(&self) -> &Layout {
        &self.state.layout
    }

    /// A kubeconfig of an administrator, usable on this machine.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("admin.kubeconfig")
    }

    /// The folder of Kubernetes' programs.
    pub fn kube_bin(&self) -> &Path {
        &self.state.kube_bin
    }

    /// Runs kubectl as administrator and returns what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.state.kube_bin.join("kubectl"));
        process::run(
            command
                .args(arguments)
                .env("KUBECONFIG", self.kubeconfig())
                .current_dir(&self.folder),
        )
    }

    /// A client of the API server, as administrator.
    pub async fn client(&self) -> Result<kube::Client> {
        client(&self.kubeconfig()).await
    }

    /// Every node, `n1` first.
    pub fn nodes(&self) -> Result<Vec<Node>> {
        self.state
            .layout
            .nodes
            .iter()
            .map(|host| self.node(&host.name))
            .collect()
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<Node> {
        let process = self
            .state
            .process(name)
            .with_context(|| format!("node `{name}` does not run"))?
            .clone();
        Ok(Node {
            host: self.host(name)?,
            process,
            folder: self.folder.join(name),
        })
    }

    /// A command in the control plane's network, which sees nodes and pods as a machine beside them
    /// does.
    pub fn control_plane_command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.state.layout.netns("cp"), program]);
        command
    }

    /// Imports an image archive on every node.
    pub fn load(&self, archive: &Path) -> Result<()> {
        let nodes = self.nodes()?;
        std::thread::scope(|scope| {
            let imports: Vec<_> = nodes
                .iter()
                .map(|node| scope.spawn(|| node.load(archive)))
                .collect();
            let join = |import: std::thread::ScopedJoinHandle<'_, Result<()>>| {
                import
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            imports.into_iter().try_for_each(join)
        })
    }

    /// Powers a node off: everything on it ends at once, and its kernel forgets its network.
    pub fn power_off(&mut self, name: &str) -> Result<()> {
        let host = self.host(name)?;
        if let Some(process) = self.state.process(name) {
            process.kill();
            process.gone(ENDING)?;
        }
        self.state.processes.retain(|process| process.role != name);
        self.save()?;
        // A machine forgets its control groups too; kubelet fails on containers of which only the
        // group is left.
        if let Some(group) = self.state.groups.get(name) {
            group.remove()?;
        }
        fabric::detach(&self.state.layout, &host)
    }

    /// Starts a node that was [powered off](Self::power_off). Its disk is as it was.
    pub fn power_on(&mut self, name: &str) -> Result<()> {
        let host = self.host(name)?;
        ensure!(self.state.process(name).is_none(), "node `{name}` is on");
        fabric::attach(&self.state.layout, &host)?;
        self.start_node(&host)
    }

    /// Powers a node off and starts it again.
    pub fn reboot(&mut self, name: &str) -> Result<()> {
        self.power_off(name)?;
        self.power_on(name)
    }

    /// Kills the API server.
    pub fn stop_apiserver(&mut self) -> Result<()> {
        let process = self
            .state
            .process("apiserver")
            .context("the API server does not run")?;
        process.kill();
        process.gone(ENDING)
    }

    /// Starts the API server after [`stop_apiserver`](Self::stop_apiserver) and waits until it
    /// answers.
    pub fn start_apiserver(&mut self) -> Result<()> {
        self.start_control("apiserver")?;
        self.wait_for_nodes()
    }

    /// Kills the API server, starts it again and waits until it answers.
    pub fn restart_apiserver(&mut self) -> Result<()> {
        self.stop_apiserver()?;
        self.start_apiserver()
    }

    fn host(&self, name: &str) -> Result<layout::Host> {
        let host = self
            .state
            .layout
            .nodes
            .iter()
            .find(|host| host.name == name);
        Ok(host
            .with_context(|| format!("no node is named `{name}`"))?
            .clone())
    }
}

async fn client(kubeconfig: &Path) -> Result<kube::Client> {
    let file = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    Ok(kube::Client::try_from(config)?)
}

/// The program whose subcommands are process 1 of nodes and the way to the API server: this one, or
/// the one that was built beside this test.
fn tool() -> Result<PathBuf> {
    const NAME: &str = "margay-cluster";
    let own = std::env::current_exe()?;
    if own.file_name().is_some_and(|name| name == NAME) {
        return Ok(own);
    }
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(NAME))
        .find(|path| path.exists());
    found.with_context(|| {
        format!(
            "{NAME} is not beside {}; build it with cargo build -p margay-tests",
            own.display()
        )
    })
}
