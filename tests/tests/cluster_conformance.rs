//! Tables of verdicts on a real Kubernetes, which cover what `conformance.rs` leaves out, the API
//! server's acceptance and the container runtime's calls of the plugin; and admission on that API
//! server. All of the tables: `make conformance ON=cluster`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use margay_tests::cluster::Cluster;
use margay_tests::conformance::cluster::OnCluster;
use margay_tests::conformance::table::Table;
use margay_tests::conformance::{Enforce, conform};
use margay_tests::suite::Suite;
use margay_tests::{admission, demo, install};

fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let cluster = match stage() {
        Ok(cluster) => cluster,
        Err(error) => {
            suite.case("a_cluster_with_margay", || Err(error));
            return suite.finish();
        }
    };
    suite.case(
        "every_feature_of_network_policies_has_the_verdicts_of_the_table",
        || {
            let mut table = Table::of_tests("cyclonus.json.gz")?;
            table.keep_cover();
            on_cluster(&cluster, &table)
        },
    );
    suite.case(
        "cluster_wide_policies_have_the_verdicts_of_the_table",
        || on_cluster(&cluster, &Table::of_tests("network-policy-api.json")?),
    );
    suite.case("policies_of_calico_have_the_verdicts_of_the_table", || {
        on_cluster(&cluster, &Table::of_tests("calico.json")?)
    });
    suite.case(
        "the_api_server_protects_tiers_and_addresses_and_fills_in_what_policies_leave_out",
        || admission::check(&cluster),
    );
    suite.finish()
}

fn stage() -> Result<Cluster> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-conformance");
    // Several checkouts may run tests at the same time.
    let cluster = demo::bring_up(
        &format!("mgy-conf-{}", std::process::id()),
        &folder,
        &|line| println!("{line}"),
    )?;
    install::install(&cluster, &install::Options::default(), &|line| {
        println!("{line}")
    })?;
    Ok(cluster)
}

fn on_cluster(cluster: &Cluster, table: &Table) -> Result<()> {
    conform(
        &mut OnCluster::new(cluster, &table.fixture)?,
        table,
        Enforce::Full,
    )
}
