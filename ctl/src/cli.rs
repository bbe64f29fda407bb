//! Commands, options and exit statuses.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::output::Finding;
use crate::{diff, explain, validate};

/// What policy means, before and after it is in force.
///
/// Exit status: 0 if what was asked for holds, 1 if it does not, 2 if it cannot be answered.
#[derive(Debug, Parser)]
#[command(name = "kubectl-margay", bin_name = "kubectl margay", version)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Says whether a connection is allowed, and which rule decides at both ends.
    Explain(explain::Args),
    /// Says which connections among pods would be allowed or denied by a change.
    Diff(diff::Args),
    /// Says which objects would not be enforced as written, and which fields have no effect.
    Validate(validate::Args),
}

/// Exit status of a command that could not answer.
const ERROR: u8 = 2;

/// Runs the program with these arguments, its own name first.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to be told if the terminal is gone.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(ERROR)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match execute(cli.command) {
        Ok(finding) => {
            // A reader such as `head` may have enough; the verdict stands.
            let _ = io::stdout().lock().write_all(finding.text.as_bytes());
            ExitCode::from(u8::from(!finding.holds))
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(ERROR)
        }
    }
}

/// Runs a command.
pub fn execute(command: Command) -> anyhow::Result<Finding> {
    match command {
        Command::Explain(args) => explain::run(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Validate(args) => validate::run(&args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
