//! Two nodes as namespaces, with the real routing driver and pod links: packets of both IP versions
//! cross with and without VXLAN, and what is removed by hand is restored.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_api::network::{Encapsulation, Mac, NodeInfo, TunnelKind, Vtep};
use margay_api::rule::IpVersion;
use margay_calc::model::{PoolRecord, Record, RecordId, RouteRecord};
use margay_dataplane::routes::driver::RoutingPart;
use margay_dataplane::routes::plan::{LocalPods, plan};
use margay_dataplane::routes::pod::{self, PodLink};
use margay_dataplane::routes::worker::Network;
use margay_netlink::route::RouteSocket;
use margay_tests::namespace::{Namespace, connect};

#[path = "routing/ipip.rs"]
mod ipip;
#[path = "routing/links.rs"]
mod links;
#[path = "routing/parameters.rs"]
mod parameters;
#[path = "routing/repair.rs"]
mod repair;

use repair::repaired_once;

const V4: &[IpVersion] = &[IpVersion::V4];
const V6: &[IpVersion] = &[IpVersion::V6];

/// How long what is promised may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long nothing must come for a path to count as closed.
const SILENCE: Duration = Duration::from_secs(2);
/// Interval of datagrams until one is answered.
const RESEND: Duration = Duration::from_millis(200);

fn vxlan_device_name(version: IpVersion) -> &'static str {
    TunnelKind::Vxlan(version).device_name()
}

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
        let found = self
            .addresses
            .iter()
            .map(IpNet::addr)
            .find(|address| IpVersion::of(*address) == version);
        found.with_context(|| format!("{} has no address of {version:?}", self.name))
    }

    fn versions(&self) -> impl Iterator<Item = IpVersion> {
        self.addresses
            .iter()
            .map(|address| IpVersion::of(address.addr()))
    }

    fn info(&self) -> NodeInfo {
        let number = self.number;
        let mut info = NodeInfo::default();
        for version in self.versions() {
            match version {
                IpVersion::V4 => {
                    info.ipv4 = format!("172.30.0.{number}/24").parse().ok();
                    let mac = Mac([0x66, 0, 0, 0, 0, number]);
                    info.vtep = Some(Vtep {
                        address: [10, 244, number, 0].into(),
                        mac,
                    });
                    info.ipip = Some([10, 244, number, 1].into());
                }
                IpVersion::V6 => {
                    info.ipv6 = format!("fd01::{number}/64").parse().ok();
                    let mac = Mac([0x66, 0, 0, 0, 6, number]);
                    info.vtep6 = Some(Vtep {
                        address: [0xfd00, 0x10, 0x244, number.into(), 0, 0, 0, 0].into(),
                        mac,
                    });
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
    // Nothing else enables forwarding on the node, and a host's defaults for new links are not what
    // pods need.
    for parameter in [
        "ipv4.ip_forward=0",
        "ipv4.conf.default.rp_filter=2",
        "ipv6.conf.all.forwarding=0",
    ] {
        host.command("sysctl", &["-qw", &format!("net.{parameter}")], "")?;
    }
    let address = |version: &IpVersion| match version {
        IpVersion::V4 => format!("10.244.{number}.5/32").parse(),
        IpVersion::V6 => format!("fd00:10:244:{number}::5/128").parse(),
    };
    let addresses = versions
        .iter()
        .map(address)
        .collect::<Result<Vec<IpNet>, _>>()?;
    let network = host.run(|| -> Result<Network> {
        let link = PodLink {
            host: "cali1",
            pod: "eth0",
            namespace: pod.file(),
            mtu: 1430,
            mac: pod::pod_mac("cali1", "eth0"),
        };
        let mut socket = RouteSocket::open()?;
        let index = pod::create_link(&mut socket, &link)?;
        pod::configure_pod(&link, &addresses)?;
        pod::add_routes(&mut socket, index, &addresses)?;
        pod::check_link(&mut socket, &link, &addresses)?;
        Ok(Network::spawn()?)
    })?;
    Ok(Node {
        name,
        number,
        host,
        pod,
        addresses,
        network,
    })
}

/// Two nodes of these IP versions on one link.
fn mk_nodes(versions: &[IpVersion]) -> Result<[Node; 2]> {
    let (one, two) = (mk_node("one", 1, versions)?, mk_node("two", 2, versions)?);
    connect((&one.host, "eth0", ""), (&two.host, "eth0", ""))?;
    for node in [&one, &two] {
        if versions.contains(&IpVersion::V4) {
            // There is no default route.
            node.host
                .ip(&format!("addr add 172.30.0.{}/24 dev eth0", node.number))?;
        }
        if versions.contains(&IpVersion::V6) {
            node.host
                .ip(&format!("addr add fd01::{}/64 dev eth0 nodad", node.number))?;
        }
    }
    Ok([one, two])
}

fn records(nodes: &[Node], encapsulation: Encapsulation) -> BTreeMap<RecordId, Record> {
    let mut records = BTreeMap::new();
    for pool in ["10.244.0.0/16", "fd00:10:244::/48"] {
        let pool: IpNet = pool.parse().expect("a range");
        records.insert(
            RecordId::Pool(pool),
            Record::Pool(PoolRecord {
                nat_outgoing: false,
                encapsulation,
            }),
        );
    }
    for node in nodes {
        records.insert(
            RecordId::Node(node.name.to_owned()),
            Record::Node(node.info()),
        );
        for version in node.versions() {
            let block = block(version, node.number).parse().expect("a range");
            let route = RouteRecord {
                node: node.name.to_owned(),
                encapsulation,
            };
            records.insert(RecordId::Route(block), Record::Route(route));
        }
    }
    records
}

/// Whether datagrams from one pod come to the other and are answered within this time. They are
/// sent again, as by any program: one is lost while a link comes up.
fn reaches(from: &Node, to: &Node, version: IpVersion, patience: Duration) -> Result<bool> {
    let (source, destination) = (from.address(version)?, to.address(version)?);
    // The kernel chooses the port: a program that another test starts holds the sockets of this one
    // until it runs.
    let server = to.pod.run(|| UdpSocket::bind((destination, 0)))?;
    let client = from.pod.run(|| UdpSocket::bind((source, 0)))?;
    server.set_read_timeout(Some(RESEND))?;
    client.set_read_timeout(Some(RESEND))?;
    let target = SocketAddr::new(destination, server.local_addr()?.port());
    let start = Instant::now();
    let mut buffer = [0; 16];
    while start.elapsed() < patience {
        client.send_to(b"hello", target)?;
        let Ok((length, sender)) = server.recv_from(&mut buffer) else {
            continue;
        };
        ensure!(
            sender.ip() == source,
            "the datagram of {source} comes from {sender}"
        );
        server.send_to(&buffer[..length], sender)?;
        if let Ok(length) = client.recv(&mut buffer) {
            return Ok(&buffer[..length] == b"hello");
        }
    }
    Ok(false)
}

fn ensure_reaches(nodes: &[Node; 2], why: &str) -> Result<()> {
    let [one, two] = nodes;
    for version in one.versions() {
        for (from, to) in [(one, two), (two, one)] {
            ensure!(
                reaches(from, to, version, PATIENCE)?,
                "no {version:?} from node {} to node {}: {why}",
                from.name,
                to.name
            );
        }
    }
    Ok(())
}

fn apply(
    runtime: &tokio::runtime::Runtime,
    nodes: &[Node],
    records: &BTreeMap<RecordId, Record>,
) -> Result<()> {
    for node in nodes {
        let pods: LocalPods = node
            .addresses
            .iter()
            .map(|address| (address.addr(), "cali1".to_owned()))
            .collect();
        let generation = node.network.set_plan(plan(node.name, records, &pods));
        let progress = runtime.block_on(node.network.wait_applied(generation));
        ensure!(
            progress.failed.is_empty(),
            "{}: {:?}",
            node.name,
            progress.failed
        );
    }
    Ok(())
}

fn device(node: &Node, version: IpVersion) -> Result<String> {
    node.host
        .ip(&format!("-d link show {}", vxlan_device_name(version)))
}

fn routes(node: &Node, version: IpVersion) -> Result<String> {
    let family = if version == IpVersion::V4 { "-4" } else { "-6" };
    node.host.ip(&format!("{family} route show proto 82"))
}

/// Checks two nodes whose pods have addresses of these IP versions.
fn cross(versions: &[IpVersion]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(versions)?;
    let [one, two] = &nodes;
    for version in versions {
        ensure!(
            !reaches(one, two, *version, SILENCE)?,
            "pods reach each other before anything was programmed"
        );
    }
    for encapsulation in [
        Encapsulation::Vxlan,
        Encapsulation::VxlanCrossSubnet,
        Encapsulation::None,
        Encapsulation::Vxlan,
    ] {
        apply(&runtime, &nodes, &records(&nodes, encapsulation))?;
        ensure_reaches(&nodes, &format!("{encapsulation:?}"))?;
        for version in IpVersion::ALL {
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
            let tunnelled = routes.contains(&format!(
                "{other} via {via} dev {}",
                vxlan_device_name(version)
            ));
            ensure!(
                tunnelled == (encapsulation == Encapsulation::Vxlan),
                "{encapsulation:?}: {routes}"
            );
            ensure!(routes.contains(&format!("blackhole {own}")), "{routes}");
        }
    }
    for version in versions {
        let details = device(one, *version)?;
        let wanted = match version {
            IpVersion::V4 => ["local 172.30.0.1", "66:00:00:00:00:01", "mtu 1450"],
            IpVersion::V6 => ["local fd01::1", "66:00:00:00:06:01", "mtu 1430"],
        };
        for wanted in wanted
            .iter()
            .chain(&["vxlan id 4096", "dstport 4789", "nolearning"])
        {
            ensure!(details.contains(wanted), "{wanted} in {details}");
        }
    }
    let foreign = if versions.contains(&IpVersion::V4) {
        "10.99.0.0/24"
    } else {
        "fd99::/64"
    };
    let family = if versions.contains(&IpVersion::V4) {
        "-4"
    } else {
        "-6"
    };
    one.host
        .ip(&format!("{family} route add {foreign} dev eth0"))?;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::None))?;
    ensure!(
        one.host
            .ip(&format!("{family} route show {foreign}"))?
            .contains("dev eth0"),
        "a foreign route was removed"
    );
    Ok(())
}

/// A host that has turned IPv6 off for every link that comes gets pods of IPv4, and its links stay
/// as they are.
#[test]
fn pods_come_up_where_the_host_has_no_ipv6() -> Result<()> {
    let (host, inside) = (Namespace::new()?, Namespace::new()?);
    for scope in ["all", "default"] {
        host.command(
            "sysctl",
            &["-qw", &format!("net.ipv6.conf.{scope}.disable_ipv6=1")],
            "",
        )?;
    }
    host.run(|| -> Result<()> {
        let link = PodLink {
            host: "cali1",
            pod: "eth0",
            namespace: inside.file(),
            mtu: 1430,
            mac: pod::pod_mac("cali1", "eth0"),
        };
        let mut socket = RouteSocket::open()?;
        let (index, addresses) = (
            pod::create_link(&mut socket, &link)?,
            ["10.244.1.5/32".parse()?],
        );
        pod::configure_pod(&link, &addresses)?;
        pod::add_routes(&mut socket, index, &addresses)?;
        pod::check_link(&mut socket, &link, &addresses)?;
        Ok(())
    })?;
    ensure!(
        host.command("sysctl", &["-n", "net.ipv6.conf.all.disable_ipv6"], "")?
            .trim()
            == "1"
    );
    Ok(())
}

/// The tunnel's MTU follows that of the link below it, without a break.
#[test]
fn the_tunnel_follows_its_underlay() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(&IpVersion::ALL)?;
    let [one, _] = &nodes;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    let index = |version| {
        Ok::<_, anyhow::Error>(device(one, version)?.split(':').next().map(str::to_owned))
    };
    let before = [index(IpVersion::V4)?, index(IpVersion::V6)?];
    for (mtu, of_v4, of_v6) in [(1400, 1350, 1330), (1500, 1450, 1430)] {
        let repairs = one.network.progress().repairs;
        one.host.ip(&format!("link set eth0 mtu {mtu}"))?;
        runtime.block_on(repaired_once(&one.network, repairs))?;
        for (version, wanted) in [(IpVersion::V4, of_v4), (IpVersion::V6, of_v6)] {
            let details = device(one, version)?;
            ensure!(
                details.contains(&format!("mtu {wanted} ")),
                "{wanted} in {details}"
            );
        }
        ensure_reaches(&nodes, &format!("MTU {mtu}"))?;
    }
    ensure!(
        before == [index(IpVersion::V4)?, index(IpVersion::V6)?],
        "a tunnel was recreated"
    );
    Ok(())
}

/// A tunnel whose port another VXLAN device has is reported, and made once that device is gone.
#[test]
fn a_tunnel_that_cannot_be_is_named_and_comes_when_it_can() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(V4)?;
    let [one, _] = &nodes;
    one.host
        .ip("link add taken type vxlan external dstport 4789")?;
    one.host.ip("link set taken up")?;
    let pods: LocalPods = one
        .addresses
        .iter()
        .map(|address| (address.addr(), "cali1".to_owned()))
        .collect();
    let generation = one.network.set_plan(plan(
        one.name,
        &records(&nodes, Encapsulation::Vxlan),
        &pods,
    ));
    let progress = runtime.block_on(one.network.wait_applied(generation));
    let reason = progress
        .failed
        .get(&RoutingPart::Tunnel(TunnelKind::Vxlan(IpVersion::V4)))
        .context("the tunnel cannot be")?;
    ensure!(reason.contains("4789"), "{reason}");
    ensure!(
        !progress
            .failed
            .contains_key(&RoutingPart::Route("10.244.1.5/32".parse()?)),
        "a pod's own route failed"
    );
    one.host.ip("link del taken")?;
    runtime.block_on(one.network.wait_for(|progress| progress.failed.is_empty()));
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    ensure_reaches(&nodes, "after the other device has gone")
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
    cross(&IpVersion::ALL)
}

/// A node that forwards still accepts its own router's advertisements, and pods accept none.
#[test]
fn router_advertisements_are_accepted_where_they_were_and_never_by_pods() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(V6)?;
    let [one, _] = &nodes;
    let value = |namespace: &Namespace, parameter: &str| {
        Ok::<_, anyhow::Error>(
            namespace
                .command("sysctl", &["-n", parameter], "")?
                .trim()
                .to_owned(),
        )
    };
    one.host
        .command("sysctl", &["-qw", "net.ipv6.conf.eth0.accept_ra=1"], "")?;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    ensure!(
        value(&one.host, "net.ipv6.conf.all.forwarding")? == "1",
        "the node does not forward"
    );
    ensure!(
        value(&one.host, "net.ipv6.conf.eth0.accept_ra")? == "2",
        "the node does not hear its router any more"
    );
    for link in ["cali1", vxlan_device_name(IpVersion::V6)] {
        // `ip` and `sysctl` disagree about dots in names.
        let parameter = format!("net/ipv6/conf/{link}/accept_ra");
        ensure!(
            value(&one.host, &parameter)? == "0",
            "the node takes routes from {link}"
        );
    }
    ensure!(
        value(&one.pod, "net.ipv6.conf.eth0.accept_ra")? == "0",
        "the pod takes routes from anybody"
    );
    Ok(())
}
