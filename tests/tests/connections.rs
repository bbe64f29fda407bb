//! Connections end with the owner of an address: packets of the next owner meet its own policy from
//! the first one on, in both directions, even where the address was translated, and connections of
//! others continue.
//!
//! Drops are detected without waiting: a later packet on a path that is always open has arrived.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use margay_api::endpoint::{EndpointKey, interface_name};
use margay_api::meta::ANNOTATION_POD_ADDRESSES;
use margay_tests::cluster::process::wait_for;
use margay_tests::lab::fabric::Topology;
use margay_tests::lab::{Lab, Options, PATIENCE};
use margay_tests::namespace::Namespace;
use margay_tests::probe::flow::Flow;
use serde_json::{Value, json};

/// The address that gets another owner.
const SHARED: Ipv4Addr = Ipv4Addr::new(10, 65, 0, 7);
/// Address of a Service in front of it.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Port that the first owner serves.
const DNS: u16 = 53;
/// Source port of the first owner.
const ASKS: u16 = 5353;
/// Port that the policies let pass both ways.
const ALWAYS: u16 = 9;
const WEB: u16 = 80;
/// Time between two packets of a connection.
const BEAT: Duration = Duration::from_millis(2);

fn mk_pod(name: &str, is_fixed: bool) -> Value {
    let mut pod = json!({"metadata": {"namespace": "x", "name": name, "labels": {"pod": name}}});
    if is_fixed {
        pod["metadata"]["annotations"] =
            json!({ANNOTATION_POD_ADDRESSES: json!([SHARED]).to_string()});
    }
    pod
}

/// Closes `x/second` both ways but for one port.
fn closed() -> Value {
    let always = json!([{"ports": [{"protocol": "UDP", "port": ALWAYS}]}]);
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {
            "namespace": "x",
            "name": "closed",
        },
        "spec": {
            "podSelector": {"matchLabels": {"pod": "second"}}, "policyTypes": ["Ingress", "Egress"],
            "ingress": always, "egress": always,
        },
    })
}

/// `x/client` and `x/other` on `n1`, the router outside; `x/first` with the shared address on `n1`,
/// without policy.
fn mk_lab() -> Result<Lab> {
    let pool = json!({"cidr": "10.65.0.0/16", "vxlanMode": "Never", "natOutgoing": true});
    let mut lab = Lab::new(&Options {
        nodes: 1,
        topology: Topology::Flat,
        pool,
        ..Options::default()
    })?;
    lab.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}))?;
    lab.apply(&closed())?;
    let service = format!(
        "table ip service {{ chain pre {{ type nat hook prerouting priority dstnat; ip daddr \
         {SERVICE} udp dport {DNS} dnat to {SHARED}:{DNS}\n }}\n }}\n"
    );
    lab.node("n1")?
        .host
        .command("nft", &["-f", "-"], &service)?;
    for (name, is_fixed) in [("client", false), ("other", false), ("first", true)] {
        lab.add_pod("n1", &mk_pod(name, is_fixed))?;
    }
    lab.wait_enforced()?;
    Ok(lab)
}

fn bound(namespace: &Namespace, address: IpAddr, port: u16) -> Result<UdpSocket> {
    let socket = namespace.run(|| UdpSocket::bind((address, port)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Number of datagrams in a socket's queue.
fn arrived(socket: &UdpSocket) -> Result<usize> {
    socket.set_nonblocking(true)?;
    let mut count = 0;
    let counted = loop {
        match socket.recv(&mut [0; 64]) {
            Ok(_) => count += 1,
            // A refusal comes by ICMP.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(count),
            Err(error) => break Err(error.into()),
        }
    };
    socket.set_nonblocking(false)?;
    counted
}

/// Sends from one port to one address again and again, whoever has it.
struct Sender {
    socket: Arc<UdpSocket>,
    sent: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    fn start(socket: UdpSocket, to: SocketAddr) -> Self {
        let (socket, sent, end) = (
            Arc::new(socket),
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (own, count, stop) = (socket.clone(), sent.clone(), end.clone());
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // It may be refused while there is no such address.
                let _ = own.send_to(b"data", to);
                count.fetch_add(1, Ordering::Relaxed);
                thread::sleep(BEAT);
            }
        });
        Self {
            socket,
            sent,
            end,
            thread: Some(thread),
        }
    }

    /// Returns when it has sent so many more.
    fn wait_for_more(&self, more: u64) -> Result<()> {
        let wanted = self.sent.load(Ordering::Relaxed) + more;
        wait_for(
            PATIENCE,
            || "a connection to make progress".to_owned(),
            || self.sent.load(Ordering::Relaxed) >= wanted,
        )
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The node's entries that have an address, each a line.
fn entries(lab: &Lab, address: Ipv4Addr) -> Result<Vec<String>> {
    let read = || std::fs::read_to_string("/proc/thread-self/net/nf_conntrack");
    let text = lab
        .node("n1")?
        .host
        .run(read)
        .context("the kernel's list of connections")?;
    let has = |line: &&str| {
        line.split_whitespace()
            .any(|word| word.ends_with(&format!("={address}")))
    };
    Ok(text.lines().filter(has).map(str::to_owned).collect())
}

/// Three established connections of the first owner of the address: to it, to it through the
/// Service, and from it to the outside, masqueraded.
struct Connections {
    direct: Sender,
    service: Sender,
    outside: Sender,
    /// The first owner's sockets.
    first: Vec<UdpSocket>,
    client: IpAddr,
}

fn connect_all(lab: &Lab) -> Result<Connections> {
    let (client, first, router) = (
        lab.pod("x/client")?,
        lab.pod("x/first")?,
        lab.fabric().router(),
    );
    let dns = bound(&first.namespace, SHARED.into(), DNS)?;
    let sender = |port: u16, to: Ipv4Addr| -> Result<Sender> {
        let socket = bound(&client.namespace, client.addresses[0], port)?;
        Ok(Sender::start(socket, SocketAddr::new(to.into(), DNS)))
    };
    let (direct, service) = (sender(40000, SHARED)?, sender(40001, SERVICE)?);
    for sender in [&direct, &service] {
        let port = sender.socket.local_addr()?.port();
        let mut buffer = [0; 64];
        loop {
            let (_, from) = dns
                .recv_from(&mut buffer)
                .context("the first owner is asked")?;
            dns.send_to(b"answer", from)?;
            if from.port() == port {
                break;
            }
        }
        sender
            .socket
            .recv(&mut buffer)
            .context("the client is answered")?;
    }
    let asking = bound(&first.namespace, SHARED.into(), ASKS)?;
    let outside = bound(lab.fabric().namespace(), router, DNS)?;
    asking.send_to(b"ask", (router, DNS))?;
    let (_, from) = outside
        .recv_from(&mut [0; 64])
        .context("the outside is asked")?;
    ensure!(from.ip() != IpAddr::V4(SHARED), "the pod is masqueraded");
    let outside = Sender::start(outside, from);
    asking.recv(&mut [0; 64]).context("the outside answers")?;
    Ok(Connections {
        direct,
        service,
        outside,
        first: vec![dns, asking],
        client: client.addresses[0],
    })
}

impl Connections {
    fn senders(&self) -> [&Sender; 3] {
        [&self.direct, &self.service, &self.outside]
    }

    fn wait_for_more(&self) -> Result<()> {
        self.senders()
            .into_iter()
            .try_for_each(|sender| sender.wait_for_more(5))
    }
}

#[test]
fn the_next_owner_of_an_address_inherits_no_connection() -> Result<()> {
    let mut lab = mk_lab()?;
    let mut connections = connect_all(&lab)?;
    let held = hold(&lab)?;
    let bystander = lab.pod("x/other")?.addresses[0];
    let others = start_flow(&lab)?;
    // Its sockets hold its network.
    connections.first.clear();
    lab.remove_pod("x/first")?;
    ensure!(
        entries(&lab, SHARED)?.is_empty(),
        "left by DEL: {:?}",
        entries(&lab, SHARED)?
    );
    connections.wait_for_more()?;
    ensure!(
        entries(&lab, SHARED)?.is_empty(),
        "what nobody has begins nothing: {:?}",
        entries(&lab, SHARED)?
    );
    for sender in connections.senders() {
        arrived(&sender.socket)?;
    }
    lab.add_pod("n1", &mk_pod("second", true))?;
    let second = lab.pod("x/second")?;
    ensure!(
        second.addresses == [IpAddr::V4(SHARED)],
        "the address has a new owner"
    );
    let (dns, asking, always) = (
        bound(&second.namespace, SHARED.into(), DNS)?,
        bound(&second.namespace, SHARED.into(), ASKS)?,
        bound(&second.namespace, SHARED.into(), ALWAYS)?,
    );
    connections.wait_for_more()?;
    (&held).write_all(b"still there?")?;
    pass(&lab, &connections, &always)?;
    ensure!(
        arrived(&dns)? == 0,
        "a packet of an old connection has come to the new owner"
    );
    ensure!(
        arrived(&asking)? == 0,
        "an answer to the old owner has come to the new one"
    );

    dns.send_to(b"inherited", (connections.client, 40000))?;
    dns.send_to(b"inherited", (connections.client, 40001))?;
    asking.send_to(b"inherited", (lab.fabric().router(), DNS))?;
    pass(&lab, &connections, &always)?;
    for sender in connections.senders() {
        ensure!(
            arrived(&sender.socket)? == 0,
            "the new owner may send nothing"
        );
    }
    held.set_nonblocking(true)?;
    match (&held).read(&mut [0; 8]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        other => bail!("the new owner's kernel has spoken to the old one's client: {other:?}"),
    }
    let IpAddr::V4(bystander) = bystander else {
        bail!("a pod of IPv4")
    };
    ensure!(
        entries(&lab, bystander)?
            .iter()
            .any(|entry| entry.contains("ESTABLISHED")),
        "others keep their entries"
    );
    let report = others.finish();
    ensure!(
        report.broken.is_none() && report.echoed > 0,
        "others are disturbed: {report:?}"
    );
    Ok(())
}

/// The new owner sends and receives on the port that its policy allows: what was sent before has
/// arrived by then, or never will.
fn pass(lab: &Lab, connections: &Connections, always: &UdpSocket) -> Result<()> {
    let client = bound(&lab.pod("x/client")?.namespace, connections.client, ALWAYS)?;
    let outside = bound(lab.fabric().namespace(), lab.fabric().router(), ALWAYS)?;
    client.send_to(b"open", (SHARED, ALWAYS))?;
    always
        .recv(&mut [0; 8])
        .context("the new owner's open port")?;
    for to in [&client, &outside] {
        always.send_to(b"open", to.local_addr()?)?;
        to.recv(&mut [0; 8])
            .context("the port that the new owner may ask")?;
    }
    Ok(())
}

/// A TCP connection of the client whose other end will vanish silently.
fn hold(lab: &Lab) -> Result<TcpStream> {
    let (client, first) = (lab.pod("x/client")?, lab.pod("x/first")?);
    let listener = first.namespace.run(|| TcpListener::bind((SHARED, WEB)))?;
    let stream = client
        .namespace
        .run(|| TcpStream::connect_timeout(&(SHARED, WEB).into(), PATIENCE))?;
    let (mut end, _) = listener.accept()?;
    end.write_all(b"x")?;
    (&stream).read_exact(&mut [0])?;
    // It ends with its network: the pod's link goes before the socket is closed.
    thread::spawn(move || {
        let _ = end.read(&mut [0; 64]);
    });
    Ok(stream)
}

fn start_flow(lab: &Lab) -> Result<Flow> {
    let (client, other) = (lab.pod("x/client")?, lab.pod("x/other")?);
    let IpAddr::V4(address) = other.addresses[0] else {
        bail!("a pod of IPv4")
    };
    let listener = other.namespace.run(|| TcpListener::bind((address, WEB)))?;
    thread::spawn(move || {
        // It ends with the flow.
        let echo = |end: TcpStream| std::io::copy(&mut &end, &mut &end);
        listener.accept().map(|(end, _)| echo(end))
    });
    Flow::start(&client.place()?, SocketAddrV4::new(address, WEB))
}

/// A pod that goes while no agent runs, and whose DEL comes late or never.
#[test]
fn connections_of_a_pod_that_went_while_the_agent_was_away_end_with_its_start() -> Result<()> {
    let mut lab = mk_lab()?;
    let mut connections = connect_all(&lab)?;
    lab.stop_agent("n1")?;
    connections.first.clear();
    lab.lose_pod("x/first")?;
    let link = interface_name(&EndpointKey::new("x", "first"));
    let has_gone = || {
        lab.node("n1")
            .and_then(|node| node.host.ip("-o link"))
            .is_ok_and(|links| !links.contains(&link))
    };
    wait_for(PATIENCE, || format!("{link} to go with its pod"), has_gone)?;
    connections.wait_for_more()?;
    ensure!(!entries(&lab, SHARED)?.is_empty(), "the kernel keeps them");
    lab.start_agent("n1")?;
    let gone = || entries(&lab, SHARED).is_ok_and(|entries| entries.is_empty());
    wait_for(
        PATIENCE,
        || "the connections of the deleted pod to end".to_owned(),
        gone,
    )
}
