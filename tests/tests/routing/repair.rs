//! Routes, links and addresses that others change are repaired, and nothing else is written.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use margay_api::network::Encapsulation;
use margay_api::rule::IpVersion;
use margay_api::settings::FelixSettings;
use margay_calc::model::{Record, RecordId};
use margay_dataplane::routes::worker::Network;
use margay_tests::cluster::process::POLL;

use super::{
    Node, PATIENCE, V4, V6, apply, block, ensure_reaches, mk_nodes, records, routes,
    vxlan_device_name,
};

/// External changes on the first node, and how to undo those that the node cannot notice.
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
        "ip link show br9 || ip link add br9 up type bridge; ip link set cali1 master br9"
            .to_owned(),
    ];
    // IPv6 addresses of a link go when it is set down; those of IPv4 stay. A route of IPv6 outlives
    // the address that its gateway is a neighbour of.
    let again = "ip link set eth0 up; ip addr replace fd01::1/64 dev eth0 nodad";
    let mut when_plain = vec![format!("ip link set eth0 down; {again}")];
    if version == IpVersion::V4 {
        when_plain.push(
            "ip addr del 172.30.0.1/24 dev eth0; ip addr add 172.30.0.1/24 dev eth0".to_owned(),
        );
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(versions)?;
    let [one, _] = &nodes;
    for encapsulation in [Encapsulation::None, Encapsulation::Vxlan] {
        apply(&runtime, &nodes, &records(&nodes, encapsulation))?;
        ensure_reaches(&nodes, &format!("{encapsulation:?}"))?;
        let all = versions
            .iter()
            .map(|version| (*version, disturbances(*version, encapsulation)));
        for (version, disturbance) in
            all.flat_map(|(version, all)| all.into_iter().map(move |one| (version, one)))
        {
            let (before, whole) = (one.network.progress().repairs, programmed(one, version)?);
            one.host.command("sh", &["-ec", &disturbance], "")?;
            runtime
                .block_on(repaired(one, version, before, &whole))
                .with_context(|| disturbance.clone())?;
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

/// Unchanged state is not written again, whatever the kernel reports of others' neighbours and
/// links.
#[test]
fn what_is_as_wanted_is_left_alone() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(&IpVersion::ALL)?;
    let [one, _] = &nodes;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    ensure_reaches(&nodes, "before")?;
    // The link's MTU makes everything be read back, and changes nothing that is read: tunnels have
    // one of their own.
    let mut plans = records(&nodes, Encapsulation::Vxlan);
    let settings = FelixSettings {
        vxlan_mtu: 1300,
        vxlan_mtu_v6: 1300,
        ..FelixSettings::default()
    };
    plans.insert(RecordId::Settings, Record::Settings(settings));
    apply(&runtime, &nodes, &plans)?;
    let before = one.network.progress().repairs;
    for mtu in [1480, 1490, 1500] {
        one.host.ip(&format!("link set eth0 mtu {mtu}"))?;
    }
    // A later removal is repaired later.
    one.host
        .ip(&format!("route del {}", block(IpVersion::V4, 2)))?;
    runtime.block_on(repaired_once(&one.network, before))?;
    ensure!(
        routes(one, IpVersion::V4)?.contains(&block(IpVersion::V4, 2)),
        "a repair of nothing was counted"
    );
    ensure!(
        one.network.progress().repairs == before + 1,
        "more than one repair"
    );
    Ok(())
}

/// Routes and neighbours of a node, as `ip` shows them.
fn programmed(node: &Node, version: IpVersion) -> Result<[BTreeSet<String>; 2]> {
    let family = if version == IpVersion::V4 { "-4" } else { "-6" };
    let sorted = |text: String| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    Ok([
        sorted(routes(node, version)?),
        sorted(
            node.host
                .ip(&format!("{family} neigh show nud permanent"))?,
        ),
    ])
}

/// Waits until the node has repaired something, and everything is as before: one removal may take
/// other objects along, as a link does, and be repaired in several steps, so the number of repairs
/// does not show whether the last removal is among them.
async fn repaired(
    node: &Node,
    version: IpVersion,
    before: u64,
    whole: &[BTreeSet<String>; 2],
) -> Result<()> {
    let again = async {
        node.network
            .wait_for(|progress| progress.repairs > before && progress.failed.is_empty())
            .await;
        // The kernel also shows with a route whether its link has a carrier, which comes after the
        // link is up.
        while programmed(node, version)? != *whole {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    };
    let Ok(result) = tokio::time::timeout(PATIENCE, again).await else {
        let (progress, found) = (node.network.progress(), programmed(node, version)?);
        bail!(
            "not repaired within {PATIENCE:?}: {before} repairs before, now {progress:?}; found \
             {found:?}, not {whole:?}"
        );
    };
    result
}

/// Waits until the node has repaired something once more, and nothing is missing.
pub(super) async fn repaired_once(network: &Network, before: u64) -> Result<()> {
    let wait = network.wait_for(|progress| progress.repairs > before && progress.failed.is_empty());
    tokio::time::timeout(PATIENCE, wait)
        .await
        .context("nothing was repaired")?;
    Ok(())
}
