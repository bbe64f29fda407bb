//! `status`: components, conditions and problems of an installation on one screen.

use std::time::Duration;

use anyhow::Result;
use margay_api::installation::TigeraStatus;
use margay_api::report::{CONFIG_MAP, Report};
use serde::Serialize;
use serde_json::Value;

use crate::live::{self, Connection, ConnectionArgs};
use crate::output::{Finding, Output};
use crate::report;

/// Namespace of the components, and that of the operator.
const NAMESPACE: &str = "margay-system";
const OPERATOR: &str = "margay-operator";
/// Workloads that an installation has: kind, and name.
const WORKLOADS: [(&str, &str); 3] = [
    ("Deployment", "margay-operator"),
    ("Deployment", "margay-typha"),
    ("DaemonSet", "margay-node"),
];
/// Pause between two looks while it is waited.
const PAUSE: Duration = Duration::from_secs(1);

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Wait until everything is available, at most for so many seconds.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "300")]
    pub wait: Option<u64>,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// State of an installation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// True if every component and every part is available and not degraded.
    pub is_available: bool,
    /// How the cluster stores Calico's data.
    pub storage: String,
    /// Workloads.
    pub components: Vec<Component>,
    /// Parts, as TigeraStatus has them.
    pub parts: Vec<Part>,
    /// Objects that are refused, records that nodes cannot enforce, and problems of nodes.
    pub problems: Vec<String>,
    /// Problems beyond those that are listed.
    pub more_problems: usize,
}

/// A workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Component {
    /// Its name.
    pub name: &'static str,
    /// Pods that it should have; `None` if it does not exist.
    pub wanted: Option<u64>,
    /// Pods that are available in the wanted version.
    pub ready: u64,
}

/// A part of an installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Name of the TigeraStatus.
    pub name: String,
    /// Available.
    pub available: bool,
    /// Being changed.
    pub progressing: bool,
    /// Not as it should be.
    pub degraded: bool,
    /// What the conditions say, where there is more to say than that all is well.
    pub messages: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let answer = live::block_on(wait(args))?;
    let text = match args.output {
        Output::Tree => show(&answer),
        Output::Json => report::json(&answer)?,
    };
    Ok(Finding {
        text,
        holds: answer.is_available,
    })
}

async fn wait(args: &Args) -> Result<Answer> {
    let cluster = Connection::open(&args.connection).await?;
    let end = args
        .wait
        .map(|seconds| tokio::time::Instant::now() + Duration::from_secs(seconds));
    loop {
        let answer = read(&cluster).await?;
        let is_over = end.is_none_or(|end| tokio::time::Instant::now() >= end);
        if answer.is_available || is_over {
            return Ok(answer);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn read(cluster: &Connection) -> Result<Answer> {
    let apps = |kind, plural| live::resource("apps", "v1", kind, plural);
    let mut workloads = cluster
        .list(&apps("Deployment", "deployments"), Some(NAMESPACE))
        .await?;
    workloads.extend(
        cluster
            .list(&apps("Deployment", "deployments"), Some(OPERATOR))
            .await?,
    );
    workloads.extend(
        cluster
            .list(&apps("DaemonSet", "daemonsets"), Some(NAMESPACE))
            .await?,
    );
    let statuses = live::resource("operator.tigera.io", "v1", "TigeraStatus", "tigerastatuses");
    let statuses = cluster.list(&statuses, None).await?;
    let maps = live::resource("", "v1", "ConfigMap", "configmaps");
    let maps = cluster.list(&maps, Some(NAMESPACE)).await?;
    Ok(answer(
        cluster.mode().to_string(),
        &workloads,
        &statuses,
        &maps,
    ))
}

fn answer(storage: String, workloads: &[Value], statuses: &[Value], maps: &[Value]) -> Answer {
    let components: Vec<Component> = WORKLOADS
        .iter()
        .map(|(kind, name)| component(kind, name, workloads))
        .collect();
    let parts: Vec<Part> = statuses.iter().filter_map(part).collect();
    let map = maps
        .iter()
        .find(|map| map["metadata"]["name"] == CONFIG_MAP);
    let data = map
        .and_then(|map| map["data"].as_object())
        .into_iter()
        .flatten();
    let reports = data.filter_map(|(_, text)| serde_json::from_str::<Report>(text.as_str()?).ok());
    let Report {
        objects,
        records,
        nodes,
    } = Report::joined(reports);
    let total = objects.total + records.total + nodes.total;
    let listed = [objects, records, nodes]
        .into_iter()
        .flat_map(|listing| listing.first);
    let problems: Vec<String> = listed
        .map(|entry| format!("{}: {}", entry.subject, entry.reason))
        .collect();
    let are_ready = components
        .iter()
        .all(|one| one.wanted.is_some_and(|wanted| one.ready >= wanted));
    let are_available = !parts.is_empty() && parts.iter().all(|one| one.available && !one.degraded);
    Answer {
        is_available: are_ready && are_available,
        storage,
        components,
        parts,
        more_problems: total.saturating_sub(problems.len()),
        problems,
    }
}

fn component(kind: &str, name: &'static str, workloads: &[Value]) -> Component {
    let found = workloads
        .iter()
        .find(|one| one["kind"] == kind && one["metadata"]["name"] == name);
    let Some(found) = found else {
        return Component {
            name,
            wanted: None,
            ready: 0,
        };
    };
    let number = |pointer: &str| found.pointer(pointer).and_then(Value::as_u64);
    let (wanted, updated, available) = match kind {
        "DaemonSet" => (
            number("/status/desiredNumberScheduled"),
            number("/status/updatedNumberScheduled"),
            number("/status/numberAvailable"),
        ),
        _ => (
            number("/spec/replicas").or(Some(1)),
            number("/status/updatedReplicas"),
            number("/status/availableReplicas"),
        ),
    };
    let ready = updated
        .unwrap_or_default()
        .min(available.unwrap_or_default());
    // A status of an earlier version says nothing about this one.
    let is_seen = number("/status/observedGeneration") >= number("/metadata/generation");
    Component {
        name,
        wanted: Some(wanted.unwrap_or_default()),
        ready: if is_seen { ready } else { 0 },
    }
}

fn part(object: &Value) -> Option<Part> {
    let status: TigeraStatus = serde_json::from_value(object.clone()).ok()?;
    let conditions = status
        .status
        .map(|status| status.conditions)
        .unwrap_or_default();
    let is = |kind: &str| {
        conditions
            .iter()
            .any(|one| one.kind == kind && one.status == "True")
    };
    let (available, degraded) = (is("Available"), is("Degraded"));
    let speaks = |kind: &str, status: &str| {
        (kind == "Degraded" || kind == "Progressing") && status == "True"
            || kind == "Available" && status != "True"
    };
    let spoken = conditions
        .iter()
        .filter(|one| speaks(&one.kind, &one.status));
    let messages = spoken
        .map(|one| format!("{}: {}", one.reason, one.message))
        .collect();
    let name = status.metadata.name.unwrap_or_default();
    Some(Part {
        name,
        available,
        progressing: is("Progressing"),
        degraded,
        messages,
    })
}

fn show(answer: &Answer) -> String {
    let mut text = format!("storage {}\n", answer.storage);
    for Component {
        name,
        wanted,
        ready,
    } in &answer.components
    {
        text += &match wanted {
            Some(wanted) => format!("{name}: {ready} of {wanted} ready\n"),
            None => format!("{name}: missing\n"),
        };
    }
    for Part {
        name,
        available,
        progressing,
        degraded,
        messages,
    } in &answer.parts
    {
        let word = |is: bool, word: &'static str| is.then_some(word);
        let words = [
            Some(if *available {
                "available"
            } else {
                "not available"
            }),
            word(*progressing, "progressing"),
            word(*degraded, "degraded"),
        ];
        let words: Vec<&str> = words.into_iter().flatten().collect();
        text += &format!("part {name}: {}\n", words.join(", "));
        messages
            .iter()
            .for_each(|message| text += &format!("  {message}\n"));
    }
    answer
        .problems
        .iter()
        .for_each(|problem| text += &format!("problem: {problem}\n"));
    if answer.more_problems > 0 {
        text += &format!("and {} more problems\n", answer.more_problems);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_api::report::{Entry, Listing};
    use serde_json::json;

    fn workloads(available: u64) -> Vec<Value> {
        let deployment = |name: &str| {
            json!({
                "kind": "Deployment", "metadata": {"name": name, "generation": 2},
                "spec": {"replicas": 2},
                "status": {"observedGeneration": 2, "updatedReplicas": 2, "availableReplicas": 2},
            })
        };
        let agents = json!({
            "kind": "DaemonSet", "metadata": {"name": "margay-node", "generation": 1},
            "status": {
                "observedGeneration": 1, "desiredNumberScheduled": 3, "updatedNumberScheduled": 3,
                "numberAvailable": available,
            },
        });
        vec![
            deployment("margay-operator"),
            deployment("margay-typha"),
            agents,
        ]
    }

    fn status(name: &str, degraded: &str) -> Value {
        let condition = |kind: &str, status: &str, message: &str| {
            let time = "2026-01-01T00:00:00Z";
            json!({
                "type": kind, "status": status, "lastTransitionTime": time,
                "reason": "R", "message": message,
            })
        };
        let conditions = [
            condition("Available", "True", "fine"),
            condition("Degraded", degraded, "two of them"),
        ];
        json!({
            "apiVersion": "operator.tigera.io/v1", "kind": "TigeraStatus",
            "metadata": {"name": name},
            "spec": {}, "status": {"conditions": conditions},
        })
    }

    #[test]
    fn an_installation_is_available_when_all_of_it_is() {
        let of = |available, degraded| {
            let statuses = [status("calico", degraded)];
            answer(
                "projectcalico.org/v3".to_owned(),
                &workloads(available),
                &statuses,
                &[],
            )
        };
        assert!(of(3, "False").is_available);
        assert!(!of(2, "False").is_available);
        assert!(!of(3, "True").is_available);
        let nothing = answer(String::new(), &[], &[], &[]);
        assert!(!nothing.is_available, "nothing is installed");
        assert!(show(&nothing).contains("margay-node: missing\n"));
    }

    #[test]
    fn a_workload_that_has_not_been_looked_at_is_not_ready() {
        let mut workloads = workloads(3);
        workloads[2]["metadata"]["generation"] = 2.into();
        assert_eq!(component("DaemonSet", "margay-node", &workloads).ready, 0);
    }

    #[test]
    fn problems_and_conditions_are_shown() {
        let entry = Entry::new("NetworkPolicy x/a", "spec.selector: bad");
        let objects = Listing {
            total: 3,
            first: [entry].into(),
        };
        let text = serde_json::to_string(&Report {
            objects,
            ..Report::default()
        })
        .expect("JSON");
        let map = json!({"metadata": {"name": CONFIG_MAP}, "data": {"typha-1": text}});
        let answer = answer(
            "projectcalico.org/v3".to_owned(),
            &workloads(3),
            &[status("calico", "True")],
            &[map],
        );
        expect_test::expect![[r#"
            storage projectcalico.org/v3
            margay-operator: 2 of 2 ready
            margay-typha: 2 of 2 ready
            margay-node: 3 of 3 ready
            part calico: available, degraded
              R: two of them
            problem: NetworkPolicy x/a: spec.selector: bad
            and 2 more problems
        "#]]
        .assert_eq(&show(&answer));
    }
}
