//! `make bench-typha`: see `margay_tests::fanout`.

use clap::{Parser, Subcommand};
use margay_runtime::executor;
use margay_tests::fanout::{cases, clients, control, hostile, server, source};

/// Workers of the server, as of a real typha, and of the other processes.
const WORKERS: usize = 8;

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Cost and latency of typha's fan-out, beside Calico's Typha and a plain rebroadcast"
)]
struct BenchCli {
    #[command(subcommand)]
    role: BenchRole,
}

#[derive(Debug, Subcommand)]
enum BenchRole {
    /// Takes the figures; starts the other roles as processes.
    Run(cases::Args),
    /// The server.
    Server(server::Args),
    /// The nodes.
    Clients(clients::Args),
    /// The source of watch events.
    Source(source::Args),
    /// Peers that misbehave.
    Hostile(hostile::Args),
}

fn main() -> anyhow::Result<()> {
    control::raise_limits()?;
    let role = BenchCli::parse().role;
    if let BenchRole::Run(args) = role {
        return cases::run(args);
    }
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider was installed before main"))?;
    executor::start(WORKERS)?.block_on(async {
        match role {
            BenchRole::Run(_) => Ok(()),
            BenchRole::Server(args) => server::run(args).await,
            BenchRole::Clients(args) => clients::run(args).await,
            BenchRole::Source(args) => source::run(args).await,
            BenchRole::Hostile(args) => hostile::run(args).await,
        }
    })
}
