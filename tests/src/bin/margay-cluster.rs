//! Brings a real Kubernetes up on this machine and takes it down; see `margay_tests::cluster`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use margay_tests::cluster::layout::Topology;
use margay_tests::cluster::{Cluster, Options, ProxyMode, binaries, forward, init, preflight};
use margay_tests::image::{Entry, Image};

#[derive(Debug, Parser)]
#[command(
    version,
    about = "A real Kubernetes on this machine; every node is a set of namespaces"
)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Install the programs that tests and clusters need, as far as they are missing.
    Prepare,
    /// Build the programs of a cluster, and Helm, and print the folder of the former.
    Build {
        /// Build the conformance suite e2e.test too.
        #[arg(long)]
        suite: bool,
    },
    /// Bring a cluster up; its nodes are NotReady, because it has no network plugin.
    Up(Up),
    /// Take a cluster down, or remove what is left of one.
    Down(Folder),
    /// Kill process 1 of a node and start it again.
    Reboot {
        /// Name of the node.
        node: String,
        #[command(flatten)]
        folder: Folder,
    },
    /// Import an image archive on every node.
    Load {
        /// The archive.
        image: PathBuf,
        #[command(flatten)]
        folder: Folder,
    },
    /// Write an image of one layer as an OCI archive.
    Image(NewImage),
    /// Process 1 of a node.
    #[command(hide = true)]
    Node { spec: PathBuf },
    /// Forward a port of this machine to an API server.
    #[command(hide = true)]
    Forward { netns: PathBuf, target: SocketAddr },
}

#[derive(Debug, clap::Args)]
struct Folder {
    /// Folder of everything the cluster writes.
    #[arg(long, default_value = "target/cluster")]
    state: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Up {
    /// Number of nodes.
    #[arg(long, default_value_t = 3)]
    nodes: u8,
    /// Prefix of the cluster's namespaces; two clusters at a time need two names and two folders.
    #[arg(long, default_value = "margay")]
    name: String,
    /// All nodes in one subnet, instead of the first two in one and the others behind a router.
    #[arg(long)]
    flat: bool,
    /// IPv6 beside IPv4 for machines, Services and pods.
    #[arg(long)]
    dual_stack: bool,
    /// Image archives that every node has before its kubelet starts.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    image: Vec<PathBuf>,
    /// Mode of kube-proxy.
    #[arg(long, value_enum, default_value = "nftables")]
    proxy: ProxyMode,
    /// Let the API server write logs/audit.log.
    #[arg(long)]
    audit: bool,
    /// Build the conformance suite e2e.test too.
    #[arg(long)]
    suite: bool,
    #[command(flatten)]
    folder: Folder,
}

#[derive(Debug, clap::Args)]
struct NewImage {
    /// Full name: host/path:tag.
    #[arg(long)]
    name: String,
    /// Archive to write.
    #[arg(long)]
    out: PathBuf,
    /// Files as SRC=DEST, symbolic links as @TARGET=DEST.
    #[arg(required = true)]
    entries: Vec<Entry>,
    /// Program and first arguments of a container.
    #[arg(last = true, required = true)]
    entrypoint: Vec<String>,
}

fn main() -> ExitCode {
    match run(Args::parse().what) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: What) -> Result<()> {
    match what {
        What::Prepare => preflight::prepare(&|line| eprintln!("{line}")),
        What::Build { suite } => {
            let folder = binaries::ensure_built(suite, &|line| eprintln!("{line}"))?;
            binaries::helm(&|line| eprintln!("{line}"))?;
            println!("{}", folder.display());
            Ok(())
        }
        What::Up(up) => bring_up(up),
        What::Down(Folder { state }) => take_down(&state),
        What::Reboot { node, folder } => Cluster::attach(&folder.state)?.reboot(&node),
        What::Load { image, folder } => Cluster::attach(&folder.state)?.load(&image),
        What::Image(NewImage {
            name,
            out,
            entries,
            entrypoint,
        }) => {
            let digest = Image {
                name,
                entries,
                entrypoint,
            }
            .write(&out)?;
            println!("{digest}");
            Ok(())
        }
        What::Node { spec } => init::run(&spec),
        What::Forward { netns, target } => forward::serve(&netns, target),
    }
}

fn bring_up(up: Up) -> Result<()> {
    let topology = if up.flat {
        Topology::Flat
    } else {
        Topology::Routed
    };
    let Up {
        nodes,
        name,
        dual_stack,
        image,
        proxy,
        audit,
        suite,
        folder,
        ..
    } = up;
    let options = Options {
        name,
        nodes,
        topology,
        dual_stack,
        state: folder.state,
        images: image,
        proxy,
        audit,
        suite,
    };
    let cluster = Cluster::up(&options, &|line| eprintln!("{line}"))?.keep();
    let env = cluster.folder().join("env");
    let text =
        std::fs::read_to_string(&env).with_context(|| format!("cannot read {}", env.display()))?;
    eprintln!(". {} && $KUBECTL get nodes", env.display());
    print!("{text}");
    Ok(())
}

fn take_down(state: &Path) -> Result<()> {
    if !Cluster::exists(state) {
        eprintln!("there is no cluster in {}", state.display());
        return Ok(());
    }
    Cluster::attach(state)?.down()?;
    eprintln!(
        "the cluster in {} is down; its logs are kept",
        state.display()
    );
    Ok(())
}
