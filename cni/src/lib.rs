//! The CNI plugin: parse, ask the agent, print; and its installer.
//!
//! The plugin is started by the container runtime for every pod, so it is small, single-purpose and holds no
//! state: [`call`] checks what the CNI specification demands, [`agent`] asks the node's agent over its socket,
//! [`result`] prints the answer in the shape of the version that was asked for.

pub mod agent;
pub mod call;
pub mod config;
pub mod error;
pub mod install;
pub mod result;

use std::io::Read;
use std::time::{Duration, Instant};

use margay_proto::cni::{Outcome, Request};

use agent::Patience;
use call::Call;
use config::Version;
use error::Error;

/// What the plugin says to its caller.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// Standard output: a result, an error, or nothing.
    pub stdout: String,
    /// Whether the process exits with 0.
    pub success: bool,
}

/// One run of the plugin. `env` is the environment; `stdin` the network configuration; `grace` how long the agent's
/// socket may be away, for an agent that is being restarted.
pub fn run(env: &dyn Fn(&str) -> Option<String>, stdin: &mut dyn Read, grace: Duration) -> Reply {
    let started = Instant::now();
    let (version, outcome) = answer(env, stdin, started, grace);
    match outcome {
        Ok(stdout) => Reply { stdout, success: true },
        Err(error) => Reply { stdout: result::error(version, &error), success: false },
    }
}

/// With the version in which an error is to be printed.
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
    let limits = Patience { until: started + config.timeout, whole: config.timeout, grace };
    let asked = Call::parse(command, env, &config).and_then(|call| {
        let request = request(call, &config, bytes, env, limits);
        let outcome = agent::ask(&config.socket, request, limits);
        let outcome = outcome.map_err(|error| error.for_command(command))?;
        printed(command, version, outcome)
    });
    (version, asked)
}

fn request(
    call: Call,
    config: &config::Config,
    bytes: Vec<u8>,
    env: &dyn Fn(&str) -> Option<String>,
    limits: Patience,
) -> Request {
    Request {
        cni_version: config.version.as_str().to_owned(),
        traceparent: env("TRACEPARENT").unwrap_or_default(),
        timeout_millis: limits.left().as_millis().try_into().unwrap_or(u32::MAX),
        config: bytes,
        network: config.name.clone(),
        verb: Some(call.verb),
    }
}

/// ADD is answered by a result, everything else by nothing.
fn printed(command: call::Command, version: Version, outcome: Outcome) -> Result<String, Error> {
    match outcome {
        Outcome::Result(result) if command == call::Command::Add => Ok(result::success(version, &result)),
        Outcome::Done(_) if command != call::Command::Add => Ok(String::new()),
        Outcome::Error(refused) => {
            Err(Error::Refused { code: refused.code, msg: refused.msg, details: refused.details })
        }
        Outcome::Result(_) => Err(Error::Misunderstood("a result where none was asked for")),
        Outcome::Done(_) => Err(Error::Misunderstood("no result to an ADD")),
    }
}
