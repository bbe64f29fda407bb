//! `create`, `apply`, `replace`, `delete`, `patch` and `label`. What would not be enforced as
//! written is not written.

use anyhow::{Context, Result, anyhow, bail, ensure};
use margay_api::storage::Kind;
use serde_json::{Map, Value};

use crate::calico::get::{missing, place};
use crate::calico::kind;
use crate::live::{self, Connection, ConnectionArgs, Found};
use crate::manifest::{self, Origin};
use crate::objects::{Content, Objects};
use crate::output::Finding;

/// Kinds that only programs write.
const OF_PROGRAMS: [&str; 4] = [
    "BlockAffinity",
    "ClusterInformation",
    "IPAMBlock",
    "IPAMHandle",
];

/// Objects out of files.
#[derive(Clone, Debug, clap::Args)]
pub struct FileArgs {
    /// File or folder of manifests; - is standard input.
    #[arg(short = 'f', long = "filename", value_name = "PATH", required = true)]
    pub files: Vec<String>,
    /// Namespace of objects without one.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Leave out objects that exist already (create), or that do not (replace).
    #[arg(long, alias = "skip-not-exists")]
    pub skip_exists: bool,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Objects to delete.
#[derive(Clone, Debug, clap::Args)]
pub struct DeleteArgs {
    /// Kind, if it is not by file.
    #[arg(required_unless_present = "files", requires = "names")]
    pub kind: Option<String>,
    /// Names.
    pub names: Vec<String>,
    /// File or folder of manifests that name the objects; - is standard input.
    #[arg(
        short = 'f',
        long = "filename",
        value_name = "PATH",
        conflicts_with = "kind"
    )]
    pub files: Vec<String>,
    /// Namespace of the objects.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Leave out objects that do not exist.
    #[arg(long)]
    pub skip_not_exists: bool,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// A change of an object.
#[derive(Clone, Debug, clap::Args)]
pub struct PatchArgs {
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Fields to change, as JSON or YAML; null removes one (RFC 7396).
    #[arg(short, long)]
    pub patch: String,
    /// merge; strategic is the same for these kinds.
    #[arg(short = 't', long = "type", default_value = "merge")]
    #[arg(value_parser = ["merge", "strategic"])]
    pub kind_of_patch: String,
    /// Namespace of the object.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// A change of a label.
#[derive(Clone, Debug, clap::Args)]
pub struct LabelArgs {
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// KEY=VALUE, or KEY with --remove.
    pub label: String,
    /// Replace another value.
    #[arg(long, conflicts_with = "remove")]
    pub overwrite: bool,
    /// Remove the label.
    #[arg(long)]
    pub remove: bool,
    /// Namespace of the object.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// What is done with objects out of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Creates what does not exist.
    Create,
    /// Creates or replaces.
    Apply,
    /// Replaces what exists.
    Replace,
}

/// An object of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// Its kind.
    pub kind: &'static Kind,
    /// Its namespace, if its kind is in one.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// As it is to be.
    pub object: Value,
}

/// Runs `create`, `apply` or `replace`. Nothing is written unless every object is right.
pub fn run(verb: Verb, args: &FileArgs) -> Result<Finding> {
    let written = read(&args.files, &args.namespace)?;
    let text = live::block_on(async {
        let cluster = Connection::open(&args.connection).await?;
        let mut text = String::new();
        for one in written {
            let subject = format!("{} {}", one.kind.kind, one.name);
            let done = write(&cluster, verb, one, args.skip_exists).await?;
            text += &format!("{subject}: {done}\n");
        }
        Ok(text)
    })?;
    Ok(Finding { text, holds: true })
}

/// Writes an object; returns what was done.
pub async fn write(
    cluster: &Connection,
    verb: Verb,
    one: Written,
    skips: bool,
) -> Result<&'static str> {
    let Written {
        kind,
        namespace,
        name,
        object,
    } = one;
    let subject = format!("{} {name}", kind.kind);
    let found = cluster.find(kind, namespace.as_deref(), &name).await?;
    Ok(match (verb, found) {
        (Verb::Create, Some(_)) | (Verb::Replace, None) if skips => "left as it is",
        (Verb::Create, Some(_)) => bail!("{subject} exists already; use apply or replace"),
        (Verb::Replace, None) => return Err(missing(kind, namespace.as_deref(), &name)),
        (_, Some(found)) => {
            cluster
                .replace(kind, &found, object)
                .await
                .with_context(|| subject.clone())?;
            "replaced"
        }
        (_, None) => {
            cluster
                .create(kind, object)
                .await
                .with_context(|| subject.clone())?;
            "created"
        }
    })
}

/// Runs `delete`.
pub fn delete(args: &DeleteArgs) -> Result<Finding> {
    let mut wanted = Vec::new();
    if let Some(kind) = &args.kind {
        let kind = writable(kind::find(kind)?)?;
        let namespace = kind.namespaced.then(|| args.namespace.clone());
        wanted.extend(
            args.names
                .iter()
                .map(|name| (kind, namespace.clone(), name.clone())),
        );
    }
    let named = objects_of(&args.files, &args.namespace)?.into_iter();
    wanted.extend(named.map(|one| (one.kind, one.namespace, one.name)));
    let text = live::block_on(async {
        let cluster = Connection::open(&args.connection).await?;
        let mut text = String::new();
        for (kind, namespace, name) in wanted {
            match cluster.find(kind, namespace.as_deref(), &name).await? {
                Some(found) => {
                    cluster
                        .delete(kind, &found)
                        .await
                        .with_context(|| format!("{} {name}", kind.kind))?;
                    text += &format!("{} {name}: deleted\n", kind.kind);
                }
                None if args.skip_not_exists => {}
                None => return Err(missing(kind, namespace.as_deref(), &name)),
            }
        }
        Ok(text)
    })?;
    Ok(Finding { text, holds: true })
}

/// Runs `patch`.
pub fn patch(args: &PatchArgs) -> Result<Finding> {
    let patch: Value = serde_saphyr::from_str(&args.patch)
        .map_err(|error| anyhow!("--patch: neither JSON nor YAML: {error}"))?;
    ensure!(
        patch.is_object(),
        "--patch: must be a map of the fields to change"
    );
    let place = (
        args.kind.as_str(),
        args.namespace.as_str(),
        args.name.as_str(),
    );
    change(&args.connection, place, |object| {
        merge(object, &patch);
        Ok(())
    })
}

/// Runs `label`.
pub fn label(args: &LabelArgs) -> Result<Finding> {
    let place = (
        args.kind.as_str(),
        args.namespace.as_str(),
        args.name.as_str(),
    );
    change(&args.connection, place, |object| {
        set_label(object, &args.label, args.overwrite, args.remove)
    })
}

/// Changes an object that exists.
fn change(
    connection: &ConnectionArgs,
    (kind, namespace, name): (&str, &str, &str),
    change: impl FnOnce(&mut Value) -> Result<()>,
) -> Result<Finding> {
    let kind = writable(kind::find(kind)?)?;
    let namespace = kind.namespaced.then_some(namespace);
    let text = live::block_on(async {
        let cluster = Connection::open(connection).await?;
        let found = cluster.find(kind, namespace, name).await?;
        let Some(found) = found else {
            return Err(missing(kind, namespace, name));
        };
        let Found { mut object, .. } = found.clone();
        change(&mut object)?;
        if object == found.object {
            return Ok(format!("{} {name}: nothing to change\n", kind.kind));
        }
        check(
            &Origin {
                file: "the change".to_owned(),
                line: 0,
            },
            &object,
            namespace.unwrap_or_default(),
        )?;
        cluster.replace(kind, &found, object).await?;
        Ok(format!("{} {name}: changed\n", kind.kind))
    })?;
    Ok(Finding { text, holds: true })
}

/// Reads objects that are to be written: each is one that would be enforced as it is.
pub fn read(files: &[String], namespace: &str) -> Result<Vec<Written>> {
    let written = objects_of(files, namespace)?;
    ensure!(
        !written.is_empty(),
        "{}: no objects of Calico's kinds",
        files.join(", ")
    );
    Ok(written)
}

fn objects_of(files: &[String], namespace: &str) -> Result<Vec<Written>> {
    let (mut written, mut errors) = (Vec::new(), Vec::new());
    for file in files {
        manifest::read(file, &mut |document| match document {
            Ok((origin, value)) => add(&origin, value, namespace, &mut written, &mut errors),
            Err(bad) => errors.push(format!("{}: {}", bad.origin, bad.reason)),
        })?;
    }
    ensure!(
        errors.is_empty(),
        "nothing is written:\n{}",
        errors.join("\n")
    );
    Ok(written)
}

/// Adds an object, or all of a list.
fn add(
    origin: &Origin,
    mut value: Value,
    namespace: &str,
    written: &mut Vec<Written>,
    errors: &mut Vec<String>,
) {
    let is_list = value["kind"]
        .as_str()
        .is_some_and(|kind| kind.ends_with("List"));
    if let Some(Value::Array(items)) = value.get_mut("items").filter(|_| is_list) {
        for item in std::mem::take(items) {
            add(origin, item, namespace, written, errors);
        }
        return;
    }
    match one(origin, value, namespace) {
        Ok(one) => written.push(one),
        Err(error) => errors.push(format!("{origin}: {error:#}")),
    }
}

fn one(origin: &Origin, mut object: Value, namespace: &str) -> Result<Written> {
    let kind = writable(kind::of(&object)?)?;
    let namespace = place(kind, &object, namespace)?;
    if let Some(namespace) = &namespace {
        object["metadata"]["namespace"] = namespace.as_str().into();
    }
    check(origin, &object, namespace.as_deref().unwrap_or_default())?;
    let name = object["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    Ok(Written {
        kind,
        namespace,
        name,
        object,
    })
}

fn writable(kind: &'static Kind) -> Result<&'static Kind> {
    ensure!(
        !OF_PROGRAMS.contains(&kind.kind),
        "{}: only the network's own programs write this kind; ipam has commands for addresses",
        kind.kind
    );
    Ok(kind)
}

/// Refuses an object that would not be enforced as written.
fn check(origin: &Origin, object: &Value, namespace: &str) -> Result<()> {
    let mut objects = Objects::default();
    objects.add(origin, object.clone(), namespace);
    if let Some(bad) = objects.unreadable.first() {
        bail!("{}", bad.reason);
    }
    let problems = objects
        .known
        .iter()
        .filter_map(|(name, object)| match &object.content {
            Content::Ingested(ingested) if !ingested.problems.is_empty() => {
                Some(format!("{name}: {}", ingested.problems.join("\n  ")))
            }
            _ => None,
        });
    match problems.collect::<Vec<_>>().as_slice() {
        [] => Ok(()),
        problems => bail!("{}", problems.join("\n")),
    }
}

/// Merges a patch into a value (RFC 7396): null removes a field, maps are merged, and all else is
/// replaced.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        target.clone_from(patch);
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    for (field, value) in fields {
        if value.is_null() {
            target
                .as_object_mut()
                .and_then(|target| target.remove(field));
        } else {
            merge(&mut target[field], value);
        }
    }
}

fn set_label(object: &mut Value, label: &str, overwrites: bool, removes: bool) -> Result<()> {
    let metadata = &mut object["metadata"];
    if !metadata["labels"].is_object() {
        metadata["labels"] = Value::Object(Map::new());
    }
    let labels = metadata["labels"]
        .as_object_mut()
        .context("metadata.labels: must be a map")?;
    if removes {
        ensure!(
            labels.remove(label).is_some(),
            "{label:?}: the object has no such label"
        );
        return Ok(());
    }
    let Some((key, value)) = label.split_once('=') else {
        bail!("{label:?}: must be KEY=VALUE, or KEY with --remove");
    };
    ensure!(
        margay_api::meta::is_qualified_name(key),
        "{key:?}: not the key of a label; use letters, digits, - _ . and one / behind a domain"
    );
    match labels.get(key) {
        Some(present) if present != value && !overwrites => {
            bail!("{key}: the object has the value {present}; --overwrite replaces it")
        }
        _ => labels.insert(key.to_owned(), value.into()),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn patches_are_merged() {
        // RFC 7396, appendix A.
        let table = [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (
                json!({"a": "b"}),
                json!({"b": "c"}),
                json!({"a": "b", "b": "c"}),
            ),
            (
                json!({"a": "b", "b": "c"}),
                json!({"a": null}),
                json!({"b": "c"}),
            ),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (
                json!({"a": [{"b": "c"}]}),
                json!({"a": [1]}),
                json!({"a": [1]}),
            ),
            (
                json!({"e": null}),
                json!({"a": 1}),
                json!({"e": null, "a": 1}),
            ),
            (
                json!({}),
                json!({"a": {"bb": {"ccc": null}}}),
                json!({"a": {"bb": {}}}),
            ),
        ];
        for (mut target, patch, wanted) in table {
            merge(&mut target, &patch);
            assert_eq!(target, wanted, "{patch}");
        }
    }

    #[test]
    fn labels_are_set_and_removed() {
        let mut object = json!({"metadata": {"name": "a"}});
        set_label(&mut object, "a=b", false, false).expect("a new label");
        set_label(&mut object, "a=b", false, false).expect("the same again");
        assert!(
            set_label(&mut object, "a=c", false, false).is_err(),
            "another value"
        );
        set_label(&mut object, "a=c", true, false).expect("overwritten");
        assert_eq!(object["metadata"]["labels"], json!({"a": "c"}));
        assert!(
            set_label(&mut object, "b", false, true).is_err(),
            "no such label"
        );
        set_label(&mut object, "a", false, true).expect("removed");
        assert_eq!(object["metadata"]["labels"], json!({}));
        assert!(set_label(&mut object, "no value", false, false).is_err());
        assert!(set_label(&mut object, "-=x", false, false).is_err());
    }

    #[test]
    fn only_what_is_right_is_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.yaml");
        let read_text = |text: &str| {
            std::fs::write(&path, text).expect("written");
            read(&[path.display().to_string()], "here")
        };
        let policy = "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\n\
                      metadata: {name: a}\nspec: {selector: all()}\n";
        let written = read_text(policy).expect("an object");
        assert_eq!(
            (written[0].name.as_str(), written[0].namespace.as_deref()),
            ("a", Some("here"))
        );
        let cases = [
            ("selector: 'a ='", "spec.selector"),
            ("kind: Pod", "apiVersion"),
            (
                "apiVersion: projectcalico.org/v3\nkind: IPAMBlock\nmetadata: {name: a}",
                "only the network's own",
            ),
            (
                "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: a, namespace: b}",
                "in no namespace",
            ),
            ("", "no objects"),
        ];
        for (text, wanted) in cases {
            let text = match text.starts_with("selector") {
                true => policy.replace("selector: all()", text),
                false => text.to_owned(),
            };
            let error = format!("{:#}", read_text(&text).expect_err("refused"));
            assert!(error.contains(wanted), "{error}");
        }
    }
}
