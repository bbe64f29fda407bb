//! Automatic host endpoints of nodes: compares the wanted ones with the existing ones. Pure.
//!
//! They are recognised by their label; one without it is a user's and left alone, whatever its
//! name. They are replaced whole, because labels that a node has lost must be removed from them
//! too.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kube::api::{DeleteParams, Preconditions};
use margay_api::hosts::{
    AutoHostEndpoints, CREATED_BY, InterfacePattern, LABEL_CREATED_BY, Template,
};
use margay_api::meta::{ANNOTATION_NODE_INTERFACES, Labels, without_reserved};
use margay_api::v3::KubeControllersConfiguration;
use margay_api::v3::parse::controllers::host_endpoints;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::address_claims;
use crate::inputs::{HostFacts, Inputs, NodeFacts};
use crate::manifest::{Key, Object, kind};

/// Profile that allows packets that no policy decides about, so that creating a host endpoint
/// changes nothing.
const PROFILE: &str = "projectcalico-default-allow";
/// Suffix of every name, from Calico (kube-controllers).
const SUFFIX: &str = "auto-hep";
/// Maximum length of an object's name.
const MAX_NAME: usize = 253;

impl HostFacts {
    fn is_ours(&self) -> bool {
        self.labels
            .get(LABEL_CREATED_BY)
            .is_some_and(|by| by == CREATED_BY)
    }

    fn text(&self, field: &str) -> &str {
        self.spec[field].as_str().unwrap_or_default()
    }

    fn node(&self) -> &str {
        self.text("node")
    }
}

/// Changes of host endpoints.
#[derive(Clone, Debug, Default)]
pub struct HostPlan {
    /// Host endpoints to create.
    pub create: Vec<Object>,
    /// Host endpoints to replace.
    pub replace: Vec<Object>,
    /// Host endpoints to delete.
    pub delete: Vec<(Key, DeleteParams)>,
    /// Host endpoints to delete by absent node, once a read by name confirms that the node is gone:
    /// a list may be incomplete, and without its host endpoints a node is open.
    pub of_absent_nodes: BTreeMap<String, Vec<(Key, DeleteParams)>>,
    /// Problems with the settings, or conflicting objects.
    pub problems: Vec<String>,
}

/// Compares wanted and existing host endpoints. Nothing is changed while either is not known, and
/// nothing is deleted when no node is listed: no cluster is without nodes, whatever the API
/// returns.
pub fn plan(inputs: &Inputs) -> HostPlan {
    let mut plan = HostPlan::default();
    let (Some(present), Some(configuration)) = (&inputs.host_endpoints, &inputs.controllers) else {
        return plan;
    };
    if inputs.nodes.is_empty() {
        return plan;
    }
    let (nodes, rejected) =
        address_claims::resolve(&inputs.nodes, inputs.pools.as_deref().unwrap_or_default());
    let wanted = match settings(configuration.as_ref()) {
        Ok(settings) => render(&settings, &nodes),
        Err(problems) => {
            plan.problems = problems;
            return plan;
        }
    };
    plan.problems.clone_from(&wanted.problems);
    if !wanted.objects.is_empty() {
        plan.problems.extend(rejected);
    }
    let present: BTreeMap<&str, &HostFacts> = present
        .iter()
        .map(|found| (found.name.as_str(), found))
        .collect();
    for (name, object) in &wanted.objects {
        match present.get(name.as_str()) {
            None => plan.create.push(object.clone()),
            Some(found) if !found.is_ours() => plan.problems.push(format!(
                "HostEndpoint {name} was not created by the operator; rename it, or add the label \
                 {LABEL_CREATED_BY}={CREATED_BY}"
            )),
            Some(found) if differs(object, found) => plan.replace.push(over(object, found)),
            Some(_) => {}
        }
    }
    let seen: BTreeSet<&str> = inputs.nodes.iter().map(|node| node.name.as_str()).collect();
    for found in present
        .values()
        .filter(|found| found.is_ours() && !wanted.has(found))
    {
        let removal = (key(&found.name), only(found));
        match found.node() {
            node if node.is_empty() || seen.contains(node) => plan.delete.push(removal),
            node => plan
                .of_absent_nodes
                .entry(node.to_owned())
                .or_default()
                .push(removal),
        }
    }
    plan
}

/// Reads the settings; nothing is wanted without any.
fn settings(configuration: Option<&Value>) -> Result<AutoHostEndpoints, Vec<String>> {
    let Some(configuration) = configuration else {
        return Ok(AutoHostEndpoints::default());
    };
    let named = |problem: &dyn std::fmt::Display| {
        format!("KubeControllersConfiguration default: {problem}")
    };
    let decoded: KubeControllersConfiguration =
        serde_json::from_value(configuration.clone()).map_err(|error| vec![named(&error)])?;
    host_endpoints(&decoded).map_err(|refusal| {
        refusal
            .problems
            .iter()
            .map(|problem| named(problem))
            .collect()
    })
}

/// Wanted host endpoints.
#[derive(Default)]
struct Wanted {
    /// Host endpoints by name.
    objects: BTreeMap<String, Object>,
    /// Nodes that should have host endpoints by interface, but whose interfaces are not known:
    /// existing ones stay.
    unknown_interfaces: BTreeSet<String>,
    problems: Vec<String>,
}

fn render(settings: &AutoHostEndpoints, nodes: &[NodeFacts]) -> Wanted {
    let mut wanted = Wanted::default();
    for node in nodes.iter().filter(|node| node.is_linux) {
        if settings.default {
            let name = object_name(&[&node.name]);
            let spec = json!({ "interfaceName": "*" });
            wanted.add(host_endpoint(
                &name,
                node,
                spec,
                &node.addresses,
                &Labels::new(),
            ));
        }
        for template in settings
            .templates
            .iter()
            .filter(|template| template.nodes.matches(&node.labels))
        {
            match &template.interfaces {
                Some(pattern) => wanted.add_by_interface(node, template, pattern),
                None => wanted.add_by_address(node, template),
            }
        }
    }
    wanted
}

impl Wanted {
    /// Adds one for all addresses of the node that the template selects.
    fn add_by_address(&mut self, node: &NodeFacts, template: &Template) {
        let addresses = within(&node.addresses, template);
        if !addresses.is_empty() {
            let name = object_name(&[&node.name, &template.name]);
            self.add(from_template(&name, node, json!({}), &addresses, template));
        }
    }

    /// Adds one for each interface that the pattern matches. It has the addresses of the interface
    /// and those of the node that the template selects, as in Calico.
    fn add_by_interface(
        &mut self,
        node: &NodeFacts,
        template: &Template,
        pattern: &InterfacePattern,
    ) {
        let interfaces = match &node.interfaces {
            Some(Ok(interfaces)) => interfaces,
            unknown => {
                self.unknown_interfaces.insert(node.name.clone());
                let error = unknown
                    .as_ref()
                    .and_then(|reported| reported.as_ref().err());
                self.problems
                    .extend(error.map(|error| unreadable(node, error)));
                return;
            }
        };
        let named = if template.nets.is_empty() {
            BTreeSet::new()
        } else {
            within(&node.addresses, template)
        };
        for interface in interfaces
            .iter()
            .filter(|interface| pattern.matches(&interface.name))
        {
            let name = object_name(&[&node.name, &template.name, &interface.name]);
            if !is_object_name(&name) {
                self.problems
                    .push(unnameable(&name, &interface.name, node, template));
                continue;
            }
            let addresses = named.union(&interface.addresses).copied().collect();
            let spec = json!({ "interfaceName": interface.name });
            self.add(from_template(&name, node, spec, &addresses, template));
        }
    }

    /// Adds one unless the name is taken: `n1-in` may be a node, or `n1` and a template.
    fn add(&mut self, object: Object) {
        match self.objects.entry(object.key.name.clone()) {
            Entry::Vacant(free) => {
                free.insert(object);
            }
            Entry::Occupied(taken) => self.problems.push(format!(
                "HostEndpoint {} would belong to node {} and, by a template, to node {}; give the \
                 template another generateName",
                taken.key(),
                taken.get().body["spec"]["node"]
                    .as_str()
                    .unwrap_or_default(),
                object.body["spec"]["node"].as_str().unwrap_or_default(),
            )),
        }
    }

    /// Returns true when an existing one stays.
    fn has(&self, found: &HostFacts) -> bool {
        let is_of_interface = !["", "*"].contains(&found.text("interfaceName"));
        self.objects.contains_key(&found.name)
            || is_of_interface && self.unknown_interfaces.contains(found.node())
    }
}

fn unreadable(node: &NodeFacts, error: &str) -> String {
    let remedy = "delete it, and the node's agent writes it again when it starts";
    format!(
        "Node {}: annotation {ANNOTATION_NODE_INTERFACES}: {error}; {remedy}",
        node.name
    )
}

fn unnameable(name: &str, interface: &str, node: &NodeFacts, template: &Template) -> String {
    format!(
        "HostEndpoint {name} would belong to interface {interface} of node {}: it is not a valid \
         name; exclude the interface by interfacePattern of template {}, and create one for it",
        node.name, template.name
    )
}

/// Returns Calico's name for one made of these parts: a name that is too long becomes a hash of
/// itself.
fn object_name(parts: &[&str]) -> String {
    let name = format!("{}-{SUFFIX}", parts.join("-"));
    if name.len() <= MAX_NAME {
        return name;
    }
    let hash = URL_SAFE_NO_PAD
        .encode(Sha256::digest(name))
        .replace(['-', '_'], "");
    format!("{}-{SUFFIX}", hash.to_lowercase())
}

/// Returns true for valid names of objects: names of interfaces may have characters that those of
/// objects may not.
fn is_object_name(name: &str) -> bool {
    let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    name.split('.').all(|part| {
        !part.is_empty()
            && part.chars().all(is_inner)
            && !part.starts_with('-')
            && !part.ends_with('-')
    })
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
    let is_within = |address: &&IpAddr| {
        template.nets.is_empty() || template.nets.iter().any(|net| net.contains(*address))
    };
    addresses.iter().filter(is_within).copied().collect()
}

fn host_endpoint(
    name: &str,
    node: &NodeFacts,
    mut spec: Value,
    addresses: &BTreeSet<IpAddr>,
    over: &Labels,
) -> Object {
    let mut labels = without_reserved(&node.labels);
    labels.extend(over.clone());
    labels.insert(LABEL_CREATED_BY.to_owned(), CREATED_BY.to_owned());
    spec["node"] = json!(node.name);
    spec["profiles"] = json!([PROFILE]);
    if !addresses.is_empty() {
        spec["expectedIPs"] = json!(addresses);
    }
    Object::new(
        "HostEndpoint",
        json!({ "metadata": { "name": name, "labels": labels }, "spec": spec }),
    )
}

fn differs(wanted: &Object, found: &HostFacts) -> bool {
    let metadata = &wanted.body["metadata"];
    let annotations = metadata
        .get("annotations")
        .cloned()
        .unwrap_or_else(|| json!({}));
    metadata["labels"] != json!(found.labels)
        || annotations != json!(found.annotations)
        || wanted.body["spec"] != found.spec
}

/// Returns the object as a replacement of exactly the version that was read.
fn over(wanted: &Object, found: &HostFacts) -> Object {
    let mut object = wanted.clone();
    object.body["metadata"]["resourceVersion"] = json!(found.version);
    object
}

fn key(name: &str) -> Key {
    Key {
        kind: kind("HostEndpoint"),
        namespace: String::new(),
        name: name.to_owned(),
    }
}

fn only(found: &HostFacts) -> DeleteParams {
    let preconditions = Preconditions {
        uid: Some(found.uid.clone()),
        resource_version: Some(found.version.clone()),
    };
    DeleteParams::default().preconditions(preconditions)
}

#[cfg(test)]
#[path = "hosts_tests.rs"]
mod tests;
