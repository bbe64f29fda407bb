//! Pods that send from addresses of others, or pose as routers.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddrV6, UdpSocket};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{Member, SetKind};
use margay_node::cni::ports::Enforcer;
use margay_proto::sync::Change;

use super::{Node, PATIENCE, Pod, Records, WEB, endpoint, friends, mk_node, mk_pod};

#[tokio::test(flavor = "multi_thread")]
async fn nobody_speaks_for_another_and_nothing_passes_an_unknown_link() -> Result<()> {
    let mut node = mk_node().await?;
    let (attacker, victim) = (&node.pods[1], &node.pods[0]);
    attacker
        .namespace
        .ip(&format!("addr add {}/32 dev lo", victim.address))?;
    let spoofing = attacker
        .namespace
        .run(|| UdpSocket::bind((victim.address, 4000)))?;
    let receiver = node.pods[2].socket(WEB)?;
    spoofing.send_to(b"x", (node.pods[2].address, WEB))?;
    ensure!(
        !node.passes(1, 2, WEB + 1)?,
        "a packet after it shows that the lie had its time"
    );
    receiver.set_nonblocking(true)?;
    ensure!(receiver.recv(&mut [0; 8]).is_err(), "a lie has arrived");

    // A link unknown to the agent, with a route: neither direction carries anything.
    let newcomer = mk_pod(&node.host, 9)?;
    let outside = newcomer.socket(0)?;
    let inside = newcomer.socket(WEB)?;
    let receiver = node.pods[0].socket(WEB)?;
    outside.send_to(b"x", (node.pods[0].address, WEB))?;
    node.pods[0]
        .socket(0)?
        .send_to(b"x", (newcomer.address, WEB))?;
    ensure!(node.passes(2, 0, WEB + 1)?, "a packet after them");
    for socket in [&receiver, &inside] {
        socket.set_nonblocking(true)?;
        ensure!(
            socket.recv(&mut [0; 8]).is_err(),
            "a packet by an unknown link has arrived"
        );
    }
    drop((receiver, inside));
    let (id, record) = endpoint(&newcomer, &[]);
    let agent = node.agent().clone();
    let (interface, pod) = (newcomer.interface(), newcomer.attached());
    let waiting = tokio::spawn(async move { agent.attach(interface, pod).await });
    node.put(id, record).await?;
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .context("attach")???;
    node.pods.push(newcomer);
    ensure!(
        node.passes(3, 0, WEB)? && node.passes(0, 3, WEB)?,
        "an attached pod is open"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_obeys_the_same_policy_and_nobody_speaks_for_another_there_either() -> Result<()> {
    let mut node = mk_node().await?;
    ensure!(
        !node.passes6(0, 2, WEB)?,
        "a friend by its IPv4 address alone"
    );
    ensure!(node.passes6(1, 0, WEB)?, "a pod without policy is open");
    let delta = MemberDelta {
        added: [Member::Net(IpNet::from(IpAddr::from(
            node.pods[0].address6,
        )))]
        .into(),
        removed: [].into(),
    };
    node.send(
        vec![Change::Members(friends(), SetKind::Net, delta)],
        Vec::new(),
    )
    .await?;
    ensure!(
        node.passes6(0, 2, WEB)? && node.passes(0, 2, WEB)?,
        "a friend by both"
    );
    ensure!(!node.passes6(1, 2, WEB)?, "a stranger is not let in");

    let (attacker, victim) = (&node.pods[1], &node.pods[0]);
    attacker
        .namespace
        .ip(&format!("addr add {}/128 dev lo nodad", victim.address6))?;
    let spoofing = attacker
        .namespace
        .run(|| UdpSocket::bind((victim.address6, 4000)))?;
    let receiver = node.pods[2].socket_of(node.pods[2].address6.into(), WEB)?;
    spoofing.send_to(b"x", (node.pods[2].address6, WEB))?;
    ensure!(
        !node.passes6(1, 2, WEB + 1)?,
        "a packet after it shows that the lie had its time"
    );
    receiver.set_nonblocking(true)?;
    ensure!(receiver.recv(&mut [0; 8]).is_err(), "a lie has arrived");
    Ok(())
}

/// Sends a router advertisement to all on the link.
fn pose_as_router(pod: &Pod) -> Result<()> {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6,
    };
    use nix::sys::socket::{sendto, setsockopt, socket, sockopt};
    use std::os::fd::AsRawFd;
    // Router advertisement: hop limit 64, no flags, a default router for 1800 seconds. The kernel
    // adds the checksum.
    const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    pod.namespace.run(|| -> Result<()> {
        let scope = nix::net::if_::if_nametoindex("eth0")?;
        let raw = socket(
            AddressFamily::Inet6,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::IcmpV6,
        )?;
        setsockopt(&raw, sockopt::Ipv6MulticastHops, &255)?;
        let to = SockaddrIn6::from(SocketAddrV6::new(all_nodes, 0, 0, scope));
        sendto(raw.as_raw_fd(), &ADVERTISEMENT, &to, MsgFlags::empty())?;
        Ok(())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_poses_as_a_router_is_ignored() -> Result<()> {
    let mut node = Node::new(2)?;
    node.records = BTreeMap::from([endpoint(&node.pods[0], &[]), endpoint(&node.pods[1], &[])]);
    // A node that accepts advertisements: without the table it does.
    let parameter = format!("net/ipv6/conf/{}/accept_ra=2", node.pods[0].interface());
    node.host.command("sysctl", &["-qw", &parameter], "")?;
    let believed = || {
        node.host
            .ip("-6 route show default")
            .map(|routes| routes.contains("proto ra"))
    };
    let heard = async {
        while !believed()? {
            pose_as_router(&node.pods[0])?;
            tokio::task::yield_now().await;
        }
        Ok::<_, anyhow::Error>(())
    };
    tokio::time::timeout(PATIENCE, heard)
        .await
        .context("an advertisement without any table")??;
    node.host.ip("-6 route flush proto ra")?;

    node.start_agent(Records::new()).await?;
    node.connect().await?;
    pose_as_router(&node.pods[0])?;
    ensure!(node.passes6(0, 1, WEB)?, "a packet after it");
    ensure!(
        !node.host.ip("-6 route show default")?.contains("proto ra"),
        "a pod has become the node's router"
    );
    Ok(())
}
