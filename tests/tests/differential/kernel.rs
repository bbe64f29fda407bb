//! Verdicts of a node's kernel: the real table in a namespace, with pods and the outside around it,
//! and which packets come out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use margay_api::endpoint::interface_name;
use margay_api::network::Mac;
use margay_api::rule::IpVersion;
use margay_dataplane::routes::parameters;
use margay_dataplane::routes::plan::HOST_MAC;
use margay_nft::{NftSocket, Ruleset, Transaction};
use margay_tests::namespace::{Namespace, connect};
use margay_tests::raw::packet::protocol::{ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE};
use margay_tests::raw::{Packet, Tap, Transport, packet};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use nix::unistd::Pid;

use crate::case::{LOCAL, Probe, addresses, local, pod};

/// Longest wait for what must happen; it takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
const HOST: Mac = Mac([2, 0, 0, 0, 0, 1]);
const OUTSIDE: Mac = Mac([2, 0, 0, 0, 0, 2]);
/// Receiver of packets without any policy.
const FAR: &str = "198.18.0.2";
/// Number of the packet whose arrival shows that those before it had their chance.
const LAST: u16 = u16::MAX;
const MARK: [u8; 4] = [0x6e, b'd', b'f', 0xa5];

/// The node, and everything around it.
pub struct Kernel {
    #[expect(dead_code, reason = "it lives as long as what is in it is used")]
    host: Namespace,
    table: NftSocket,
    conntrack: OwnedFd,
    /// One at each pod, in their order, then the outside.
    taps: Vec<(Namespace, Tap, Mac)>,
    far: (Namespace, Tap),
}

impl Kernel {
    /// A node without a table.
    pub fn new() -> Result<Self> {
        let (host, outside, far) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
        // The table decides about packets from the other links, whatever their source; pods' links
        // are as their maker has left them.
        for parameter in [
            "ipv4.conf.all.rp_filter=0",
            "ipv4.conf.default.rp_filter=0",
            "ipv6.conf.default.accept_dad=0",
        ] {
            host.command("sysctl", &["-qw", &format!("net.{parameter}")], "")?;
        }
        host.run(|| {
            IpVersion::ALL
                .into_iter()
                .try_for_each(|version| parameters::set_forwarding(version).map(drop))
        })?;
        connect((&host, "eth0", "172.30.0.1/24"), (&outside, "eth0", ""))?;
        connect((&host, "eth1", "198.18.0.1/24"), (&far, "eth0", ""))?;
        let mut commands = vec![
            format!("link set eth0 address {HOST}"),
            "addr add fd10::1/64 dev eth0 nodad".to_owned(),
            format!("neigh replace 172.30.0.2 lladdr {OUTSIDE} dev eth0 nud permanent"),
            format!("neigh replace fd10::2 lladdr {OUTSIDE} dev eth0 nud permanent"),
            format!("neigh replace {FAR} lladdr {OUTSIDE} dev eth1 nud permanent"),
            "route add default via 172.30.0.2".to_owned(),
            "route add ::/0 via fd10::2".to_owned(),
        ];
        let mut taps = Vec::new();
        for name in LOCAL {
            let (key, nets) = (pod(name), addresses(&pod(name)).map(IpNet::from));
            let (interface, namespace) = (interface_name(&key), Namespace::new()?);
            let mac = host.connect_pod(&namespace, &interface, &nets)?;
            for net in nets {
                commands.push(format!(
                    "neigh replace {} lladdr {mac} dev {interface} nud permanent",
                    net.addr()
                ));
            }
            // An interface without an address answers nothing: an error would contain the packet,
            // and be taken for it.
            namespace.ip("addr flush dev eth0")?;
            let tap = namespace.run(|| Tap::open("eth0"))?;
            taps.push((namespace, tap, mac));
        }
        host.command("ip", &["-batch", "-"], &commands.join("\n"))?;
        let tap = outside.run(|| Tap::open("eth0"))?;
        taps.push((outside, tap, OUTSIDE));
        let tap = far.run(|| Tap::open("eth0"))?;
        let table = host.run(NftSocket::open)?;
        let conntrack = host.run(|| {
            socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkNetFilter,
            )
        })?;
        Ok(Self {
            host,
            table,
            conntrack,
            taps,
            far: (far, tap),
        })
    }

    /// Puts this table in the place of the present one, and forgets every connection.
    pub fn load(&mut self, ruleset: &Ruleset) -> Result<()> {
        self.table.exec(&Transaction::replace(ruleset))?;
        self.forget()
    }

    /// Which of the packets come out, each where it should if at all.
    pub fn pass(&mut self, probes: &[Probe]) -> Result<BTreeSet<usize>> {
        let frames: Vec<(usize, Vec<u8>)> = probes
            .iter()
            .enumerate()
            .map(|(number, probe)| self.frame(probe, number as u16))
            .collect();
        let outside = self.taps.len() - 1;
        let far = FAR.parse().expect("an address");
        let last = Packet::new(
            "203.0.113.250".parse().expect("an address"),
            far,
            Transport::Udp {
                ports: (1, 9),
                data: marked(LAST),
            },
        );
        let last = packet::ethernet(HOST, OUTSIDE, last.ethertype(), &last.encode());
        let frames = frames.into_iter().chain([(outside, last)]);
        let taps = &self.taps;
        std::thread::scope(|scope| scope.spawn(|| send_in_order(taps, frames)).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let end = Instant::now() + PATIENCE;
        while !std::iter::from_fn(|| self.far.1.next().transpose())
            .any(|frame| frame.is_ok_and(|frame| numbers(&frame).any(|number| number == LAST)))
        {
            ensure!(
                Instant::now() < end,
                "the packet that nothing forbids did not come out"
            );
            std::thread::yield_now();
        }
        let mut seen: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for (place, (_, tap, _)) in self.taps.iter().enumerate() {
            while let Some(frame) = tap.next()? {
                for number in numbers(&frame) {
                    seen.entry(number.into()).or_default().insert(place);
                }
            }
        }
        for (number, places) in &seen {
            let probe = probes.get(*number).context("a packet that was not sent")?;
            let wanted = local(probe.destination).unwrap_or(outside);
            ensure!(
                places.iter().eq([&wanted]),
                "{probe:?} came out at {places:?}"
            );
        }
        Ok(seen.into_keys().collect())
    }

    fn frame(&self, probe: &Probe, number: u16) -> (usize, Vec<u8>) {
        let from = local(probe.source).unwrap_or(self.taps.len() - 1);
        let gateway = if local(probe.source).is_some() {
            HOST_MAC
        } else {
            HOST
        };
        let packet = Packet::new(probe.source, probe.destination, transport(probe, number));
        (
            from,
            packet::ethernet(
                gateway,
                self.taps[from].2,
                packet.ethertype(),
                &packet.encode(),
            ),
        )
    }

    /// Removes every connection that the kernel knows of in the namespace: `IPCTNL_MSG_CT_DELETE`
    /// without a tuple.
    fn forget(&self) -> Result<()> {
        const DELETE: u16 = (1 << 8) | 2;
        const REQUEST_AND_ACK: u16 = 1 | 4;
        const ERROR: u16 = 2;
        let mut message = 20_u32.to_ne_bytes().to_vec();
        message.extend(DELETE.to_ne_bytes());
        message.extend(REQUEST_AND_ACK.to_ne_bytes());
        message.extend([0; 12]);
        send(self.conntrack.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answer = [0; 256];
        let length = recv(self.conntrack.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let is_error = length >= 20 && answer[4..6] == ERROR.to_ne_bytes();
        if !is_error || answer[16..20] != [0; 4] {
            bail!("connections are not forgotten: {:?}", &answer[..length]);
        }
        Ok(())
    }
}

fn transport(probe: &Probe, number: u16) -> Transport {
    let (ports, data) = (probe.ports, marked(number));
    let body = [&number.to_be_bytes()[..], &[0, 1], &data].concat();
    match (probe.protocol, probe.source) {
        (TCP, _) => Transport::Syn { ports, data },
        (UDP, _) => Transport::Udp { ports, data },
        (UDPLITE, _) => Transport::UdpLite { ports, data },
        (SCTP, _) => Transport::Init { ports, data },
        (ICMP, IpAddr::V4(_)) | (ICMPV6, IpAddr::V6(_)) => Transport::Icmp {
            kind: probe.icmp,
            body,
        },
        (protocol, _) => Transport::Other {
            protocol,
            data: [&[0; 4], &data[..]].concat(),
        },
    }
}

fn marked(number: u16) -> Vec<u8> {
    [&MARK[..], &number.to_be_bytes()].concat()
}

fn numbers(frame: &[u8]) -> impl Iterator<Item = u16> {
    let found = frame.windows(6).filter(|window| window.starts_with(&MARK));
    found.map(|window| u16::from_be_bytes([window[4], window[5]]))
}

/// On one processor, as each has a queue of its own for what comes in by a virtual link.
fn send_in_order(
    taps: &[(Namespace, Tap, Mac)],
    frames: impl Iterator<Item = (usize, Vec<u8>)>,
) -> Result<()> {
    let own = Pid::from_raw(0);
    let allowed = sched_getaffinity(own)?;
    let first = (0..CpuSet::count())
        .find(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .context("a processor")?;
    let mut one = CpuSet::new();
    one.set(first)?;
    sched_setaffinity(own, &one)?;
    for (from, frame) in frames {
        taps[from].1.send(&frame)?;
    }
    Ok(())
}
