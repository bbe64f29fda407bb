//! A node as the machine sees it: its files, and how it is started, entered and ended.

use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::ProxyMode;
use super::cgroup::Group;
use super::images::PAUSE;
use super::layout::{API_PORT, Host, Layout};
use super::pki::{Pki, Subject};
use super::process::{self, Place, Process};
use super::state::State;

/// Folders every node has from the start; the last ones are filled by its first mounts.
const FOLDERS: [&str; 21] = [
    "etc/cni/net.d",
    "etc/kubernetes",
    "home",
    "mnt",
    "opt/cni/bin",
    "root",
    "srv",
    "var/cache",
    "var/lib/calico",
    "var/lib/containerd",
    "var/lib/kubelet",
    "var/log/containers",
    "var/log/pods",
    "var/tmp",
    "dev",
    "proc",
    "run",
    "sys",
    "tmp",
    "margay/bin",
    "margay/images",
];

/// Parameters of process 1 of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// Name and address.
    pub host: Host,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its control group.
    pub group: Group,
    /// Folder that becomes `/` of the node.
    pub root: PathBuf,
    /// Folder of the programs, `/margay/bin` of the node.
    pub kube_bin: PathBuf,
    /// Folder of image archives that are imported at start, `/margay/images` of the node.
    pub images: PathBuf,
    /// Folder of logs.
    pub logs: PathBuf,
    /// The API server.
    pub api: SocketAddr,
    /// The mode of kube-proxy.
    pub proxy: ProxyMode,
}

/// A node that runs.
#[derive(Debug, Clone)]
pub struct Node {
    /// Name and address.
    pub host: Host,
    /// Process 1.
    pub process: Process,
    /// Its folder in the state folder; `root` in it is the node's file system.
    pub folder: PathBuf,
}

impl Node {
    /// A command that runs in all namespaces of the node, below its `/`.
    pub fn command(&self, program: &str) -> Command {
        self.enter(&["-m", "-u", "-i", "-n", "-p", "-C"], program)
    }

    /// A command that runs in the node's network but sees the machine's files.
    pub fn net_command(&self, program: &str) -> Command {
        self.enter(&["-n"], program)
    }

    /// Runs a command in all namespaces of the node and returns what it printed.
    pub fn exec(&self, arguments: &[&str]) -> Result<String> {
        let (program, rest) = arguments
            .split_first()
            .context("a command to run in the node")?;
        process::run(self.command(program).args(rest))
    }

    /// Imports an image archive.
    pub fn load(&self, archive: &Path) -> Result<()> {
        let file = std::fs::File::open(archive)
            .with_context(|| format!("cannot read {}", archive.display()))?;
        let mut ctr = self.command("/margay/bin/ctr");
        process::run(
            ctr.args(["-n", "k8s.io", "images", "import", "-"])
                .stdin(file),
        )?;
        Ok(())
    }

    fn enter(&self, namespaces: &[&str], program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.process.pid.to_string()])
            .args(namespaces)
            .args(["--", program]);
        command.env(
            "PATH",
            "/margay/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
        command
    }
}

/// Writes a node's files: the skeleton of its file system, configuration and credentials.
pub fn prepare(state: &Path, layout: &Layout, host: &Host, pki: &Pki) -> Result<()> {
    let folder = state.join(&host.name);
    let root = folder.join("root");
    for path in FOLDERS {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(root.join(path))?;
    }
    symlink("/run", root.join("var/run"))?;
    symlink("/run/lock", root.join("var/lock"))?;
    // Other programs look for these two beside the node's other files.
    symlink("root/etc/cni/net.d", folder.join("cni-conf"))?;
    symlink("root/opt/cni/bin", folder.join("cni-bin"))?;
    let etc = root.join("etc");
    let id = Sha256::digest(format!("{}/{}", state.display(), host.name));
    let id = HEXLOWER.encode(&id[..16]);
    let texts = [
        ("hostname", format!("{}\n", host.name)),
        (
            "hosts",
            format!("127.0.0.1 localhost\n{} {}\n", host.address, host.name),
        ),
        ("machine-id", format!("{id}\n")),
        ("resolv.conf", String::new()),
        ("kubernetes/containerd.toml", containerd_config()),
        ("kubernetes/kubelet.yaml", kubelet_config()),
    ];
    for (name, text) in texts {
        std::fs::write(etc.join(name), text)?;
    }
    for name in [
        "group",
        "nsswitch.conf",
        "os-release",
        "passwd",
        "protocols",
        "services",
    ] {
        // Programs fall back on defaults where the machine itself has no such file.
        let _ = std::fs::copy(Path::new("/etc").join(name), etc.join(name));
    }
    // Links in /usr lead here.
    std::fs::create_dir_all(etc.join("alternatives"))?;
    for (family, suffix) in ["iptables", "ip6tables"]
        .into_iter()
        .flat_map(|family| ["", "-save", "-restore"].map(|suffix| (family, suffix)))
    {
        symlink(
            format!("/usr/sbin/{family}-nft{suffix}"),
            etc.join(format!("alternatives/{family}{suffix}")),
        )?;
    }
    let kubernetes = etc.join("kubernetes");
    let user = format!("system:node:{}", host.name);
    let subject = Subject {
        file: &host.name,
        name: &user,
        group: Some("system:nodes"),
    };
    let names = [host.name.clone(), host.address.to_string()];
    pki.client(
        subject,
        &names,
        &layout.server(),
        &kubernetes.join("kubelet.kubeconfig"),
    )?;
    let copies = [
        (format!("pki/{}.crt", host.name), "kubelet.crt"),
        (format!("pki/{}.key", host.name), "kubelet.key"),
        ("pki/ca.crt".into(), "ca.crt"),
        ("proxy.kubeconfig".into(), "proxy.kubeconfig"),
    ];
    for (from, to) in copies {
        std::fs::copy(state.join(&from), kubernetes.join(to))
            .with_context(|| format!("cannot copy {from}"))?;
    }
    Ok(())
}

/// Starts process 1 of a node whose files and network exist.
pub fn start(folder: &Path, state: &State, host: &Host) -> Result<Process> {
    let group = state
        .groups
        .get(&host.name)
        .with_context(|| format!("{} has no control group", host.name))?;
    group.create()?;
    let spec = Spec {
        host: host.clone(),
        netns: state.layout.netns_path(&host.name),
        group: group.clone(),
        root: folder.join(&host.name).join("root"),
        kube_bin: state.kube_bin.clone(),
        images: folder.join("images"),
        logs: folder.join("logs"),
        api: SocketAddr::from((state.layout.control_plane().address, API_PORT)),
        proxy: state.proxy,
    };
    let path = folder.join(&host.name).join("init.json");
    std::fs::write(&path, serde_json::to_string_pretty(&spec)?)?;
    let mut command = Command::new(&state.tool);
    command.arg("node").arg(&path);
    Process::start(
        command,
        Place {
            role: &host.name,
            netns: None,
            init: true,
            state: folder,
            stdin: None,
        },
    )
}

fn containerd_config() -> String {
    format!(
        "version = 3\n\
         root = '/var/lib/containerd'\n\
         state = '/run/containerd'\n\
         [grpc]\n\
         address = '/run/containerd/containerd.sock'\n\
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\n\
         sandbox = '{PAUSE}'\n\
         [plugins.'io.containerd.cri.v1.runtime']\n\
         # A container may ask for a lower score than this process may give; without this it would \
         not start.\n\
         restrict_oom_score_adj = true\n\
         [plugins.'io.containerd.cri.v1.runtime'.cni]\n\
         # The nodes have no loopback plugin.\n\
         use_internal_loopback = true\n"
    )
}

fn kubelet_config() -> String {
    let eviction = "{nodefs.available: 1%, imagefs.available: 1%, memory.available: 50Mi}";
    let folder = "/etc/kubernetes";
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1\n\
         kind: KubeletConfiguration\n\
         failCgroupV1: false\n\
         cgroupDriver: cgroupfs\n\
         cgroupsPerQOS: false\n\
         enforceNodeAllocatable: []\n\
         failSwapOn: false\n\
         makeIPTablesUtilChains: false\n\
         containerRuntimeEndpoint: unix:///run/containerd/containerd.sock\n\
         volumePluginDir: /var/lib/kubelet/volume-plugins\n\
         clusterDomain: cluster.local\n\
         clusterDNS: [10.96.0.10]\n\
         authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: \
         {{clientCAFile: {folder}/ca.crt}}}}\n\
         authorization: {{mode: Webhook}}\n\
         tlsCertFile: {folder}/kubelet.crt\n\
         tlsPrivateKeyFile: {folder}/kubelet.key\n\
         evictionHard: {eviction}\n\
         imageGCHighThresholdPercent: 100\n\
         imageGCLowThresholdPercent: 99\n\
         maxPods: 250\n\
         nodeStatusUpdateFrequency: 5s\n"
    )
}
