//! `make kernels`: see `margay_tests::machine`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use margay_tests::machine;

#[derive(Debug, Parser)]
#[command(
    version,
    about = "The kernel layers of the tests on kernels that people run, in virtual machines"
)]
struct Args {
    /// Only these kernels, as 5.10,6.1.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only suites with one of these in their names.
    #[arg(long, value_delimiter = ',')]
    suites: Vec<String>,
    /// The subset that depends on the kernel most, with the programs that `cargo test` builds.
    #[arg(long)]
    quick: bool,
    /// Look for newer kernels than those that were fetched before.
    #[arg(long)]
    refresh: bool,
    /// Folder for the consoles' logs.
    #[arg(long, default_value = "target/kernels")]
    state: PathBuf,
}

fn main() -> ExitCode {
    let Args {
        only,
        suites,
        quick,
        refresh,
        state,
    } = Args::parse();
    let options = machine::Options {
        kernels: only,
        suites,
        quick,
        refresh,
        state,
    };
    match machine::run(&options, &|line| eprintln!("{line}")) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
