//! IP in IP, where the kernel has it; where it has not, what is reported.

use margay_tests::cluster::process::POLL;

use super::*;

/// Whether the kernel has IP in IP.
fn has_ipip() -> Result<bool> {
    let trial = Namespace::new()?;
    let added = trial.ip("link add trial type ipip remote 192.0.2.1 local 192.0.2.2");
    Ok(added.is_ok())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// The records of two nodes that share no subnet, although they are on one link.
fn mk_records(
    nodes: &[Node],
    encapsulation: Encapsulation,
    apart: bool,
) -> BTreeMap<RecordId, Record> {
    let mut records = records(nodes, encapsulation);
    for record in records.values_mut() {
        if let (Record::Node(info), true) = (record, apart) {
            info.ipv4 = info.ipv4.map(|net| net.addr().into());
        }
    }
    records
}

fn tunnel(node: &Node) -> Result<String> {
    // With details: without them, addresses come without the alias.
    node.host.ip("-d addr show dev tunl0")
}

fn wait_for(what: &str, condition: impl Fn() -> Result<bool>) -> Result<()> {
    let since = Instant::now();
    while !condition()? {
        ensure!(since.elapsed() < PATIENCE, "waited for {what}");
        std::thread::sleep(POLL);
    }
    Ok(())
}

#[test]
fn pods_of_two_nodes_reach_each_other_by_ipip_or_its_absence_is_reported() -> Result<()> {
    let nodes = mk_nodes(V4)?;
    if has_ipip()? {
        reach_each_other(&nodes)
    } else {
        is_reported(&nodes)
    }
}

fn reach_each_other(nodes: &[Node; 2]) -> Result<()> {
    let runtime = runtime()?;
    let [one, _] = nodes;
    leave_to_others(nodes, &runtime)?;
    for (encapsulation, apart, is_tunnelled) in [
        (Encapsulation::Ipip, false, true),
        (Encapsulation::IpipCrossSubnet, false, false),
        (Encapsulation::IpipCrossSubnet, true, true),
        (Encapsulation::Vxlan, false, false),
        (Encapsulation::Ipip, false, true),
    ] {
        let what = format!("{encapsulation:?}, apart: {apart}");
        apply(&runtime, nodes, &mk_records(nodes, encapsulation, apart))?;
        ensure_reaches(nodes, &what)?;
        let routes = routes(one, IpVersion::V4)?;
        let wanted = "10.244.2.0/26 via 172.30.0.2 dev tunl0 onlink";
        ensure!(routes.contains(wanted) == is_tunnelled, "{what}: {routes}");
        let tunnel = tunnel(one).unwrap_or_default();
        let is_ours = ["mtu 1480", ",UP", "alias margay", "inet 10.244.1.1/32"]
            .iter()
            .all(|part| tunnel.contains(part));
        let is_used = encapsulation != Encapsulation::Vxlan;
        ensure!(is_ours == is_used, "{what}: {tunnel}");
        ensure!(is_used || !tunnel.contains("inet "), "{what}: {tunnel}");
    }
    for change in [
        "link set tunl0 down",
        "link set tunl0 mtu 1300",
        "addr del 10.244.1.1/32 dev tunl0",
        // As Calico has left it, of an earlier address.
        "addr add 10.244.1.9/32 dev tunl0",
        "route del 10.244.2.0/26",
    ] {
        one.host.ip(change)?;
        wait_for(change, || {
            let (tunnel, routes) = (tunnel(one)?, routes(one, IpVersion::V4)?);
            Ok(tunnel.contains("mtu 1480")
                && tunnel.contains(",UP")
                && tunnel.contains("inet 10.244.1.1/32")
                && !tunnel.contains("10.244.1.9")
                && routes.contains("10.244.2.0/26 via 172.30.0.2 dev tunl0 onlink"))
        })?;
        ensure_reaches(nodes, change)?;
    }
    Ok(())
}

/// The kernel's own device stays as its owner has it while no pool needs it.
fn leave_to_others(nodes: &[Node; 2], runtime: &tokio::runtime::Runtime) -> Result<()> {
    let [one, _] = nodes;
    if one.host.ip("link show tunl0").is_err() {
        one.host.ip("link add tunl0 type ipip")?;
    }
    one.host.ip("addr add 192.0.2.9/32 dev tunl0")?;
    one.host.ip("link set tunl0 up")?;
    apply(runtime, nodes, &records(nodes, Encapsulation::Vxlan))?;
    let found = tunnel(one)?;
    ensure!(
        found.contains("192.0.2.9") && found.contains(",UP"),
        "{found}"
    );
    apply(runtime, nodes, &records(nodes, Encapsulation::Ipip))?;
    let found = tunnel(one)?;
    ensure!(!found.contains("192.0.2.9"), "{found}");
    Ok(())
}

fn is_reported(nodes: &[Node; 2]) -> Result<()> {
    let runtime = runtime()?;
    let [one, _] = nodes;
    let pods: LocalPods = one
        .addresses
        .iter()
        .map(|address| (address.addr(), "cali1".to_owned()))
        .collect();
    let wanted = |encapsulation| plan(one.name, &records(nodes, encapsulation), &pods);
    let generation = one.network.set_plan(wanted(Encapsulation::Ipip));
    let progress = runtime.block_on(one.network.wait_applied(generation));
    let reason = progress
        .failed
        .get(&RoutingPart::Tunnel(TunnelKind::Ipip))
        .context("there is no IPIP here")?;
    for part in [
        "tunl0 cannot be created",
        "load the module ipip",
        "CONFIG_NET_IPIP",
    ] {
        ensure!(reason.contains(part), "{part} in {reason}");
    }
    // It costs the node's own pods nothing, and goes with the encapsulation.
    let own = RoutingPart::Route("10.244.1.5/32".parse()?);
    ensure!(!progress.failed.contains_key(&own), "{:?}", progress.failed);
    let generation = one.network.set_plan(wanted(Encapsulation::Vxlan));
    let progress = runtime.block_on(one.network.wait_applied(generation));
    ensure!(progress.failed.is_empty(), "{:?}", progress.failed);
    Ok(())
}
