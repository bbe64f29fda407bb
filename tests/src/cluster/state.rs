//! State of a cluster on disk, so that any later process can manage it or take it down.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::ProxyMode;
use super::cgroup::Group;
use super::layout::Layout;
use super::process::Process;

/// The content of `cluster.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Names and addresses.
    pub layout: Layout,
    /// Folder of Kubernetes' programs.
    pub kube_bin: PathBuf,
    /// The harness's own program, which is process 1 of every node.
    pub tool: PathBuf,
    /// Port on 127.0.0.1 of the machine that leads to the API server.
    pub port: u16,
    /// The mode of kube-proxy.
    pub proxy: ProxyMode,
    /// True if the API server writes an audit log.
    pub audit: bool,
    /// Control group of each node.
    pub groups: BTreeMap<String, Group>,
    /// The process that brings the cluster up, as long as it does. When it has ended, what it left
    /// is of no use.
    pub starting: Option<Process>,
    /// Running processes, in the order in which they were started; process 1 of a node has the
    /// node's name.
    pub processes: Vec<Process>,
}

impl State {
    /// Reads the state of the cluster in `folder`; none when there is no cluster.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("cluster.json");
        if !path.exists() {
            return Ok(None);
        }
        let text =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text)
            .map(Some)
            .with_context(|| format!("{} is damaged", path.display()))
    }

    /// Writes the state, and what people and other programs read: `pids` and `env`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let pids: String = self
            .processes
            .iter()
            .map(|process| format!("{}\n", process.pid))
            .collect();
        replace(
            &folder.join("cluster.json"),
            &serde_json::to_string_pretty(self)?,
        )?;
        replace(&folder.join("pids"), &pids)?;
        replace(&folder.join("env"), &self.env(folder))
    }

    /// The process with that role.
    pub fn process(&self, role: &str) -> Option<&Process> {
        self.processes.iter().find(|process| process.role == role)
    }

    /// Replaces an earlier process of the same role.
    pub fn remember(&mut self, process: Process) {
        self.processes.retain(|other| other.role != process.role);
        self.processes.push(process);
    }

    fn env(&self, folder: &Path) -> String {
        let nodes: Vec<String> = self
            .layout
            .nodes
            .iter()
            .filter_map(|host| Some(format!("{}:{}", host.name, self.process(&host.name)?.pid)))
            .collect();
        let netns = self.layout.netns_path(&self.layout.control_plane().name);
        let variables = [
            (
                "KUBECONFIG",
                folder.join("admin.kubeconfig").display().to_string(),
            ),
            (
                "KUBECTL",
                self.kube_bin.join("kubectl").display().to_string(),
            ),
            ("NODES", nodes.join(" ")),
            ("STATE", folder.display().to_string()),
            ("CONTROL_PLANE_NETNS", netns.display().to_string()),
        ];
        variables
            .iter()
            .fold(String::new(), |mut text, (name, value)| {
                let _ = writeln!(text, "export {name}=\"{value}\"");
                text
            })
    }
}

/// Writes a file that appears whole or not at all.
fn replace(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text).with_context(|| format!("cannot write {}", new.display()))?;
    std::fs::rename(&new, path).with_context(|| format!("cannot write {}", path.display()))
}
