//! Host endpoints that are made for nodes: what there should be, and what is to be done for it. Pure.
//!
//! They are known by their label; one without it is a person's and left alone, whatever its name. They are written whole, because labels that
//! a node has lost have to go from them as well.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use kube::api::{DeleteParams, Preconditions};
use margay_api::hosts::{AutoHostEndpoints, CREATED_BY, LABEL_CREATED_BY, Template};
use margay_api::meta::{Labels, without_reserved};
use margay_api::v3::KubeControllersConfiguration;
use margay_api::v3::controllers::host_endpoints;
use serde_json::{Value, json};

use crate::inputs::{Inputs, NodeFacts};
use crate::object::{Key, Object, kind};

/// The profile that allows what no policy decides, so that making a host endpoint changes nothing.
const PROFILE: &str = "projectcalico-default-allow";

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
    let wanted = match settings(configuration.as_ref()) {
        Ok(settings) => render(&settings, &inputs.nodes, &mut plan.problems),
        Err(problems) => {
            plan.problems = problems;
            return plan;
        }
    };
    let present: BTreeMap<&str, &HostFacts> = present.iter().map(|found| (found.name.as_str(), found)).collect();
    for (name, object) in &wanted {
        match present.get(name.as_str()) {
            None => plan.create.push(object.clone()),
            Some(found) if !found.is_ours() => plan.problems.push(format!(
                "HostEndpoint {name} was not made for its node but by somebody; rename it, or give it the label {LABEL_CREATED_BY}={CREATED_BY}"
            )),
            Some(found) if differs(object, found) => plan.replace.push(over(object, found)),
            Some(_) => {}
        }
    }
    let unwanted = present.values().filter(|found| found.is_ours() && !wanted.contains_key(&found.name));
    plan.delete = unwanted.map(|found| (key(&found.name), only(found))).collect();
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

/// Every host endpoint that there should be, by name. Of two of one name the first stays: `n1-in` may be a node, or `n1` and a template.
fn render(settings: &AutoHostEndpoints, nodes: &[NodeFacts], problems: &mut Vec<String>) -> BTreeMap<String, Object> {
    let mut objects: BTreeMap<String, Object> = BTreeMap::new();
    let mut add = |object: Object| {
        match objects.entry(object.key.name.clone()) {
        Entry::Vacant(free) => {
            free.insert(object);
        }
        Entry::Occupied(taken) => problems.push(format!(
            "HostEndpoint {} would be of node {} and of node {}, of one by a template; give the template another generateName",
            taken.key(),
            taken.get().body["spec"]["node"].as_str().unwrap_or_default(),
            object.body["spec"]["node"].as_str().unwrap_or_default(),
        )),
    }
    };
    for node in nodes.iter().filter(|node| node.is_linux) {
        if settings.default {
            let name = format!("{}-auto-hep", node.name);
            let spec = json!({ "interfaceName": "*" });
            add(host_endpoint(&name, node, spec, &node.addresses, &Labels::new()));
        }
        for template in settings.templates.iter().filter(|template| template.nodes.matches(&node.labels)) {
            let addresses = within(&node.addresses, template);
            if !addresses.is_empty() {
                let name = format!("{}-{}-auto-hep", node.name, template.name);
                let mut object = host_endpoint(&name, node, json!({}), &addresses, &template.labels);
                if !template.annotations.is_empty() {
                    object.body["metadata"]["annotations"] = json!(template.annotations);
                }
                add(object);
            }
        }
    }
    objects
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
