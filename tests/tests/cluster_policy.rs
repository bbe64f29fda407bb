//! On a real Kubernetes: an installation makes nodes Ready, pods talk, and packets obey every kind
//! of policy.

use std::path::Path;
use std::process::ExitCode;

use margay_api::storage::Mode;
use margay_tests::scenarios::{Environment, hosts, policy, pools, secrets};
use margay_tests::suite::Suite;
use margay_tests::{demo, install};

const INSTALLED: &str = "an_installation_makes_every_node_ready";

fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-policy");
    // Several checkouts may run tests at the same time.
    let name = format!("mgy-policy-{}", std::process::id());
    let staged = demo::stage(&name, &folder, &install::Options::default(), &|line| {
        println!("{line}")
    });
    let stage = match staged {
        Ok(stage) => stage,
        Err(error) => {
            suite.case(INSTALLED, || Err(error));
            return suite.finish();
        }
    };
    suite.case(INSTALLED, || install::check_status(&stage.cluster));
    let environment = Environment {
        stage,
        mode: Mode::V3,
    };
    policy::run(&mut suite, &environment);
    pools::run(&mut suite, &environment);
    hosts::run(&mut suite, &environment);
    // Last, because from then on every program logs everything.
    secrets::run(&mut suite, &environment);
    suite.finish()
}
