//! Two nodes as namespaces, with the real routing driver and pod links: packets cross by VXLAN and without it, and what is removed by hand comes back.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_api::network::{Encapsulation, Mac, NodeInfo, Vtep};
use margay_calc::model::{PoolRecord, Record, RecordId, RouteRecord};
use margay_node::net::netlink::Socket;
use margay_node::net::plan::{LocalPods, plan};
use margay_node::net::pod::{self, PodLink};
use margay_node::net::worker::Network;
use margay_tests::namespace::{Namespace, connect};

struct Node {
    name: &'static str,
    host: Namespace,
    pod: Namespace,
    address: IpAddr,
    block: IpNet,
    network: Network,
}

/// A node with one pod, and an underlay address on `eth0`.
fn mk_node(name: &'static str, number: u8) -> Result<Node> {
    let (host, pod) = (Namespace::new()?, Namespace::new()?);
    host.command("sysctl", &["-qw", "net.ipv4.ip_forward=1"], "")?;
    let address: IpNet = format!("10.244.{number}.5/32").parse()?;
    let network = host.run(|| -> Result<Network> {
        let link = PodLink { host: "cali1", pod: "eth0", namespace: pod.file(), mtu: 1450 };
        let mut socket = Socket::open()?;
        let index = pod::create(&mut socket, &link)?;
        pod::configure(&link, &[address])?;
        pod::route(&mut socket, index, &[address])?;
        pod::check(&mut socket, &link, &[address])?;
        Ok(Network::spawn()?)
    })?;
    Ok(Node { name, host, pod, address: address.addr(), block: format!("10.244.{number}.0/26").parse()?, network })
}

fn info(number: u8) -> NodeInfo {
    NodeInfo {
        ipv4: format!("172.30.0.{number}/24").parse().ok(),
        vtep: Some(Vtep { address: Ipv4Addr::new(10, 244, number, 0), mac: Mac([0x66, 0, 0, 0, 0, number]) }),
        ..NodeInfo::default()
    }
}

fn records(nodes: &[(&Node, u8)], encapsulation: Encapsulation) -> BTreeMap<RecordId, Record> {
    let pool: IpNet = "10.244.0.0/16".parse().expect("a range");
    let mut records =
        BTreeMap::from([(RecordId::Pool(pool), Record::Pool(PoolRecord { nat_outgoing: false, encapsulation }))]);
    for (node, number) in nodes {
        records.insert(RecordId::Node(node.name.to_owned()), Record::Node(info(*number)));
        records.insert(
            RecordId::Route(node.block),
            Record::Route(RouteRecord { node: node.name.to_owned(), encapsulation }),
        );
    }
    records
}

/// Whether a datagram from one pod comes to the other and is answered.
fn reaches(from: &Node, to: &Node) -> Result<bool> {
    let server = to.pod.run(|| UdpSocket::bind((to.address, 7777)))?;
    let client = from.pod.run(|| UdpSocket::bind((from.address, 0)))?;
    server.set_read_timeout(Some(Duration::from_secs(3)))?;
    client.send_to(b"hello", SocketAddr::new(to.address, 7777))?;
    let mut buffer = [0; 16];
    match server.recv_from(&mut buffer) {
        Ok((length, source)) => Ok(&buffer[..length] == b"hello" && source.ip() == from.address),
        Err(_) => Ok(false),
    }
}

fn apply(runtime: &tokio::runtime::Runtime, nodes: &[&Node], records: &BTreeMap<RecordId, Record>) -> Result<()> {
    for node in nodes {
        let pods = LocalPods::from([(node.address, "cali1".to_owned())]);
        let generation = node.network.want(plan(node.name, records, &pods));
        let progress = runtime.block_on(node.network.applied(generation));
        ensure!(progress.failed.is_empty(), "{}: {:?}", node.name, progress.failed);
    }
    Ok(())
}

fn device(node: &Node) -> Result<String> {
    node.host.ip("-d link show vxlan.calico")
}

#[test]
fn pods_of_two_nodes_reach_each_other_by_vxlan_and_without() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (one, two) = (mk_node("one", 1)?, mk_node("two", 2)?);
    connect((&one.host, "eth0", "172.30.0.1/24"), (&two.host, "eth0", "172.30.0.2/24"))?;
    // A default route that leads to nobody: proxy ARP answers only for what the node has a route to.
    for node in [&one, &two] {
        node.host.ip("route add default via 172.30.0.254")?;
    }
    let (both, numbered) = ([&one, &two], [(&one, 1), (&two, 2)]);

    ensure!(!reaches(&one, &two)?, "pods reach each other before anything was programmed");
    for encapsulation in
        [Encapsulation::Vxlan, Encapsulation::VxlanCrossSubnet, Encapsulation::None, Encapsulation::Vxlan]
    {
        apply(&runtime, &both, &records(&numbered, encapsulation))?;
        ensure!(reaches(&one, &two)? && reaches(&two, &one)?, "no packets with {encapsulation:?}");
        let routes = one.host.ip("route show proto 82")?;
        let tunnelled = routes.contains("10.244.2.0/26 via 10.244.2.0 dev vxlan.calico");
        ensure!(tunnelled == (encapsulation == Encapsulation::Vxlan), "{encapsulation:?}: {routes}");
        ensure!(routes.contains("blackhole 10.244.1.0/26"), "{routes}");
        ensure!(
            device(&one).is_ok() == (encapsulation != Encapsulation::None),
            "{encapsulation:?}: {:?}",
            device(&one)
        );
    }
    let details = device(&one)?;
    for wanted in ["vxlan id 4096", "local 172.30.0.1", "dstport 4789", "nolearning", "66:00:00:00:00:01", "mtu 1450"] {
        ensure!(details.contains(wanted), "{wanted} in {details}");
    }

    let before = one.network.progress().repairs;
    one.host.ip("route del 10.244.2.0/26")?;
    runtime.block_on(repaired(&one.network, before))?;
    ensure!(reaches(&one, &two)?, "a route that was deleted by hand did not come back");
    one.host.ip("link del vxlan.calico")?;
    runtime.block_on(repaired(&one.network, before + 1))?;
    ensure!(reaches(&one, &two)?, "a device that was deleted by hand did not come back");

    one.host.ip("route add 10.99.0.0/24 dev eth0")?;
    apply(&runtime, &both, &records(&numbered, Encapsulation::None))?;
    ensure!(one.host.ip("route show 10.99.0.0/24")?.contains("10.99.0.0/24"), "a foreign route was removed");
    Ok(())
}

/// Waits until the node has repaired something once more, and the repair is in force.
async fn repaired(network: &Network, before: u64) -> Result<()> {
    let wait = network.until(|progress| progress.repairs > before && progress.failed.is_empty());
    tokio::time::timeout(Duration::from_secs(5), wait).await.context("nothing was repaired within 5 s")?;
    Ok(())
}
