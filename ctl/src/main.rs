//! `kubectl margay`: what policy means, before and after it is in force.

use std::process::ExitCode;

fn main() -> ExitCode {
    margay_ctl::run(std::env::args_os())
}
