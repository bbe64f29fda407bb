//! Host endpoints that the operator makes for nodes and their interfaces.

use std::collections::BTreeMap;

use anyhow::Result;
use margay_api::hosts::{CREATED_BY, LABEL_CREATED_BY};
use serde_json::{Value, json};

use super::Environment;
use super::policy::all_open;
use crate::cluster::process::wait_for;
use crate::demo::OBEY;
use crate::suite::Suite;

/// Runs them.
pub fn run(suite: &mut Suite, environment: &Environment) {
    suite.case("host_endpoints_of_nodes_come_and_follow_and_go", || {
        come_and_go(environment)
    });
    suite.case(
        "each_interface_that_a_template_means_has_a_host_endpoint",
        || of_interfaces(environment),
    );
}

/// The operator makes a host endpoint of every node, which changes nothing for packets; those of
/// people it leaves alone.
fn come_and_go(environment: &Environment) -> Result<()> {
    let cluster = &environment.stage.cluster;
    environment.apply("mine", MINE)?;
    environment.apply("controllers", &CONTROLLERS.replace("SWITCH", "Enabled"))?;
    let automatic = ["n1-auto-hep", "n2-auto-hep", "n3-auto-hep"];
    come_to(environment, "one of every node", &|found| {
        found.keys().eq(["mine"].iter().chain(&automatic))
            && automatic.iter().all(|name| is_of_node(one(found, name)))
    })?;
    let address = json!(cluster.node("n1")?.host.address);
    come_to(
        environment,
        "all interfaces of n1 at its address",
        &|found| {
            let spec = &one(found, "n1-auto-hep")["spec"];
            let addresses = spec["expectedIPs"].as_array().cloned().unwrap_or_default();
            spec["node"] == "n1" && spec["interfaceName"] == "*" && addresses.contains(&address)
        },
    )?;
    cluster.kubectl(&["label", "node", "n1", "place=here"])?;
    come_to(environment, "the label of n1", &|found| {
        place(found) == "here"
    })?;
    all_open(environment)?;
    cluster.kubectl(&["label", "node", "n1", "place-"])?;
    come_to(environment, "no label", &|found| place(found).is_null())?;
    environment.apply("controllers", &CONTROLLERS.replace("SWITCH", "Disabled"))?;
    come_to(environment, "a person's alone", &|found| {
        found.keys().eq(["mine"])
    })?;
    environment.delete("HostEndpoint", "mine")?;
    all_open(environment)
}

/// An interface that comes gets one, with its addresses, and loses it when it goes. Those of pods
/// and of the network itself get none.
fn of_interfaces(environment: &Environment) -> Result<()> {
    let cluster = &environment.stage.cluster;
    let n1 = cluster.node("n1")?;
    let ip = |arguments: &str| {
        n1.exec(&[&["ip"], &arguments.split(' ').collect::<Vec<_>>()[..]].concat())
            .map(drop)
    };
    environment.apply("interfaces", INTERFACES)?;
    let name = |node: &str, interface: &str| format!("{node}-outer-{interface}-auto-hep");
    let eth0 = ["n1", "n2", "n3"].map(|node| name(node, "eth0"));
    come_to(environment, "one of every eth0", &|found| {
        found.keys().eq(&eth0)
            && found
                .values()
                .all(|object| is_of_node(object) && object["spec"]["interfaceName"] == "eth0")
    })?;
    let extra = name("n1", "extra9");
    // Names that begin so are left out.
    ip("link add extra9 type veth peer name veth9")?;
    come_to(environment, "one of the new interface", &|found| {
        one(found, &extra)["spec"]["interfaceName"] == "extra9"
    })?;
    ip("address add 198.18.9.1/24 dev extra9")?;
    let addresses = json!(["198.18.9.1"]);
    come_to(environment, "its address", &|found| {
        one(found, &extra)["spec"]["expectedIPs"] == addresses
    })?;
    all_open(environment)?;
    ip("link delete extra9")?;
    come_to(environment, "none of what is gone", &|found| {
        found.keys().eq(&eth0)
    })?;
    environment.apply("controllers", &CONTROLLERS.replace("SWITCH", "Disabled"))?;
    come_to(environment, "none", &|found| found.is_empty())
}

/// Returns whether it is marked as made for a node, and lets everything through that no policy
/// denies.
fn is_of_node(object: &Value) -> bool {
    let labels = &object["metadata"]["labels"];
    labels[LABEL_CREATED_BY] == CREATED_BY
        && object["spec"]["profiles"] == json!(["projectcalico-default-allow"])
}

fn place(found: &BTreeMap<String, Value>) -> &Value {
    &one(found, "n1-auto-hep")["metadata"]["labels"]["place"]
}

fn one<'a>(found: &'a BTreeMap<String, Value>, name: &str) -> &'a Value {
    found.get(name).unwrap_or(&Value::Null)
}

/// Waits until the host endpoints are as they should be.
fn come_to(
    environment: &Environment,
    what: &str,
    is_so: &dyn Fn(&BTreeMap<String, Value>) -> bool,
) -> Result<()> {
    let found = || environment.objects("HostEndpoint");
    wait_for(
        OBEY,
        || format!("{what}; there are {:?}", found()),
        || found().is_ok_and(|found| is_so(&found)),
    )
}

/// Endpoint of an interface that no node has.
const MINE: &str = r#"
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: mine}
spec: {node: n1, interfaceName: none9, profiles: [projectcalico-default-allow]}
"#;

const CONTROLLERS: &str = r#"
apiVersion: projectcalico.org/v3
kind: KubeControllersConfiguration
metadata: {name: default}
spec: {controllers: {node: {hostEndpoint: {autoCreate: SWITCH}}}}
"#;

const INTERFACES: &str = r#"
apiVersion: projectcalico.org/v3
kind: KubeControllersConfiguration
metadata: {name: default}
spec:
  controllers:
    node:
      hostEndpoint:
        autoCreate: Enabled
        createDefaultHostEndpoint: Disabled
        templates: [{generateName: outer, interfacePattern: "eth0|extra|cali|vxlan|lo"}]
"#;
