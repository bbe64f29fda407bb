//! Two nodes as namespaces, with the real routing driver and pod links: packets of both IP versions cross by VXLAN and without it, and what is removed by
//! hand comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_api::network::{Encapsulation, Mac, NodeInfo, Vtep};
use margay_api::rule::IpVersion;
use margay_calc::model::{PoolRecord, Record, RecordId, RouteRecord};
use margay_node::net::netlink::Socket;
use margay_node::net::plan::{LocalPods, VERSIONS, plan, version_of, vxlan_device_name};
use margay_node::net::pod::{self, PodLink};
use margay_node::net::removal::Removal;
use margay_node::net::worker::Network;
use margay_tests::namespace::{Namespace, connect};

const V4: &[IpVersion] = &[IpVersion::V4];
const V6: &[IpVersion] = &[IpVersion::V6];

struct Node {
    name: &'static str,
    number: u8,
    host: Namespace,
    pod: Namespace,
    addresses: Vec<IpNet>,
    network: Network,
}

impl Node {
    fn address(&self, version: IpVersion) -> Result<IpAddr> {
        let found = self.addresses.iter().map(IpNet::addr).find(|address| version_of(*address) == version);
        found.with_context(|| format!("{} has no address of {version:?}", self.name))
    }

    fn versions(&self) -> impl Iterator<Item = IpVersion> {
        self.addresses.iter().map(|address| version_of(address.addr()))
    }

    fn info(&self) -> NodeInfo {
        let number = self.number;
        let mut info = NodeInfo::default();
        for version in self.versions() {
            match version {
                IpVersion::V4 => {
                    info.ipv4 = format!("172.30.0.{number}/24").parse().ok();
                    let mac = Mac([0x66, 0, 0, 0, 0, number]);
                    info.vtep = Some(Vtep { address: [10, 244, number, 0].into(), mac });
                }
                IpVersion::V6 => {
                    info.ipv6 = format!("fd01::{number}/64").parse().ok();
                    let mac = Mac([0x66, 0, 0, 0, 6, number]);
                    info.vtep6 = Some(Vtep { address: [0xfd00, 0x10, 0x244, number.into(), 0, 0, 0, 0].into(), mac });
                }
            }
        }
        info
    }
}

fn block(version: IpVersion, number: u8) -> String {
    match version {
        IpVersion::V4 => format!("10.244.{number}.0/26"),
        IpVersion::V6 => format!("fd00:10:244:{number}::/122"),
    }
}

/// A node with one pod that has an address of each of these IP versions.
fn mk_node(name: &'static str, number: u8, versions: &[IpVersion]) -> Result<Node> {
    let (host, pod) = (Namespace::new()?, Namespace::new()?);
    // The node forwards IPv6 without being told to by anybody else.
    host.command("sysctl", &["-qw", "net.ipv4.ip_forward=1"], "")?;
    let address = |version: &IpVersion| match version {
        IpVersion::V4 => format!("10.244.{number}.5/32").parse(),
        IpVersion::V6 => format!("fd00:10:244:{number}::5/128").parse(),
    };
    let addresses = versions.iter().map(address).collect::<Result<Vec<IpNet>, _>>()?;
    let network = host.run(|| -> Result<Network> {
        let link = PodLink { host: "cali1", pod: "eth0", namespace: pod.file(), mtu: 1430 };
        let mut socket = Socket::open()?;
        let index = pod::create(&mut socket, &link)?;
        pod::configure(&link, &addresses)?;
        pod::route(&mut socket, index, &addresses)?;
        pod::check(&mut socket, &link, &addresses)?;
        Ok(Network::spawn()?)
    })?;
    Ok(Node { name, number, host, pod, addresses, network })
}

/// Two nodes of these IP versions on one link.
fn mk_nodes(versions: &[IpVersion]) -> Result<[Node; 2]> {
    let (one, two) = (mk_node("one", 1, versions)?, mk_node("two", 2, versions)?);
    connect((&one.host, "eth0", ""), (&two.host, "eth0", ""))?;
    for node in [&one, &two] {
        if versions.contains(&IpVersion::V4) {
            node.host.ip(&format!("addr add 172.30.0.{}/24 dev eth0", node.number))?;
            // A default route that leads to nobody: proxy ARP answers only for what the node has a route to.
            node.host.ip("route add default via 172.30.0.254")?;
        }
        if versions.contains(&IpVersion::V6) {
            node.host.ip(&format!("addr add fd01::{}/64 dev eth0 nodad", node.number))?;
        }
    }
    Ok([one, two])
}

fn records(nodes: &[Node], encapsulation: Encapsulation) -> BTreeMap<RecordId, Record> {
    let mut records = BTreeMap::new();
    for pool in ["10.244.0.0/16", "fd00:10:244::/48"] {
        let pool: IpNet = pool.parse().expect("a range");
        records.insert(RecordId::Pool(pool), Record::Pool(PoolRecord { nat_outgoing: false, encapsulation }));
    }
    for node in nodes {
        records.insert(RecordId::Node(node.name.to_owned()), Record::Node(node.info()));
        for version in node.versions() {
            let block = block(version, node.number).parse().expect("a range");
            let route = RouteRecord { node: node.name.to_owned(), encapsulation };
            records.insert(RecordId::Route(block), Record::Route(route));
        }
    }
    records
}

/// Whether a datagram from one pod comes to the other and is answered.
fn reaches(from: &Node, to: &Node, version: IpVersion) -> Result<bool> {
    let (source, destination) = (from.address(version)?, to.address(version)?);
    let server = to.pod.run(|| UdpSocket::bind((destination, 7777)))?;
    let client = from.pod.run(|| UdpSocket::bind((source, 0)))?;
    server.set_read_timeout(Some(Duration::from_secs(3)))?;
    client.set_read_timeout(Some(Duration::from_secs(3)))?;
    client.send_to(b"hello", SocketAddr::new(destination, 7777))?;
    let mut buffer = [0; 16];
    let Ok((length, asker)) = server.recv_from(&mut buffer) else { return Ok(false) };
    server.send_to(&buffer[..length], asker)?;
    let answered = client.recv_from(&mut buffer).is_ok();
    Ok(answered && &buffer[..length] == b"hello" && asker.ip() == source)
}

fn ensure_reaches(nodes: &[Node; 2], why: &str) -> Result<()> {
    let [one, two] = nodes;
    for version in one.versions() {
        ensure!(reaches(one, two, version)? && reaches(two, one, version)?, "no packets of {version:?}: {why}");
    }
    Ok(())
}

fn apply(runtime: &tokio::runtime::Runtime, nodes: &[Node], records: &BTreeMap<RecordId, Record>) -> Result<()> {
    for node in nodes {
        let pods: LocalPods = node.addresses.iter().map(|address| (address.addr(), "cali1".to_owned())).collect();
        let generation = node.network.want(plan(node.name, records, &pods));
        let progress = runtime.block_on(node.network.applied(generation));
        ensure!(progress.failed.is_empty(), "{}: {:?}", node.name, progress.failed);
    }
    Ok(())
}

fn device(node: &Node, version: IpVersion) -> Result<String> {
    node.host.ip(&format!("-d link show {}", vxlan_device_name(version)))
}

fn routes(node: &Node, version: IpVersion) -> Result<String> {
    let family = if version == IpVersion::V4 { "-4" } else { "-6" };
    node.host.ip(&format!("{family} route show proto 82"))
}

/// All that is promised of two nodes whose pods have addresses of these IP versions.
fn cross(versions: &[IpVersion]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let nodes = mk_nodes(versions)?;
    let [one, two] = &nodes;
    for version in versions {
        ensure!(!reaches(one, two, *version)?, "pods reach each other before anything was programmed");
    }
    for encapsulation in
        [Encapsulation::Vxlan, Encapsulation::VxlanCrossSubnet, Encapsulation::None, Encapsulation::Vxlan]
    {
        apply(&runtime, &nodes, &records(&nodes, encapsulation))?;
        ensure_reaches(&nodes, &format!("{encapsulation:?}"))?;
        for version in VERSIONS {
            let is_used = versions.contains(&version);
            let found = device(one, version);
            ensure!(
                found.is_ok() == (is_used && encapsulation != Encapsulation::None),
                "{encapsulation:?} {version:?}: {found:?}"
            );
            if !is_used {
                continue;
            }
            let (own, other) = (block(version, 1), block(version, 2));
            let via = other.split_once('/').context("a range")?.0;
            let routes = routes(one, version)?;
            let tunnelled = routes.contains(&format!("{other} via {via} dev {}", vxlan_device_name(version)));
            ensure!(tunnelled == (encapsulation == Encapsulation::Vxlan), "{encapsulation:?}: {routes}");
            ensure!(routes.contains(&format!("blackhole {own}")), "{routes}");
        }
    }
    for version in versions {
        let details = device(one, *version)?;
        let wanted = match version {
            IpVersion::V4 => ["local 172.30.0.1", "66:00:00:00:00:01", "mtu 1450"],
            IpVersion::V6 => ["local fd01::1", "66:00:00:00:06:01", "mtu 1430"],
        };
        for wanted in wanted.iter().chain(&["vxlan id 4096", "dstport 4789", "nolearning"]) {
            ensure!(details.contains(wanted), "{wanted} in {details}");
        }
    }
    for version in versions {
        let (device, other) = (vxlan_device_name(*version), block(*version, 2));
        let via = other.split_once('/').context("a range")?.0;
        for removal in
            [format!("route del {other}"), format!("link del {device}"), format!("neigh del {via} dev {device}")]
        {
            let (before, whole) = (one.network.progress().repairs, programmed(one, *version)?);
            one.host.ip(&removal)?;
            runtime.block_on(repaired(one, *version, before, &whole)).with_context(|| removal.clone())?;
            ensure_reaches(&nodes, &format!("after {removal}"))?;
        }
    }
    let foreign = if versions.contains(&IpVersion::V4) { "10.99.0.0/24" } else { "fd99::/64" };
    let family = if versions.contains(&IpVersion::V4) { "-4" } else { "-6" };
    one.host.ip(&format!("{family} route add {foreign} dev eth0"))?;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::None))?;
    ensure!(
        one.host.ip(&format!("{family} route show {foreign}"))?.contains("dev eth0"),
        "a foreign route was removed"
    );
    Ok(())
}

#[test]
fn pods_of_two_nodes_reach_each_other_by_vxlan_and_without() -> Result<()> {
    cross(V4)
}

#[test]
fn pods_with_ipv6_alone_reach_each_other_by_vxlan_and_without() -> Result<()> {
    cross(V6)
}

#[test]
fn pods_with_both_versions_reach_each_other_by_vxlan_and_without() -> Result<()> {
    cross(&VERSIONS)
}

/// A node that forwards keeps listening to its own router, and pods listen to nobody.
#[test]
fn router_advertisements_are_heard_where_they_were_and_never_by_pods() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let nodes = mk_nodes(V6)?;
    let [one, _] = &nodes;
    let value = |namespace: &Namespace, parameter: &str| {
        Ok::<_, anyhow::Error>(namespace.command("sysctl", &["-n", parameter], "")?.trim().to_owned())
    };
    one.host.command("sysctl", &["-qw", "net.ipv6.conf.eth0.accept_ra=1"], "")?;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    ensure!(value(&one.host, "net.ipv6.conf.all.forwarding")? == "1", "the node does not forward");
    ensure!(value(&one.host, "net.ipv6.conf.eth0.accept_ra")? == "2", "the node does not hear its router any more");
    for link in ["cali1", vxlan_device_name(IpVersion::V6)] {
        // `ip` and `sysctl` disagree about dots in names.
        let parameter = format!("net/ipv6/conf/{link}/accept_ra");
        ensure!(value(&one.host, &parameter)? == "0", "the node takes routes from {link}");
    }
    ensure!(value(&one.pod, "net.ipv6.conf.eth0.accept_ra")? == "0", "the pod takes routes from anybody");
    Ok(())
}

/// Removals that wait for the same turn are one request to the kernel; what is gone already spoils nothing, and nobody else's link goes.
#[test]
fn links_are_removed_together() -> Result<()> {
    let (host, inside) = (Namespace::new()?, Namespace::new()?);
    let name = |number: usize| format!("cali{number}");
    let removal = host.run(|| -> Result<Removal> {
        let mut socket = Socket::open()?;
        for number in 0..12 {
            let link = PodLink { host: &name(number), pod: &name(number), namespace: inside.file(), mtu: 1430 };
            pod::create(&mut socket, &link)?;
        }
        let (gone, present) = (["absent".to_owned(), name(2), name(3)], [name(3)]);
        ensure!(pod::remove_all(&mut socket, &gone).iter().all(Result::is_ok), "a group with a link that is gone");
        ensure!(pod::remove_all(&mut socket, &present).iter().all(Result::is_ok), "a link that is gone");
        Ok(Removal::spawn()?)
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let removals = (0..10).chain(0..10).map(|number| removal.remove(name(number)));
    for result in runtime.block_on(futures::future::join_all(removals)) {
        result?;
    }
    for namespace in [&host, &inside] {
        let present = namespace.ip("-o link show type veth")?;
        let names = present.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
        let names: Vec<&str> = names.collect();
        ensure!(names == ["cali10", "cali11"], "left are {names:?}");
    }
    Ok(())
}

/// Routes and neighbours of a node, as `ip` shows them.
fn programmed(node: &Node, version: IpVersion) -> Result<[BTreeSet<String>; 2]> {
    let family = if version == IpVersion::V4 { "-4" } else { "-6" };
    let sorted = |text: String| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    Ok([sorted(routes(node, version)?), sorted(node.host.ip(&format!("{family} neigh show nud permanent"))?)])
}

/// Waits until the node has repaired something, and all is as it was: what one removal takes along, as a link does, may be repaired in more than one turn, so
/// that a number of repairs says nothing about the last removal.
async fn repaired(node: &Node, version: IpVersion, before: u64, whole: &[BTreeSet<String>; 2]) -> Result<()> {
    let again = async {
        let mut seen = before;
        loop {
            seen = node.network.until(|progress| progress.repairs > seen && progress.failed.is_empty()).await.repairs;
            if programmed(node, version)? == *whole {
                return Ok(());
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), again).await.context("not repaired within 5 s")?
}
