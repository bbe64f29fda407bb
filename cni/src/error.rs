//! Everything that can be wrong with a call, with the code that the CNI specification has for it.

use std::path::PathBuf;
use std::time::Duration;

use margay_proto::cni::code;

use crate::call::Command;
use crate::config::Version;

/// Why a call failed; [`Error::code`] is from the specification, section "Error".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration's version is not ours.
    #[error("cniVersion {found:?}: must be one of {}; change it in the network configuration", Version::LIST)]
    Version {
        /// As given; empty if it is missing.
        found: String,
    },
    /// The command came with a later version than the configuration's.
    #[error("cniVersion {found:?}: {command} needs {needs:?} or later; change it in the network configuration")]
    TooOld {
        /// The command.
        command: &'static str,
        /// The first version that has it.
        needs: &'static str,
        /// The configuration's.
        found: &'static str,
    },
    /// A field of the configuration that we cannot honour.
    #[error("{key}={value}: {rule}; remove it from the network configuration")]
    UnsupportedField {
        /// Path of the field.
        key: &'static str,
        /// As given.
        value: String,
        /// What we support.
        rule: &'static str,
    },
    /// An environment variable that the caller must set is not set.
    #[error("{name} is not set: {rule}; the container runtime sets it when it calls a plugin")]
    Unset {
        /// The variable.
        name: &'static str,
        /// What it should hold.
        rule: &'static str,
    },
    /// An environment variable has a value that cannot be meant.
    #[error("{name}={value:?}: {rule}; the container runtime sets it when it calls a plugin")]
    Environment {
        /// The variable.
        name: &'static str,
        /// As given.
        value: String,
        /// What it should hold.
        rule: &'static str,
    },
    /// Standard input cannot be read.
    #[error("network configuration on standard input: {0}; the caller must write it and close its end")]
    Stdin(std::io::Error),
    /// Standard input is not JSON, or not of the form that it should have.
    #[error("network configuration on standard input: {0}; it must be one JSON object of the CNI specification")]
    Decode(String),
    /// A field of the configuration has a value that cannot be meant.
    #[error("{field}={value}: {rule}; correct it in the network configuration")]
    Config {
        /// Path of the field.
        field: &'static str,
        /// As given, as JSON.
        value: String,
        /// What it should hold.
        rule: &'static str,
    },
    /// The agent does not listen.
    #[error(
        "agent socket {socket}: {source}; see that the margay-node pod of this node runs (kubectl -n margay-system get pods -o wide)",
        socket = socket.display()
    )]
    AgentAway {
        /// Where it should.
        socket: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The socket is not ours to open.
    #[error("agent socket {socket}: {source}; the plugin must run as root", socket = socket.display())]
    Forbidden {
        /// Where it is.
        socket: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The agent took the request and went away.
    #[error("agent socket {socket}: the agent went away before it answered ({source}); the next call asks again", socket = socket.display())]
    AgentGone {
        /// Where it was.
        socket: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The agent did not answer in time.
    #[error("agent socket {socket}: no answer within {patience:?}; the log of this node's margay-node pod says what it waits for", socket = socket.display())]
    AgentSilent {
        /// Where it listens.
        socket: PathBuf,
        /// The time that it had.
        patience: Duration,
    },
    /// The agent said what it must not say.
    #[error(
        "the agent has answered with {0}; plugin and agent are of different versions: restart the margay-node pod of this node"
    )]
    Misunderstood(&'static str),
    /// The agent has refused, and says why.
    #[error("{msg}")]
    Refused {
        /// Its code.
        code: u32,
        /// Its message.
        msg: String,
        /// Its details.
        details: String,
    },
    /// STATUS, when there is nobody to ask.
    #[error("{0}")]
    NotAvailable(Box<Error>),
}

impl Error {
    /// The number that callers act upon.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::TooOld { .. } => code::INCOMPATIBLE_VERSION,
            Self::UnsupportedField { .. } => code::UNSUPPORTED_FIELD,
            Self::Unset { .. } | Self::Environment { .. } => code::INVALID_ENVIRONMENT,
            Self::Stdin(_) | Self::Forbidden { .. } => code::IO,
            Self::Decode(_) => code::DECODE,
            Self::Config { .. } => code::INVALID_CONFIG,
            Self::AgentAway { .. } | Self::AgentGone { .. } | Self::AgentSilent { .. } => code::TRY_AGAIN,
            Self::Misunderstood(_) => code::MISUNDERSTOOD,
            Self::Refused { code, .. } => *code,
            Self::NotAvailable(_) => code::NOT_AVAILABLE,
        }
    }

    /// More for the reader, if there is more.
    pub fn details(&self) -> &str {
        match self {
            Self::Refused { details, .. } => details,
            Self::NotAvailable(cause) => cause.details(),
            _ => "",
        }
    }

    /// STATUS has a code of its own for an agent that cannot be asked. Pods that run keep what they have without
    /// it, so it is the one that says nothing about them.
    pub(crate) fn for_command(self, command: Command) -> Self {
        match self {
            Self::AgentAway { .. } | Self::AgentGone { .. } | Self::AgentSilent { .. }
                if command == Command::Status =>
            {
                Self::NotAvailable(Box::new(self))
            }
            other => other,
        }
    }
}
