//! `make demo`: see `margay_tests::demo`.

use std::path::PathBuf;
use std::process::ExitCode;

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
    /// Leave the cluster up, and print what can be done with it.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let Args { state, name, keep } = Args::parse();
    match demo::run(&demo::Options { state, name, keep }) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
