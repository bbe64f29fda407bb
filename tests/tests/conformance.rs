//! Tables of verdicts with real packets, without Kubernetes. These are the cases that have every feature of the table between them; all of it, and on a
//! real cluster: `make conformance`.

use std::path::Path;

use anyhow::{Result, ensure};
use margay_tests::conformance::kernel::Kernel;
use margay_tests::conformance::table::Table;
use margay_tests::conformance::{Enforce, Options, run};

/// Cases whose policies allow and block some of each transport; enough to see whether the runner can fail.
const TELLING: [u32; 2] = [1, 193];

fn mk_table(name: &str) -> Result<Table> {
    Table::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(name))
}

fn conform(table: &Table, enforce: Enforce) -> Result<()> {
    let options = Options { enforce, hold: 1, ..Options::default() };
    let report = run(&mut Kernel::new(&table.fixture)?, table, &options, &|line| println!("{line}"))?;
    ensure!(report.is_good(), "{}", report.text());
    Ok(())
}

#[test]
fn every_feature_of_network_policies_has_the_verdicts_of_the_table() -> Result<()> {
    let mut table = mk_table("cyclonus.json.gz")?;
    table.keep_cover();
    conform(&table, Enforce::Full)
}

#[test]
fn cluster_wide_policies_have_the_verdicts_of_the_table() -> Result<()> {
    conform(&mk_table("network-policy-api.json")?, Enforce::Full)
}

/// Without policy every blocked row is found wrong, and every allowed one when everything is denied: a runner that cannot fail shows nothing.
#[test]
fn the_runner_sees_that_nothing_or_everything_is_denied() -> Result<()> {
    let mut table = mk_table("cyclonus.json.gz")?;
    table.keep(&TELLING)?;
    conform(&table, Enforce::Off)?;
    conform(&table, Enforce::Deny)
}
