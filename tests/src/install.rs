//! Installs Margay as a user does: the image on every node, the two manifests applied, then waiting
//! until it is available.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};

use margay_api::storage::Mode;

use crate::cluster::{Cluster, process};
use crate::image::{Entry, Image};

/// The image that deploy/operator.yaml names.
pub const IMAGE: &str = concat!("margay.io/margay:v", env!("CARGO_PKG_VERSION"));
/// Namespaces of everything of ours.
pub const NAMESPACES: [&str; 2] = ["margay-operator", "margay-system"];
/// Time limit of an installation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Options of an installation.
#[derive(Debug, Clone)]
pub struct Options {
    /// `spec.calicoNetwork.ipPools[0].cidr`.
    pub cidr: String,
    /// `spec.calicoNetwork.ipPools[0].blockSize`; the usual one when absent.
    pub block_size: Option<u8>,
    /// `spec.calicoNetwork.ipPools[0].encapsulation`.
    pub encapsulation: String,
    /// Range and encapsulation of a pool of IPv6 beside it.
    pub ipv6: Option<(String, String)>,
    /// Storage of Calico's data that the cluster has.
    pub mode: Mode,
    /// True for one manifest without an Installation; the other options have no effect then.
    pub standalone: bool,
    /// Collector of traces as the nodes see it, `http://HOST:PORT`.
    pub collector: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cidr: "10.244.0.0/16".to_owned(),
            block_size: None,
            encapsulation: "VXLANCrossSubnet".to_owned(),
            ipv6: None,
            mode: Mode::V3,
            standalone: false,
            collector: None,
        }
    }
}

/// The folder of the checkout.
pub fn checkout() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// Writes the image of every component into `folder`, of programs that were built beside this one.
pub fn image(folder: &Path) -> Result<PathBuf> {
    image_of(&beside, folder)
}

/// The same, of programs that are found by their names.
pub fn image_of(find: &dyn Fn(&str) -> Result<PathBuf>, folder: &Path) -> Result<PathBuf> {
    let entries = ["margay", "margay-cni"]
        .iter()
        .map(|name| {
            Ok(Entry::File {
                source: strip(&find(name)?, folder)?,
                dest: (*name).into(),
            })
        })
        .collect::<Result<_>>()?;
    let archive = folder.join("margay.tar");
    let image = Image {
        name: IMAGE.to_owned(),
        entries,
        entrypoint: vec!["/margay".to_owned()],
    };
    image.write(&archive)?;
    Ok(archive)
}

/// A copy without symbols of a program that was built beside this one.
pub fn stripped(name: &str, folder: &Path) -> Result<PathBuf> {
    strip(&beside(name)?, folder)
}

/// A program that was built beside this one.
pub fn beside(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.exists());
    beside.with_context(|| {
        format!(
            "{name} is not beside {}; build it first: cargo build --bins",
            own.display()
        )
    })
}

fn strip(program: &Path, folder: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let copy = folder.join(format!("{name}.stripped"));
    process::run(Command::new("strip").arg("-o").arg(&copy).arg(program))?;
    Ok(copy)
}

/// Applies operator and Installation; the image has to be on the nodes. `progress` receives each
/// command before it runs.
pub fn apply(cluster: &Cluster, options: &Options, progress: &dyn Fn(&str)) -> Result<()> {
    let deploy = checkout().join("deploy");
    let path = |name: &str| deploy.join(name).display().to_string();
    let kubectl = |arguments: &[&str]| -> Result<()> {
        let prefix = format!("{}/", checkout().display());
        progress(&format!(
            "kubectl {}",
            arguments.join(" ").replace(&prefix, "")
        ));
        cluster.kubectl(arguments).map(|_| ())
    };
    if options.standalone {
        return kubectl(&["apply", "--server-side", "-f", &path("margay.yaml")]);
    }
    let manifest = match options.mode {
        Mode::V1 => "operator-v1.yaml",
        Mode::V3 => "operator.yaml",
    };
    kubectl(&["apply", "--server-side", "-f", &path(manifest)])?;
    kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd",
        "--all",
        "--timeout=60s",
    ])?;
    if let Some(collector) = &options.collector {
        kubectl(&[
            "set",
            "env",
            "-n",
            NAMESPACES[0],
            "deployment/margay-operator",
            &format!("OTEL_EXPORTER_OTLP_ENDPOINT={collector}"),
            "OTEL_BSP_SCHEDULE_DELAY=200",
        ])?;
        let limit = format!("--timeout={}s", PATIENCE.as_secs());
        kubectl(&[
            "rollout",
            "status",
            "-n",
            NAMESPACES[0],
            "deployment/margay-operator",
            &limit,
        ])?;
    }
    kubectl(&["apply", "-f", &installation(cluster, &deploy, options)?])
}

/// The user's sample as it is, or a copy with another pool.
fn installation(cluster: &Cluster, deploy: &Path, options: &Options) -> Result<String> {
    let sample = deploy.join("installation.yaml");
    let mut object: serde_json::Value =
        serde_yaml_ng::from_str(&std::fs::read_to_string(&sample)?)?;
    let pool = object
        .pointer_mut("/spec/calicoNetwork/ipPools/0")
        .context("deploy/installation.yaml has no pool")?;
    let wanted = [
        ("cidr", &options.cidr),
        ("encapsulation", &options.encapsulation),
    ];
    if options.block_size.is_none()
        && options.ipv6.is_none()
        && wanted
            .iter()
            .all(|(field, value)| pool[field] == value.as_str())
    {
        return Ok(sample.display().to_string());
    }
    for (field, value) in wanted {
        pool[field] = value.as_str().into();
    }
    if let Some(size) = options.block_size {
        pool["blockSize"] = size.into();
    }
    if let Some((cidr, encapsulation)) = &options.ipv6 {
        let pools = object
            .pointer_mut("/spec/calicoNetwork/ipPools")
            .and_then(|pools| pools.as_array_mut());
        let pool = serde_json::json!({
            "cidr": cidr,
            "encapsulation": encapsulation,
            "natOutgoing": "Enabled",
        });
        pools
            .context("deploy/installation.yaml has no pools")?
            .push(pool);
    }
    let copy = cluster.folder().join("installation.json");
    std::fs::write(&copy, serde_json::to_string_pretty(&object)?)?;
    Ok(copy.display().to_string())
}

/// Waits until every node is Ready and every pod of ours is too. `progress` receives events as they
/// happen; an error includes what a person would look at first.
pub fn wait(cluster: &Cluster, progress: &dyn Fn(&str)) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let wait = async {
        tokio::time::timeout(PATIENCE, watch(cluster, progress))
            .await
            .context("the time was up")?
    };
    runtime.block_on(wait).with_context(|| {
        format!(
            "Margay is not up on every node after {PATIENCE:?}\n{}",
            diagnosis(cluster)
        )
    })
}

/// Applies, and waits.
pub fn install(cluster: &Cluster, options: &Options, progress: &dyn Fn(&str)) -> Result<()> {
    apply(cluster, options, progress).with_context(|| diagnosis(cluster))?;
    wait(cluster, progress)
}

/// Change of an object whose state is awaited.
struct StateChange {
    name: String,
    place: String,
    ready: bool,
    gone: bool,
}

impl From<Node> for StateChange {
    fn from(node: Node) -> Self {
        Self {
            name: format!("node {}", node.name_any()),
            place: String::new(),
            ready: node_ready(&node),
            gone: false,
        }
    }
}

impl From<Pod> for StateChange {
    fn from(pod: Pod) -> Self {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
        Self {
            name: format!("pod {}", pod.name_any()),
            place: node.map(|node| format!(" on {node}")).unwrap_or_default(),
            ready: pod_ready(&pod),
            gone: pod.metadata.deletion_timestamp.is_some(),
        }
    }
}

/// Returns the change that an event is about, if it is about one object. The watcher itself
/// restarts a watch that fails.
fn seen<K: Into<StateChange>>(
    event: Result<watcher::Event<K>, watcher::Error>,
) -> Option<StateChange> {
    match event.ok()? {
        watcher::Event::Apply(object) | watcher::Event::InitApply(object) => Some(object.into()),
        watcher::Event::Delete(object) => Some(StateChange {
            gone: true,
            ..object.into()
        }),
        watcher::Event::Init | watcher::Event::InitDone => None,
    }
}

async fn watch(cluster: &Cluster, progress: &dyn Fn(&str)) -> Result<()> {
    let client = cluster.client().await?;
    let begin = Instant::now();
    let all = watcher::Config::default;
    let nodes = watcher(Api::<Node>::all(client.clone()), all()).default_backoff();
    let mut streams = vec![nodes.map(seen).boxed()];
    for namespace in NAMESPACES {
        let pods = Api::<Pod>::namespaced(client.clone(), namespace);
        streams.push(watcher(pods, all()).default_backoff().map(seen).boxed());
    }
    let mut events = futures::stream::select_all(streams);
    let mut state: BTreeMap<String, bool> = BTreeMap::new();
    let wanted = cluster.layout().nodes.len();
    while let Some(event) = events.next().await {
        let Some(change) = event else { continue };
        if change.gone {
            state.remove(&change.name);
        } else if state.insert(change.name.clone(), change.ready) != Some(change.ready)
            && change.ready
        {
            progress(&format!(
                "{:5.1} s  {}{} is Ready",
                begin.elapsed().as_secs_f32(),
                change.name,
                change.place
            ));
        }
        let count = |prefix: &str| {
            state
                .iter()
                .filter(|(name, ready)| name.starts_with(prefix) && **ready)
                .count()
        };
        let complete = count("node ") == wanted
            && count("pod margay-node-") == wanted
            && count("pod margay-typha-") > 0
            && state.values().all(|ready| *ready);
        if complete {
            return Ok(());
        }
    }
    anyhow::bail!("the watch ended")
}

/// Returns whether a node is Ready.
pub fn node_ready(node: &Node) -> bool {
    let conditions = node
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| {
        all.iter()
            .any(|one| one.type_ == "Ready" && one.status == "True")
    })
}

/// Returns whether a pod is Ready.
pub fn pod_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| {
        all.iter()
            .any(|one| one.type_ == "Ready" && one.status == "True")
    })
}

/// Returns what a person would look at first when an installation does not come up.
pub fn diagnosis(cluster: &Cluster) -> String {
    const LINES: usize = 40;
    let mut text = String::new();
    let mut look = |arguments: &[&str]| {
        let output = cluster
            .kubectl(arguments)
            .unwrap_or_else(|error| format!("{error:#}"));
        let lines: Vec<&str> = output.lines().collect();
        let last = lines[lines.len().saturating_sub(LINES)..].join("\n");
        text += &format!("--- kubectl {}\n{last}\n", arguments.join(" "));
    };
    look(&["get", "nodes", "-o", "wide"]);
    look(&["get", "pods", "-A", "-o", "wide"]);
    look(&["get", "installation,tigerastatus", "-o", "yaml"]);
    for namespace in NAMESPACES {
        look(&["get", "events", "-n", namespace, "--sort-by=.lastTimestamp"]);
    }
    look(&["logs", "-n", NAMESPACES[0], "deployment/margay-operator"]);
    for (workload, init) in [
        ("deployment/margay-typha", false),
        ("daemonset/margay-node", true),
    ] {
        let mut arguments = vec!["logs", "-n", NAMESPACES[1], workload, "--prefix"];
        if init {
            arguments.extend(["--all-containers", "--all-pods"]);
        }
        look(&arguments);
    }
    text
}

/// Pids of a component's processes on a node: `node`, `typha` or `operator`. Components are in the
/// network of their node, which distinguishes them from those of another cluster on this machine.
pub fn processes(node: &crate::cluster::node::Node, component: &str) -> Vec<i32> {
    running(node, &["/margay", component])
}

/// Pids of processes in the network of a node whose command line begins so.
fn running(node: &crate::cluster::node::Node, command: &[&str]) -> Vec<i32> {
    let network = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let own = network(node.process.pid);
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            command
                .iter()
                .enumerate()
                .all(|(index, word)| words.get(index) == Some(&word.as_bytes()))
        })
        .filter(|pid| network(*pid) == own)
        .collect()
}

/// Port of typha's admin server, on its node's loopback.
pub const TYPHA_ADMIN: u16 = 9098;

/// The value of a metric, summed over its labels, from an admin server on a node's loopback.
pub fn metric(node: &crate::cluster::node::Node, port: u16, name: &str) -> Result<f64> {
    let url = format!("http://127.0.0.1:{port}/metrics");
    let text = node.exec(&["busybox", "wget", "-q", "-O", "-", &url])?;
    let values = text.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let own = series.split('{').next() == Some(name);
        own.then(|| value.parse::<f64>().ok())?
    });
    let values: Vec<f64> = values.collect();
    ensure!(
        !values.is_empty(),
        "no metric {name} at {url} of {}",
        node.host.name
    );
    Ok(values.iter().sum())
}

/// Kills a component on a node with SIGKILL, and waits until its successor runs.
pub fn kill(node: &crate::cluster::node::Node, component: &str) -> Result<()> {
    restart(node, &["/margay", component])
}

/// The same for the node's kubelet, which its init system starts again.
pub fn restart_kubelet(node: &crate::cluster::node::Node) -> Result<()> {
    restart(node, &["/margay/bin/kubelet"])
}

fn restart(node: &crate::cluster::node::Node, command: &[&str]) -> Result<()> {
    let (old, name) = (running(node, command), command.join(" "));
    ensure!(!old.is_empty(), "no {name} runs on {}", node.host.name);
    for pid in &old {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(*pid),
            nix::sys::signal::Signal::SIGKILL,
        )?;
    }
    process::wait_for(
        PATIENCE,
        || format!("a new {name} on {}", node.host.name),
        || running(node, command).iter().any(|pid| !old.contains(pid)),
    )
}

/// Fails unless the installation's own status agrees that it is available.
pub fn check_status(cluster: &Cluster) -> Result<()> {
    let path = r#"jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Available")].status}{"\n"}{end}"#;
    let text = cluster.kubectl(&["get", "tigerastatus", "-o", path])?;
    ensure!(!text.trim().is_empty(), "no TigeraStatus exists");
    ensure!(
        text.lines().all(|line| line.ends_with(" True")),
        "not available:\n{text}"
    );
    Ok(())
}
