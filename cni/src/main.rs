//! `margay-cni`: the plugin, and its installer `margay-cni install`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// Time in which an agent that is being restarted is back.
const GRACE: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let env = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    match std::env::args().nth(1).as_deref() {
        None => plugin(&env),
        Some("install") => install(&env),
        Some(other) => {
            eprintln!(
                "margay-cni: unknown argument {other:?}; use `margay-cni install`, or no argument \
                 and CNI_COMMAND in the environment"
            );
            ExitCode::from(2)
        }
    }
}

fn plugin(env: &dyn Fn(&str) -> Option<String>) -> ExitCode {
    let reply = margay_cni::run(env, &mut std::io::stdin(), GRACE);
    let written = std::io::stdout().write_all(reply.stdout.as_bytes());
    if reply.success && written.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn install(env: &dyn Fn(&str) -> Option<String>) -> ExitCode {
    match margay_cni::install::run(env) {
        Ok(report) => {
            for line in report {
                eprintln!("margay-cni install: {line}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("margay-cni install: {error}");
            ExitCode::FAILURE
        }
    }
}
