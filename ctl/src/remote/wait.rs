//! `wait KIND/NAME`: until every node enforces an object as the API server has it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kube::api::ApiResource;
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::storage::{Kind, Mode};
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use crate::calico::kind;
use crate::live::{self, Connection, ConnectionArgs};
use crate::output::{Finding, Output};
use crate::remote::follow::{self, Followed, NodeProgress, Progress, State};
use crate::remote::link::Link;
use crate::report;
use crate::tree::Tree;

/// Kinds of Kubernetes by the names that kubectl has: names, typha's name, group, version, kind,
/// plural, namespaced.
type KubernetesKind = (
    &'static [&'static str],
    &'static str,
    (&'static str, &'static str, &'static str, &'static str),
    bool,
);
const KUBERNETES: [KubernetesKind; 4] = [
    (
        &[
            "networkpolicy.networking.k8s.io",
            "networkpolicies.networking.k8s.io",
            "netpol",
        ],
        "KubernetesNetworkPolicy",
        (
            "networking.k8s.io",
            "v1",
            "NetworkPolicy",
            "networkpolicies",
        ),
        true,
    ),
    (
        &["clusternetworkpolicy", "clusternetworkpolicies", "cnp"],
        "KubernetesClusterNetworkPolicy",
        (
            "policy.networking.k8s.io",
            "v1alpha2",
            "ClusterNetworkPolicy",
            "clusternetworkpolicies",
        ),
        false,
    ),
    (
        &["pod", "pods", "po"],
        "Pod",
        ("", "v1", "Pod", "pods"),
        true,
    ),
    (
        &["namespace", "namespaces", "ns"],
        "Namespace",
        ("", "v1", "Namespace", "namespaces"),
        false,
    ),
];
/// Pause between two looks at the API server.
const PAUSE: Duration = Duration::from_millis(200);
/// Names that stand for a policy of whatever kind.
const ANY_POLICY: [&str; 2] = ["policy", "policies"];
/// Kinds of policies that it is looked for in, by names that identify them.
const POLICIES: [&str; 4] = [
    "networkpolicy",
    "globalnetworkpolicy",
    "networkpolicy.networking.k8s.io",
    "clusternetworkpolicy",
];
/// Calico's kinds that typha watches and nodes therefore depend on.
const WATCHED: [&str; 8] = [
    "FelixConfiguration",
    "GlobalNetworkPolicy",
    "GlobalNetworkSet",
    "HostEndpoint",
    "IPPool",
    "NetworkPolicy",
    "NetworkSet",
    "Tier",
];

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// KIND/NAME; policy/NAME is a policy of whatever kind.
    pub object: String,
    /// Wait until the object has gone and no node enforces it any more.
    #[arg(long)]
    pub deleted: bool,
    /// Namespace of the object.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Time limit in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// The object.
    pub object: String,
    /// True if every node enforces it as written, or none does any more if it is deleted.
    pub in_force: bool,
    /// Each node that has an agent.
    pub nodes: Vec<NodeProgress>,
    /// Replicas of typha that have not received the object.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unaware: Vec<String>,
    /// Reasons why it is not enforced as written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

impl Answer {
    /// The answer about an object, by how far it is.
    pub fn new(object: String, progress: Progress) -> Self {
        Self {
            object,
            in_force: progress.holds(),
            nodes: progress.nodes,
            unaware: progress.unaware,
            problems: progress.problems,
        }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let (answer, is_deletion) = (live::block_on(wait(args))?, args.deleted);
    let text = match args.output {
        Output::Tree => show(&answer, is_deletion),
        Output::Json => report::json(&answer)?,
    };
    Ok(Finding {
        text,
        holds: answer.in_force,
    })
}

async fn wait(args: &Args) -> Result<Answer> {
    let Some((kind, name)) = args.object.split_once('/') else {
        bail!(
            "{:?}: must be KIND/NAME, such as policy/NAME; -n names the namespace",
            args.object
        );
    };
    let end = Instant::now() + Duration::from_secs(args.timeout);
    let cluster = Connection::open(&args.connection).await?;
    let known = Known::find(&cluster, kind, &args.namespace, name, args.deleted).await?;
    let subject = known.subject(&args.namespace, name);
    let followed = match args.deleted {
        true => known.gone(&cluster, &args.namespace, name, end).await?,
        false => vec![known.present(&cluster, &args.namespace, name).await?],
    };
    let link = Link::open(&cluster).await?;
    let mut replicas = link.replicas().await?;
    let mut progress = Progress::default();
    for one in &followed {
        progress = follow::follow(&link, &mut replicas, one, end).await?;
    }
    Ok(Answer::new(subject, progress))
}

/// A kind that can be followed.
pub struct Known {
    /// Kind as typha calls it.
    watched: &'static str,
    /// Kind in the API.
    resource: ApiResource,
    is_namespaced: bool,
    /// The kind, if it is Calico's.
    calico: Option<&'static Kind>,
}

impl Known {
    /// The kind of that name.
    pub fn of(mode: Mode, name: &str) -> Result<Self> {
        let wanted = name.to_lowercase();
        let mut kubernetes = KUBERNETES.iter();
        if let Some((_, watched, resource, is_namespaced)) =
            kubernetes.find(|(names, ..)| names.contains(&wanted.as_str()))
        {
            let (group, version, kind, plural) = *resource;
            return Ok(Self {
                watched,
                resource: live::resource(group, version, kind, plural),
                is_namespaced: *is_namespaced,
                calico: None,
            });
        }
        let kind = kind::find(name)?;
        let Some(watched) = WATCHED.iter().find(|watched| **watched == kind.kind) else {
            bail!(
                "{}: what nodes enforce does not depend on this kind; it does on {}",
                kind.kind,
                WATCHED.join(", ")
            );
        };
        Ok(Self {
            watched,
            resource: kind.resource(mode),
            is_namespaced: kind.namespaced,
            calico: Some(kind),
        })
    }

    /// The kind of that name; for a policy of whatever kind, the one that has it.
    async fn find(
        cluster: &Connection,
        kind: &str,
        namespace: &str,
        name: &str,
        is_deleted: bool,
    ) -> Result<Self> {
        if !ANY_POLICY.contains(&kind.to_lowercase().as_str()) {
            return Self::of(cluster.mode(), kind);
        }
        ensure!(
            !is_deleted,
            "{kind}/{name}: name the kind of what has been deleted, one of {}",
            POLICIES.join(", ")
        );
        let mut found = Vec::new();
        for one in POLICIES {
            let known = Self::of(cluster.mode(), one)?;
            if known.read(cluster, namespace, name).await?.is_some() {
                found.push((one, known));
            }
        }
        match found.len() {
            0 => bail!("there is no policy {name}; -n names another namespace"),
            1 => Ok(found.remove(0).1),
            _ => bail!(
                "{kind}/{name}: there are several of that name; name the kind: {}",
                found
                    .iter()
                    .map(|(kind, _)| *kind)
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        }
    }

    /// Kind and name, for people.
    pub fn subject(&self, namespace: &str, name: &str) -> String {
        let kind = self
            .calico
            .map_or(self.resource.kind.as_str(), |kind| kind.kind);
        match self.is_namespaced {
            true => format!("{kind} {namespace}/{name}"),
            false => format!("{kind} {name}"),
        }
    }

    /// The object as it is, to be followed.
    pub async fn present(
        &self,
        cluster: &Connection,
        namespace: &str,
        name: &str,
    ) -> Result<Followed> {
        let found = self.read(cluster, namespace, name).await?;
        let (stored_name, object) = found.with_context(|| {
            format!(
                "there is no {}; -n names another namespace",
                self.subject(namespace, name)
            )
        })?;
        let version = object["metadata"]["resourceVersion"].as_str();
        let version = version.and_then(|version| version.parse().ok());
        let version = version.with_context(|| {
            format!(
                "{}: its resource version is not a number",
                self.subject(namespace, name)
            )
        })?;
        Ok(self.followed(namespace, name, stored_name, Some(version)))
    }

    /// The names under which the object must be gone, once the API server has it no more.
    pub async fn gone(
        &self,
        cluster: &Connection,
        namespace: &str,
        name: &str,
        end: Instant,
    ) -> Result<Vec<Followed>> {
        while self.read(cluster, namespace, name).await?.is_some() {
            ensure!(
                Instant::now() < end,
                "{} is still there; delete it, or look at its finalizers",
                self.subject(namespace, name)
            );
            tokio::time::sleep(PAUSE).await;
        }
        let names = match self.calico {
            Some(kind) => live::stored_names(cluster.mode(), kind, name),
            None => vec![name.to_owned()],
        };
        let names = names.into_iter();
        Ok(names
            .map(|stored| self.followed(namespace, name, stored, None))
            .collect())
    }

    async fn read(
        &self,
        cluster: &Connection,
        namespace: &str,
        name: &str,
    ) -> Result<Option<(String, Value)>> {
        let namespace = self.is_namespaced.then_some(namespace);
        if let Some(kind) = self.calico {
            let found = cluster.find(kind, namespace, name).await?;
            return Ok(found.map(|found| (found.stored_name, found.object)));
        }
        let object = cluster.read(&self.resource, namespace, name).await?;
        Ok(object.map(|object| (name.to_owned(), object)))
    }

    fn followed(
        &self,
        namespace: &str,
        name: &str,
        stored_name: String,
        version: Option<u64>,
    ) -> Followed {
        let namespace = match self.is_namespaced {
            true => namespace.to_owned(),
            false => String::new(),
        };
        Followed {
            kind: self.watched,
            stored_name,
            version,
            policy: PolicyKind::parse(self.watched).map(|kind| PolicyKey {
                kind,
                namespace: namespace.clone(),
                name: name.to_owned(),
            }),
            namespace,
        }
    }
}

fn show(answer: &Answer, is_deletion: bool) -> String {
    let done = answer
        .nodes
        .iter()
        .filter(|node| node.state == State::InForce)
        .count();
    let word = if is_deletion {
        "gone from"
    } else {
        "in force on"
    };
    let nodes = answer
        .nodes
        .iter()
        .filter(|node| node.state != State::InForce);
    let nodes = nodes.map(|node| Tree::leaf(describe(node)));
    let unaware = answer.unaware.iter();
    let unaware = unaware.map(|replica| Tree::leaf(format!("{replica} has not received it")));
    let problems = answer.problems.iter();
    let problems = problems.map(|problem| Tree::leaf(format!("not as written: {problem}")));
    let mut text = String::new();
    Tree::new(
        format!(
            "{}: {word} {done} of {} nodes",
            answer.object,
            answer.nodes.len()
        ),
        problems.chain(unaware).chain(nodes),
    )
    .write(&mut text);
    text
}

/// A node and how far it is, for people.
pub fn describe(node: &NodeProgress) -> String {
    let NodeProgress {
        node,
        replica,
        state,
        ..
    } = node;
    match state {
        State::InForce => format!("{node}: done"),
        State::Behind => format!("{node}: not acknowledged yet (connected to {replica})"),
        State::Refused { reason } => format!("{node}: cannot enforce it: {reason}"),
        State::NotConnected => format!("{node}: its agent is not connected to typha"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_those_that_nodes_depend_on() {
        let watched = |name: &str| Known::of(Mode::V3, name).map(|known| known.watched);
        assert_eq!(watched("gnp").expect("a kind"), "GlobalNetworkPolicy");
        assert_eq!(
            watched("netpol").expect("a kind"),
            "KubernetesNetworkPolicy"
        );
        assert_eq!(
            watched("cnp").expect("a kind"),
            "KubernetesClusterNetworkPolicy"
        );
        let refused = watched("bgppeer")
            .expect_err("nothing that is enforced")
            .to_string();
        assert!(
            refused.contains("does not depend on this kind"),
            "{refused}"
        );
        assert!(POLICIES.iter().all(|name| watched(name).is_ok()));
    }

    #[test]
    fn a_policy_in_the_older_storage_is_gone_under_both_names() {
        let known = Known::of(Mode::V1, "gnp").expect("a kind");
        let followed = known.followed("x", "p", "default.p".to_owned(), None);
        assert_eq!(followed.namespace, "", "of the cluster");
        assert_eq!(followed.stored_name, "default.p");
        assert_eq!(followed.policy.expect("a policy").name, "p");
    }

    #[test]
    fn nodes_that_are_not_there_are_named() {
        let node = |node: &str, state| NodeProgress {
            node: node.to_owned(),
            replica: "t".to_owned(),
            state,
            acked: Vec::new(),
        };
        let progress = Progress {
            nodes: vec![node("a", State::InForce), node("b", State::Behind)],
            unaware: Vec::new(),
            problems: vec!["spec.order: bad".to_owned()],
        };
        let answer = Answer::new("NetworkPolicy x/p".to_owned(), progress);
        assert!(!answer.in_force);
        expect_test::expect![[r#"
            NetworkPolicy x/p: in force on 1 of 2 nodes
            ├─ not as written: spec.order: bad
            └─ b: not acknowledged yet (connected to t)
        "#]]
        .assert_eq(&show(&answer, false));
    }
}
