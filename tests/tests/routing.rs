//! Two nodes as namespaces, with the real routing driver and pod links: packets of both IP versions cross by VXLAN and without it, and what is removed by
//! hand comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use margay_api::network::{Encapsulation, Mac, NodeInfo, Vtep};
use margay_api::rule::IpVersion;
use margay_api::settings::FelixSettings;
use margay_calc::model::{PoolRecord, Record, RecordId, RouteRecord};
use margay_dataplane::routes::driver::RoutingPart;
use margay_dataplane::routes::message::LinkRef;
use margay_dataplane::routes::plan::{LocalPods, plan, vxlan_device_name};
use margay_dataplane::routes::pod::{self, PodLink};
use margay_dataplane::routes::removal::{LinkRemover, link_index};
use margay_dataplane::routes::worker::Network;
use margay_netlink::route::RouteSocket;
use margay_tests::cluster::process::POLL;
use margay_tests::namespace::{Namespace, connect};

#[path = "routing/parameters.rs"]
mod parameters;

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
        let found = self.addresses.iter().map(IpNet::addr).find(|address| IpVersion::of(*address) == version);
        found.with_context(|| format!("{} has no address of {version:?}", self.name))
    }

    fn versions(&self) -> impl Iterator<Item = IpVersion> {
        self.addresses.iter().map(|address| IpVersion::of(address.addr()))
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
    // Nobody else tells the node to forward, and what a host may do to links that come is not what pods need.
    for parameter in ["ipv4.ip_forward=0", "ipv4.conf.default.rp_filter=2", "ipv6.conf.all.forwarding=0"] {
        host.command("sysctl", &["-qw", &format!("net.{parameter}")], "")?;
    }
    let address = |version: &IpVersion| match version {
        IpVersion::V4 => format!("10.244.{number}.5/32").parse(),
        IpVersion::V6 => format!("fd00:10:244:{number}::5/128").parse(),
    };
    let addresses = versions.iter().map(address).collect::<Result<Vec<IpNet>, _>>()?;
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
    Ok(Node { name, number, host, pod, addresses, network })
}

/// Two nodes of these IP versions on one link.
fn mk_nodes(versions: &[IpVersion]) -> Result<[Node; 2]> {
    let (one, two) = (mk_node("one", 1, versions)?, mk_node("two", 2, versions)?);
    connect((&one.host, "eth0", ""), (&two.host, "eth0", ""))?;
    for node in [&one, &two] {
        if versions.contains(&IpVersion::V4) {
            // There is no default route.
            node.host.ip(&format!("addr add 172.30.0.{}/24 dev eth0", node.number))?;
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

/// Whether a datagram from one pod comes to the other and is answered. It is sent again for some seconds: the kernel starts
/// the queue of a link that has come up when its carrier has been looked at, once a second, and drops what comes before.
fn reaches(from: &Node, to: &Node, version: IpVersion) -> Result<bool> {
    const TRIES: u32 = 10;
    let (source, destination) = (from.address(version)?, to.address(version)?);
    let server = to.pod.run(|| UdpSocket::bind((destination, 7777)))?;
    let client = from.pod.run(|| UdpSocket::bind((source, 0)))?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    }
    let is_answered = |_| -> Result<bool> {
        let mut buffer = [0; 16];
        client.send_to(b"hello", SocketAddr::new(destination, 7777))?;
        let Ok((length, asker)) = server.recv_from(&mut buffer) else { return Ok(false) };
        server.send_to(&buffer[..length], asker)?;
        let answered = client.recv_from(&mut buffer).is_ok();
        Ok(answered && &buffer[..length] == b"hello" && asker.ip() == source)
    };
    (0..TRIES).map(is_answered).find(|answer| !matches!(answer, Ok(false))).unwrap_or(Ok(false))
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
        let generation = node.network.set_plan(plan(node.name, records, &pods));
        let progress = runtime.block_on(node.network.wait_applied(generation));
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

/// What somebody else does to node one, and what undoes it where the node cannot know.
fn disturbances(version: IpVersion, encapsulation: Encapsulation) -> Vec<String> {
    let (device, other) = (vxlan_device_name(version), block(version, 2));
    let via = other.split_once('/').map_or("", |(via, _)| via);
    let own = block(version, 1);
    let own = own.split_once('/').map_or("", |(own, _)| own);
    let (mac, elsewhere) = match version {
        IpVersion::V4 => ("66:00:00:00:00:02", "172.30.0.77"),
        IpVersion::V6 => ("66:00:00:00:06:02", "fd01::77"),
    };
    let length = if version == IpVersion::V4 { 32 } else { 128 };
    let any = [
        format!("ip route del {other}"),
        format!("ip route replace {other} dev eth0 proto static"),
        "ip link set cali1 down".to_owned(),
        "ip link set cali1 down; ip link set cali1 up".to_owned(),
        "ip link set cali1 address 66:99:99:99:99:99".to_owned(),
        "ip link show br9 || ip link add br9 up type bridge; ip link set cali1 master br9".to_owned(),
    ];
    // IPv6 addresses of a link go when it is set down; those of IPv4 stay. A route of IPv6 outlives the address that its gateway is a neighbour of.
    let again = "ip link set eth0 up; ip addr replace fd01::1/64 dev eth0 nodad";
    let mut when_plain = vec![format!("ip link set eth0 down; {again}")];
    if version == IpVersion::V4 {
        when_plain.push("ip addr del 172.30.0.1/24 dev eth0; ip addr add 172.30.0.1/24 dev eth0".to_owned());
    }
    let when_tunnelled = [
        format!("ip link del {device}"),
        format!("ip link set {device} down"),
        format!("ip link set {device} down; ip link set {device} up"),
        format!("ip link set {device} mtu 1290"),
        format!("ip link set {device} address 66:99:99:99:99:99"),
        format!("ip addr del {own}/{length} dev {device}"),
        format!("ip neigh del {via} dev {device}"),
        format!("ip neigh replace {via} lladdr 66:99:99:99:99:99 nud permanent dev {device}"),
        format!("bridge fdb del {mac} dev {device}"),
        format!("bridge fdb replace {mac} dst {elsewhere} dev {device}"),
    ];
    match encapsulation {
        Encapsulation::None => any.into_iter().chain(when_plain).collect(),
        _ => any.into_iter().chain(when_tunnelled).collect(),
    }
}

fn undone(versions: &[IpVersion]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let nodes = mk_nodes(versions)?;
    let [one, _] = &nodes;
    for encapsulation in [Encapsulation::None, Encapsulation::Vxlan] {
        apply(&runtime, &nodes, &records(&nodes, encapsulation))?;
        ensure_reaches(&nodes, &format!("{encapsulation:?}"))?;
        let all = versions.iter().map(|version| (*version, disturbances(*version, encapsulation)));
        for (version, disturbance) in all.flat_map(|(version, all)| all.into_iter().map(move |one| (version, one))) {
            let (before, whole) = (one.network.progress().repairs, programmed(one, version)?);
            one.host.command("sh", &["-ec", &disturbance], "")?;
            runtime.block_on(repaired(one, version, before, &whole)).with_context(|| disturbance.clone())?;
            ensure_reaches(&nodes, &format!("{encapsulation:?}, after {disturbance}"))?;
        }
    }
    Ok(())
}

#[test]
fn what_others_do_to_links_addresses_and_routes_of_ipv4_is_undone() -> Result<()> {
    undone(V4)
}

#[test]
fn what_others_do_to_links_addresses_and_routes_of_ipv6_is_undone() -> Result<()> {
    undone(V6)
}

#[test]
fn what_others_do_to_one_ip_version_is_undone_beside_the_other() -> Result<()> {
    undone(&IpVersion::ALL)
}

/// What nobody has changed is not written again, whatever the kernel tells of others' neighbours and links.
#[test]
fn what_is_as_wanted_is_left_alone() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let nodes = mk_nodes(&IpVersion::ALL)?;
    let [one, _] = &nodes;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    ensure_reaches(&nodes, "before")?;
    // The link's MTU makes everything be read back, and changes nothing that is read: tunnels have one of their own.
    let mut plans = records(&nodes, Encapsulation::Vxlan);
    let settings = FelixSettings { vxlan_mtu: 1300, vxlan_mtu_v6: 1300, ..FelixSettings::default() };
    plans.insert(RecordId::Settings, Record::Settings(settings));
    apply(&runtime, &nodes, &plans)?;
    let before = one.network.progress().repairs;
    for mtu in [1480, 1490, 1500] {
        one.host.ip(&format!("link set eth0 mtu {mtu}"))?;
    }
    // What is removed after that is repaired after that.
    one.host.ip(&format!("route del {}", block(IpVersion::V4, 2)))?;
    runtime.block_on(repaired_once(&one.network, before))?;
    ensure!(routes(one, IpVersion::V4)?.contains(&block(IpVersion::V4, 2)), "a repair of nothing was counted");
    ensure!(one.network.progress().repairs == before + 1, "more than one repair");
    Ok(())
}

/// A host that has turned IPv6 off for every link that comes gets pods of IPv4, and its links stay as they are.
#[test]
fn pods_come_up_where_the_host_has_no_ipv6() -> Result<()> {
    let (host, inside) = (Namespace::new()?, Namespace::new()?);
    for scope in ["all", "default"] {
        host.command("sysctl", &["-qw", &format!("net.ipv6.conf.{scope}.disable_ipv6=1")], "")?;
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
        let (index, addresses) = (pod::create_link(&mut socket, &link)?, ["10.244.1.5/32".parse()?]);
        pod::configure_pod(&link, &addresses)?;
        pod::add_routes(&mut socket, index, &addresses)?;
        pod::check_link(&mut socket, &link, &addresses)?;
        Ok(())
    })?;
    ensure!(host.command("sysctl", &["-n", "net.ipv6.conf.all.disable_ipv6"], "")?.trim() == "1");
    Ok(())
}

/// The tunnel's MTU follows that of the link below it, without a break.
#[test]
fn the_tunnel_follows_its_underlay() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let nodes = mk_nodes(&IpVersion::ALL)?;
    let [one, _] = &nodes;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    let index = |version| Ok::<_, anyhow::Error>(device(one, version)?.split(':').next().map(str::to_owned));
    let before = [index(IpVersion::V4)?, index(IpVersion::V6)?];
    for (mtu, of_v4, of_v6) in [(1400, 1350, 1330), (1500, 1450, 1430)] {
        let repairs = one.network.progress().repairs;
        one.host.ip(&format!("link set eth0 mtu {mtu}"))?;
        runtime.block_on(repaired_once(&one.network, repairs))?;
        for (version, wanted) in [(IpVersion::V4, of_v4), (IpVersion::V6, of_v6)] {
            let details = device(one, version)?;
            ensure!(details.contains(&format!("mtu {wanted} ")), "{wanted} in {details}");
        }
        ensure_reaches(&nodes, &format!("MTU {mtu}"))?;
    }
    ensure!(before == [index(IpVersion::V4)?, index(IpVersion::V6)?], "a tunnel was made anew");
    Ok(())
}

/// Where another VXLAN device has the port, it is said, and done once that has gone.
#[test]
fn a_tunnel_that_cannot_be_is_named_and_comes_when_it_can() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let nodes = mk_nodes(V4)?;
    let [one, _] = &nodes;
    one.host.ip("link add taken type vxlan external dstport 4789")?;
    one.host.ip("link set taken up")?;
    let pods: LocalPods = one.addresses.iter().map(|address| (address.addr(), "cali1".to_owned())).collect();
    let generation = one.network.set_plan(plan(one.name, &records(&nodes, Encapsulation::Vxlan), &pods));
    let progress = runtime.block_on(one.network.wait_applied(generation));
    let reason = progress.failed.get(&RoutingPart::Tunnel(IpVersion::V4)).context("the tunnel cannot be")?;
    ensure!(reason.contains("4789"), "{reason}");
    ensure!(!progress.failed.contains_key(&RoutingPart::Route("10.244.1.5/32".parse()?)), "a pod's own route failed");
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
    let removal = host.run(|| -> Result<LinkRemover> {
        let mut socket = RouteSocket::open()?;
        for number in 0..12 {
            let link = PodLink {
                host: &name(number),
                pod: &name(number),
                namespace: inside.file(),
                mtu: 1430,
                mac: pod::pod_mac(&name(number), "eth0"),
            };
            pod::create_link(&mut socket, &link)?;
        }
        let link = |name: String| LinkRef::Name(name);
        let (gone, present) = ([link("absent".to_owned()), link(name(2)), link(name(3))], [link(name(3))]);
        ensure!(pod::remove_links(&mut socket, &gone).iter().all(Result::is_ok), "a group with a link that is gone");
        ensure!(pod::remove_links(&mut socket, &present).iter().all(Result::is_ok), "a link that is gone");
        Ok(LinkRemover::spawn()?)
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

/// A DEL does not wait for its link, and the pod of the same name may have a new one before the old one's turn comes.
#[test]
fn a_link_that_is_expected_to_go_goes_and_a_later_one_of_its_name_stays() -> Result<()> {
    let (host, inside, own) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
    let create = |name: &str, namespace: &Namespace| -> Result<()> {
        let mac = pod::pod_mac(name, "eth0");
        let link = PodLink { host: name, pod: name, namespace: namespace.file(), mtu: 1430, mac };
        host.run(|| -> Result<()> { pod::create_link(&mut RouteSocket::open()?, &link).map(drop).map_err(Into::into) })
    };
    for (name, namespace) in [("cali1", &inside), ("cali2", &inside), ("cali3", &own)] {
        create(name, namespace)?;
    }
    let index = |name: &str| link_index(name).expect("it is there");
    // Names are looked up in the network of the thread that asks.
    host.run(|| -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let removal = LinkRemover::spawn()?;
        runtime.block_on(async {
            let (one, two, three, none) = tokio::join!(
                removal.wait_or_remove(index("cali1")),
                removal.wait_or_remove(index("cali2")),
                removal.wait_or_remove(index("cali3")),
                removal.wait_or_remove(u32::MAX >> 1),
            );
            [one, two, three, none].into_iter().collect::<Result<Vec<()>, _>>()
        })?;
        Ok(())
    })?;
    ensure!(host.ip("-o link show type veth")?.is_empty(), "all have gone");
    create("cali1", &inside)?;
    let again = host.run(|| -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let removal = LinkRemover::spawn()?;
        runtime.block_on(async {
            let later = async {
                tokio::task::yield_now().await;
                create("cali1", &inside)
            };
            let (gone, created) = tokio::join!(removal.wait_or_remove(index("cali1")), later);
            gone?;
            created
        })
    });
    again?;
    ensure!(host.ip("-o link show type veth")?.contains("cali1"), "the new one is not the one that was to go");
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
        node.network.wait_for(|progress| progress.repairs > before && progress.failed.is_empty()).await;
        // The kernel says of a route too whether its link has a carrier, which comes after the link is up.
        while programmed(node, version)? != *whole {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    };
    let Ok(result) = tokio::time::timeout(Duration::from_secs(5), again).await else {
        let (progress, found) = (node.network.progress(), programmed(node, version)?);
        bail!("not repaired within 5 s: {before} repairs before, now {progress:?}; found {found:?}, not {whole:?}");
    };
    result
}

/// Waits until the node has repaired something once more, and nothing is wanting.
async fn repaired_once(network: &Network, before: u64) -> Result<()> {
    let wait = network.wait_for(|progress| progress.repairs > before && progress.failed.is_empty());
    tokio::time::timeout(Duration::from_secs(5), wait).await.context("nothing was repaired within 5 s")?;
    Ok(())
}
