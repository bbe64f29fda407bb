//! Network configuration: the fields that the plugin itself reads. The agent gets all of it.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use margay_proto::cni::{MAX_MESSAGE, REMOVED, SOCKET, ValidAttachment};
use serde_json::{Map, Value};

use crate::error::Error;

/// Maximum length of the configuration: half of a message, so that the previous result fits beside
/// it.
const LONGEST: usize = MAX_MESSAGE / 2;
/// Default of `policy_setup_timeout_seconds`: time that the agent waits for policy.
const SETUP: Duration = Duration::from_secs(30);
/// Time that the plugin waits beyond that, for everything else that the agent does.
const SLACK: Duration = Duration::from_secs(30);
/// Maximum of `policy_setup_timeout_seconds`: kubelet gives up on a sandbox after four minutes.
const LONGEST_SETUP: u64 = 180;

/// Supported version of the CNI specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.1: addresses carry their family.
    V031,
    /// 0.4.0: CHECK.
    V040,
    /// 1.0.0: addresses no longer carry their family.
    V100,
    /// 1.1.0: GC, STATUS, and MTUs in results.
    V110,
}

impl Version {
    /// Version of errors when the configuration does not specify one.
    pub const NEWEST: Self = Self::V110;
    /// Oldest first.
    pub const ALL: [Self; 4] = [Self::V031, Self::V040, Self::V100, Self::V110];
    /// For messages.
    pub(crate) const LIST: &'static str = "0.3.1, 0.4.0, 1.0.0, 1.1.0";

    /// Returns the version as it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V031 => "0.3.1",
            Self::V040 => "0.4.0",
            Self::V100 => "1.0.0",
            Self::V110 => "1.1.0",
        }
    }

    /// Parses a version; `None` if it is not supported.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|version| version.as_str() == text)
    }
}

/// Fields that the plugin itself reads.
#[derive(Debug)]
pub struct Config {
    /// `cniVersion`.
    pub version: Version,
    /// Name of the network.
    pub name: String,
    /// `margay.socket`, where the agent listens.
    pub socket: PathBuf,
    /// `margay.removed`, the file that is there when Margay has been removed from the node.
    pub removed: PathBuf,
    /// Time limit of a call, from `policy_setup_timeout_seconds`.
    pub timeout: Duration,
    /// `prevResult` as JSON; empty if there is none.
    pub prev_result: Vec<u8>,
    /// `cni.dev/valid-attachments`; none if the key is missing.
    pub valid: Option<Vec<ValidAttachment>>,
}

/// Reads standard input to its end.
pub fn read(stdin: &mut dyn Read) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    stdin
        .take(LONGEST as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::Stdin)?;
    if bytes.len() > LONGEST {
        return Err(Error::Decode(format!("longer than {LONGEST} bytes")));
    }
    Ok(bytes)
}

/// Returns the version to answer in, even if other fields are invalid.
pub fn version_in(bytes: &[u8]) -> Version {
    let value: Option<Value> = serde_json::from_slice(bytes).ok();
    let text = value
        .as_ref()
        .and_then(|value| value.get("cniVersion"))
        .and_then(Value::as_str);
    text.and_then(Version::parse).unwrap_or(Version::NEWEST)
}

/// Parses and validates the fields that the plugin itself needs.
pub fn parse(bytes: &[u8]) -> Result<Config, Error> {
    let value: Value =
        serde_json::from_slice(bytes).map_err(|error| Error::Decode(error.to_string()))?;
    let Value::Object(fields) = value else {
        return Err(Error::Decode("it is not a JSON object".to_owned()));
    };
    let version = string(&fields, "cniVersion")?.unwrap_or_default();
    let version = Version::parse(version).ok_or_else(|| Error::Version {
        found: version.to_owned(),
    })?;
    check_ipam(&fields)?;
    Ok(Config {
        version,
        name: name(&fields)?,
        socket: path(&fields, "socket", "margay.socket", SOCKET)?,
        removed: path(&fields, "removed", "margay.removed", REMOVED)?,
        timeout: timeout(&fields)?,
        prev_result: match fields.get("prevResult") {
            None | Some(Value::Null) => Vec::new(),
            Some(value @ Value::Object(_)) => value.to_string().into_bytes(),
            Some(other) => return Err(invalid("prevResult", other, "must be an object")),
        },
        valid: valid(&fields)?,
    })
}

fn invalid(field: &'static str, value: &Value, rule: &'static str) -> Error {
    Error::Config {
        field,
        value: value.to_string(),
        rule,
    }
}

fn string<'a>(fields: &'a Map<String, Value>, key: &'static str) -> Result<Option<&'a str>, Error> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(invalid(key, other, "must be a string")),
    }
}

fn name(fields: &Map<String, Value>) -> Result<String, Error> {
    let name = string(fields, "name")?.unwrap_or_default();
    if !is_identifier(name) {
        let rule = "must be the network's name: letters, digits, _ . and -, beginning with a \
                    letter or digit";
        return Err(invalid("name", &Value::from(name), rule));
    }
    Ok(name.to_owned())
}

/// Returns true for the form of container ids and network names in the specification.
pub(crate) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// Parses a path of our own part of the configuration.
fn path(
    fields: &Map<String, Value>,
    name: &str,
    field: &'static str,
    default: &str,
) -> Result<PathBuf, Error> {
    let rule = "must be an absolute path shorter than 108 bytes";
    let ours = match fields.get("margay") {
        None | Some(Value::Null) => return Ok(PathBuf::from(default)),
        Some(Value::Object(ours)) => ours,
        Some(other) => return Err(invalid("margay", other, "must be an object")),
    };
    match ours.get(name) {
        None | Some(Value::Null) => Ok(PathBuf::from(default)),
        Some(Value::String(path)) if path.starts_with('/') && path.len() < 108 => {
            Ok(PathBuf::from(path))
        }
        Some(other) => Err(invalid(field, other, rule)),
    }
}

fn timeout(fields: &Map<String, Value>) -> Result<Duration, Error> {
    let key = "policy_setup_timeout_seconds";
    match fields.get(key) {
        None | Some(Value::Null) => Ok(SETUP + SLACK),
        Some(value) => match value.as_u64() {
            Some(seconds) if seconds <= LONGEST_SETUP => Ok(Duration::from_secs(seconds) + SLACK),
            _ => Err(invalid(key, value, "must be whole seconds from 0 to 180")),
        },
    }
}

/// Refuses other IPAM plugins: addresses come from the agent, and a second allocator would assign
/// them twice.
fn check_ipam(fields: &Map<String, Value>) -> Result<(), Error> {
    let kind = fields.get("ipam").and_then(|ipam| ipam.get("type"));
    match kind {
        None => Ok(()),
        Some(Value::String(kind)) if ["margay", "calico-ipam"].contains(&kind.as_str()) => Ok(()),
        Some(other) => Err(Error::UnsupportedField {
            key: "ipam.type",
            value: other.to_string(),
            rule: "must be calico-ipam, which the agent implements",
        }),
    }
}

/// Reads the attachments that stay. Some callers write only the key of a draft of the
/// specification, `cni.dev/attachments`.
fn valid(fields: &Map<String, Value>) -> Result<Option<Vec<ValidAttachment>>, Error> {
    let key = "cni.dev/valid-attachments";
    let rule = "must be a list of objects with containerID and ifname";
    let given = fields
        .get(key)
        .or_else(|| fields.get("cni.dev/attachments"));
    let list = match given {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(invalid(key, other, rule)),
    };
    let one = |entry: &Value| {
        let text = |name: &str| entry.get(name).and_then(Value::as_str).map(str::to_owned);
        match (text("containerID"), text("ifname")) {
            (Some(container_id), Some(ifname)) => Ok(ValidAttachment {
                container_id,
                ifname,
            }),
            _ => Err(invalid(key, entry, rule)),
        }
    };
    list.iter()
        .map(one)
        .collect::<Result<Vec<_>, _>>()
        .map(Some)
}
