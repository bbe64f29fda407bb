//! On a real Kubernetes: an installation makes nodes Ready, pods talk, and packets obey every kind of policy.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use margay_tests::cluster::process::wait_for;
use margay_tests::demo::{self, OBEY, Stage, examples, flips};
use margay_tests::install;
use margay_tests::matrix::{self, Matrix};
use margay_tests::probe::{Protocol, Target, Verdict, ask};
use margay_tests::suite::Suite;
use margay_tests::world::{self, PODS};

const INSTALLED: &str = "an_installation_makes_every_node_ready";

fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-policy");
    // Checkouts side by side test at the same time.
    let name = format!("mgy-policy-{}", std::process::id());
    let staged = demo::stage(&name, &folder, &install::Options::default(), &|line| println!("{line}"));
    let stage = match staged {
        Ok(stage) => stage,
        Err(error) => {
            suite.case(INSTALLED, || Err(error));
            return suite.finish();
        }
    };
    suite.case(INSTALLED, || install::check_status(&stage.cluster));
    suite.case("everybody_reaches_everybody", || all_open(&stage));
    suite.case("encapsulation_only_across_the_router", || encapsulation(&stage));
    suite.case("pods_reach_the_world_behind_their_nodes_address", || world_outside(&stage));
    suite.case("a_deny_policy_cuts_pods_of_two_nodes_off_and_its_deletion_joins_them", || denied(&stage));
    match examples::all() {
        Ok(examples) => examples.iter().for_each(|example| {
            suite.case(&format!("example_{}", example.name.replace('-', "_")), || run_example(&stage, example));
        }),
        Err(error) => {
            suite.case("examples", || Err(error));
        }
    }
    suite.case("an_invalid_policy_opens_nothing_and_hurts_no_other", || invalid(&stage));
    suite.finish()
}

fn all_open(stage: &Stage) -> Result<()> {
    expect(stage, &Matrix::open(&PODS, &demo::ports()))
}

fn expect(stage: &Stage, expected: &Matrix) -> Result<()> {
    let outcome = matrix::settle(&stage.world, expected, OBEY)?;
    ensure!(outcome.matched.is_some(), "packets do not obey\n{}", outcome.measured.beside(expected));
    Ok(())
}

/// n1 and n2 share a subnet; n3 is behind a router.
fn encapsulation(stage: &Stage) -> Result<()> {
    let routes = stage.cluster.node("n1")?.exec(&["ip", "route", "show", "proto", "82"])?;
    let to = |node: &str, way: &str| {
        let address = stage.cluster.node(node).map(|node| node.host.address.to_string()).unwrap_or_default();
        routes
            .lines()
            .any(|line| line.contains(way) && (way == "vxlan.calico" || line.contains(&format!("via {address} "))))
    };
    ensure!(to("n2", "dev eth0") && to("n3", "vxlan.calico"), "routes of n1:\n{routes}");
    Ok(())
}

/// The world outside knows no way to pods: what it answers has crossed address translation both ways.
fn world_outside(stage: &Stage) -> Result<()> {
    let outside = Target::new(Protocol::Tcp, margay_tests::cluster::layout::OUTSIDE, 9);
    for pod in &stage.world.pods {
        let begin = Instant::now();
        // Nothing listens there, so that a reset is the answer.
        while ask(&pod.place, &[outside])? != [Verdict::Refused] {
            ensure!(begin.elapsed() < OBEY, "{} gets no answer from {}", pod.name, outside.address);
        }
    }
    Ok(())
}

fn denied(stage: &Stage) -> Result<()> {
    ensure!(stage.world.pod("x/a")?.node != stage.world.pod("x/b")?.node, "both pods are on one node");
    flips::measure(&stage.cluster, &stage.world, "x/a", "x/b", 4).map(|_| ())
}

fn run_example(stage: &Stage, example: &examples::Example) -> Result<()> {
    let (outcome, _) = example.apply(&stage.cluster, &stage.world)?;
    let removed = example.delete(&stage.cluster, &stage.world)?;
    ensure!(outcome.matched.is_some(), "{}", outcome.measured.beside(&example.expected));
    ensure!(removed.matched.is_some(), "after its deletion\n{}", removed.measured.print(None));
    Ok(())
}

/// A policy with a range that is none is refused; whom it selects is closed, not opened, and another policy is enforced as ever.
fn invalid(stage: &Stage) -> Result<()> {
    let path = stage.cluster.folder().join("invalid.yaml");
    std::fs::write(&path, INVALID)?;
    let path = path.display().to_string();
    stage.cluster.kubectl(&["apply", "-f", &path])?;
    let mut expected = Matrix::open(&PODS, &[(Protocol::Tcp, 80)]);
    for ((_, _, to), verdict) in &mut expected.cells {
        if to == "x/b" || to == "y/b" {
            *verdict = Verdict::Silent;
        }
    }
    let enforced = expect(stage, &expected);
    let said = || {
        let logs = stage.cluster.kubectl(&["logs", "-n", "margay-system", "deployment/margay-typha", "--all-pods"]);
        logs.is_ok_and(|logs| logs.contains("not-a-range"))
    };
    let reported = wait_for(Duration::from_secs(10), || "typha to say what is refused and why".into(), said);
    stage.cluster.kubectl(&["delete", "-f", &path])?;
    enforced.context("with a policy whose range is none")?;
    reported?;
    expect(stage, &Matrix::open(&PODS, &[(world::PORTS[0].1, world::PORTS[0].2)]))
}

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
