//! `make demo`: see `margay_tests::demo`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use margay_tests::demo;

#[derive(Debug, Parser)]
#[command(
    version,
    about = "A real Kubernetes on this machine, Margay on it, and what it does to packets"
)]
struct Args {
    /// Folder of everything the cluster writes.
    #[arg(long, default_value = "target/demo")]
    state: PathBuf,
    /// Prefix of the cluster's namespaces.
    #[arg(long, default_value = "margay-demo")]
    name: String,
    /// Leave the cluster up, and say what can be done with it.
    #[arg(long)]
    keep: bool,
}

fn main() -> Result<ExitCode> {
    let Args { state, name, keep } = Args::parse();
    let good = demo::run(&demo::Options { state, name, keep })?;
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
