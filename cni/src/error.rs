//! Errors of a call, with their codes in the CNI specification.

use std::path::PathBuf;
use std::time::Duration;

use margay_proto::cni::code;

use crate::call::Command;
use crate::config::Version;

/// Reason why a call failed; [`Error::code`] is from the specification, section "Error".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration's version is not supported.
    #[error(
        "cniVersion {found:?}: must be one of {}; change it in the network configuration",
        Version::LIST
    )]
    Version {
        /// As specified; empty if it is missing.
        found: String,
    },
    /// The command requires a later version than the configuration's.
    #[error(
        "cniVersion {found:?}: {command} needs {needs:?} or later; change it in the network \
         configuration"
    )]
    TooOld {
        /// The command.
        command: &'static str,
        /// The first version that has it.
        needs: &'static str,
        /// The configuration's version.
        found: &'static str,
    },
    /// A field of the configuration that is not supported.
    #[error("{key}={value}: {rule}; remove it from the network configuration")]
    UnsupportedField {
        /// Path of the field.
        key: &'static str,
        /// As specified.
        value: String,
        /// Supported values.
        rule: &'static str,
    },
    /// An environment variable that the caller must set is not set.
    #[error("{name} is not set: {rule}; the container runtime sets it when it calls a plugin")]
    Unset {
        /// The variable.
        name: &'static str,
        /// Its required content.
        rule: &'static str,
    },
    /// An environment variable has an invalid value.
    #[error("{name}={value:?}: {rule}; the container runtime sets it when it calls a plugin")]
    Environment {
        /// The variable.
        name: &'static str,
        /// As specified.
        value: String,
        /// Its required content.
        rule: &'static str,
    },
    /// Standard input cannot be read.
    #[error(
        "network configuration on standard input: {0}; the caller must write it and close its end"
    )]
    Stdin(std::io::Error),
    /// Standard input is not a JSON object.
    #[error(
        "network configuration on standard input: {0}; it must be one JSON object of the CNI \
         specification"
    )]
    Decode(String),
    /// A field of the configuration has an invalid value.
    #[error("{field}={value}: {rule}; correct it in the network configuration")]
    Config {
        /// Path of the field.
        field: &'static str,
        /// As specified, as JSON.
        value: String,
        /// Its required content.
        rule: &'static str,
    },
    /// The agent does not listen.
    #[error(
        "agent socket {socket}: {source}; check that the margay-node pod of this node is running \
         (kubectl -n margay-system get pods -o wide)",
        socket = socket.display()
    )]
    AgentAway {
        /// Path of the socket.
        socket: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// Margay has been removed from the node.
    #[error(
        "Margay has been removed from this node (there is {marker}); install it again, or another \
         network",
        marker = marker.display()
    )]
    Removed {
        /// The file that says so.
        marker: PathBuf,
    },
    /// The process may not open the socket.
    #[error(
        "agent socket {socket}: {source}; the plugin must run as root",
        socket = socket.display(),
    )]
    Forbidden {
        /// Path of the socket.
        socket: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// The agent closed the connection before it answered.
    #[error(
        "agent socket {socket}: the agent closed the connection before it answered ({source}); \
         retry the call",
        socket = socket.display(),
    )]
    AgentGone {
        /// Path of the socket.
        socket: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// The agent did not answer in time.
    #[error(
        "agent socket {socket}: no answer within {timeout:?}; the log of this node's \
         margay-node pod shows what it is waiting for",
        socket = socket.display(),
    )]
    AgentSilent {
        /// Path of the socket.
        socket: PathBuf,
        /// Time limit.
        timeout: Duration,
    },
    /// The agent's answer does not match the request.
    #[error(
        "unexpected answer of the agent: {0}; plugin and agent have different versions: restart \
         the margay-node pod of this node"
    )]
    UnexpectedAnswer(&'static str),
    /// The agent refused the request.
    #[error("{msg}")]
    Refused {
        /// Its code.
        code: u32,
        /// Its message.
        msg: String,
        /// Its details.
        details: String,
    },
    /// STATUS, when the agent cannot be reached.
    #[error("{0}")]
    NotAvailable(Box<Error>),
}

impl Error {
    /// Returns the code that callers act upon.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::TooOld { .. } => code::INCOMPATIBLE_VERSION,
            Self::UnsupportedField { .. } => code::UNSUPPORTED_FIELD,
            Self::Unset { .. } | Self::Environment { .. } => code::INVALID_ENVIRONMENT,
            Self::Stdin(_) | Self::Forbidden { .. } => code::IO,
            Self::Decode(_) => code::DECODE,
            Self::Config { .. } => code::INVALID_CONFIG,
            Self::AgentAway { .. }
            | Self::AgentGone { .. }
            | Self::AgentSilent { .. }
            | Self::Removed { .. } => code::TRY_AGAIN,
            Self::UnexpectedAnswer(_) => code::MISUNDERSTOOD,
            Self::Refused { code, .. } => *code,
            Self::NotAvailable(_) => code::NOT_AVAILABLE,
        }
    }

    /// Returns further details, if there are any.
    pub fn details(&self) -> &str {
        match self {
            Self::Refused { details, .. } => details,
            Self::NotAvailable(cause) => cause.details(),
            _ => "",
        }
    }

    /// Replaces the error of an agent that cannot be reached by STATUS's own code for that. Running
    /// pods keep their network without the agent, so it is the code that makes no statement about
    /// them.
    pub(crate) fn for_command(self, command: Command) -> Self {
        match self {
            Self::AgentAway { .. }
            | Self::AgentGone { .. }
            | Self::AgentSilent { .. }
            | Self::Removed { .. }
                if command == Command::Status =>
            {
                Self::NotAvailable(Box::new(self))
            }
            other => other,
        }
    }
}
