//! Host endpoints while the agent restarts, with and without typha.

use std::net::{SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use margay_calc::model::RecordId;
use margay_tests::lab::wait;
use margay_tests::probe::Place;
use margay_tests::probe::flow::Flow;
use serde_json::json;

use super::End::{Far, Node, Outside, Pod};
use super::{API, NODE, OTHER, SSH, Stage, WEB, eth0, host, policy, rule};

/// Datagrams are sent all the time; none may get in while the agent is away, starts and applies
/// changes.
#[test]
fn a_restart_lets_nothing_in_and_what_stands_stays() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.others(&format!(
        "table inet others {{ counter probes {{}}; counter leaks {{}};
            chain early {{ type filter hook prerouting priority raw;
                udp dport {WEB} counter name probes; }};
            chain in {{ type filter hook input priority 10;
                udp dport {WEB} counter name leaks; }}; }}"
    ))?;
    let outside = Place::of_namespace(stage.namespace(Outside)?)?;
    let flow = Flow::start(&outside, SocketAddrV4::new(NODE.parse()?, WEB))?;
    let closed = host(&json!({"interfaceName": "*"}), &[]);
    stage.apply(std::slice::from_ref(&closed))?;
    let socket = stage
        .namespace(Outside)?
        .run(|| UdpSocket::bind("0.0.0.0:0"))?;
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                // An ICMP error of the node would be mistaken for the failure that is looked for
                // below.
                let _ = socket.send_to(b"x", (NODE, WEB));
                std::thread::yield_now();
            }
        });
        let done = (|| {
            stage.lab.stop_agent("n1")?;
            let before = stage.counted("probes")?;
            stage.lab.apply(&policy(
                "ssh",
                "role == 'host'",
                &json!({"types": ["Ingress"], "ingress": [rule("Allow", OTHER)]}),
            ))?;
            stage.lab.start_agent("n1")?;
            stage.lab.wait_enforced()?;
            stage.lab.apply(&host(&eth0(), &[]))?;
            stage.lab.wait_enforced()?;
            ensure!(stage.counted("probes")? > before, "no datagram was sent");
            Ok(())
        })();
        end.store(true, Ordering::Relaxed);
        done
    })?;
    ensure!(
        stage.counted("leaks")? == 0,
        "{} datagrams got in",
        stage.counted("leaks")?
    );
    stage.expect(
        "after the restart",
        &[
            (Outside, Node, WEB, false),
            (Outside, Node, OTHER, true),
            (Outside, Node, SSH, true),
        ],
    )?;
    let report = flow.finish();
    ensure!(
        report.broken.is_none() && report.echoed > 0,
        "an established connection: {report:?}"
    );
    Ok(())
}

/// A node that has booted has no rules; one whose agent alone was restarted has the earlier ones.
/// Both enforce their last view without typha.
#[test]
fn without_typha_a_node_enforces_what_it_had_saved() -> Result<()> {
    let mut stage = Stage::new()?;
    let endpoint = host(&eth0(), &[]);
    let rules = |port| {
        policy(
            "in",
            "role == 'host'",
            &json!({"types": ["Ingress"], "ingress": [rule("Allow", port)]}),
        )
    };
    stage.apply(&[endpoint, rules(WEB)])?;
    let saved = |stage: &Stage| -> Result<bool> {
        let records = stage.lab.node("n1")?.saved();
        let is_host =
            |id: &RecordId| matches!(id, RecordId::HostEndpoint(name) if name == "n1-host");
        let is_policy = |id: &RecordId| matches!(id, RecordId::Policy(key) if key.name == "in");
        Ok(records.keys().any(is_host) && records.keys().any(is_policy))
    };
    wait("the view to be saved", || saved(&stage))?;
    let restricted = [
        (Outside, Node, WEB, true),
        (Outside, Node, OTHER, false),
        (Outside, Node, SSH, true),
        (Far, Node, OTHER, false),
        (Node, Outside, WEB, false),
        (Node, Outside, API, true),
        (Node, Pod, WEB, true),
        (Outside, Pod, OTHER, true),
    ];
    stage.lab.stop_agent("n1")?;
    stage.lab.start_agent_alone("n1")?;
    stage.expect("another agent, without typha", &restricted)?;
    stage.lab.stop_agent("n1")?;
    stage
        .namespace(Node)?
        .command("nft", &["delete", "table", "inet", "margay"], "")?;
    stage.expect("no rules", &[(Outside, Node, OTHER, true)])?;
    stage.lab.start_agent_alone("n1")?;
    let enforcing = || {
        Ok(stage
            .lab
            .node("n1")?
            .status()
            .context("no agent")?
            .enforcing)
    };
    wait("what was saved to be enforced", enforcing)?;
    stage.expect("booted, without typha", &restricted)?;

    stage.lab.apply(&rules(OTHER))?;
    stage.lab.stop_agent("n1")?;
    stage.lab.start_agent("n1")?;
    stage.lab.wait_enforced()?;
    stage.expect(
        "typha is back",
        &[(Outside, Node, WEB, false), (Outside, Node, OTHER, true)],
    )
}
