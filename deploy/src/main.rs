//! The multi-call binary of the image: `margay operator`, `margay typha`, `margay node`.

use clap::{Parser, Subcommand};

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
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // Every TLS connection of the process uses this provider; a second one would be a second implementation to trust.
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider was installed before main"))?;
    match Cli::parse().component {
        Component::Operator(args) => margay_operator::run(args).await,
        Component::Typha(args) => margay_typha::run(args).await,
        Component::Node(args) => margay_node::run(args).await,
    }
}
