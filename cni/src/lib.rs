//! The CNI plugin, a client of the node's agent; and its installer.
//!
//! The container runtime starts the plugin for every pod, so it is small, single-purpose and
//! stateless: [`call`] validates what the CNI specification requires, [`agent`] sends the request
//! to the node's agent over its socket, [`result`] prints the answer in the format of the requested
//! version.

pub mod agent;
pub mod call;
pub mod config;
pub mod error;
pub mod install;
pub mod result;

use std::io::Read;
use std::time::{Duration, Instant};

use margay_proto::cni::{Outcome, Request, Verb};

use agent::TimeLimits;
use config::Version;
use error::Error;

/// Output of the plugin.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// Standard output: a result, an error, or nothing.
    pub stdout: String,
    /// True when the process exits with 0.
    pub success: bool,
}

/// Runs the plugin once. `env` is the environment; `stdin` the network configuration; `grace` the
/// time that the agent's socket may be absent, for an agent that is being restarted.
pub fn run(env: &dyn Fn(&str) -> Option<String>, stdin: &mut dyn Read, grace: Duration) -> Reply {
    let started = Instant::now();
    let (version, outcome) = answer(env, stdin, started, grace);
    match outcome {
        Ok(stdout) => Reply {
            stdout,
            success: true,
        },
        Err(error) => Reply {
            stdout: result::error(version, &error),
            success: false,
        },
    }
}

/// Returns the outcome with the version in which an error is to be printed.
fn answer(
    env: &dyn Fn(&str) -> Option<String>,
    stdin: &mut dyn Read,
    started: Instant,
    grace: Duration,
) -> (Version, Result<String, Error>) {
    let newest = Version::NEWEST;
    let command = match call::command(env) {
        Ok(command) => command,
        Err(error) => return (newest, Err(error)),
    };
    let bytes = match config::read(stdin) {
        Ok(bytes) => bytes,
        Err(error) => return (newest, Err(error)),
    };
    if command == call::Command::Version {
        return (newest, Ok(result::versions(&bytes)));
    }
    let config = match config::parse(&bytes) {
        Ok(config) => config,
        Err(error) => return (config::version_in(&bytes), Err(error)),
    };
    let version = config.version;
    let limits = TimeLimits {
        until: started + config.timeout,
        whole: config.timeout,
        grace,
    };
    let outcome = call::parse(command, env, &config).and_then(|verb| {
        let request = request(verb, &config, bytes, env, limits);
        let outcome = agent::call(&config.socket, request, limits);
        match outcome {
            Err(Error::AgentAway { .. }) if config.removed.exists() => removed(command, &config),
            outcome => printed(
                command,
                version,
                outcome.map_err(|error| error.for_command(command))?,
            ),
        }
    });
    (version, outcome)
}

fn request(
    verb: Verb,
    config: &config::Config,
    bytes: Vec<u8>,
    env: &dyn Fn(&str) -> Option<String>,
    limits: TimeLimits,
) -> Request {
    Request {
        cni_version: config.version.as_str().to_owned(),
        traceparent: env("TRACEPARENT").unwrap_or_default(),
        timeout_millis: limits.left().as_millis().try_into().unwrap_or(u32::MAX),
        config: bytes,
        network: config.name.clone(),
        verb: Some(verb),
    }
}

/// Answers in the place of an agent that does not come back: its state went with it, so that there
/// is nothing left to delete, and pods that are deleted later do not hang.
fn removed(command: call::Command, config: &config::Config) -> Result<String, Error> {
    match command {
        call::Command::Del | call::Command::Gc => Ok(String::new()),
        _ => Err(Error::Removed {
            marker: config.removed.clone(),
        }
        .for_command(command)),
    }
}

/// Formats the outcome: ADD prints a result, other commands nothing.
fn printed(command: call::Command, version: Version, outcome: Outcome) -> Result<String, Error> {
    match outcome {
        Outcome::Result(result) if command == call::Command::Add => {
            Ok(result::success(version, &result))
        }
        Outcome::Done(_) if command != call::Command::Add => Ok(String::new()),
        Outcome::Error(refused) => Err(Error::Refused {
            code: refused.code,
            msg: refused.msg,
            details: refused.details,
        }),
        Outcome::Result(_) => Err(Error::UnexpectedAnswer(
            "a result to a command other than ADD",
        )),
        Outcome::Done(_) => Err(Error::UnexpectedAnswer("no result to ADD")),
    }
}
