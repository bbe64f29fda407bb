//! Validation of a call: its command and its container, both from the environment.

use margay_proto::cni::{Add, Attachment, Check, Del, Gc, Pod, Status, Verb};

use crate::config::{Config, Version, is_identifier};
use crate::error::Error;

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Adds an interface to a container.
    Add,
    /// Removes it.
    Del,
    /// Checks that it is as it was created.
    Check,
    /// Checks that ADD would work.
    Status,
    /// Removes attachments that belong to no container any more.
    Gc,
    /// Lists the supported versions of the specification.
    Version,
}

impl Command {
    /// Returns its name and the first version of the specification that has it.
    fn description(self) -> (&'static str, Version) {
        match self {
            Self::Add => ("ADD", Version::V031),
            Self::Del => ("DEL", Version::V031),
            Self::Version => ("VERSION", Version::V031),
            Self::Check => ("CHECK", Version::V040),
            Self::Status => ("STATUS", Version::V110),
            Self::Gc => ("GC", Version::V110),
        }
    }
}

/// Reads the command, before anything else.
pub fn command(env: Env<'_>) -> Result<Command, Error> {
    use Command::{Add, Check, Del, Gc, Status, Version};
    let name = "CNI_COMMAND";
    let rule = "must be ADD, DEL, CHECK, STATUS, GC or VERSION";
    let value = given(env, name).ok_or(Error::Unset { name, rule })?;
    let all = [Add, Del, Check, Status, Gc, Version];
    let found = all
        .into_iter()
        .find(|command| command.description().0 == value);
    found.ok_or(Error::Environment { name, value, rule })
}

/// Validates a call and builds the request to the agent.
pub fn parse(command: Command, env: Env<'_>, config: &Config) -> Result<Verb, Error> {
    let (name, since) = command.description();
    if config.version < since {
        let (needs, found) = (since.as_str(), config.version.as_str());
        return Err(Error::TooOld {
            command: name,
            needs,
            found,
        });
    }
    let prev_result = config.prev_result.clone();
    Ok(match command {
        Command::Add => {
            let attachment = attachment(env, true)?;
            require_pod(attachment.pod.as_ref())?;
            Verb::Add(Add {
                attachment: Some(attachment),
                prev_result,
            })
        }
        Command::Del => Verb::Del(Del {
            attachment: Some(attachment(env, false)?),
            prev_result,
        }),
        Command::Check if prev_result.is_empty() => {
            return Err(missing("prevResult", "must hold the result of the ADD"));
        }
        Command::Check => Verb::Check(Check {
            attachment: Some(attachment(env, true)?),
            prev_result,
        }),
        Command::Gc => {
            // Defaulting the key to an empty list would remove every attachment.
            let key = "cni.dev/valid-attachments";
            let valid = config.valid.clone();
            let valid = valid.ok_or_else(|| {
                missing(
                    key,
                    "must list the attachments that stay; an empty list removes all",
                )
            })?;
            Verb::Gc(Gc { valid })
        }
        Command::Status | Command::Version => Verb::Status(Status {}),
    })
}

fn missing(field: &'static str, rule: &'static str) -> Error {
    Error::Config {
        field,
        value: "null".to_owned(),
        rule,
    }
}

/// Reads a variable; an empty one counts as unset.
fn given(env: Env<'_>, name: &str) -> Option<String> {
    env(name).filter(|value| !value.is_empty())
}

fn checked(
    env: Env<'_>,
    name: &'static str,
    rule: &'static str,
    holds: impl Fn(&str) -> bool,
) -> Result<String, Error> {
    let value = given(env, name).ok_or(Error::Unset { name, rule })?;
    if holds(&value) {
        Ok(value)
    } else {
        Err(Error::Environment { name, value, rule })
    }
}

fn attachment(env: Env<'_>, needs_netns: bool) -> Result<Attachment, Error> {
    let container_id = checked(
        env,
        "CNI_CONTAINERID",
        "must be the container's id: letters, digits, _ . and -, beginning with a letter or digit",
        is_identifier,
    )?;
    let ifname = checked(
        env,
        "CNI_IFNAME",
        "must be the interface's name in the container: at most 15 bytes, not . or .., without / : \
         or space",
        is_interface_name,
    )?;
    let netns = given(env, "CNI_NETNS");
    if needs_netns && netns.is_none() {
        let rule = "must be the path of the container's network namespace";
        return Err(Error::Unset {
            name: "CNI_NETNS",
            rule,
        });
    }
    let netns = netns.unwrap_or_default();
    Ok(Attachment {
        container_id,
        ifname,
        netns,
        pod: Some(pod(env)?),
    })
}

/// Returns true for valid names of interfaces (dev_valid_name of net/core/dev.c, adopted by the CNI
/// specification).
fn is_interface_name(name: &str) -> bool {
    name.len() < 16
        && ![".", ".."].contains(&name)
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
}

/// Parses `CNI_ARGS`, which is `KEY=VALUE;KEY=VALUE`; keys of other plugins are ignored.
fn pod(env: Env<'_>) -> Result<Pod, Error> {
    let name = "CNI_ARGS";
    let mut pod = Pod::default();
    let Some(args) = given(env, name) else {
        return Ok(pod);
    };
    for part in args.split(';').filter(|part| !part.is_empty()) {
        let Some((key, value)) = part.split_once('=') else {
            let rule = "must be KEY=VALUE pairs separated by semicolons";
            return Err(Error::Environment {
                name,
                value: args,
                rule,
            });
        };
        let field = match key {
            "K8S_POD_NAMESPACE" => &mut pod.namespace,
            "K8S_POD_NAME" => &mut pod.name,
            "K8S_POD_UID" => &mut pod.uid,
            "K8S_POD_INFRA_CONTAINER_ID" => &mut pod.infra_container_id,
            _ => continue,
        };
        *field = value.to_owned();
    }
    Ok(pod)
}

/// Requires the name of the pod: an interface without a pod would have no policy.
fn require_pod(pod: Option<&Pod>) -> Result<(), Error> {
    let Some(pod) = pod else { return Ok(()) };
    for (name, value) in [
        ("K8S_POD_NAMESPACE", &pod.namespace),
        ("K8S_POD_NAME", &pod.name),
    ] {
        if value.is_empty() {
            return Err(Error::Unset {
                name,
                rule: "must be among the pairs of CNI_ARGS",
            });
        }
    }
    Ok(())
}
