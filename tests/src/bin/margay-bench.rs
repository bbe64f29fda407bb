//! `make bench`: see `margay_tests::bench`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use margay_tests::bench;

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Figures of Margay on this machine, beside their anchors and budgets"
)]
struct Args {
    /// Folder of everything the cluster writes.
    #[arg(long, default_value = "target/bench")]
    state: PathBuf,
    /// Prefix of the cluster's namespaces.
    #[arg(long, default_value = "margay-bench")]
    name: String,
    /// Folder of the programs that are measured; that of this program if not given.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Take only these measurements; an unknown name lists all.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Path of the report, without `.md` and `.json`.
    #[arg(long, default_value = "target/bench-report")]
    report: PathBuf,
    /// Fail when a budget is missed.
    #[arg(long)]
    strict: bool,
}

fn main() -> ExitCode {
    let Args {
        state,
        name,
        programs,
        only,
        report,
        strict,
    } = Args::parse();
    let programs = programs.or_else(own_folder).unwrap_or_default();
    match bench::run(&bench::Options {
        state,
        name,
        programs,
        only,
        report,
    }) {
        Ok(kept) if kept || !strict => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Folder of this program, and of those that were built with it.
fn own_folder() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.to_owned())
}
