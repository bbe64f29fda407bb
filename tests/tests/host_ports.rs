//! Host ports with real packets: from outside, from other pods, from the node and from the pod
//! itself.
//!
//! `n1` has pod `x/web` with host ports and `x/near` without, `n3` beyond the router has `x/far`.
//! What is outside the cluster is the router between the nodes.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use margay_api::rule::IpVersion;
use margay_tests::lab::{Lab, Options, PATIENCE};
use margay_tests::namespace::Namespace;
use margay_tests::probe::serve::Ports;
use margay_tests::probe::{Place, Protocol, Target, Verdict, ask};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

/// Port of the pod that every host port leads to.
const WEB: u16 = 80;
/// Host port at every address of the node.
const ANY: u16 = 8080;
/// Host port at the address of the node.
const ONE: u16 = 8081;
/// Host port at the loopback address.
const LOCAL: u16 = 8082;
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

struct Stage {
    lab: Lab,
    version: IpVersion,
    /// Serves the ports.
    runtime: Runtime,
}

fn mk_pod(name: &str, ports: &[Value]) -> Value {
    json!({
        "metadata": {"namespace": "x", "name": name, "labels": {"pod": name}},
        "spec": {"containers": [{"name": "c", "ports": ports}]},
    })
}

/// A host port in each protocol.
fn mk_ports(port: u16, address: &str) -> Vec<Value> {
    let of = |protocol| {
        json!({
            "hostPort": port, "containerPort": WEB, "hostIP": address, "protocol": protocol,
        })
    };
    ["TCP", "UDP", "SCTP"].map(of).into()
}

impl Stage {
    fn new(options: &Options) -> Result<Self> {
        let mut lab = Lab::new(options)?;
        lab.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}))?;
        let loopback = loopback(options.version).to_string();
        let own = lab.node("n1")?.address.addr().to_string();
        let ports = [
            mk_ports(ANY, ""),
            mk_ports(ONE, &own),
            mk_ports(LOCAL, &loopback),
        ]
        .concat();
        for (node, pod) in [
            ("n1", mk_pod("web", &ports)),
            ("n1", mk_pod("near", &[])),
            ("n3", mk_pod("far", &[])),
        ] {
            lab.add_pod(node, &pod)?;
        }
        lab.wait_enforced()?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let stage = Self {
            lab,
            version: options.version,
            runtime,
        };
        let web = PROTOCOLS.map(|protocol| (protocol, WEB));
        stage.serve(&stage.lab.pod("x/web")?.namespace, &web)?;
        Ok(stage)
    }

    fn serve(&self, namespace: &Namespace, ports: &[(Protocol, u16)]) -> Result<()> {
        let opened = namespace.run(|| Ports::open(ports))?;
        Ok(self.runtime.block_on(async { opened.serve() })?)
    }

    fn namespace(&self, end: &str) -> Result<&Namespace> {
        Ok(match end {
            "outside" => self.lab.fabric().namespace(),
            "node" => &self.lab.node("n1")?.host,
            pod => &self.lab.pod(&format!("x/{pod}"))?.namespace,
        })
    }

    /// Address of the node.
    fn node(&self) -> Result<IpAddr> {
        Ok(self.lab.node("n1")?.address.addr())
    }

    /// Fails unless each end gets this verdict at this address and port, in every protocol.
    fn expect(&self, expected: &[(&str, IpAddr, u16, Verdict)]) -> Result<()> {
        for (end, address, port, verdict) in expected {
            let place = Place::of_namespace(self.namespace(end)?)?;
            let targets = PROTOCOLS.map(|protocol| Target::new(protocol, *address, *port));
            // Where the kernel has no sockets of SCTP, nobody refuses it.
            let is_expected = |(protocol, found): (&Protocol, &Verdict)| {
                found == verdict || *protocol == Protocol::Sctp && *verdict == Verdict::Refused
            };
            let since = Instant::now();
            loop {
                let verdicts = ask(&place, &targets)?;
                if PROTOCOLS.iter().zip(&verdicts).all(is_expected) {
                    break;
                }
                // Nothing changes meanwhile; a slow machine is given time to answer.
                let is_over = *verdict == Verdict::Silent || since.elapsed() > PATIENCE;
                ensure!(
                    !is_over,
                    "{end} to {address} {port}: {verdicts:?} instead of {verdict:?}\n{}",
                    self.lab.node("n1")?.ruleset()?
                );
            }
        }
        Ok(())
    }

    /// The address that the pod sees as the source of a connection to its host port.
    fn source_of(&self, end: &str, address: IpAddr) -> Result<IpAddr> {
        const PORT: u16 = 81;
        let pod = &self.lab.pod("x/source")?.namespace;
        let any = SocketAddr::new(unspecified(self.version), PORT);
        let listener = pod.run(|| TcpListener::bind(any))?;
        let target = SocketAddr::new(address, 8100);
        let mut stream = self
            .namespace(end)?
            .run(|| TcpStream::connect_timeout(&target, PATIENCE))
            .with_context(|| format!("{end} to {target}"))?;
        let (mut accepted, source) = listener.accept()?;
        accepted.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        Ok(source.ip())
    }
}

fn loopback(version: IpVersion) -> IpAddr {
    match version {
        IpVersion::V4 => Ipv4Addr::LOCALHOST.into(),
        IpVersion::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

fn unspecified(version: IpVersion) -> IpAddr {
    match version {
        IpVersion::V4 => Ipv4Addr::UNSPECIFIED.into(),
        IpVersion::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[test]
fn a_host_port_leads_to_its_pod_from_everywhere() -> Result<()> {
    leads_from_everywhere(&Stage::new(&Options::default())?)
}

#[test]
fn a_host_port_of_ipv6_leads_to_its_pod_from_everywhere() -> Result<()> {
    leads_from_everywhere(&Stage::new(&Options::ipv6())?)
}

fn leads_from_everywhere(stage: &Stage) -> Result<()> {
    use Verdict::{Answered, Refused};
    let (node, local) = (stage.node()?, loopback(stage.version));
    for end in ["outside", "node", "near", "far", "web"] {
        stage.expect(&[
            (end, node, ANY, Answered),
            (end, node, ONE, Answered),
            (end, node, LOCAL, Refused),
        ])?;
    }
    // The kernel routes no packets between `::1` and pods.
    let loopback = match stage.version {
        IpVersion::V4 => Answered,
        IpVersion::V6 => Refused,
    };
    stage.expect(&[
        ("node", local, ANY, loopback),
        ("node", local, ONE, Refused),
        ("node", local, LOCAL, loopback),
    ])?;
    // What the node forwards is not for it.
    let outside = stage.lab.fabric().router();
    stage.expect(&[("near", outside, ANY, Refused)])?;
    stage.serve(
        stage.namespace("outside")?,
        &PROTOCOLS.map(|protocol| (protocol, ANY)),
    )?;
    stage.lab.pod("x/web")?.namespace.ip("link set eth0 down")?;
    stage.expect(&[("near", outside, ANY, Answered)])
}

#[test]
fn the_pod_sees_who_connects() -> Result<()> {
    for options in [Options::default(), Options::ipv6()] {
        let mut stage = Stage::new(&options)?;
        let port = json!({"hostPort": 8100, "containerPort": 81});
        stage.lab.add_pod("n1", &mk_pod("source", &[port]))?;
        stage.lab.wait_enforced()?;
        let (node, local) = (stage.node()?, loopback(stage.version));
        let near = stage.lab.pod("x/near")?.addresses[0];
        for (end, source) in [("outside", stage.lab.fabric().router()), ("near", near)] {
            let seen = stage.source_of(end, node)?;
            ensure!(
                seen == source,
                "{end}, which is {source}, is seen as {seen}"
            );
        }
        // Of these the node's own address has to be seen, or no reply would come back.
        let mut ends = vec![("source", node), ("node", node)];
        ends.extend((options.version == IpVersion::V4).then_some(("node", local)));
        for (end, address) in ends {
            let seen = stage.source_of(end, address)?;
            let is_nodes = stage.lab.node("n1")?.host.ip("-o addr show")?;
            ensure!(
                is_nodes.contains(&format!(" {seen}/")) && seen != local,
                "{end} to {address} is seen as {seen}"
            );
        }
    }
    Ok(())
}

/// Policies of the pod decide about its own port and the real source; those before translation
/// about the port of the node.
#[test]
fn policies_see_the_port_of_their_stage() -> Result<()> {
    use Verdict::{Answered, Silent};
    let stage = Stage::new(&Options::default())?;
    let node = stage.node()?;
    let from = json!([{"podSelector": {"matchLabels": {"pod": "near"}}}]);
    let ports = ["TCP", "UDP", "SCTP"].map(|protocol| json!({"protocol": protocol, "port": WEB}));
    let ingress = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "x", "name": "web"},
        "spec": {
            "podSelector": {"matchLabels": {"pod": "web"}}, "policyTypes": ["Ingress"],
            "ingress": [{"from": from, "ports": ports}],
        },
    });
    stage.lab.apply(&ingress)?;
    stage.lab.wait_enforced()?;
    stage.expect(&[
        ("near", node, ANY, Answered),
        ("outside", node, ANY, Silent),
    ])?;
    stage.lab.delete(&ingress)?;
    let endpoint = json!({
        "apiVersion": "projectcalico.org/v3", "kind": "HostEndpoint",
        "metadata": {"name": "n1", "labels": {"host": "n1"}},
        "spec": {
            "node": "n1", "interfaceName": "eth0", "profiles": ["projectcalico-default-allow"],
        },
    });
    let to = json!({"ports": [ANY]});
    let deny = |protocol: &str| json!({"action": "Deny", "protocol": protocol, "destination": to});
    let denied = ["TCP", "UDP", "SCTP"].map(deny);
    let before = json!({
        "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy",
        "metadata": {"name": "before"},
        "spec": {
            "selector": "host == 'n1'", "preDNAT": true, "applyOnForward": true,
            "types": ["Ingress"], "ingress": denied,
        },
    });
    for object in [&endpoint, &before] {
        let problems = stage.lab.apply(object)?;
        ensure!(problems.is_empty(), "{problems:?}");
    }
    stage.lab.wait_enforced()?;
    stage.expect(&[
        ("outside", node, ANY, Silent),
        ("outside", node, ONE, Answered),
        ("near", node, ANY, Answered),
    ])
}

#[test]
fn a_host_port_is_one_pods_and_goes_with_it() -> Result<()> {
    use Verdict::{Answered, Refused};
    let mut stage = Stage::new(&Options::default())?;
    let node = stage.node()?;
    let again = mk_pod(
        "again",
        &[json!({"hostPort": ANY, "containerPort": 1, "hostIP": "::"})],
    );
    let refused = format!(
        "{:#}",
        stage.lab.add_pod("n1", &again).map(drop).unwrap_err()
    );
    for part in [
        "host port [::]:8080/TCP of pod x/again",
        "used by pod x/web",
    ] {
        ensure!(refused.contains(part), "{refused}");
    }
    stage.lab.delete(&again_object(&again))?;
    // On another node it is free.
    stage
        .lab
        .add_pod("n2", &mk_pod("other", &mk_ports(ANY, "")))?;
    stage.lab.stop_agent("n1")?;
    stage.expect(&[("outside", node, ANY, Answered)])?;
    stage.lab.start_agent("n1")?;
    stage.lab.wait_enforced()?;
    stage.expect(&[
        ("outside", node, ANY, Answered),
        ("node", node, ONE, Answered),
    ])?;
    stage.lab.remove_pod("x/web")?;
    stage.expect(&[
        ("outside", node, ANY, Refused),
        ("node", node, ONE, Refused),
    ])?;
    let ruleset = stage.lab.node("n1")?.ruleset()?;
    ensure!(!ruleset.contains("hostports"), "{ruleset}");
    stage.lab.add_pod("n1", &again)?;
    Ok(())
}

fn again_object(pod: &Value) -> Value {
    let mut object = pod.clone();
    (object["apiVersion"], object["kind"]) = ("v1".into(), "Pod".into());
    object
}

/// A UDP client that goes on sending from one port reaches the pod as soon as it is there, and
/// nobody once it has gone.
#[test]
fn a_client_that_was_there_before_reaches_the_pod() -> Result<()> {
    const PORT: u16 = 8053;
    let mut stage = Stage::new(&Options::default())?;
    let target = SocketAddr::new(stage.node()?, PORT);
    let client = stage.namespace("outside")?.run(|| {
        let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        client.set_read_timeout(Some(PATIENCE))?;
        client.connect(target)?;
        Ok::<_, std::io::Error>(client)
    })?;
    let ask =
        || -> std::io::Result<usize> { client.send(b"x").and_then(|_| client.recv(&mut [0; 8])) };
    ensure!(ask().is_err(), "nobody serves the port");
    let port = json!({"hostPort": PORT, "containerPort": PORT, "protocol": "UDP"});
    stage.lab.add_pod("n1", &mk_pod("dns", &[port]))?;
    stage.serve(&stage.lab.pod("x/dns")?.namespace, &[(Protocol::Udp, PORT)])?;
    ask().context("the pod is there")?;
    stage.lab.remove_pod("x/dns")?;
    ensure!(ask().is_err(), "the pod has gone");
    Ok(())
}
