//! On a real Kubernetes: one manifest, applied once, makes nodes Ready and enforces policy, without
//! an Installation.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use margay_api::storage::Mode;
use margay_tests::scenarios::{Environment, policy};
use margay_tests::suite::Suite;
use margay_tests::{demo, install};

/// Everything that comes to y/a is denied.
const DENY: &str = "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\n\
                    metadata: {name: closed, namespace: y}\n\
                    spec: {selector: pod == 'a', types: [Ingress]}\n";

fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-standalone");
    let name = format!("mgy-alone-{}", std::process::id());
    let options = install::Options {
        standalone: true,
        ..install::Options::default()
    };
    let staged = demo::stage(&name, &folder, &options, &|line| println!("{line}"));
    let stage = match staged {
        Ok(stage) => stage,
        Err(error) => {
            suite.case("one_manifest_makes_every_node_ready", || Err(error));
            return suite.finish();
        }
    };
    let environment = Environment {
        stage,
        mode: Mode::V3,
    };
    suite.case("one_manifest_makes_every_node_ready", || {
        install::check_status(&environment.stage.cluster)
    });
    suite.case("packets_obey_policy_without_an_installation", || {
        packets(&environment)
    });
    suite.case("pools_are_the_users_once_there_is_one", || {
        pools(&environment)
    });
    suite.finish()
}

fn packets(environment: &Environment) -> Result<()> {
    policy::all_open(environment)?;
    environment.apply("closed", DENY)?;
    policy::expect(environment, &policy::without(&["y/a"]))?;
    let cluster = &environment.stage.cluster;
    cluster.kubectl(&[
        "delete",
        "-n",
        "y",
        "networkpolicies.projectcalico.org",
        "closed",
    ])?;
    policy::all_open(environment)
}

/// An Installation has no effect, and that is reported.
fn pools(environment: &Environment) -> Result<()> {
    let pools = environment.objects("IPPool")?;
    ensure!(
        pools.keys().eq(["default-ipv4-ippool"]),
        "{:?}",
        pools.keys()
    );
    let cluster = &environment.stage.cluster;
    let file = install::checkout().join("deploy/installation.yaml");
    cluster.kubectl(&["apply", "-f", &file.display().to_string()])?;
    let degraded = "--for=condition=Degraded";
    cluster
        .kubectl(&["wait", degraded, "tigerastatus/ippools", "--timeout=60s"])
        .context("an Installation that nothing reads")?;
    ensure!(environment.objects("IPPool")?.len() == 1, "it made a pool");
    cluster.kubectl(&["delete", "installation", "default"])?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Degraded=False",
        "tigerastatus/ippools",
        "--timeout=60s",
    ])?;
    policy::all_open(environment)
}
