//! `make e2e-netpol`: see `margay_tests::e2e`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use margay_tests::e2e;

#[derive(Debug, Parser)]
#[command(
    version,
    about = "The NetworkPolicy cases of Kubernetes' end-to-end suite, against Margay on a real \
             Kubernetes on this machine"
)]
struct Args {
    /// Folder of everything the cluster writes.
    #[arg(long, default_value = "target/e2e")]
    state: PathBuf,
    /// Prefix of the cluster's namespaces.
    #[arg(long, default_value = "margay-e2e")]
    name: String,
    /// Folder of the JUnit report.
    #[arg(long, default_value = "target/e2e-report")]
    report: PathBuf,
}

fn main() -> ExitCode {
    let Args {
        state,
        name,
        report,
    } = Args::parse();
    match e2e::run(
        &e2e::Options {
            state,
            name,
            report,
        },
        &|line| eprintln!("{line}"),
    ) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
