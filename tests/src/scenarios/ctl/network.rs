//! What the command line says of the network: verdicts, what is in force where, and connections.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Ctl, DENY};
use crate::cluster::images::AGNHOST;
use crate::demo;
use crate::matrix::{self, Cell, Matrix};
use crate::probe::{Protocol, Target, ask};
use crate::scenarios::policy::{all_open, expect, without};
use crate::world::PODS;

/// The policy is written by the program, and packets agree with what it says of them.
pub(super) fn verdicts(ctl: &Ctl<'_>) -> Result<()> {
    let file = ctl.file("ctl-deny", DENY)?.display().to_string();
    ctl.run(&["apply", "-f", &file])?;
    expect(ctl.environment, &without(&["x/b"]))?;
    let denied = ctl.ask(&["explain", "y/a", "x/b", "--port", "80"])?;
    ensure!(
        denied.status == Some(1) && denied.out.contains("ctl-deny"),
        "{denied:?}"
    );
    let allowed = ctl.ask(&["explain", "x/b", "y/a", "--port", "80"])?;
    ensure!(allowed.status == Some(0), "{allowed:?}");
    let opened = DENY.replace("types: [Ingress]", "ingress: [{action: Allow}]");
    let file = ctl.file("ctl-open", &opened)?.display().to_string();
    let change = ctl.ask(&["diff", "-f", &file])?;
    ensure!(
        change.status == Some(1) && change.out.contains("x/b"),
        "{change:?}"
    );
    ctl.run(&["delete", "np", "ctl-deny", "-n", "x"])?;
    all_open(ctl.environment)
}

/// As soon as it returns, no packet passes: nothing else is waited for.
pub(super) fn waiting(ctl: &Ctl<'_>) -> Result<()> {
    let file = ctl.file("ctl-deny", DENY)?.display().to_string();
    let (open, closed) = (Matrix::open(&PODS, &demo::ports()), without(&["x/b"]));
    for _ in 0..3 {
        ctl.run(&["apply", "-f", &file])?;
        let text = ctl.run(&["wait", "policy/ctl-deny", "-n", "x"])?;
        ensure!(text.contains("in force on 3 of 3 nodes"), "{text}");
        obeys_now(ctl, &closed)?;
        ctl.run(&["delete", "np", "ctl-deny", "-n", "x"])?;
        let text = ctl.run(&["wait", "networkpolicy/ctl-deny", "-n", "x", "--deleted"])?;
        ensure!(text.contains("gone from 3 of 3 nodes"), "{text}");
        obeys_now(ctl, &open)?;
    }
    // Kubernetes' own policies, and what is not there.
    let own = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "own", "namespace": "x"}, "spec": {"podSelector": {}},
    });
    let file = ctl.file("ctl-own", &own.to_string())?.display().to_string();
    let cluster = &ctl.environment.stage.cluster;
    cluster.kubectl(&["apply", "-f", &file])?;
    let answer = ctl.json(&["wait", "policy/own", "-n", "x"])?;
    ensure!(
        answer["inForce"] == true && answer["nodes"].as_array().is_some_and(|all| all.len() == 3),
        "{answer}"
    );
    let present = ctl.refused(&[
        "wait",
        "netpol/own",
        "-n",
        "x",
        "--deleted",
        "--timeout",
        "1",
    ])?;
    ensure!(present.contains("still there"), "{present}");
    cluster.kubectl(&["delete", "-f", &file])?;
    let missing = ctl.refused(&["wait", "policy/nope"])?;
    ensure!(missing.contains("there is no policy nope"), "{missing}");
    Ok(())
}

/// Fails unless one measurement, which begins now, is as expected.
fn obeys_now(ctl: &Ctl<'_>, expected: &Matrix) -> Result<()> {
    let cells: Vec<Cell> = expected.cells.keys().cloned().collect();
    let mut measured = Matrix::default();
    matrix::measure(&ctl.environment.stage.world, &cells, &mut measured)?;
    ensure!(
        expected.differing(&measured).is_empty(),
        "{}",
        measured.beside(expected)
    );
    Ok(())
}

pub(super) fn tracing(ctl: &Ctl<'_>) -> Result<()> {
    let file = ctl.file("ctl-deny", DENY)?.display().to_string();
    let answer = ctl.json(&["trace", "-f", &file])?;
    let one = &answer[0];
    let node = &ctl.environment.stage.world.pod("x/b")?.node;
    let nodes = one["nodes"].as_array().cloned().unwrap_or_default();
    ensure!(
        one["inForce"] == true && one["done"] == "created" && nodes.len() == 3,
        "{answer}"
    );
    for found in &nodes {
        let stages = &found["stages"];
        if found["node"] == **node {
            let sum =
                stages["planUs"].as_u64().unwrap_or(0) + stages["commitUs"].as_u64().unwrap_or(0);
            let acked = stages["ackedUs"].as_u64().unwrap_or(0);
            ensure!(sum > 0 && acked >= sum, "{found}");
        }
    }
    let text = ctl.run(&["trace", "-f", &file, "--delete"])?;
    ensure!(
        text.contains("NetworkPolicy x/ctl-deny: deleted") && text.contains("commit"),
        "{text}"
    );
    Ok(())
}

pub(super) fn agents(ctl: &Ctl<'_>) -> Result<()> {
    let answer = ctl.json(&["node", "status"])?;
    let nodes = answer.as_array().cloned().unwrap_or_default();
    ensure!(
        nodes.len() == 3
            && nodes
                .iter()
                .all(|node| node["isReady"] == true && node["revision"] != 0),
        "{answer}"
    );
    let text = ctl.run(&["node", "status", "n2"])?;
    ensure!(
        text.starts_with("n2: ready, kernel ") && text.contains("of typha at"),
        "{text}"
    );
    let unknown = ctl.refused(&["node", "status", "n9"])?;
    ensure!(unknown.contains("there is no Node n9"), "{unknown}");
    let kernel = ctl.ask(&["node", "checksystem"])?;
    ensure!(
        kernel.out.lines().count() >= 3 && kernel.status != Some(2),
        "{kernel:?}"
    );
    Ok(())
}

/// The file has what another pod asks meanwhile, and ends at its bound.
pub(super) fn capture(ctl: &Ctl<'_>) -> Result<()> {
    let world = &ctl.environment.stage.world;
    let (asked, address) = (world.pod("x/a")?, world.address("x/a")?);
    let path = ctl.folder().join("ctl-capture.pcap").display().to_string();
    let arguments = [
        "capture",
        "a",
        "-n",
        "x",
        "-w",
        &path,
        "--seconds",
        "60",
        "--bytes",
        "2000",
    ];
    let target = Target::new(Protocol::Tcp, address, 80);
    let asking = &world.pod("y/a")?.place;
    let answer = std::thread::scope(|scope| {
        let running = scope.spawn(|| ctl.run(&arguments));
        // Packets until it has enough of them.
        while !running.is_finished() {
            ask(asking, &[target])?;
        }
        running
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    ensure!(answer.contains("bytes are in"), "{answer}");
    let file = std::fs::read(ctl.folder().join("ctl-capture.pcap"))?;
    let wanted = asked.address.octets();
    let is_there = file.windows(4).any(|bytes| bytes == wanted);
    ensure!(
        file.starts_with(&[0x4d, 0x3c, 0xb2, 0xa1]) && is_there && file.len() < 4096,
        "{} bytes",
        file.len()
    );
    let again = ctl.refused(&arguments)?;
    ensure!(again.contains("cannot be created"), "{again}");
    let long = [
        "capture",
        "a",
        "-n",
        "x",
        "-w",
        "long.pcap",
        "--seconds",
        "3600",
    ];
    let long = ctl.refused(&long)?;
    ensure!(long.contains("at most 600"), "{long}");
    Ok(())
}

/// A tier that keeps UDP from the servers of a test.
const NO_UDP: &str = "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: ctl}\n\
                      spec: {order: 50, defaultAction: Pass}\n---\n\
                      apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\n\
                      metadata: {name: ctl.no-udp}\n\
                      spec: {tier: ctl, selector: role == 'server', types: [Ingress], \
                      ingress: [{action: Deny, protocol: UDP}]}\n";

pub(super) fn connectivity(ctl: &Ctl<'_>) -> Result<()> {
    let test = ["connectivity", "test", "--image", AGNHOST];
    let answer = ctl.json(&test)?;
    // From each of three nodes: 3 pods by HTTP and UDP, 3 with large packets, 3 node ports and the
    // Service; with the policy 18 and the guest's 3; 18 again. There is no DNS.
    ensure!(
        answer["passed"] == 3 * (6 + 3 + 3 + 1) + 18 + 3 + 18 && answer["failed"] == json!([]),
        "{answer}"
    );
    let cluster = &ctl.environment.stage.cluster;
    let left = cluster.kubectl(&["get", "namespace", "margay-connectivity"]);
    ensure!(left.is_err(), "its namespace is left");
    let file = ctl.file("ctl-no-udp", NO_UDP)?.display().to_string();
    ctl.run(&["apply", "-f", &file])?;
    let failing = ctl.ask(&[&test[..], &["--nodes", "1", "--timeout", "20"]].concat())?;
    ctl.run(&["delete", "gnp", "ctl.no-udp"])?;
    ctl.run(&["delete", "tier", "ctl"])?;
    ensure!(
        failing.status == Some(1)
            && failing.out.contains("2 connections are not")
            && failing.out.contains("no tunnel is between them"),
        "{failing:?}"
    );
    Ok(())
}
