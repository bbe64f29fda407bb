//! `get`: objects of one of Calico's kinds, in the forms that calicoctl has.

use std::str::FromStr;

use anyhow::{Result, anyhow, bail, ensure};
use margay_api::storage::Kind;
use serde_json::{Value, json};

use crate::calico::kind;
use crate::calico::table::{self, Width};
use crate::live::{self, Connection, ConnectionArgs};
use crate::objects::metadata_text;
use crate::output::Finding;

/// Fields of metadata that belong to one cluster.
const OF_CLUSTER: [&str; 9] = [
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "managedFields",
    "namespace",
    "resourceVersion",
    "selfLink",
    "uid",
];

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Kind, such as networkpolicy, gnp or ippools.
    pub kind: String,
    /// Names of objects [default: all].
    pub names: Vec<String>,
    /// ps, wide, yaml, json, name or custom-columns=HEADING,...
    #[arg(short, long, default_value = "ps")]
    pub output: GetOutput,
    /// Namespace of the objects.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Objects of all namespaces.
    #[arg(short = 'A', long, alias = "all-ns", conflicts_with_all = ["namespace", "names"])]
    pub all_namespaces: bool,
    /// Leave out what belongs to one cluster, such as versions and times.
    #[arg(long)]
    pub export: bool,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Form of the output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GetOutput {
    /// A table.
    Table(Width),
    /// YAML.
    Yaml,
    /// JSON.
    Json,
    /// `kind/name`.
    Name,
}

impl FromStr for GetOutput {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.starts_with("go-template") {
            bail!(
                "go-template: its language is that of another program; use -o json with jq, or \
                 custom-columns=HEADING,..."
            );
        }
        Ok(match text {
            "ps" => Self::Table(Width::Usual),
            "wide" => Self::Table(Width::Wide),
            "yaml" => Self::Yaml,
            "json" => Self::Json,
            "name" => Self::Name,
            _ => match text.strip_prefix("custom-columns=") {
                Some(headings) => Self::Table(Width::Custom(
                    headings.split(',').map(str::to_owned).collect(),
                )),
                None => bail!("must be ps, wide, yaml, json, name or custom-columns=HEADING,..."),
            },
        })
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let kind = kind::find(&args.kind)?;
    let namespace = (kind.namespaced && !args.all_namespaces).then_some(args.namespace.as_str());
    let objects = live::block_on(read(kind, namespace, args))?;
    Ok(Finding {
        text: show(kind, objects, args)?,
        holds: true,
    })
}

async fn read(kind: &Kind, namespace: Option<&str>, args: &Args) -> Result<Vec<Value>> {
    let cluster = Connection::open(&args.connection).await?;
    if args.names.is_empty() {
        return cluster.list_calico(kind, namespace).await;
    }
    let mut objects = Vec::new();
    for name in &args.names {
        let found = cluster.find(kind, namespace, name).await?;
        let found = found.ok_or_else(|| missing(kind, namespace, name))?;
        objects.push(found.object);
    }
    Ok(objects)
}

/// The error about an object that does not exist.
pub fn missing(kind: &Kind, namespace: Option<&str>, name: &str) -> anyhow::Error {
    match namespace {
        Some(namespace) => {
            anyhow!(
                "there is no {} {namespace}/{name}; -n names another namespace",
                kind.kind
            )
        }
        None => anyhow!("there is no {} {name}", kind.kind),
    }
}

/// Formats the objects.
fn show(kind: &Kind, mut objects: Vec<Value>, args: &Args) -> Result<String> {
    objects
        .iter_mut()
        .for_each(|object| strip(object, args.export));
    if kind.kind == "Tier" {
        // Tiers are read in the order in which packets meet them; one without an order is the last.
        let order = |tier: &Value| tier["spec"]["order"].as_f64().unwrap_or(f64::INFINITY);
        objects.sort_by(|a, b| order(a).total_cmp(&order(b)));
    }
    match &args.output {
        GetOutput::Table(width) => table::table(kind, &objects, width, args.all_namespaces),
        GetOutput::Name => {
            let name = |object: &Value| object["metadata"]["name"].as_str().map(str::to_owned);
            let lines = objects.iter().filter_map(name);
            Ok(lines
                .map(|name| format!("{}/{name}\n", kind.kind.to_lowercase()))
                .collect())
        }
        GetOutput::Json => {
            Ok(serde_json::to_string_pretty(&collected(kind, objects, &args.names))? + "\n")
        }
        GetOutput::Yaml => {
            let text = serde_saphyr::to_string(&collected(kind, objects, &args.names));
            Ok(text.map_err(|error| anyhow!("{error}"))?)
        }
    }
}

/// The object that was asked for by name, else a list.
fn collected(kind: &Kind, mut objects: Vec<Value>, names: &[String]) -> Value {
    if names.len() == 1 && objects.len() == 1 {
        return objects.remove(0);
    }
    json!({
        "apiVersion": "projectcalico.org/v3",
        "kind": format!("{}List", kind.kind),
        "metadata": {},
        "items": objects,
    })
}

/// Removes what no user reads, and for an export all that belongs to one cluster.
fn strip(object: &mut Value, is_export: bool) {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("managedFields");
        if is_export {
            metadata.retain(|field, _| !OF_CLUSTER.contains(&field.as_str()));
        }
    }
    if is_export && let Some(object) = object.as_object_mut() {
        object.remove("status");
    }
}

/// Checks that an object has a name and is where its kind belongs; returns the namespace.
pub fn place(kind: &Kind, object: &Value, namespace: &str) -> Result<Option<String>> {
    let name = metadata_text(object, kind.kind, "name")?;
    let within = metadata_text(object, kind.kind, "namespace")?;
    ensure!(
        name.is_some(),
        "{}: metadata.name: \"\": an object has a name; add it",
        kind.kind
    );
    match (kind.namespaced, within) {
        (true, within) => Ok(Some(within.unwrap_or(namespace).to_owned())),
        (false, None) => Ok(None),
        (false, Some(within)) => bail!(
            "{} {}: metadata.namespace: {within:?}: this kind is in no namespace; remove it",
            kind.kind,
            name.unwrap_or_default()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(output: &str, names: &[&str], export: bool) -> Args {
        Args {
            kind: "tier".to_owned(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            output: output.parse().expect("a form"),
            namespace: "default".to_owned(),
            all_namespaces: false,
            export,
            connection: ConnectionArgs::default(),
        }
    }

    fn tier(name: &str, order: Option<u64>) -> Value {
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "Tier",
            "metadata": {"name": name, "uid": "u", "resourceVersion": "1", "managedFields": []},
            "spec": {"order": order},
        })
    }

    #[test]
    fn objects_are_shown_in_every_form() {
        let kind = kind::find("tier").expect("a kind");
        let tiers = vec![
            tier("last", None),
            tier("b", Some(20)),
            tier("a", Some(100)),
        ];
        let shown =
            |output: &str| show(kind, tiers.clone(), &args(output, &[], false)).expect("text");
        assert_eq!(
            shown("ps"),
            "NAME   ORDER\nb      20\na      100\nlast   <nil>\n"
        );
        assert_eq!(shown("name"), "tier/b\ntier/a\ntier/last\n");
        let list: Value = serde_json::from_str(&shown("json")).expect("JSON");
        assert_eq!(
            (&list["kind"], list["items"].as_array().map(Vec::len)),
            (&json!("TierList"), Some(3))
        );
        let yaml: Value = serde_saphyr::from_str(&shown("yaml")).expect("YAML");
        assert_eq!(yaml, list);
    }

    #[test]
    fn an_export_has_nothing_of_its_cluster() {
        let kind = kind::find("tier").expect("a kind");
        let text = show(kind, vec![tier("a", Some(1))], &args("json", &["a"], true)).expect("text");
        let object: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(object["metadata"], json!({"name": "a"}));
    }

    #[test]
    fn unknown_forms_are_refused_with_a_reason() {
        let error = |text: &str| text.parse::<GetOutput>().expect_err("refused").to_string();
        assert!(error("go-template={{.}}").contains("use -o json with jq"));
        assert!(error("tabel").contains("must be ps"));
    }

    #[test]
    fn objects_are_where_their_kind_belongs() {
        let pool = Kind::of("IPPool").expect("a kind");
        let policy = Kind::of("NetworkPolicy").expect("a kind");
        let object =
            |namespace: Option<&str>| json!({"metadata": {"name": "a", "namespace": namespace}});
        assert_eq!(place(pool, &object(None), "n").ok(), Some(None));
        assert_eq!(
            place(policy, &object(None), "n").ok(),
            Some(Some("n".to_owned()))
        );
        assert_eq!(
            place(policy, &object(Some("m")), "n").ok(),
            Some(Some("m".to_owned()))
        );
        assert!(place(pool, &object(Some("m")), "n").is_err());
        assert!(place(pool, &json!({"metadata": {}}), "n").is_err());
    }
}
