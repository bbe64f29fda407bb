//! Commands, options and exit statuses.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::calico::{datastore, get, ipam, version, write};
use crate::output::Finding;
use crate::pages::{self, CompletionArgs, ManArgs};
use crate::remote::{capture, node, trace, wait};
use crate::{connectivity, diff, explain, status, sysdump, uninstall, validate};

/// Name under which the program is Calico's own command line.
const CALICOCTL: &str = "calicoctl";
/// Exit status of a command that could not answer.
const ERROR: u8 = 2;

/// What policy means and how the network is, before and after a change.
///
/// Exit status: 0 if what was asked for holds or is done, 1 if it does not hold, 2 if it cannot be
/// answered or done.
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
    /// Shows components, conditions and problems of the installation.
    Status(status::Args),
    /// Waits until every node enforces an object.
    Wait(wait::Args),
    /// Makes a change and shows its way to every node, with the times of its stages.
    Trace(trace::Args),
    /// Writes packets of a pod into a file that tcpdump and Wireshark read.
    Capture(capture::Args),
    /// Shows agents and what kernels lack.
    #[command(subcommand)]
    Node(node::Command),
    /// Tries connections.
    #[command(subcommand)]
    Connectivity(connectivity::Command),
    /// Shows Calico's objects.
    Get(get::Args),
    /// Creates objects out of files.
    Create(write::FileArgs),
    /// Creates or replaces objects out of files.
    Apply(write::FileArgs),
    /// Replaces objects out of files.
    Replace(write::FileArgs),
    /// Deletes objects.
    Delete(write::DeleteArgs),
    /// Changes fields of an object.
    Patch(write::PatchArgs),
    /// Sets or removes a label of an object.
    Label(write::LabelArgs),
    /// Shows, checks and releases addresses.
    #[command(subcommand)]
    Ipam(ipam::Command),
    /// Locks and unlocks Calico's data.
    #[command(subcommand)]
    Datastore(datastore::Command),
    /// Takes Margay out of the cluster, and cleans the nodes.
    Uninstall(uninstall::Args),
    /// Collects what helps others to see what is wrong, as `cluster diags` does.
    Sysdump(sysdump::Args),
    /// Collects what helps others to see what is wrong.
    #[command(subcommand, hide = true)]
    Cluster(ClusterCommand),
    /// Shows versions.
    Version(version::Args),
    /// Prints the completion script of a shell.
    Completion(CompletionArgs),
    /// Writes manual pages.
    Man(ManArgs),
}

/// calicoctl's name of `sysdump`.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Collects what helps others to see what is wrong.
    Diags(sysdump::Args),
}

/// Runs the program with these arguments, its own name first.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let command = command(args.first());
    let parsed = command.clone().try_get_matches_from(args);
    let cli = match parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            // There is nobody to report to if the terminal is gone.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(ERROR)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match execute(cli.command, command) {
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

/// The command line under the name that the program was called by.
fn command(program: Option<&OsString>) -> clap::Command {
    let name = program.and_then(|path| Path::new(path).file_stem());
    match name.is_some_and(|name| name == CALICOCTL) {
        true => Cli::command().name(CALICOCTL).bin_name(CALICOCTL),
        false => Cli::command(),
    }
}

fn execute(command: Command, cli: clap::Command) -> anyhow::Result<Finding> {
    match command {
        Command::Explain(args) => explain::run(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Validate(args) => validate::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Wait(args) => wait::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Capture(args) => capture::run(&args),
        Command::Node(command) => node::run(&command),
        Command::Connectivity(command) => connectivity::run(&command),
        Command::Get(args) => get::run(&args),
        Command::Create(args) => write::run(write::Verb::Create, &args),
        Command::Apply(args) => write::run(write::Verb::Apply, &args),
        Command::Replace(args) => write::run(write::Verb::Replace, &args),
        Command::Delete(args) => write::delete(&args),
        Command::Patch(args) => write::patch(&args),
        Command::Label(args) => write::label(&args),
        Command::Ipam(command) => ipam::run(&command),
        Command::Datastore(command) => datastore::run(&command),
        Command::Sysdump(args) | Command::Cluster(ClusterCommand::Diags(args)) => {
            sysdump::run(&args)
        }
        Command::Uninstall(args) => uninstall::run(&args),
        Command::Version(args) => version::run(&args),
        Command::Completion(args) => pages::completion(cli, &args),
        Command::Man(args) => pages::man(cli, &args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        command(Some(&"/usr/bin/calicoctl".into())).debug_assert();
    }

    #[test]
    fn the_name_decides_what_the_program_is_called() {
        let name = |path: &str| command(Some(&path.into())).get_name().to_owned();
        assert_eq!(name("/usr/local/bin/calicoctl"), "calicoctl");
        assert_eq!(name("kubectl-margay"), "kubectl-margay");
    }
}
