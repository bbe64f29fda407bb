//! `make conformance`: see `margay_tests::conformance`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use margay_tests::conformance::cluster::OnCluster;
use margay_tests::conformance::kernel::Kernel;
use margay_tests::conformance::report::Report;
use margay_tests::conformance::table::Table;
use margay_tests::conformance::{Enforce, Options, run};
use margay_tests::{demo, install};

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Runs a table of verdicts with real packets; ends with success only if every row is as \
             it must be"
)]
struct Args {
    /// The table.
    #[arg(long, default_value = "tests/data/cyclonus.json.gz")]
    cases: PathBuf,
    /// Where: namespaces without Kubernetes, or a real cluster.
    #[arg(long, value_enum, default_value = "kernel")]
    on: On,
    /// Numbers of the cases to run; all when absent.
    #[arg(long, value_delimiter = ',')]
    only: Vec<u32>,
    /// Policies in force.
    #[arg(long, value_enum, default_value = "full")]
    enforce: Enforce,
    /// Number of further checks of a matching table before it is accepted.
    #[arg(long, default_value_t = 3)]
    hold: usize,
    /// Seconds that a table may take to match.
    #[arg(long, default_value_t = 20)]
    limit: u64,
    /// Path of the report, as JSON.
    #[arg(long, default_value = "target/conformance.json")]
    report: PathBuf,
    /// Folder of everything the cluster writes.
    #[arg(long, default_value = "target/conformance-cluster")]
    state: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum On {
    Kernel,
    Cluster,
}

fn main() -> ExitCode {
    match conform(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn conform(args: &Args) -> Result<bool> {
    let mut table = Table::read(&args.cases)?;
    if !args.only.is_empty() {
        table.keep(&args.only)?;
    }
    let options = Options {
        enforce: args.enforce,
        hold: args.hold,
        limit: Duration::from_secs(args.limit),
        ..Options::default()
    };
    let report = match args.on {
        On::Kernel => run(
            &mut Kernel::new(&table.fixture)?,
            &table,
            &options,
            &print_line,
        )?,
        On::Cluster => on_cluster(args, &table, &options)?,
    };
    print_line(&format!("\n{}\n{}", args.cases.display(), report.text()));
    write(&args.report, &report)?;
    Ok(report.is_good())
}

fn on_cluster(args: &Args, table: &Table, options: &Options) -> Result<Report> {
    let cluster = demo::bring_up("mgy-conform", &args.state, &print_line)?;
    let report =
        install::install(&cluster, &install::Options::default(), &print_line).and_then(|()| {
            run(
                &mut OnCluster::new(&cluster, &table.fixture)?,
                table,
                options,
                &print_line,
            )
        });
    cluster.down()?;
    report
}

fn write(path: &Path, report: &Report) -> Result<()> {
    let object = serde_json::json!({"summary": report.summary(), "run": report});
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, serde_json::to_string_pretty(&object)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    print_line(&format!("report          {}", path.display()));
    Ok(())
}

fn print_line(text: &str) {
    println!("{}", text.trim_end());
}
