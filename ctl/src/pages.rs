//! Completion for shells and manual pages, made from the command line itself.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;

use crate::output::Finding;

/// Arguments of `completion`.
#[derive(Clone, Debug, clap::Args)]
pub struct CompletionArgs {
    /// The shell.
    pub shell: Shell,
}

/// Arguments of `man`.
#[derive(Clone, Debug, clap::Args)]
pub struct ManArgs {
    /// Folder for the pages, of which there is one for each command.
    pub folder: PathBuf,
}

/// Returns the completion script of a shell.
pub fn completion(mut command: Command, args: &CompletionArgs) -> Result<Finding> {
    let (name, mut script) = (command.get_name().to_owned(), Vec::new());
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    Ok(Finding {
        text: String::from_utf8(script)?,
        holds: true,
    })
}

/// Writes the manual pages.
pub fn man(command: Command, args: &ManArgs) -> Result<Finding> {
    let folder = args.folder.display();
    std::fs::create_dir_all(&args.folder)
        .with_context(|| format!("{folder}: cannot be created"))?;
    clap_mangen::generate_to(command, &args.folder)
        .with_context(|| format!("{folder}: pages cannot be written"))?;
    Ok(Finding {
        text: format!("the pages are in {folder}\n"),
        holds: true,
    })
}
