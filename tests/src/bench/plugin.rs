//! The CNI plugin's calls as the runtime makes them, and the API requests behind them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::cluster::Cluster;
use crate::cluster::node::Node;

/// Name of the plugin's program.
const PLUGIN: &str = "margay";
/// The shim beside it.
const SHIM: &str = "margay-shim";
/// Name of the flow schema whose requests are counted.
const SCHEMA: &str = "margay-bench";

/// The shim over a node's plugin.
#[derive(Debug)]
pub struct Shim {
    folder: PathBuf,
}

/// One call of the plugin.
#[derive(Debug, Clone)]
pub struct Call {
    /// Duration.
    pub took: Duration,
    /// CPU that it used.
    pub cpu: Duration,
    /// Its largest memory.
    pub kib: u64,
}

impl Shim {
    /// Lays the shim over the plugin. It is mounted there, in the runtime's mount namespace alone,
    /// because the agent restores a plugin that differs from its own.
    pub fn put(node: &Node, shim: &Path) -> Result<Self> {
        let own = Self {
            folder: node.folder.join("cni-bin"),
        };
        let (plugin, real) = (
            own.folder.join(PLUGIN),
            own.folder.join(PLUGIN).with_extension("real"),
        );
        let _ = std::fs::remove_file(own.log());
        if !real.exists() {
            std::fs::hard_link(&plugin, &real)
                .with_context(|| format!("no plugin {}", plugin.display()))?;
        }
        std::fs::copy(shim, own.folder.join(SHIM))
            .with_context(|| format!("{} is not built", shim.display()))?;
        node.exec(&["mount", "--bind", &on_node(SHIM), &on_node(PLUGIN)])?;
        Ok(own)
    }

    /// The first call so far with this command for each pod of the namespace; one that failed is an
    /// error. The runtime repeats DEL for pods that are gone, of which there is nothing left to
    /// measure.
    pub fn calls(&self, command: &str, namespace: &str) -> Result<Vec<Call>> {
        let text = std::fs::read_to_string(self.log()).context("the plugin was not called")?;
        let mut calls = BTreeMap::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [verb, pod, took, cpu, kib, code] = words[..] else {
                continue;
            };
            let is_of = |(own, _): (&str, &str)| own == namespace;
            if verb != command || !pod.split_once('/').is_some_and(is_of) {
                continue;
            }
            ensure!(code == "0", "{verb} of {pod} failed");
            calls.entry(pod).or_insert(Call {
                took: Duration::from_micros(took.parse()?),
                cpu: Duration::from_micros(cpu.parse()?),
                kib: kib.parse()?,
            });
        }
        ensure!(!calls.is_empty(), "no {command} was called");
        Ok(calls.into_values().collect())
    }

    /// Uncovers the plugin.
    pub fn remove(self, node: &Node) -> Result<()> {
        node.exec(&["umount", &on_node(PLUGIN)])
            .context("uncover the plugin")?;
        Ok(())
    }

    fn log(&self) -> PathBuf {
        self.folder.join("calls.log")
    }
}

/// Path of a program in the runtime's folder of plugins.
fn on_node(program: &str) -> String {
    format!("/opt/cni/bin/{program}")
}

/// Gives a service account a flow schema of its own, so that the API server's fairness metrics
/// count its requests.
pub fn count_requests(cluster: &Cluster, (namespace, name): (&str, &str)) -> Result<()> {
    let every = json!({
        "subjects": [{
            "kind": "ServiceAccount",
            "serviceAccount": {"namespace": namespace, "name": name},
        }],
        "resourceRules": [{
            "verbs": ["*"],
            "apiGroups": ["*"],
            "resources": ["*"],
            "namespaces": ["*"],
            "clusterScope": true,
        }],
        "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
    });
    let schema = json!({
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1", "kind": "FlowSchema", "metadata": {
            "name": SCHEMA,
        },
        "spec": {
            "priorityLevelConfiguration": {"name": "workload-low"}, "matchingPrecedence": 100,
            "distinguisherMethod": {"type": "ByUser"}, "rules": [every],
        },
    });
    let path = cluster.folder().join("flow-schema.json");
    std::fs::write(&path, schema.to_string())?;
    cluster
        .kubectl(&["apply", "--server-side", "-f", &path.display().to_string()])
        .map(|_| ())
}

/// Requests of the account so far.
pub fn requests(cluster: &Cluster) -> Result<f64> {
    let text = cluster.kubectl(&["get", "--raw", "/metrics"])?;
    let label = format!("flow_schema=\"{SCHEMA}\"");
    let own = |line: &&str| {
        line.starts_with("apiserver_flowcontrol_dispatched_requests_total{")
            && line.contains(&label)
    };
    let values = text
        .lines()
        .filter(own)
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
    Ok(values.sum())
}

/// Requests of the account, once there are no new ones.
pub fn requests_at_rest(cluster: &Cluster) -> Result<f64> {
    const REST: Duration = Duration::from_millis(500);
    const LIMIT: Duration = Duration::from_secs(15);
    let begin = Instant::now();
    let mut last = requests(cluster)?;
    while begin.elapsed() < LIMIT {
        std::thread::sleep(REST);
        let now = requests(cluster)?;
        if now == last {
            break;
        }
        last = now;
    }
    Ok(last)
}
