//! Parameters of the host and of links, by `/proc/sys` and `ethtool`: set, compared and set again.

use margay_api::settings::FelixSettings;
use margay_tests::cluster::process::POLL;

use super::*;

/// Every parameter is compared within this time.
const SILENT: Duration = Duration::from_secs(30);

/// Parameters with notifications are restored at once; a host's own programs set them for every new
/// link.
#[test]
fn kernel_parameters_are_set_again() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(&IpVersion::ALL)?;
    let [one, _] = &nodes;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    let [tunnel, _] = IpVersion::ALL.map(vxlan_device_name);
    for (parameter, other, ours) in [
        ("net/ipv4/ip_forward".to_owned(), "0", "1"),
        ("net/ipv6/conf/all/forwarding".to_owned(), "0", "1"),
        ("net/ipv4/conf/cali1/forwarding".to_owned(), "0", "1"),
        ("net/ipv4/conf/cali1/rp_filter".to_owned(), "2", "1"),
        ("net/ipv4/conf/cali1/proxy_arp".to_owned(), "0", "1"),
        ("net/ipv6/conf/cali1/proxy_ndp".to_owned(), "0", "1"),
        (format!("net/ipv4/conf/{tunnel}/forwarding"), "0", "1"),
        (format!("net/ipv4/conf/{tunnel}/rp_filter"), "1", "0"),
        (format!("net/ipv4/conf/{tunnel}/proxy_arp"), "1", "0"),
    ] {
        let before = one.network.progress().repairs;
        one.host
            .command("sysctl", &["-qw", &format!("{parameter}={other}")], "")?;
        runtime
            .block_on(repaired_once(&one.network, before))
            .with_context(|| parameter.clone())?;
        let value = one.host.command("sysctl", &["-n", &parameter], "")?;
        ensure!(value.trim() == ours, "{parameter} is {value}");
        ensure_reaches(&nodes, &format!("after {parameter}={other}"))?;
    }
    Ok(())
}

/// Parameters that the kernel sends no notification of are compared every few seconds.
#[test]
fn kernel_parameters_without_notification_are_set_again() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(&IpVersion::ALL)?;
    let [one, _] = &nodes;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    let [_, tunnel_v6] = IpVersion::ALL.map(vxlan_device_name);
    let of_tunnel = format!("net/ipv6/conf/{tunnel_v6}/accept_ra");
    let silent = [
        ("net/ipv4/neigh/cali1/proxy_delay", "80", "0"),
        ("net/ipv4/conf/cali1/route_localnet", "0", "1"),
        ("net/ipv4/conf/cali1/accept_redirects", "1", "0"),
        ("net/ipv4/conf/cali1/accept_source_route", "1", "0"),
        ("net/ipv4/conf/cali1/arp_accept", "1", "0"),
        ("net/ipv6/conf/cali1/addr_gen_mode", "0", "1"),
        ("net/ipv6/conf/cali1/accept_ra", "2", "0"),
        ("net/ipv6/conf/cali1/accept_redirects", "1", "0"),
        ("net/ipv6/conf/cali1/accept_source_route", "1", "0"),
        ("net/ipv6/conf/cali1/autoconf", "1", "0"),
        ("net/ipv6/conf/cali1/accept_dad", "1", "0"),
        (of_tunnel.as_str(), "2", "0"),
    ];
    let is_set = |parameter: &str, value: &str| {
        Ok::<_, anyhow::Error>(one.host.command("sysctl", &["-n", parameter], "")?.trim() == value)
    };
    for (parameter, other, ours) in silent {
        ensure!(
            is_set(parameter, ours)?,
            "{parameter} is not {ours} at first"
        );
        one.host
            .command("sysctl", &["-qw", &format!("{parameter}={other}")], "")?;
    }
    // One repair may have come in the middle of these.
    let repaired = async {
        loop {
            let mut all = silent
                .iter()
                .map(|(parameter, _, ours)| is_set(parameter, ours));
            if all.try_fold(true, |so_far, is_set| {
                Ok::<_, anyhow::Error>(so_far & is_set?)
            })? {
                return Ok::<_, anyhow::Error>(());
            }
            tokio::time::sleep(POLL).await;
        }
    };
    runtime
        .block_on(async { tokio::time::timeout(SILENT, repaired).await })
        .context("not set again in time")??;
    ensure_reaches(&nodes, "after the parameters")
}

/// An agent's changes of the host's own parameters are recorded with the former values.
#[test]
fn what_has_been_changed_of_the_host_is_known() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(&IpVersion::ALL)?;
    let [one, _] = &nodes;
    one.host
        .command("sysctl", &["-qw", "net.ipv6.conf.eth0.accept_ra=1"], "")?;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    let changed = || -> Vec<(String, String, String)> {
        let changed = one.network.progress().changed.into_values();
        changed
            .map(|changed| (changed.parameter, changed.former, changed.now))
            .collect()
    };
    let wanted = [
        ("ipv4/ip_forward", "0", "1"),
        ("ipv6/conf/all/forwarding", "0", "1"),
        ("ipv6/conf/eth0/accept_ra", "1", "2"),
    ]
    .map(|(parameter, former, now)| (parameter.to_owned(), former.to_owned(), now.to_owned()));
    ensure!(changed() == wanted, "{:?}", changed());
    // The first value stays recorded.
    let before = one.network.progress().repairs;
    one.host
        .command("sysctl", &["-qw", "net.ipv4.ip_forward=0"], "")?;
    runtime.block_on(repaired_once(&one.network, before))?;
    ensure!(changed() == wanted, "{:?}", changed());
    Ok(())
}

/// The kernel takes IPv6 from a link whose MTU is too small for it; pods of IPv4 need none.
#[test]
fn pods_of_ipv4_have_an_mtu_that_ipv6_has_not() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(V4)?;
    let [one, _] = &nodes;
    apply(&runtime, &nodes, &records(&nodes, Encapsulation::Vxlan))?;
    one.pod.ip("link set eth0 mtu 1200")?;
    one.host.ip("link set cali1 mtu 1200")?;
    // The tunnel follows its link, for which everything is read back.
    let before = one.network.progress().repairs;
    one.host.ip("link set eth0 mtu 1400")?;
    runtime.block_on(repaired_once(&one.network, before))?;
    ensure_reaches(&nodes, "with a small MTU")?;
    let inside = Namespace::new()?;
    one.host.run(|| -> Result<()> {
        let mac = pod::pod_mac("cali2", "eth0");
        let link = PodLink {
            host: "cali2",
            pod: "eth0",
            namespace: inside.file(),
            mtu: 1200,
            mac,
        };
        let mut socket = RouteSocket::open()?;
        let (index, addresses) = (
            pod::create_link(&mut socket, &link)?,
            ["10.244.1.6/32".parse()?],
        );
        pod::configure_pod(&link, &addresses)?;
        pod::add_routes(&mut socket, index, &addresses)?;
        pod::check_link(&mut socket, &link, &addresses)?;
        let refusal = pod::configure_pod(&link, &["fd00::6/128".parse()?])
            .err()
            .context("IPv6 with an MTU of 1200")?;
        ensure!(refusal.to_string().contains("1280"), "{refusal}");
        Ok(())
    })
}

/// With ChecksumOffloadBroken software computes checksums, also after somebody has turned the
/// offload on again.
#[test]
fn a_tunnel_leaves_no_checksums_to_hardware_where_that_is_broken() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(&IpVersion::ALL)?;
    let [one, _] = &nodes;
    let offloads = |version| {
        let features = one
            .host
            .command("ethtool", &["-k", vxlan_device_name(version)], "")?;
        let line = features
            .lines()
            .find(|line| line.starts_with("tx-checksumming:"))
            .context("no such feature")?;
        Ok::<_, anyhow::Error>(line.ends_with(" on"))
    };
    let mut plans = records(&nodes, Encapsulation::Vxlan);
    apply(&runtime, &nodes, &plans)?;
    ensure!(
        offloads(IpVersion::V4)? && offloads(IpVersion::V6)?,
        "the kernel's own default is another one"
    );
    let settings = FelixSettings {
        checksum_offload_broken: true,
        ..FelixSettings::default()
    };
    plans.insert(RecordId::Settings, Record::Settings(settings));
    apply(&runtime, &nodes, &plans)?;
    for version in IpVersion::ALL {
        ensure!(
            !offloads(version)?,
            "{version:?} leaves checksums to hardware"
        );
        let before = one.network.progress().repairs;
        one.host.command(
            "ethtool",
            &["-K", vxlan_device_name(version), "tx", "on"],
            "",
        )?;
        runtime.block_on(repaired_once(&one.network, before))?;
        ensure!(
            !offloads(version)?,
            "{version:?} leaves checksums to hardware again"
        );
    }
    ensure_reaches(&nodes, "with checksums by software")
}

/// Each write of a link's forwarding takes the default routes that routers advertise from all links
/// of the node.
#[test]
fn a_node_without_ipv6_pods_stays_a_host_of_ipv6() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let nodes = mk_nodes(&[IpVersion::V4])?;
    let mut records = records(&nodes, Encapsulation::Vxlan);
    records.retain(|id, _| !matches!(id, RecordId::Pool(IpNet::V6(_))));
    apply(&runtime, &nodes, &records)?;
    let [one, _] = &nodes;
    for link in ["all", "default", "eth0", "cali1"] {
        let value = one.host.command(
            "sysctl",
            &["-n", &format!("net/ipv6/conf/{link}/forwarding")],
            "",
        )?;
        ensure!(value.trim() == "0", "forwarding of {link} is {value}");
    }
    Ok(())
}
