//! Who reaches whom: without policy, under every example, under policies that are written and deleted again and again, and under one that is refused.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Ground;
use crate::cluster::layout::OUTSIDE;
use crate::cluster::process::wait_for;
use crate::demo::{self, OBEY, examples, flips};
use crate::matrix::{self, Matrix};
use crate::probe::{Protocol, Target, Verdict, ask};
use crate::suite::Suite;
use crate::world::{self, PODS};

/// Runs all of them.
pub fn run(suite: &mut Suite, ground: &Ground) {
    suite.case("everybody_reaches_everybody", || all_open(ground));
    suite.case("encapsulation_only_across_the_router", || encapsulation(ground));
    suite.case("pods_reach_the_world_behind_their_nodes_address", || world_outside(ground));
    suite.case("a_deny_policy_cuts_pods_of_two_nodes_off_and_its_deletion_joins_them", || denied(ground));
    match examples::all() {
        Ok(examples) => examples.iter().for_each(|example| {
            suite.case(&format!("example_{}", example.name.replace('-', "_")), || run_example(ground, example));
        }),
        Err(error) => {
            suite.case("examples", || Err(error));
        }
    }
    suite.case("a_policy_that_stops_parsing_keeps_what_it_denied", || stops_parsing(ground));
    suite.case("an_invalid_policy_opens_nothing_and_hurts_no_other", || invalid(ground));
}

/// Fails unless everybody comes to reach everybody.
pub fn all_open(ground: &Ground) -> Result<()> {
    expect(ground, &Matrix::open(&PODS, &demo::ports()))
}

/// Fails unless packets come to obey.
pub fn expect(ground: &Ground, expected: &Matrix) -> Result<()> {
    let outcome = matrix::settle(&ground.stage.world, expected, OBEY)?;
    ensure!(outcome.matched.is_some(), "packets do not obey\n{}", outcome.measured.beside(expected));
    Ok(())
}

/// n1 and n2 share a subnet; n3 is behind a router.
fn encapsulation(ground: &Ground) -> Result<()> {
    let routes = ground.stage.cluster.node("n1")?.exec(&["ip", "route", "show", "proto", "82"])?;
    let to = |node: &str, way: &str| {
        let address = ground.stage.cluster.node(node).map(|node| node.host.address.to_string()).unwrap_or_default();
        routes
            .lines()
            .any(|line| line.contains(way) && (way == "vxlan.calico" || line.contains(&format!("via {address} "))))
    };
    ensure!(to("n2", "dev eth0") && to("n3", "vxlan.calico"), "routes of n1:\n{routes}");
    Ok(())
}

/// The world outside knows no way to pods: what it answers has crossed address translation both ways.
fn world_outside(ground: &Ground) -> Result<()> {
    let outside = Target::new(Protocol::Tcp, OUTSIDE, 9);
    for pod in &ground.stage.world.pods {
        let begin = Instant::now();
        // Nothing listens there, so that a reset is the answer.
        while ask(&pod.place, &[outside])? != [Verdict::Refused] {
            ensure!(begin.elapsed() < OBEY, "{} gets no answer from {}", pod.name, outside.address);
        }
    }
    Ok(())
}

fn denied(ground: &Ground) -> Result<()> {
    ensure!(ground.stage.world.pod("x/a")?.node != ground.stage.world.pod("x/b")?.node, "both pods are on one node");
    flips::measure(&ground.stage.cluster, &ground.stage.world, "x/a", "x/b", 4).map(|_| ())
}

fn run_example(ground: &Ground, example: &examples::Example) -> Result<()> {
    let text = std::fs::read_to_string(&example.manifest)?;
    let manifest = super::stored(ground.mode, &example.name, &text, ground.stage.cluster.folder())?;
    let example = examples::Example { manifest, ..example.clone() };
    let (outcome, _) = example.apply(&ground.stage.cluster, &ground.stage.world)?;
    let removed = example.delete(&ground.stage.cluster, &ground.stage.world)?;
    ensure!(outcome.matched.is_some(), "{}", outcome.measured.beside(&example.expected));
    ensure!(removed.matched.is_some(), "after its deletion\n{}", removed.measured.print(None));
    Ok(())
}

/// A policy with a range that is none is refused; whom it selects is closed, not opened, and another policy is enforced as ever.
fn invalid(ground: &Ground) -> Result<()> {
    let path = ground.apply("invalid", INVALID)?.display().to_string();
    let mut expected = Matrix::open(&PODS, &[(Protocol::Tcp, 80)]);
    for ((_, _, to), verdict) in &mut expected.cells {
        if to == "x/b" || to == "y/b" {
            *verdict = Verdict::Silent;
        }
    }
    let enforced = expect(ground, &expected);
    let said = || {
        let logs =
            ground.stage.cluster.kubectl(&["logs", "-n", "margay-system", "deployment/margay-typha", "--all-pods"]);
        logs.is_ok_and(|logs| logs.contains("not-a-range"))
    };
    let reported = wait_for(Duration::from_secs(10), || "typha to say what is refused and why".into(), said);
    ground.stage.cluster.kubectl(&["delete", "-f", &path])?;
    enforced.context("with a policy whose range is none")?;
    reported?;
    expect(ground, &Matrix::open(&PODS, &[(world::PORTS[0].1, world::PORTS[0].2)]))
}

/// A selector that is none is refused at write. One that gets in all the same, as the API server does not count parentheses, changes nothing but what is said;
/// and where the policy has never been read otherwise, all that it may be about is closed.
fn stops_parsing(ground: &Ground) -> Result<()> {
    let closed = |is_closed: &dyn Fn(&str) -> bool| {
        let mut expected = Matrix::open(&PODS, &[(Protocol::Tcp, 80)]);
        for ((_, _, to), verdict) in &mut expected.cells {
            if is_closed(to) {
                *verdict = Verdict::Silent;
            }
        }
        expected
    };
    let apply = |selector: &str| ground.apply("stops-parsing", &DENYING.replace("SELECTOR", selector));
    let (open, close) = ("(".repeat(200), ")".repeat(200));
    let unread = format!("{open}pod == 'b'{close}");
    let path = apply("pod == 'b'")?.display().to_string();
    expect(ground, &closed(&|to| to == "x/b")).context("under the sound policy")?;
    let told = format!("{:#}", apply("pod = 'b'").err().context("the API server takes what is no selector")?);
    ensure!(told.contains("not a selector"), "it is refused, but not because of its selector: {told}");

    let kubectl = |arguments: &[&str]| ground.stage.cluster.kubectl(arguments);
    let kept = apply(&unread).and_then(|_| {
        let status = || kubectl(&["get", "tigerastatus", "policies", "-o", "json"]).unwrap_or_default();
        let says = || status().contains("parentheses nest at most") && status().contains("its previous version stays");
        wait_for(Duration::from_secs(30), || format!("TigeraStatus to say it: {}", status()), says)?;
        let events = || kubectl(&["get", "events.events.k8s.io", "-n", "x", "-o", "json"]).unwrap_or_default();
        let tells = || events().contains("parentheses nest at most");
        wait_for(Duration::from_secs(30), || format!("an event that says it: {}", events()), tells)?;
        expect(ground, &closed(&|to| to == "x/b")).context("when its selector is not one")
    });
    kubectl(&["delete", "-f", &path])?;
    kept?;
    let unheard = apply(&unread).and_then(|_| expect(ground, &closed(&|to| to.starts_with("x/"))));
    kubectl(&["delete", "-f", &path])?;
    unheard.context("a policy whose selector never was one")?;
    let well = || {
        let available = r#"jsonpath={.status.conditions[?(@.type=="Degraded")].status}"#;
        kubectl(&["get", "tigerastatus", "policies", "-o", available]).is_ok_and(|status| status.trim() == "False")
    };
    wait_for(Duration::from_secs(30), || "TigeraStatus to say that all is well".into(), well)?;
    expect(ground, &Matrix::open(&PODS, &[(world::PORTS[0].1, world::PORTS[0].2)]))
}

const DENYING: &str = r#"
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: stops-parsing, namespace: x}
spec:
  selector: "SELECTOR"
  types: [Ingress]
  ingress:
  - action: Deny
"#;

const INVALID: &str = r#"
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: refused, namespace: x}
spec:
  selector: pod == 'b'
  types: [Ingress]
  ingress:
  - action: Allow
    source: {nets: [not-a-range]}
  - action: Allow
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: good, namespace: "y"}
spec:
  podSelector: {matchLabels: {pod: b}}
  policyTypes: [Ingress]
"#;
