//! A table as data: a fixture, actions step by step, and the allowed connections after each step.
//!
//! A file is a list of cases, or an object with a `Fixture` of its own and `Cases`; it may be
//! compressed (`.gz`). Unknown fields are ignored, unknown actions are not. In policies
//! `{{ip NAMESPACE/POD}}` stands for the address of a pod.

use std::fs::File;
use std::io::Read;
use std::net::Ipv4Addr;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use flate2::read::GzDecoder;
use ipnet::Ipv4Net;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::probe::Protocol;

/// Cases over one fixture.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Table {
    /// State before each case.
    #[serde(default)]
    pub fixture: Fixture,
    /// The cases; each starts from the bare fixture.
    pub cases: Vec<Case>,
}

/// State before each case.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Fixture {
    /// Range of the pool that pods get their addresses from.
    #[serde(default = "cidr")]
    pub cidr: Ipv4Net,
    /// True if the pods have the addresses of the range one after another, in the order in which
    /// they are written.
    #[serde(default)]
    pub pin: bool,
    /// Namespaces with their pods.
    pub namespaces: Vec<FixtureNamespace>,
}

/// A namespace of the fixture.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FixtureNamespace {
    /// Its name.
    pub name: String,
    /// Its labels, beside the one that the API server gives.
    #[serde(default)]
    pub labels: Value,
    /// Its service accounts beside the one that every namespace has.
    #[serde(default)]
    pub service_accounts: Vec<FixtureAccount>,
    /// Its pods.
    pub pods: Vec<FixturePod>,
}

/// A service account of the fixture.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FixtureAccount {
    /// Its name.
    pub name: String,
    /// Its labels.
    #[serde(default)]
    pub labels: Value,
}

/// A pod of the fixture.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FixturePod {
    /// Its name.
    pub name: String,
    /// Its labels.
    #[serde(default)]
    pub labels: Value,
    /// Its service account.
    #[serde(default = "default_account")]
    pub service_account: String,
    /// On which node it is, from 0; absent: spread.
    pub node: Option<usize>,
    /// Ports that it serves.
    pub ports: Vec<Port>,
}

/// A port of a pod's container.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Port {
    /// Its name; may be empty.
    #[serde(default)]
    pub name: String,
    /// Its transport.
    #[serde(deserialize_with = "protocol")]
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
}

/// A case.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// Its number in the table.
    pub n: u32,
    /// Description.
    pub desc: String,
    /// Tags: the features that it uses.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Its steps.
    pub steps: Vec<Step>,
}

/// A step: actions, and what holds after them.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Step {
    /// Actions, in order; a table may have null for none.
    #[serde(default, deserialize_with = "list")]
    pub actions: Vec<Action>,
    /// The verdicts; what is not listed is not asked.
    #[serde(default, deserialize_with = "list")]
    pub rows: Vec<Row>,
}

/// Actions.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "the names are those of the data")]
pub enum Action {
    #[serde(rename_all = "PascalCase")]
    CreatePolicy { policy: Value },
    #[serde(rename_all = "PascalCase")]
    UpdatePolicy { policy: Value },
    #[serde(rename_all = "PascalCase")]
    DeletePolicy { namespace: String, name: String },
    #[serde(rename_all = "PascalCase")]
    CreateClusterPolicy { policy: Value },
    #[serde(rename_all = "PascalCase")]
    UpdateClusterPolicy { policy: Value },
    #[serde(rename_all = "PascalCase")]
    DeleteClusterPolicy { name: String },
    /// Creates an object of any kind, or replaces it.
    #[serde(rename_all = "PascalCase")]
    Apply { object: Value },
    /// Deletes the object of this `apiVersion`, `kind`, namespace and name.
    #[serde(rename_all = "PascalCase")]
    Remove { object: Value },
    #[serde(rename_all = "PascalCase")]
    CreateNamespace { namespace: String, labels: Value },
    #[serde(rename_all = "PascalCase")]
    SetNamespaceLabels { namespace: String, labels: Value },
    #[serde(rename_all = "PascalCase")]
    DeleteNamespace { namespace: String },
    #[serde(rename_all = "PascalCase")]
    CreatePod {
        namespace: String,
        pod: String,
        labels: Value,
    },
    #[serde(rename_all = "PascalCase")]
    SetPodLabels {
        namespace: String,
        pod: String,
        labels: Value,
    },
    #[serde(rename_all = "PascalCase")]
    DeletePod { namespace: String, pod: String },
}

/// Target.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// A pod, `namespace/name`.
    Pod(String),
    /// A node by its number from 0: a process in the node's own network.
    Node(usize),
}

/// One verdict: `from/pod to/pod PROTO/port allowed|blocked`. The target may be `node:NUMBER`; the
/// port of `ICMP` is the type.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// Source, `namespace/name`.
    pub from: String,
    /// Target.
    pub to: Target,
    /// By which transport.
    pub protocol: Protocol,
    /// At which port.
    pub port: u16,
    /// True if there is an answer; otherwise there is silence.
    pub allowed: bool,
}

impl Table {
    /// Reads a table.
    pub fn read(path: &Path) -> Result<Self> {
        let open = || File::open(path).with_context(|| format!("no table {}", path.display()));
        let mut text = String::new();
        match path.extension() {
            Some(extension) if extension == "gz" => {
                GzDecoder::new(open()?).read_to_string(&mut text)?
            }
            _ => open()?.read_to_string(&mut text)?,
        };
        Self::parse(&text).with_context(|| format!("{} is not a table", path.display()))
    }

    /// Reads a table of this repository.
    pub fn of_tests(name: &str) -> Result<Self> {
        Self::read(
            &Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("data")
                .join(name),
        )
    }

    /// Reads the text of a table.
    pub fn parse(text: &str) -> Result<Self> {
        if text.trim_start().starts_with('[') {
            return Ok(Self {
                fixture: Fixture::default(),
                cases: serde_json::from_str(text)?,
            });
        }
        Ok(serde_json::from_str(text)?)
    }

    /// Keeps the cases of these numbers.
    pub fn keep(&mut self, numbers: &[u32]) -> Result<()> {
        if let Some(missing) = numbers
            .iter()
            .find(|number| self.cases.iter().all(|case| case.n != **number))
        {
            bail!("the table has no case {missing}");
        }
        self.cases.retain(|case| numbers.contains(&case.n));
        Ok(())
    }

    /// Keeps few cases that together have every tag of the table, and those with more than one
    /// step.
    pub fn keep_cover(&mut self) {
        let mut covered = std::collections::BTreeSet::new();
        self.cases.retain(|case| {
            let is_new = case
                .tags
                .iter()
                .filter(|tag| covered.insert((*tag).clone()))
                .count()
                > 0;
            is_new || case.steps.len() > 1
        });
    }
}

impl Default for Fixture {
    /// Namespaces x, y, z with pods a, b, c each, all serving TCP, UDP and SCTP on 80 and 81, at
    /// 192.168.1.1 and on.
    fn default() -> Self {
        let pod = |name: &str| FixturePod {
            name: name.to_owned(),
            labels: serde_json::json!({"pod": name}),
            service_account: default_account(),
            node: None,
            ports: default_ports(),
        };
        let namespace = |name: &str| FixtureNamespace {
            name: name.to_owned(),
            labels: serde_json::json!({"ns": name}),
            service_accounts: Vec::new(),
            pods: ["a", "b", "c"].map(pod).into(),
        };
        Self {
            cidr: cidr(),
            pin: true,
            namespaces: ["x", "y", "z"].map(namespace).into(),
        }
    }
}

/// Default ports of pods: `serve-80-tcp` and so on.
pub fn default_ports() -> Vec<Port> {
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let of = |port: u16| {
        protocols.map(|protocol| Port {
            name: format!("serve-{port}-{protocol}"),
            protocol,
            port,
        })
    };
    [of(80), of(81)].concat()
}

/// The service account of pods that name none.
pub fn default_account() -> String {
    "default".to_owned()
}

fn cidr() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 1, 0), 24)
}

fn protocol<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Protocol, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.to_lowercase()
        .parse()
        .map_err(serde::de::Error::custom)
}

impl FromStr for Row {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [from, to, port, verdict] = words[..] else {
            bail!("row `{text}` is not `from/pod to/pod PROTO/port allowed|blocked`");
        };
        let (protocol, port) = port
            .split_once('/')
            .with_context(|| format!("row `{text}`: `{port}` is not PROTO/port"))?;
        Ok(Self {
            from: from.to_owned(),
            to: match to.strip_prefix("node:") {
                Some(number) => Target::Node(
                    number
                        .parse()
                        .with_context(|| format!("row `{text}`: node"))?,
                ),
                None => Target::Pod(to.to_owned()),
            },
            protocol: protocol
                .to_lowercase()
                .parse()
                .with_context(|| format!("row `{text}`"))?,
            port: port
                .parse()
                .with_context(|| format!("row `{text}`: port"))?,
            allowed: match verdict {
                "allowed" => true,
                "blocked" => false,
                _ => bail!("row `{text}`: `{verdict}` is neither allowed nor blocked"),
            },
        })
    }
}

/// A list, or null for an empty one: what Go writes of a list that was never made.
fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = if self.allowed { "allowed" } else { "blocked" };
        let protocol = self.protocol.to_string().to_uppercase();
        match &self.to {
            Target::Pod(to) => write!(out, "{} {to} {protocol}/{} {verdict}", self.from, self.port),
            Target::Node(to) => write!(
                out,
                "{} node:{to} {protocol}/{} {verdict}",
                self.from, self.port
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_as_they_are_written() {
        for text in [
            "x/a y/b TCP/80 allowed",
            "x/a node:2 UDP/53 blocked",
            "x/a y/b SCTP/81 blocked",
            "x/a y/b ICMP/8 allowed",
        ] {
            assert_eq!(text.parse::<Row>().unwrap().to_string(), text);
        }
        for (text, message) in [
            ("x/a y/b TCP/80", "is not `from/pod"),
            ("x/a y/b 80 allowed", "is not PROTO/port"),
            ("x/a y/b GRE/80 allowed", "`gre` is none of"),
            ("x/a y/b TCP/80 perhaps", "`perhaps` is neither"),
            ("x/a y/b TCP/eighty allowed", "port"),
        ] {
            let error = format!("{:#}", text.parse::<Row>().unwrap_err());
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn a_table_has_a_fixture_of_its_own_or_the_usual_one() {
        let usual = Table::parse(r#"[{"n": 1, "desc": "d", "steps": []}]"#).unwrap();
        assert_eq!(
            (usual.fixture.namespaces.len(), usual.fixture.pin),
            (3, true)
        );
        let text = r#"{"Fixture": {"Namespaces": [{"Name": "g", "Pods": [{"Name": "p", "Ports": [
            {"Name": "dns", "Protocol": "UDP", "Port": 53}]}]}]}, "Cases": []}"#;
        let own = Table::parse(text).unwrap();
        assert_eq!(
            own.fixture.namespaces[0].pods[0].ports[0].protocol,
            Protocol::Udp
        );
        let none = Table::parse(
            r#"[{"n": 1, "desc": "d", "steps": [{"Actions": null, "Rows": null}, {}]}]"#,
        )
        .unwrap();
        assert!(
            none.cases[0]
                .steps
                .iter()
                .all(|step| step.actions.is_empty() && step.rows.is_empty())
        );
        let unknown =
            r#"[{"n": 1, "desc": "d", "steps": [{"Actions": [{"Explode": {}}], "Rows": []}]}]"#;
        assert!(format!("{:#}", Table::parse(unknown).unwrap_err()).contains("Explode"));
    }

    #[test]
    fn cases_are_chosen_by_number_or_by_what_they_cover() {
        let case = |n: u32, tags: &str| {
            format!(r#"{{"n": {n}, "desc": "", "tags": {tags}, "steps": []}}"#)
        };
        let text = format!(
            "[{},{},{}]",
            case(1, r#"["a"]"#),
            case(2, r#"["a"]"#),
            case(3, r#"["a", "b"]"#)
        );
        let numbers = |table: &Table| table.cases.iter().map(|case| case.n).collect::<Vec<_>>();
        let mut table = Table::parse(&text).unwrap();
        table.keep_cover();
        assert_eq!(numbers(&table), [1, 3]);
        table.keep(&[3]).unwrap();
        assert_eq!(numbers(&table), [3]);
        assert!(table.keep(&[2]).is_err());
    }
}
