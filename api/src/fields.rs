//! Settings without effect. The API keeps every field that a user writes, because objects of other
//! versions must stay complete; so the effect of each field is listed in one table per kind
//! (`fields/*.tsv`), and fields that are set and have no effect are reported.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Bound;
use std::sync::LazyLock;

use serde_json::Value;

/// Maximum length of a value in a message, in characters.
const SHOWN: usize = 60;
/// Maximum number of edits in a misspelt name.
const MISSPELT: usize = 2;

/// Effect of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// It has an effect, or an invalid value of it is reported elsewhere.
    Acts,
    /// It has no effect.
    Idle,
    /// It has no effect, and a user who relies on it is less protected than he thinks.
    Unsafe,
}

/// One line of a table.
#[derive(Debug)]
struct Rule {
    effect: Effect,
    /// Values that equal Margay's behaviour.
    harmless: Vec<&'static str>,
    meaning: &'static str,
}

/// The rules of a kind, by the path of the field below `spec`.
#[derive(Debug)]
pub struct Table(BTreeMap<&'static str, Rule>);

/// Fields of Installation.
pub static INSTALLATION: LazyLock<Table> =
    LazyLock::new(|| Table::parse(include_str!("fields/installation.tsv")));
/// Fields of FelixConfiguration.
pub static FELIX: LazyLock<Table> =
    LazyLock::new(|| Table::parse(include_str!("fields/felix.tsv")));
/// Fields of BGPConfiguration.
pub static BGP: LazyLock<Table> = LazyLock::new(|| Table::parse(include_str!("fields/bgp.tsv")));
/// Fields of IPPool.
pub static POOL: LazyLock<Table> = LazyLock::new(|| Table::parse(include_str!("fields/pool.tsv")));
/// Fields of IPAMConfiguration.
pub static IPAM: LazyLock<Table> = LazyLock::new(|| Table::parse(include_str!("fields/ipam.tsv")));
/// Fields of KubeControllersConfiguration.
pub static CONTROLLERS: LazyLock<Table> =
    LazyLock::new(|| Table::parse(include_str!("fields/controllers.tsv")));

/// Returns the table of a kind; `None` for kinds all of whose fields act.
pub fn table(kind: &str) -> Option<&'static Table> {
    match kind {
        "Installation" => Some(&INSTALLATION),
        "FelixConfiguration" => Some(&FELIX),
        "BGPConfiguration" => Some(&BGP),
        "IPPool" => Some(&POOL),
        "IPAMConfiguration" => Some(&IPAM),
        "KubeControllersConfiguration" => Some(&CONTROLLERS),
        _ => None,
    }
}

/// A field or an object without effect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ignored {
    /// True when somebody is less protected than he thinks, or has misspelt a name.
    pub is_unsafe: bool,
    /// Kind and name.
    pub object: String,
    /// Field below `spec` with its value; empty for the object itself.
    pub field: String,
    /// Consequence for the user.
    pub meaning: String,
}

impl fmt::Display for Ignored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gap = if self.field.is_empty() { "" } else { ", " };
        write!(f, "{}{gap}{}: {}", self.object, self.field, self.meaning)
    }
}

impl Table {
    /// Reads a table. Panics on a bad line: tables are part of the program, and a test reads them
    /// all.
    fn parse(text: &'static str) -> Self {
        let rule = |line: &'static str| {
            let mut columns = line.split('\t');
            let mut column = || columns.next().unwrap_or_default();
            let (field, effect, harmless, meaning) = (column(), column(), column(), column());
            let effect = match effect {
                "acts" => Effect::Acts,
                "idle" => Effect::Idle,
                "unsafe" => Effect::Unsafe,
                other => panic!("{field}: {other:?}: must be acts, idle or unsafe"),
            };
            let harmless = harmless
                .split(',')
                .filter(|value| !value.is_empty())
                .collect();
            (
                field,
                Rule {
                    effect,
                    harmless,
                    meaning,
                },
            )
        };
        Self(
            text.lines()
                .filter(|line| !line.starts_with('#'))
                .map(rule)
                .collect(),
        )
    }

    /// Adds the fields of an object's spec that have no effect.
    pub fn find_ignored(&self, object: &str, spec: &Value, found: &mut BTreeSet<Ignored>) {
        self.descend(&mut Look { object, found }, "", "spec", spec);
    }

    /// `path` is as in the table, with `[]` for every element of a list; `shown` is the path for
    /// the user.
    fn descend(&self, look: &mut Look<'_>, path: &str, shown: &str, value: &Value) {
        for (name, value) in value
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(_, value)| !is_unset(value))
        {
            let below = if path.is_empty() {
                name.clone()
            } else {
                format!("{path}.{name}")
            };
            let shown = format!("{shown}.{name}");
            if let Some(rule) = self
                .0
                .get(below.as_str())
                .or_else(|| self.0.get(format!("{below}.*").as_str()))
            {
                look.check(rule, &shown, value);
            } else if self.has_below(&format!("{below}[].")) {
                for (index, element) in value.as_array().into_iter().flatten().enumerate() {
                    self.descend(
                        look,
                        &format!("{below}[]"),
                        &format!("{shown}[{index}]"),
                        element,
                    );
                }
            } else if self.has_below(&format!("{below}.")) {
                self.descend(look, &below, &shown, value);
            } else {
                look.add_unknown(self.nearest(path, name), &shown, value);
            }
        }
    }

    fn has_below(&self, prefix: &str) -> bool {
        self.0
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .next()
            .is_some_and(|(field, _)| field.starts_with(prefix))
    }

    /// Returns the similar name beside this one in the table, which is probably meant.
    fn nearest(&self, path: &str, name: &str) -> Option<&'static str> {
        let prefix = if path.is_empty() {
            String::new()
        } else {
            format!("{path}.")
        };
        let siblings = self
            .0
            .keys()
            .copied()
            .filter_map(|field| field.strip_prefix(prefix.as_str()));
        nearest(
            siblings.map(|rest| rest.split(['.', '[']).next().unwrap_or_default()),
            name,
        )
    }
}

/// Returns the name that is probably meant by a misspelt one.
fn nearest<'a>(names: impl Iterator<Item = &'a str>, name: &str) -> Option<&'a str> {
    let distance = |other: &str| strsim::osa_distance(&other.to_lowercase(), &name.to_lowercase());
    let nearest = names.map(|other| (distance(other), other)).min();
    nearest
        .filter(|(edits, _)| *edits <= MISSPELT)
        .map(|(_, other)| other)
}

/// Adds the fields of a spec that its schema (OpenAPI v3, as in a definition) does not have.
pub fn find_unknown(object: &str, schema: &Value, spec: &Value, found: &mut BTreeSet<Ignored>) {
    descend_schema(&mut Look { object, found }, "spec", schema, spec);
}

fn descend_schema(look: &mut Look<'_>, shown: &str, schema: &Value, value: &Value) {
    for (index, element) in value.as_array().into_iter().flatten().enumerate() {
        descend_schema(
            look,
            &format!("{shown}[{index}]"),
            &schema["items"],
            element,
        );
    }
    let Some(known) = schema["properties"].as_object() else {
        return;
    };
    for (name, value) in value
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, value)| !is_unset(value))
    {
        let shown = format!("{shown}.{name}");
        match known.get(name) {
            Some(schema) => descend_schema(look, &shown, schema, value),
            None if schema["x-kubernetes-preserve-unknown-fields"] == true => {}
            None => look.add_unknown(
                nearest(known.keys().map(String::as_str), name),
                &shown,
                value,
            ),
        }
    }
}

/// Collects findings about one object.
struct Look<'a> {
    object: &'a str,
    found: &'a mut BTreeSet<Ignored>,
}

impl Look<'_> {
    fn check(&mut self, rule: &Rule, field: &str, value: &Value) {
        if rule.effect != Effect::Acts && !rule.harmless.contains(&text(value).as_str()) {
            self.add(
                rule.effect == Effect::Unsafe,
                field,
                value,
                rule.meaning.to_owned(),
            );
        }
    }

    fn add_unknown(&mut self, nearest: Option<&str>, field: &str, value: &Value) {
        let meaning = match nearest {
            Some(name) => {
                format!("there is no such field, so it has no effect; did you mean {name}?")
            }
            None => "this version does not know the field, and it has no effect".to_owned(),
        };
        self.add(nearest.is_some(), field, value, meaning);
    }

    fn add(&mut self, is_unsafe: bool, field: &str, value: &Value, meaning: String) {
        let field = format!("{field} is {}", shortened(&text(value)));
        self.found.insert(Ignored {
            is_unsafe,
            object: self.object.to_owned(),
            field,
            meaning,
        });
    }
}

fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(is_unset),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Formats a value: text as it is, everything else as JSON.
fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
#[path = "fields_tests.rs"]
mod tests;
