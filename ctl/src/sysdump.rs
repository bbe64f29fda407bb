//! `sysdump`: what helps others to see what is wrong, as files in a folder. Secrets are not read,
//! and what may be one is taken out; every file is of limited size.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, ListParams, LogParams};
use kube::{Api, ResourceExt};
use margay_api::storage::kind;
use serde_json::Value;

use crate::live::{self, Connection, ConnectionArgs};
use crate::output::Finding;

/// Namespaces of the components and of the operator.
const NAMESPACES: [&str; 2] = ["margay-system", "margay-operator"];
/// Maximal size of a file, in bytes; the rest is left out.
const MAX_FILE: usize = 32 << 20;
/// What stands for a value that was taken out.
const REMOVED: &str = "<removed>";
/// Words in the names of fields and variables whose values may be secret.
const SECRET: [&str; 7] = [
    "password",
    "passwd",
    "secret",
    "token",
    "credential",
    "privatekey",
    "headers",
];

/// Resources that are listed beside Calico's: whether those of the namespaces only, group, version,
/// kind, plural.
type Listed = (bool, &'static str, &'static str, &'static str, &'static str);
const RESOURCES: [Listed; 8] = [
    (false, "", "v1", "Node", "nodes"),
    (
        false,
        "operator.tigera.io",
        "v1",
        "Installation",
        "installations",
    ),
    (
        false,
        "operator.tigera.io",
        "v1",
        "TigeraStatus",
        "tigerastatuses",
    ),
    (true, "", "v1", "Pod", "pods"),
    (true, "", "v1", "ConfigMap", "configmaps"),
    (true, "", "v1", "Event", "events"),
    (true, "apps", "v1", "DaemonSet", "daemonsets"),
    (true, "apps", "v1", "Deployment", "deployments"),
];

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Folder for the files; it must be empty or not exist.
    pub folder: PathBuf,
    /// Age of the oldest lines of logs, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    pub since: i64,
    /// Lines of each log, at most.
    #[arg(long, value_name = "NUMBER", default_value_t = 5000)]
    pub max_logs: i64,
    /// Logs of pods on these nodes only.
    #[arg(long, value_name = "NODE", value_delimiter = ',')]
    pub focus_nodes: Vec<String>,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let folder = &args.folder;
    let shown = folder.display();
    std::fs::create_dir_all(folder).with_context(|| format!("{shown}: cannot be created"))?;
    let mut entries =
        std::fs::read_dir(folder).with_context(|| format!("{shown}: cannot be read"))?;
    ensure!(
        entries.next().is_none(),
        "{shown}: must be empty, so that nothing is mixed with it"
    );
    let errors = live::block_on(async {
        let cluster = Connection::open(&args.connection).await?;
        let mut errors = dump_objects(&cluster, folder).await?;
        errors.extend(dump_logs(&cluster, args).await?);
        Ok(errors)
    })?;
    let mut text =
        format!("the files are in {shown}; look through them before they leave the house\n");
    errors
        .iter()
        .for_each(|error| text += &format!("missing: {error}\n"));
    Ok(Finding {
        text,
        holds: errors.is_empty(),
    })
}

/// Writes every kind into a file of its own; returns what could not be read.
async fn dump_objects(cluster: &Connection, folder: &Path) -> Result<Vec<String>> {
    let calico = kind::ALL
        .iter()
        .map(|kind| (false, kind.resource(cluster.mode())));
    let others = RESOURCES
        .iter()
        .map(|(is_of_ours, group, version, kind, plural)| {
            (*is_of_ours, live::resource(group, version, kind, plural))
        });
    let mut errors = Vec::new();
    for (is_of_ours, resource) in others.chain(calico) {
        match dump(cluster, is_of_ours, &resource).await {
            Ok(text) => write(folder, &format!("{}.yaml", resource.plural), &text)?,
            Err(error) => errors.push(format!("{}: {error:#}", resource.plural)),
        }
    }
    Ok(errors)
}

async fn dump(cluster: &Connection, is_of_ours: bool, resource: &ApiResource) -> Result<String> {
    let mut objects = Vec::new();
    match is_of_ours {
        true => {
            for namespace in NAMESPACES {
                objects.extend(cluster.list(resource, Some(namespace)).await?);
            }
        }
        false => objects = cluster.list(resource, None).await?,
    }
    let mut text = String::new();
    for mut object in objects {
        redact(&mut object);
        let document = serde_saphyr::to_string(&object)
            .map_err(|error| anyhow::anyhow!("an object cannot be written as YAML: {error}"))?;
        text += "---\n";
        text += &document;
        if text.len() > MAX_FILE {
            break;
        }
    }
    Ok(text)
}

/// Writes the logs of every container of the components, and of their former lives; returns what
/// could not be read.
async fn dump_logs(cluster: &Connection, args: &Args) -> Result<Vec<String>> {
    let mut errors = Vec::new();
    for namespace in NAMESPACES {
        let pods = Api::namespaced(cluster.client().clone(), namespace);
        errors.extend(dump_logs_of(&pods, args).await?);
    }
    Ok(errors)
}

async fn dump_logs_of(pods: &Api<Pod>, args: &Args) -> Result<Vec<String>> {
    let listed = match pods.list(&ListParams::default()).await {
        Ok(listed) => listed.items,
        Err(error) => return Ok(vec![format!("logs: {error}")]),
    };
    let mut errors = Vec::new();
    for (pod, container, has_former) in containers(&listed, &args.focus_nodes) {
        let lives = [(false, ""), (true, ".previous")];
        for (previous, ending) in lives
            .into_iter()
            .filter(|(previous, _)| has_former || !previous)
        {
            let params = LogParams {
                container: Some(container.clone()),
                previous,
                since_seconds: Some(args.since),
                tail_lines: Some(args.max_logs),
                limit_bytes: i64::try_from(MAX_FILE).ok(),
                timestamps: true,
                ..LogParams::default()
            };
            match pods.logs(&pod, &params).await {
                Ok(text) => write(
                    &args.folder,
                    &format!("{pod}.{container}{ending}.log"),
                    &text,
                )?,
                Err(error) => errors.push(format!("log of {pod} {container}{ending}: {error}")),
            }
        }
    }
    Ok(errors)
}

/// Containers of pods on these nodes, or of all: pod, container, and whether it has been restarted.
fn containers(pods: &[Pod], nodes: &[String]) -> Vec<(String, String, bool)> {
    let is_meant = |pod: &&Pod| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
        nodes.is_empty() || node.is_some_and(|node| nodes.contains(node))
    };
    let mut found = Vec::new();
    for pod in pods.iter().filter(is_meant) {
        let statuses = pod
            .status
            .iter()
            .flat_map(|status| status.container_statuses.iter().flatten());
        let restarted: Vec<&str> = statuses
            .filter(|one| one.restart_count > 0)
            .map(|one| one.name.as_str())
            .collect();
        let spec = pod.spec.iter();
        let all = spec.flat_map(|spec| {
            spec.init_containers
                .iter()
                .flatten()
                .chain(&spec.containers)
        });
        found.extend(all.map(|container| {
            let is_restarted = restarted.contains(&container.name.as_str());
            (pod.name_any(), container.name.clone(), is_restarted)
        }));
    }
    found
}

fn write(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    let end = text.floor_char_boundary(MAX_FILE);
    std::fs::write(&path, &text[..end])
        .with_context(|| format!("{}: cannot be written", path.display()))
}

/// Takes out what nobody reads, and values that may be secret.
fn redact(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.remove("managedFields");
            fields.remove("kubectl.kubernetes.io/last-applied-configuration");
            // A variable of a container has its name in a field beside the value.
            let is_variable = fields
                .get("name")
                .and_then(Value::as_str)
                .is_some_and(is_secret);
            for (name, value) in fields {
                if is_secret(name) && value.is_string() || is_variable && name == "value" {
                    *value = REMOVED.into();
                } else {
                    redact(value);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(redact),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn is_secret(name: &str) -> bool {
    let plain: String = name
        .to_lowercase()
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .collect();
    // The name of a Secret is none.
    let is_name = plain.ends_with("name") || plain.ends_with("ref") || plain.ends_with("refs");
    !is_name && SECRET.iter().any(|word| plain.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_may_be_secret_is_taken_out() {
        let mut object = json!({
            "metadata": {
                "name": "a", "managedFields": [1],
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "b": "c"},
            },
            "spec": {
                "password": "hunter2", "secretName": "margay-typha-tls",
                "env": [
                    {"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": "authorization=x"},
                    {"name": "MARGAY_LOG", "value": "info"},
                ],
                "volumes": [{"secret": {"secretName": "s"}}],
            },
        });
        redact(&mut object);
        assert_eq!(
            object,
            json!({
                "metadata": {"name": "a", "annotations": {"b": "c"}},
                "spec": {
                    "password": REMOVED, "secretName": "margay-typha-tls",
                    "env": [
                        {"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": REMOVED},
                        {"name": "MARGAY_LOG", "value": "info"},
                    ],
                    "volumes": [{"secret": {"secretName": "s"}}],
                },
            })
        );
    }

    #[test]
    fn secrets_are_not_listed() {
        assert!(RESOURCES.iter().all(|(_, _, _, kind, _)| *kind != "Secret"));
    }

    #[test]
    fn logs_are_those_of_the_nodes_that_are_asked_for() {
        let pod = |name: &str, node: &str, restarts: i32| -> Pod {
            serde_json::from_value(json!({
                "metadata": {"name": name},
                "spec": {
                    "nodeName": node,
                    "containers": [{"name": "main"}], "initContainers": [{"name": "first"}],
                },
                "status": {"containerStatuses": [{
                    "name": "main", "restartCount": restarts,
                    "image": "", "imageID": "", "ready": true,
                }]},
            }))
            .expect("a pod")
        };
        let pods = [pod("a", "n1", 0), pod("b", "n2", 1)];
        let found = containers(&pods, &["n2".to_owned()]);
        let wanted = [("b", "first", false), ("b", "main", true)];
        assert_eq!(
            found,
            wanted.map(|(pod, name, former)| (pod.to_owned(), name.to_owned(), former))
        );
        assert_eq!(containers(&pods, &[]).len(), 4);
    }

    #[test]
    fn files_are_of_limited_size() {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), "a", &"ä".repeat(MAX_FILE)).expect("written");
        let size = std::fs::metadata(folder.path().join("a"))
            .expect("a file")
            .len();
        assert!(size <= MAX_FILE as u64 && size > MAX_FILE as u64 - 4);
    }
}
