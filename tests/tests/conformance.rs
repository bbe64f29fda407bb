//! Tables of verdicts with real packets, without Kubernetes. These are the cases that have every
//! feature of the table between them; all of it, and on a real cluster: `make conformance`.

use anyhow::Result;
use margay_tests::conformance::kernel::Kernel;
use margay_tests::conformance::table::Table;
use margay_tests::conformance::{Enforce, conform};

/// Cases whose policies allow and block some of each transport; enough to see whether the runner
/// can fail.
const SIGNIFICANT: [u32; 2] = [1, 193];

fn on_kernel(table: &Table, enforce: Enforce) -> Result<()> {
    conform(&mut Kernel::new(&table.fixture)?, table, enforce)
}

#[test]
fn every_feature_of_network_policies_has_the_verdicts_of_the_table() -> Result<()> {
    let mut table = Table::of_tests("cyclonus.json.gz")?;
    table.keep_cover();
    on_kernel(&table, Enforce::Full)
}

#[test]
fn cluster_wide_policies_have_the_verdicts_of_the_table() -> Result<()> {
    on_kernel(&Table::of_tests("network-policy-api.json")?, Enforce::Full)
}

#[test]
fn policies_of_calico_have_the_verdicts_of_the_table() -> Result<()> {
    on_kernel(&Table::of_tests("calico.json")?, Enforce::Full)
}

/// Without policy every blocked row is found wrong, and every allowed one when everything is
/// denied: a runner that cannot fail shows nothing.
#[test]
fn the_runner_sees_that_nothing_or_everything_is_denied() -> Result<()> {
    let mut table = Table::of_tests("cyclonus.json.gz")?;
    table.keep(&SIGNIFICANT)?;
    on_kernel(&table, Enforce::Off)?;
    on_kernel(&table, Enforce::Deny)
}
