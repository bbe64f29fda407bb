//! The command line on a real Kubernetes, where Calico's data is in the newer storage. What it does
//! in the older one is a part of `cluster_v1.rs`.

use std::path::Path;
use std::process::ExitCode;

use margay_api::storage::Mode;
use margay_tests::scenarios::{Environment, ctl};
use margay_tests::suite::Suite;
use margay_tests::{demo, install};

fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-ctl");
    let name = format!("mgy-ctl-{}", std::process::id());
    let staged = demo::stage(&name, &folder, &install::Options::default(), &|line| {
        println!("{line}")
    });
    let stage = match staged {
        Ok(stage) => stage,
        Err(error) => {
            suite.case("an_installation_for_the_command_line", || Err(error));
            return suite.finish();
        }
    };
    let environment = Environment {
        stage,
        mode: Mode::V3,
    };
    ctl::run(&mut suite, &environment);
    // Last, because nothing is left then.
    ctl::remove(&mut suite, environment);
    suite.finish()
}
