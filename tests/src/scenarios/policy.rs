//! Connectivity without policy, under every example, under policies that are written and deleted
//! again and again, and under one that is refused.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Environment;
use crate::cluster::layout::OUTSIDE;
use crate::cluster::process::wait_for;
use crate::demo::{self, OBEY, examples, flips};
use crate::matrix::{self, Matrix};
use crate::probe::{Protocol, Target, Verdict, ask};
use crate::suite::Suite;
use crate::world::{self, PODS};

/// Runs all of them.
pub fn run(suite: &mut Suite, environment: &Environment) {
    suite.case("everybody_reaches_everybody", || all_open(environment));
    suite.case("encapsulation_only_across_the_router", || {
        encapsulation(environment)
    });
    suite.case("pods_reach_the_world_behind_their_nodes_address", || {
        world_outside(environment)
    });
    suite.case(
        "a_deny_policy_cuts_pods_of_two_nodes_off_and_its_deletion_joins_them",
        || denied(environment),
    );
    match examples::all() {
        Ok(examples) => examples.iter().for_each(|example| {
            suite.case(
                &format!("example_{}", example.name.replace('-', "_")),
                || run_example(environment, example),
            );
        }),
        Err(error) => {
            suite.case("examples", || Err(error));
        }
    }
    suite.case("a_policy_that_stops_parsing_keeps_what_it_denied", || {
        stops_parsing(environment)
    });
    suite.case("an_invalid_policy_opens_nothing_and_hurts_no_other", || {
        invalid(environment)
    });
}

/// Waits until every pod reaches every other one.
pub fn all_open(environment: &Environment) -> Result<()> {
    expect(environment, &Matrix::open(&PODS, &demo::ports()))
}

/// Verdicts while these pods get no answer through and everything else is open.
pub fn without(closed: &[&str]) -> Matrix {
    let mut expected = Matrix::open(&PODS, &demo::ports());
    for ((_, _, to), verdict) in &mut expected.cells {
        if closed.contains(&to.as_str()) {
            *verdict = Verdict::Silent;
        }
    }
    expected
}

/// Waits until packets obey.
pub fn expect(environment: &Environment, expected: &Matrix) -> Result<()> {
    let outcome = matrix::wait_for_match(&environment.stage.world, expected, OBEY)?;
    ensure!(
        outcome.matched.is_some(),
        "packets do not obey\n{}",
        outcome.measured.beside(expected)
    );
    Ok(())
}

/// n1 and n2 share a subnet; n3 is behind a router.
fn encapsulation(environment: &Environment) -> Result<()> {
    let routes = environment
        .stage
        .cluster
        .node("n1")?
        .exec(&["ip", "route", "show", "proto", "82"])?;
    let to = |node: &str, way: &str| {
        let address = environment
            .stage
            .cluster
            .node(node)
            .map(|node| node.host.address.to_string())
            .unwrap_or_default();
        routes.lines().any(|line| {
            line.contains(way)
                && (way == "vxlan.calico" || line.contains(&format!("via {address} ")))
        })
    };
    ensure!(
        to("n2", "dev eth0") && to("n3", "vxlan.calico"),
        "routes of n1:\n{routes}"
    );
    Ok(())
}

/// The outside world has no route to pods: its answers have crossed address translation both ways.
fn world_outside(environment: &Environment) -> Result<()> {
    let outside = Target::new(Protocol::Tcp, OUTSIDE, 9);
    for pod in &environment.stage.world.pods {
        let begin = Instant::now();
        // Nothing listens there, so that a reset is the answer.
        while ask(&pod.place, &[outside])? != [Verdict::Refused] {
            ensure!(
                begin.elapsed() < OBEY,
                "{} gets no answer from {}",
                pod.name,
                outside.address
            );
        }
    }
    Ok(())
}

fn denied(environment: &Environment) -> Result<()> {
    ensure!(
        environment.stage.world.pod("x/a")?.node != environment.stage.world.pod("x/b")?.node,
        "both pods are on one node"
    );
    flips::measure(
        &environment.stage.cluster,
        &environment.stage.world,
        "x/a",
        "x/b",
        4,
    )
    .map(|_| ())
}

fn run_example(environment: &Environment, example: &examples::Example) -> Result<()> {
    let text = std::fs::read_to_string(&example.manifest)?;
    let manifest = super::stored(
        environment.mode,
        &example.name,
        &text,
        environment.stage.cluster.folder(),
    )?;
    let example = examples::Example {
        manifest,
        ..example.clone()
    };
    let (outcome, _) = example.apply(&environment.stage.cluster, &environment.stage.world)?;
    let removed = example.delete(&environment.stage.cluster, &environment.stage.world)?;
    ensure!(
        outcome.matched.is_some(),
        "{}",
        outcome.measured.beside(&example.expected)
    );
    ensure!(
        removed.matched.is_some(),
        "after its deletion\n{}",
        removed.measured.print(None)
    );
    Ok(())
}

/// A policy with an invalid range is refused; the pods that it selects are closed, not opened, and
/// other policies are enforced as before.
fn invalid(environment: &Environment) -> Result<()> {
    let path = environment.apply("invalid", INVALID)?.display().to_string();
    let mut expected = Matrix::open(&PODS, &[(Protocol::Tcp, 80)]);
    for ((_, _, to), verdict) in &mut expected.cells {
        if to == "x/b" || to == "y/b" {
            *verdict = Verdict::Silent;
        }
    }
    let enforced = expect(environment, &expected);
    let is_logged = || {
        let logs = environment.stage.cluster.kubectl(&[
            "logs",
            "-n",
            "margay-system",
            "deployment/margay-typha",
            "--all-pods",
        ]);
        logs.is_ok_and(|logs| logs.contains("not-a-range"))
    };
    let reported = wait_for(
        Duration::from_secs(10),
        || "typha to log the refusal with its reason".into(),
        is_logged,
    );
    environment
        .stage
        .cluster
        .kubectl(&["delete", "-f", &path])?;
    enforced.context("with a policy whose range is invalid")?;
    reported?;
    expect(
        environment,
        &Matrix::open(&PODS, &[(world::PORTS[0].1, world::PORTS[0].2)]),
    )
}

/// An invalid selector is refused at write. One that gets in nevertheless, because the API server
/// does not count parentheses, changes only what is reported; and if the policy has no former
/// value, everything that it may select is closed.
fn stops_parsing(environment: &Environment) -> Result<()> {
    let closed = |is_closed: &dyn Fn(&str) -> bool| {
        let mut expected = Matrix::open(&PODS, &[(Protocol::Tcp, 80)]);
        for ((_, _, to), verdict) in &mut expected.cells {
            if is_closed(to) {
                *verdict = Verdict::Silent;
            }
        }
        expected
    };
    let apply =
        |selector: &str| environment.apply("stops-parsing", &DENYING.replace("SELECTOR", selector));
    let (open, close) = ("(".repeat(200), ")".repeat(200));
    let unread = format!("{open}pod == 'b'{close}");
    let path = apply("pod == 'b'")?.display().to_string();
    expect(environment, &closed(&|to| to == "x/b")).context("under the sound policy")?;
    let refusal = format!(
        "{:#}",
        apply("pod = 'b'")
            .err()
            .context("the API server accepts an invalid selector")?
    );
    ensure!(
        refusal.contains("not a selector"),
        "it is refused, but not because of its selector: {refusal}"
    );

    let kubectl = |arguments: &[&str]| environment.stage.cluster.kubectl(arguments);
    let kept = apply(&unread).and_then(|_| {
        let status =
            || kubectl(&["get", "tigerastatus", "policies", "-o", "json"]).unwrap_or_default();
        let is_reported = || {
            status().contains("parentheses nest at most")
                && status().contains("its previous version stays")
        };
        wait_for(
            Duration::from_secs(30),
            || format!("TigeraStatus to report it: {}", status()),
            is_reported,
        )?;
        let events = || {
            kubectl(&["get", "events.events.k8s.io", "-n", "x", "-o", "json"]).unwrap_or_default()
        };
        let has_event = || events().contains("parentheses nest at most");
        wait_for(
            Duration::from_secs(30),
            || format!("an event about it: {}", events()),
            has_event,
        )?;
        expect(environment, &closed(&|to| to == "x/b")).context("when its selector is not one")
    });
    kubectl(&["delete", "-f", &path])?;
    kept?;
    let closed_all =
        apply(&unread).and_then(|_| expect(environment, &closed(&|to| to.starts_with("x/"))));
    kubectl(&["delete", "-f", &path])?;
    closed_all.context("a policy whose selector never was one")?;
    let well = || {
        let available = r#"jsonpath={.status.conditions[?(@.type=="Degraded")].status}"#;
        kubectl(&["get", "tigerastatus", "policies", "-o", available])
            .is_ok_and(|status| status.trim() == "False")
    };
    wait_for(
        Duration::from_secs(30),
        || "TigeraStatus to report no problem".into(),
        well,
    )?;
    expect(
        environment,
        &Matrix::open(&PODS, &[(world::PORTS[0].1, world::PORTS[0].2)]),
    )
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
