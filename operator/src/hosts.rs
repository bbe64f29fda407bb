//! Host endpoints that are made for nodes: what there should be, and what is to be done for it. Pure.
//!
//! They are known by their label; one without it is a person's and left alone, whatever its name. They are written whole, because labels that
//! a node has lost have to go from them as well.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kube::api::{DeleteParams, Preconditions};
use margay_api::hosts::{AutoHostEndpoints, CREATED_BY, InterfacePattern, LABEL_CREATED_BY, Template};
use margay_api::meta::{ANNOTATION_NODE_INTERFACES, Labels, without_reserved};
use margay_api::v3::KubeControllersConfiguration;
use margay_api::v3::controllers::host_endpoints;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::claimed::believed;
use crate::inputs::{Inputs, NodeFacts};
use crate::object::{Key, Object, kind};

/// The profile that allows what no policy decides, so that making a host endpoint changes nothing.
const PROFILE: &str = "projectcalico-default-allow";
/// End of every name, Calico's.
const SUFFIX: &str = "auto-hep";
/// The longest name of an object.
const MAX_NAME: usize = 253;

/// A host endpoint as found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostFacts {
    /// Its name.
    pub name: String,
    /// Identity of the object.
    pub uid: String,
    /// Its version, which a replacement has to name.
    pub version: String,
    /// Its labels.
    pub labels: Labels,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its spec.
    pub spec: Value,
}

impl HostFacts {
    fn is_ours(&self) -> bool {
        self.labels.get(LABEL_CREATED_BY).is_some_and(|by| by == CREATED_BY)
    }

    fn text(&self, field: &str) -> &str {
        self.spec[field].as_str().unwrap_or_default()
    }

    fn node(&self) -> &str {
        self.text("node")
    }
}

/// What is to be done.
#[derive(Clone, Debug, Default)]
pub struct HostPlan {
    /// Host endpoints to make.
    pub create: Vec<Object>,
    /// Host endpoints to write anew.
    pub replace: Vec<Object>,
    /// Host endpoints to delete.
    pub delete: Vec<(Key, DeleteParams)>,
    /// Host endpoints to delete if their nodes, which were not seen, are not there when they are asked for: a list can be short by error, and
    /// without its host endpoints a node is open.
    pub departed: BTreeMap<String, Vec<(Key, DeleteParams)>>,
    /// What is wrong: with the settings, or in the way.
    pub problems: Vec<String>,
}

/// Compares what there should be with what there is. Nothing is done while either is not known, and nothing is deleted when there are no nodes
/// at all: no cluster is without any, whatever the API says.
pub fn plan(inputs: &Inputs) -> HostPlan {
    let mut plan = HostPlan::default();
    let (Some(present), Some(configuration)) = (&inputs.host_endpoints, &inputs.controllers) else {
        return plan;
    };
    if inputs.nodes.is_empty() {
        return plan;
    }
    let (nodes, unbelieved) = believed(&inputs.nodes, inputs.pools.as_deref().unwrap_or_default());
    let wanted = match settings(configuration.as_ref()) {
        Ok(settings) => render(&settings, &nodes),
        Err(problems) => {
            plan.problems = problems;
            return plan;
        }
    };
    plan.problems.clone_from(&wanted.problems);
    if !wanted.objects.is_empty() {
        plan.problems.extend(unbelieved);
    }
    let present: BTreeMap<&str, &HostFacts> = present.iter().map(|found| (found.name.as_str(), found)).collect();
    for (name, object) in &wanted.objects {
        match present.get(name.as_str()) {
            None => plan.create.push(object.clone()),
            Some(found) if !found.is_ours() => plan.problems.push(format!(
                "HostEndpoint {name} was not made for its node but by somebody; rename it, or give it the label {LABEL_CREATED_BY}={CREATED_BY}"
            )),
            Some(found) if differs(object, found) => plan.replace.push(over(object, found)),
            Some(_) => {}
        }
    }
    let seen: BTreeSet<&str> = inputs.nodes.iter().map(|node| node.name.as_str()).collect();
    for found in present.values().filter(|found| found.is_ours() && !wanted.has(found)) {
        let removal = (key(&found.name), only(found));
        match found.node() {
            node if node.is_empty() || seen.contains(node) => plan.delete.push(removal),
            node => plan.departed.entry(node.to_owned()).or_default().push(removal),
        }
    }
    plan
}

/// What is to be made; nothing while there are no settings.
fn settings(configuration: Option<&Value>) -> Result<AutoHostEndpoints, Vec<String>> {
    let Some(configuration) = configuration else {
        return Ok(AutoHostEndpoints::default());
    };
    let named = |problem: &dyn std::fmt::Display| format!("KubeControllersConfiguration default: {problem}");
    let decoded: KubeControllersConfiguration =
        serde_json::from_value(configuration.clone()).map_err(|error| vec![named(&error)])?;
    host_endpoints(&decoded).map_err(|refusal| refusal.problems.iter().map(|problem| named(problem)).collect())
}

/// What there should be.
#[derive(Default)]
struct Wanted {
    /// Host endpoints by name.
    objects: BTreeMap<String, Object>,
    /// Nodes that some should be made for by their interfaces, which are not known: those that were made stay.
    unsure: BTreeSet<String>,
    problems: Vec<String>,
}

fn render(settings: &AutoHostEndpoints, nodes: &[NodeFacts]) -> Wanted {
    let mut wanted = Wanted::default();
    for node in nodes.iter().filter(|node| node.is_linux) {
        if settings.default {
            let name = object_name(&[&node.name]);
            let spec = json!({ "interfaceName": "*" });
            wanted.add(host_endpoint(&name, node, spec, &node.addresses, &Labels::new()));
        }
        for template in settings.templates.iter().filter(|template| template.nodes.matches(&node.labels)) {
            match &template.interfaces {
                Some(pattern) => wanted.of_interfaces(node, template, pattern),
                None => wanted.of_addresses(node, template),
            }
        }
    }
    wanted
}

impl Wanted {
    /// One for all the addresses of the node that the template is for.
    fn of_addresses(&mut self, node: &NodeFacts, template: &Template) {
        let addresses = within(&node.addresses, template);
        if !addresses.is_empty() {
            let name = object_name(&[&node.name, &template.name]);
            self.add(from_template(&name, node, json!({}), &addresses, template));
        }
    }

    /// One for each interface that the pattern matches. Beside the addresses of the interface it has those of the node that the template names, as in Calico.
    fn of_interfaces(&mut self, node: &NodeFacts, template: &Template, pattern: &InterfacePattern) {
        let interfaces = match &node.interfaces {
            Some(Ok(interfaces)) => interfaces,
            unknown => {
                self.unsure.insert(node.name.clone());
                let fault = unknown.as_ref().and_then(|told| told.as_ref().err());
                self.problems.extend(fault.map(|error| unreadable(node, error)));
                return;
            }
        };
        let named = if template.nets.is_empty() { BTreeSet::new() } else { within(&node.addresses, template) };
        for interface in interfaces.iter().filter(|interface| pattern.matches(&interface.name)) {
            let name = object_name(&[&node.name, &template.name, &interface.name]);
            if !is_object_name(&name) {
                self.problems.push(unnameable(&name, &interface.name, node, template));
                continue;
            }
            let addresses = named.union(&interface.addresses).copied().collect();
            let spec = json!({ "interfaceName": interface.name });
            self.add(from_template(&name, node, spec, &addresses, template));
        }
    }

    /// Of two of one name the first stays: `n1-in` may be a node, or `n1` and a template.
    fn add(&mut self, object: Object) {
        match self.objects.entry(object.key.name.clone()) {
            Entry::Vacant(free) => {
                free.insert(object);
            }
            Entry::Occupied(taken) => self.problems.push(format!(
                "HostEndpoint {} would be of node {} and of node {}, of one by a template; give the template another generateName",
                taken.key(),
                taken.get().body["spec"]["node"].as_str().unwrap_or_default(),
                object.body["spec"]["node"].as_str().unwrap_or_default(),
            )),
        }
    }

    /// Whether one that was made is to stay.
    fn has(&self, found: &HostFacts) -> bool {
        let is_of_interface = !["", "*"].contains(&found.text("interfaceName"));
        self.objects.contains_key(&found.name) || is_of_interface && self.unsure.contains(found.node())
    }
}

fn unreadable(node: &NodeFacts, error: &str) -> String {
    let remedy = "delete it, and the agent there writes it when it starts";
    format!("Node {}: annotation {ANNOTATION_NODE_INTERFACES}: {error}; {remedy}", node.name)
}

fn unnameable(name: &str, interface: &str, node: &NodeFacts, template: &Template) -> String {
    format!(
        "HostEndpoint {name} would be of interface {interface} of node {}: no object can have this name; leave the interface out by \
         interfacePattern of template {}, and write one for it",
        node.name, template.name
    )
}

/// Calico's name for one that is made of these: too long a name becomes a hash of itself.
fn object_name(parts: &[&str]) -> String {
    let name = format!("{}-{SUFFIX}", parts.join("-"));
    if name.len() <= MAX_NAME {
        return name;
    }
    let hash = URL_SAFE_NO_PAD.encode(Sha256::digest(name)).replace(['-', '_'], "");
    format!("{}-{SUFFIX}", hash.to_lowercase())
}

/// Whether an object may be called so: names of interfaces may have more characters than those of objects.
fn is_object_name(name: &str) -> bool {
    let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    name.split('.')
        .all(|part| !part.is_empty() && part.chars().all(is_inner) && !part.starts_with('-') && !part.ends_with('-'))
}

fn from_template(
    name: &str,
    node: &NodeFacts,
    spec: Value,
    addresses: &BTreeSet<IpAddr>,
    template: &Template,
) -> Object {
    let mut object = host_endpoint(name, node, spec, addresses, &template.labels);
    if !template.annotations.is_empty() {
        object.body["metadata"]["annotations"] = json!(template.annotations);
    }
    object
}

fn within(addresses: &BTreeSet<IpAddr>, template: &Template) -> BTreeSet<IpAddr> {
    let is_within =
        |address: &&IpAddr| template.nets.is_empty() || template.nets.iter().any(|net| net.contains(*address));
    addresses.iter().filter(is_within).copied().collect()
}

fn host_endpoint(name: &str, node: &NodeFacts, mut spec: Value, addresses: &BTreeSet<IpAddr>, over: &Labels) -> Object {
    let mut labels = without_reserved(&node.labels);
    labels.extend(over.clone());
    labels.insert(LABEL_CREATED_BY.to_owned(), CREATED_BY.to_owned());
    spec["node"] = json!(node.name);
    spec["profiles"] = json!([PROFILE]);
    if !addresses.is_empty() {
        spec["expectedIPs"] = json!(addresses);
    }
    Object::new("HostEndpoint", json!({ "metadata": { "name": name, "labels": labels }, "spec": spec }))
}

fn differs(wanted: &Object, found: &HostFacts) -> bool {
    let metadata = &wanted.body["metadata"];
    let annotations = metadata.get("annotations").cloned().unwrap_or_else(|| json!({}));
    metadata["labels"] != json!(found.labels)
        || annotations != json!(found.annotations)
        || wanted.body["spec"] != found.spec
}

/// The object in place of just the one that was seen.
fn over(wanted: &Object, found: &HostFacts) -> Object {
    let mut object = wanted.clone();
    object.body["metadata"]["resourceVersion"] = json!(found.version);
    object
}

fn key(name: &str) -> Key {
    Key { kind: kind("HostEndpoint"), namespace: String::new(), name: name.to_owned() }
}

fn only(found: &HostFacts) -> DeleteParams {
    let preconditions = Preconditions { uid: Some(found.uid.clone()), resource_version: Some(found.version.clone()) };
    DeleteParams::default().preconditions(preconditions)
}

#[cfg(test)]
#[path = "hosts_tests.rs"]
mod tests;
