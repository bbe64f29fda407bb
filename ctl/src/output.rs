//! Form and result of every command.

use clap::ValueEnum;

/// Form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Text for people.
    #[default]
    Tree,
    /// JSON for programs.
    Json,
}

/// What a command found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Text for standard output, ending in a line break.
    pub text: String,
    /// Whether what was asked for holds: exit status 0, else 1.
    pub holds: bool,
}
