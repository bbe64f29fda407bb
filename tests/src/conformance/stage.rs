//! Current state of a run: the fixture, the results of actions, and the pods that ask.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::backend::{Backend, Running, WantedPod};
use super::table::{self, Action, Fixture, Row, Table, Target};
use crate::probe::prober::Prober;
use crate::probe::{self, Protocol, Verdict};

/// Nodes that pods are spread over.
const NODES: usize = 3;
/// Between the braces of a policy that names a pod's address.
const ADDRESS_OF: (&str, &str) = ("{{ip ", "}}");

/// `apiVersion` and `kind` of created objects whose actions do not have them.
const NETWORK_POLICY: (&str, &str) = ("networking.k8s.io/v1", "NetworkPolicy");
const CLUSTER_POLICY: (&str, &str) = ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy");

/// Current state of a run.
pub struct Stage {
    fixture: Fixture,
    pods: BTreeMap<String, Member>,
    nodes: BTreeMap<usize, IpAddr>,
    /// Labels of namespaces.
    namespaces: BTreeMap<String, Value>,
    /// Objects that actions have created, in order.
    made: Vec<Value>,
}

/// A pod that runs, and asks.
struct Member {
    labels: Value,
    address: IpAddr,
    prober: Prober,
}

/// Returns whether an action is left out when no policy of the table is to be in force.
pub fn is_policy(action: &Action) -> bool {
    use Action::{Apply, CreateClusterPolicy, CreatePolicy, DeleteClusterPolicy, DeletePolicy};
    use Action::{Remove, UpdateClusterPolicy, UpdatePolicy};
    matches!(
        action,
        CreatePolicy { .. }
            | UpdatePolicy { .. }
            | DeletePolicy { .. }
            | CreateClusterPolicy { .. }
            | UpdateClusterPolicy { .. }
            | DeleteClusterPolicy { .. }
            | Apply { .. }
            | Remove { .. }
    )
}

impl Stage {
    /// Brings the fixture of the table up.
    pub fn set(backend: &mut dyn Backend, table: &Table) -> Result<Self> {
        let fixture = table.fixture.clone();
        let mut stage = Self {
            fixture: fixture.clone(),
            pods: BTreeMap::new(),
            nodes: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            made: Vec::new(),
        };
        let mut wanted = Vec::new();
        for namespace in &fixture.namespaces {
            stage.put_namespace(backend, &namespace.name, &namespace.labels)?;
            for account in &namespace.service_accounts {
                backend.apply(&account_object(
                    &namespace.name,
                    &account.name,
                    &account.labels,
                ))?;
            }
            for (index, pod) in namespace.pods.iter().enumerate() {
                wanted.push(WantedPod {
                    namespace: namespace.name.clone(),
                    name: pod.name.clone(),
                    labels: pod.labels.clone(),
                    service_account: pod.service_account.clone(),
                    node: pod.node.unwrap_or(index) % NODES,
                    address: stage.pinned(wanted.len()),
                    ports: pod.ports.clone(),
                });
            }
        }
        let running = backend.start(&wanted)?;
        for (wanted, running) in wanted.iter().zip(running) {
            stage.join(wanted, &running)?;
        }
        stage.listen_on_nodes(backend, table)?;
        Ok(stage)
    }

    /// Carries out one action.
    pub fn act(&mut self, backend: &mut dyn Backend, action: &Action) -> Result<()> {
        match action {
            Action::CreatePolicy { policy } | Action::UpdatePolicy { policy } => {
                self.apply(backend, &with_kind(policy, NETWORK_POLICY))
            }
            Action::CreateClusterPolicy { policy } | Action::UpdateClusterPolicy { policy } => {
                self.apply(backend, &with_kind(policy, CLUSTER_POLICY))
            }
            Action::Apply { object } => self.apply(backend, object),
            Action::DeletePolicy { namespace, name } => self.remove(
                backend,
                &with_kind(
                    &json!({"metadata": {"namespace": namespace, "name": name}}),
                    NETWORK_POLICY,
                ),
            ),
            Action::DeleteClusterPolicy { name } => self.remove(
                backend,
                &with_kind(&json!({"metadata": {"name": name}}), CLUSTER_POLICY),
            ),
            Action::Remove { object } => self.remove(backend, object),
            Action::CreateNamespace { namespace, labels }
            | Action::SetNamespaceLabels { namespace, labels } => {
                self.put_namespace(backend, namespace, labels)
            }
            Action::DeleteNamespace { namespace } => {
                self.namespaces.remove(namespace);
                backend.remove(&namespace_object(namespace, &json!({})))
            }
            Action::CreatePod {
                namespace,
                pod,
                labels,
            } => {
                let wanted = WantedPod {
                    namespace: namespace.clone(),
                    name: pod.clone(),
                    labels: labels.clone(),
                    service_account: table::default_account(),
                    node: self.pods.len() % NODES,
                    address: self.pinned(self.pods.len()),
                    ports: table::default_ports(),
                };
                let running = backend.start(std::slice::from_ref(&wanted))?;
                running
                    .iter()
                    .try_for_each(|running| self.join(&wanted, running))
            }
            Action::SetPodLabels {
                namespace,
                pod,
                labels,
            } => self.label(backend, namespace, pod, labels),
            Action::DeletePod { namespace, pod } => {
                self.stop(backend, &format!("{namespace}/{pod}"))
            }
        }
    }

    /// Creates an object of a case, with the addresses that it names.
    pub fn apply(&mut self, backend: &mut dyn Backend, object: &Value) -> Result<()> {
        let object = self.with_addresses(object)?;
        backend.apply(&object)?;
        if !self
            .made
            .iter()
            .any(|made| identity(made) == identity(&object))
        {
            self.made.push(object);
        }
        Ok(())
    }

    /// Brings back the bare fixture.
    pub fn restore(&mut self, backend: &mut dyn Backend) -> Result<()> {
        while let Some(object) = self.made.pop() {
            backend.remove(&object)?;
        }
        let fixture = self.fixture.clone();
        let mut own: BTreeMap<String, &Value> = BTreeMap::new();
        for namespace in &fixture.namespaces {
            own.extend(
                namespace
                    .pods
                    .iter()
                    .map(|pod| (format!("{}/{}", namespace.name, pod.name), &pod.labels)),
            );
        }
        let foreign: Vec<String> = self
            .pods
            .keys()
            .filter(|name| !own.contains_key(*name))
            .cloned()
            .collect();
        foreign
            .iter()
            .try_for_each(|name| self.stop(backend, name))?;
        for (name, labels) in own {
            let member = self
                .pods
                .get(&name)
                .with_context(|| format!("a case has deleted {name} of the fixture"))?;
            if member.labels != *labels {
                let (namespace, pod) = crate::world::split(&name)?;
                self.label(backend, namespace, pod, labels)?;
            }
        }
        let wanted: BTreeMap<&str, &Value> = fixture
            .namespaces
            .iter()
            .map(|namespace| (namespace.name.as_str(), &namespace.labels))
            .collect();
        for (name, labels) in self.namespaces.clone() {
            match wanted.get(name.as_str()) {
                Some(wanted) if **wanted != labels => self.put_namespace(backend, &name, wanted)?,
                Some(_) => {}
                None => {
                    self.namespaces.remove(&name);
                    backend.remove(&namespace_object(&name, &json!({})))?;
                }
            }
        }
        Ok(())
    }

    /// Takes the fixture down.
    pub fn clear(mut self, backend: &mut dyn Backend) -> Result<()> {
        let pods: Vec<String> = self.pods.keys().cloned().collect();
        pods.iter().try_for_each(|name| self.stop(backend, name))?;
        for namespace in &self.fixture.namespaces {
            for account in &namespace.service_accounts {
                backend.remove(&account_object(&namespace.name, &account.name, &json!({})))?;
            }
        }
        self.namespaces
            .keys()
            .try_for_each(|name| backend.remove(&namespace_object(name, &json!({}))))
    }

    /// Asks all rows at once, each from a port that its pod has not used lately; gives the verdicts
    /// in their order.
    pub fn ask(&self, rows: &[&Row], patience: Duration) -> Result<Vec<Verdict>> {
        let mut by_asker: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (index, row) in rows.iter().enumerate() {
            by_asker.entry(&row.from).or_default().push(index);
        }
        for (from, indexes) in &by_asker {
            let target = |index: &usize| {
                let row = rows[*index];
                Ok(probe::Target::new(
                    row.protocol,
                    self.address(&row.to)?,
                    row.port,
                ))
            };
            let targets = indexes.iter().map(target).collect::<Result<Vec<_>>>()?;
            self.member(from)?.prober.ask(targets, patience)?;
        }
        let mut verdicts = vec![Verdict::Broken; rows.len()];
        for (from, indexes) in &by_asker {
            for (index, verdict) in indexes.iter().zip(self.member(from)?.prober.answers()?) {
                verdicts[*index] = verdict;
            }
        }
        Ok(verdicts)
    }

    fn remove(&mut self, backend: &mut dyn Backend, object: &Value) -> Result<()> {
        self.made.retain(|made| identity(made) != identity(object));
        backend.remove(object)
    }

    fn put_namespace(
        &mut self,
        backend: &mut dyn Backend,
        name: &str,
        labels: &Value,
    ) -> Result<()> {
        backend.apply(&namespace_object(name, labels))?;
        self.namespaces.insert(name.to_owned(), labels.clone());
        Ok(())
    }

    fn label(
        &mut self,
        backend: &mut dyn Backend,
        namespace: &str,
        pod: &str,
        labels: &Value,
    ) -> Result<()> {
        backend.label(namespace, pod, labels)?;
        let name = format!("{namespace}/{pod}");
        self.pods
            .get_mut(&name)
            .with_context(|| format!("no pod is named {name}"))?
            .labels = labels.clone();
        Ok(())
    }

    fn join(&mut self, wanted: &WantedPod, running: &Running) -> Result<()> {
        let name = wanted.key();
        let pinned = wanted.address.map(IpAddr::V4);
        ensure!(
            pinned.is_none_or(|pinned| pinned == running.address),
            "{name} has {}, and must have {pinned:?}: ranges in the table would not match",
            running.address
        );
        let member = Member {
            labels: wanted.labels.clone(),
            address: running.address,
            prober: Prober::start(&running.place)?,
        };
        self.pods.insert(name, member);
        Ok(())
    }

    fn stop(&mut self, backend: &mut dyn Backend, name: &str) -> Result<()> {
        self.pods.remove(name);
        let (namespace, pod) = crate::world::split(name)?;
        backend.stop(namespace, pod)
    }

    /// Addresses follow each other from the first of the range, if the table has their order.
    fn pinned(&self, index: usize) -> Option<Ipv4Addr> {
        let first = u32::from(self.fixture.cidr.network()) + 1;
        self.fixture
            .pin
            .then(|| Ipv4Addr::from(first + index as u32))
    }

    fn listen_on_nodes(&mut self, backend: &mut dyn Backend, table: &Table) -> Result<()> {
        let mut wanted: BTreeMap<usize, BTreeSet<(Protocol, u16)>> = BTreeMap::new();
        for row in table
            .cases
            .iter()
            .flat_map(|case| &case.steps)
            .flat_map(|step| &step.rows)
        {
            if let Target::Node(number) = row.to {
                wanted
                    .entry(number)
                    .or_default()
                    .insert((row.protocol, row.port));
            }
        }
        for (number, ports) in wanted {
            let ports: Vec<(Protocol, u16)> = ports.into_iter().collect();
            self.nodes
                .insert(number, backend.serve_on_node(number, &ports)?);
        }
        Ok(())
    }

    fn member(&self, name: &str) -> Result<&Member> {
        self.pods
            .get(name)
            .with_context(|| format!("no pod is named {name}"))
    }

    fn address(&self, target: &Target) -> Result<IpAddr> {
        match target {
            Target::Pod(name) => Ok(self.member(name)?.address),
            Target::Node(number) => self
                .nodes
                .get(number)
                .copied()
                .with_context(|| format!("no node {number}")),
        }
    }

    /// The object with every `{{ip NAMESPACE/POD}}` replaced.
    fn with_addresses(&self, object: &Value) -> Result<Value> {
        let (open, close) = ADDRESS_OF;
        let mut text = object.to_string();
        while let Some(begin) = text.find(open) {
            let length = text[begin..].find(close).context("`{{ip ` without `}}`")?;
            let name = &text[begin + open.len()..begin + length];
            let address = self.member(name)?.address.to_string();
            text.replace_range(begin..begin + length + close.len(), &address);
        }
        Ok(serde_json::from_str(&text)?)
    }
}

/// The object with the `apiVersion` and `kind` that its action implies, where it has none itself.
fn with_kind(object: &Value, (version, kind): (&str, &str)) -> Value {
    let mut object = object.clone();
    for (field, implied) in [("apiVersion", version), ("kind", kind)] {
        if object[field].as_str().unwrap_or_default().is_empty() {
            object[field] = implied.into();
        }
    }
    object
}

fn namespace_object(name: &str, labels: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

fn account_object(namespace: &str, name: &str, labels: &Value) -> Value {
    let metadata = json!({"namespace": namespace, "name": name, "labels": labels});
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
}

fn identity(object: &Value) -> [&str; 4] {
    let text = |pointer| {
        object
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    [
        text("/apiVersion"),
        text("/kind"),
        text("/metadata/namespace"),
        text("/metadata/name"),
    ]
}
