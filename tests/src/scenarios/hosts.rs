//! Host endpoints that the operator makes for nodes.

use anyhow::{Result, ensure};

use super::Ground;
use super::policy::all_open;
use crate::cluster::process::wait_for;
use crate::demo::OBEY;
use crate::suite::Suite;

/// Runs them. Labels are where users see them in the newer storage only.
pub fn run(suite: &mut Suite, ground: &Ground) {
    suite.case("host_endpoints_of_nodes_come_and_follow_and_go", || come_and_go(ground));
}

/// The operator makes a host endpoint of every node, which changes nothing for packets; a person's own it leaves alone.
fn come_and_go(ground: &Ground) -> Result<()> {
    let cluster = &ground.stage.cluster;
    let is = |path: &str, wanted: &str| {
        let said = || cluster.kubectl(&["get", "hostendpoints", "-o", &format!("jsonpath={path}")]).unwrap_or_default();
        wait_for(OBEY, || format!("{wanted}; there is {}", said()), || said().trim() == wanted)
    };
    let names = "{.items[*].metadata.name}";
    ground.apply("mine", MINE)?;
    ground.apply("controllers", &CONTROLLERS.replace("SWITCH", "Enabled"))?;
    is(names, "mine n1-auto-hep n2-auto-hep n3-auto-hep")?;
    let of_n1 = |path: &str| format!("{{.items[?(@.metadata.name==\"n1-auto-hep\")]{path}}}");
    is(&of_n1(".spec.node"), "n1")?;
    let address = cluster.node("n1")?.host.address.to_string();
    let addresses = cluster.kubectl(&["get", "hostendpoint", "n1-auto-hep", "-o", "jsonpath={.spec.expectedIPs}"])?;
    ensure!(addresses.contains(&format!("\"{address}\"")), "{address} is not in {addresses}");
    cluster.kubectl(&["label", "node", "n1", "place=here"])?;
    is(&of_n1(".metadata.labels.place"), "here")?;
    all_open(ground)?;
    cluster.kubectl(&["label", "node", "n1", "place-"])?;
    is(&of_n1(".metadata.labels.place"), "")?;
    ground.apply("controllers", &CONTROLLERS.replace("SWITCH", "Disabled"))?;
    is(names, "mine")?;
    cluster.kubectl(&["delete", "hostendpoint", "mine"])?;
    all_open(ground)
}

/// Of an interface that no node has.
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
