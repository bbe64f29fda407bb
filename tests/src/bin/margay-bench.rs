//! `make bench`: see `margay_tests::bench`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use margay_tests::bench;

#[derive(Debug, Parser)]
#[command(version, about = "Figures of Margay on a real Kubernetes on this machine")]
struct Args {
    /// Folder of everything the cluster writes.
    #[arg(long, default_value = "target/bench")]
    state: PathBuf,
    /// Prefix of the cluster's namespaces.
    #[arg(long, default_value = "margay-bench")]
    name: String,
}

fn main() -> Result<()> {
    let Args { state, name } = Args::parse();
    bench::run(&bench::Options { state, name })
}
