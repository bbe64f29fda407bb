//! The multi-call binary of the image: `margay operator`, `margay typha`, `margay node`,
//! `margay clean`.

use clap::{Parser, Subcommand};
use margay_runtime::executor;

/// Calico-compatible networking and network policy for Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "margay", version)]
struct Cli {
    #[command(subcommand)]
    component: Component,
}

#[derive(Debug, Subcommand)]
enum Component {
    /// Reconciles an Installation into every component.
    Operator(margay_operator::Args),
    /// Watches the API once, computes what each node must enforce, and streams it.
    Typha(margay_typha::Args),
    /// Programs routes, addresses and policy into the kernel of a node, and serves the CNI plugin.
    Node(margay_node::Args),
    /// Removes from a node what an agent has left there that is not to come back.
    Clean(margay_node::clean::Args),
}

impl Component {
    /// Threads, at most: typha serves many nodes, the others wait for one server each.
    const fn workers(&self) -> usize {
        match self {
            Self::Operator(_) | Self::Node(_) | Self::Clean(_) => 2,
            Self::Typha(_) => 8,
        }
    }

    async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Operator(args) => margay_operator::run(args).await,
            Self::Typha(args) => margay_typha::run(args).await,
            Self::Node(args) => margay_node::run(args).await,
            Self::Clean(args) => margay_node::clean::run(args).await,
        }
    }
}

fn main() -> anyhow::Result<()> {
    // Every TLS connection of the process uses this provider; a second one would be a second
    // implementation to trust.
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider was installed before main"))?;
    let component = Cli::parse().component;
    executor::start(component.workers())?.block_on(component.run())
}
