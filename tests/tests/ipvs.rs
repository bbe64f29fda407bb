//! Policy where kube-proxy is in IPVS mode: its changes to a node's links, addresses and virtual
//! servers are made here by hand, and packets are real. It takes a kernel with IPVS, so
//! `make kernels` runs it and `cargo test` does not.
//!
//! `n1` has the client `x/a`, the backend `x/b` and a process of its own; the backend `x/c` is on
//! `n3`, beyond a tunnel. What is outside the cluster is the router.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use margay_tests::lab::{Lab, Options, PATIENCE, check_enforced};
use margay_tests::namespace::Namespace;
use margay_tests::probe::serve::Ports;
use margay_tests::probe::{Place, Protocol, Target, Verdict, ask};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use Verdict::{Answered, Silent};

/// The address of the Service, and the port of pods.
const SERVICE: &str = "10.96.0.10";
const BACKEND: u16 = 8080;
/// Ports of the Service: of the backend on the node, of the one on the other node, of a process of
/// the node, and of nobody.
const NEAR: u16 = 80;
const FAR: u16 = 81;
const HOST: u16 = 82;
const NOBODYS: u16 = 9090;
/// The node, and the port of it that leads to the backend on it.
const NODE: &str = "172.30.0.1";
const NODE_PORT: u16 = 30080;

struct Stage {
    lab: Lab,
    /// Serves the ports.
    _runtime: Runtime,
}

impl Stage {
    fn new() -> Result<Self> {
        let mut lab = Lab::new(&Options::default())?;
        lab.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}))?;
        for (node, name) in [("n1", "a"), ("n1", "b"), ("n3", "c")] {
            let metadata = json!({"namespace": "x", "name": name, "labels": {"pod": name}});
            lab.add_pod(
                node,
                &json!({"metadata": metadata, "spec": {"containers": [{"name": "c"}]}}),
            )?;
        }
        lab.wait_enforced()?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        for (place, ports) in [
            (&lab.pod("x/b")?.namespace, vec![BACKEND]),
            (&lab.pod("x/c")?.namespace, vec![BACKEND]),
            (&lab.node("n1")?.host, vec![NOBODYS]),
        ] {
            let ports: Vec<_> = ports
                .into_iter()
                .map(|port| (Protocol::Tcp, port))
                .collect();
            let opened = place.run(|| Ports::open(&ports))?;
            runtime.block_on(async { opened.serve() })?;
        }
        Ok(Self {
            lab,
            _runtime: runtime,
        })
    }

    fn host(&self) -> Result<&Namespace> {
        Ok(&self.lab.node("n1")?.host)
    }

    /// Does what kube-proxy does for a Service of three ports, one of them with a NodePort.
    fn serve(&self) -> Result<()> {
        let host = self.host()?;
        host.ip("link add kube-ipvs0 type dummy")?;
        host.ip(&format!("address add {SERVICE}/32 dev kube-ipvs0"))?;
        let address = |name: &str| Ok::<_, anyhow::Error>(self.lab.pod(name)?.addresses[0]);
        let (near, far) = (address("x/b")?, address("x/c")?);
        self.lead(SERVICE, NEAR, near, BACKEND)?;
        self.lead(SERVICE, FAR, far, BACKEND)?;
        self.lead(SERVICE, HOST, NODE.parse()?, NOBODYS)?;
        self.lead(NODE, NODE_PORT, near, BACKEND)?;
        // The module has created the parameter.
        host.run(|| std::fs::write("/proc/sys/net/ipv4/vs/conntrack", "1"))?;
        self.until("the chains of IPVS", |table| {
            table.contains("chain ipvs-to")
        })
    }

    fn lead(&self, address: &str, port: u16, backend: IpAddr, to: u16) -> Result<()> {
        let (server, backend) = (
            format!("{address}:{port}"),
            SocketAddr::new(backend, to).to_string(),
        );
        let host = self.host()?;
        host.command("ipvsadm", &["-A", "-t", &server, "-s", "rr"], "")?;
        host.command("ipvsadm", &["-a", "-t", &server, "-r", &backend, "-m"], "")
            .map(drop)
    }

    fn until(&self, what: &str, is_so: impl Fn(&str) -> bool) -> Result<()> {
        let begin = Instant::now();
        loop {
            let table = self
                .host()?
                .command("nft", &["list", "table", "inet", "margay"], "")?;
            if is_so(&table) {
                return Ok(());
            }
            ensure!(begin.elapsed() < PATIENCE, "{what}:\n{table}");
        }
    }

    fn apply(&self, object: &Value) -> Result<()> {
        let problems = self.lab.apply(object)?;
        ensure!(problems.is_empty(), "{object}: {problems:?}");
        self.lab.wait_enforced()?;
        check_enforced(&self.lab)
    }

    fn delete(&self, object: &Value) -> Result<()> {
        self.lab.delete(object)?;
        self.lab.wait_enforced()
    }

    /// Answers that the client gets from the ports of the Service, in their order above, and the
    /// outside from the port of the node.
    fn expect(&self, what: &str, client: [Verdict; 4], outside: Verdict) -> Result<()> {
        let ports = [NEAR, FAR, HOST, NOBODYS];
        let target = |address: &str, port| {
            Ok::<_, anyhow::Error>(Target::new(Protocol::Tcp, address.parse::<IpAddr>()?, port))
        };
        let targets = ports
            .map(|port| target(SERVICE, port))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let heard = ask(&self.lab.pod("x/a")?.place()?, &targets)?;
        ensure!(
            heard == client,
            "{what}: the client hears {heard:?} of ports {ports:?}, not {client:?}"
        );
        let place = Place::of_namespace(self.lab.fabric().namespace())?;
        let heard = ask(&place, &[target(NODE, NODE_PORT)?])?;
        ensure!(
            heard == [outside],
            "{what}: the outside hears {heard:?}, not {outside:?}"
        );
        Ok(())
    }
}

/// A policy of the namespace for one pod.
fn policy(pod: &str, direction: &str, rules: Value) -> Value {
    let name = format!("{pod}-{}", direction.to_lowercase());
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {
            "namespace": "x",
            "name": name,
        },
        "spec": {
            "podSelector": {"matchLabels": {"pod": pod}},
            "policyTypes": [direction],
            direction.to_lowercase(): rules,
        },
    })
}

fn only(peer: &str, pod: &str) -> Value {
    json!([{peer: [{"podSelector": {"matchLabels": {"pod": pod}}}]}])
}

#[test]
fn what_ipvs_sends_on_obeys_policy_of_both_ends() -> Result<()> {
    let stage = Stage::new()?;
    stage.serve()?;
    stage.expect("without policy", [Answered; 4], Answered)?;

    let closed = policy("b", "Ingress", json!([]));
    stage.apply(&closed)?;
    stage.expect(
        "nobody may ask the backend",
        [Silent, Answered, Answered, Answered],
        Silent,
    )?;
    stage.delete(&closed)?;

    let from_a = policy("b", "Ingress", only("from", "a"));
    stage.apply(&from_a)?;
    stage.expect(
        "the client alone may ask the backend",
        [Answered; 4],
        Silent,
    )?;
    stage.delete(&from_a)?;

    let to_b = policy("a", "Egress", only("to", "b"));
    stage.apply(&to_b)?;
    stage.expect(
        "the client may ask the backend alone",
        [Answered, Silent, Silent, Silent],
        Answered,
    )?;
    stage.delete(&to_b)?;

    let to_c = policy("a", "Egress", only("to", "c"));
    stage.apply(&to_c)?;
    stage.expect(
        "the client may ask the other backend alone",
        [Silent, Answered, Silent, Silent],
        Answered,
    )?;
    stage.delete(&to_c)?;
    stage.expect("after the policies", [Answered; 4], Answered)
}

/// Holds across a restart of the agent, and ends with IPVS.
#[test]
fn the_chains_of_ipvs_come_and_go_with_its_link() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.serve()?;
    stage.apply(&policy("b", "Ingress", json!([])))?;
    let closed = [Silent, Answered, Answered, Answered];
    stage.expect("nobody may ask the backend", closed, Silent)?;
    stage.lab.stop_agent("n1")?;
    stage.expect("without an agent", closed, Silent)?;
    stage.lab.start_agent("n1")?;
    stage.lab.wait_enforced()?;
    stage.expect("with its successor", closed, Silent)?;
    stage
        .host()?
        .ip("link del kube-ipvs0")
        .context("what kube-proxy does in another mode")?;
    stage.until("no chains of IPVS", |table| !table.contains("ipvs"))
}
