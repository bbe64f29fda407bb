//! Two nodes with real agents, routing drivers and pod links, and taps wherever a packet could come
//! out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, interface_name};
use margay_api::network::{Encapsulation, Mac, NodeInfo, Vtep};
use margay_api::rule::Action;
use margay_api::settings::FelixSettings;
use margay_calc::model::{EndpointRecord, PoolRecord, Record, RecordId, RouteRecord};
use margay_dataplane::Attached;
use margay_dataplane::nftables::{Netfilter, Nftables};
use margay_dataplane::routes::plan::HOST_MAC;
use margay_dataplane::routes::worker::Network;
use margay_node::agent::{self, AgentEvent, AgentHandle, AgentParts};
use margay_node::metrics::Metrics;
use margay_proto::sync::{Change, Frame, Trailer};
use margay_tests::namespace::{Namespace, connect};
use margay_tests::raw::{Packet, Tap, Transport, packet};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{AddressFamily, SockProtocol};
use nix::unistd::Pid;
use tokio::sync::oneshot;

/// Longest wait for what must happen; it takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// MAC address of the host side of every pod's link.
pub const GATEWAY: Mac = HOST_MAC;
/// Port that packets of the tests go to.
pub const PORT: u16 = 8000;
/// Port that a policy of the tests does not name.
pub const DENIED: u16 = 8001;
/// Port that is always open.
pub const ALWAYS: u16 = 9;
/// Every packet that a test looks for carries this and its number.
const MARK: [u8; 4] = [0x6e, b'g', b'y', 0xa5];

/// Both addresses of something, IPv4 first.
pub type Addresses = [IpAddr; 2];
/// The records of a view.
pub type Records = BTreeMap<RecordId, Record>;

/// A pod.
pub struct Pod {
    /// Its identity.
    pub key: EndpointKey,
    /// Its addresses.
    pub addresses: Addresses,
    /// Its network.
    pub namespace: Namespace,
    /// MAC address of its interface.
    pub mac: Mac,
}

/// A node with its agent.
pub struct Node {
    /// Its name.
    pub name: &'static str,
    /// Its addresses.
    pub addresses: Addresses,
    /// Its network.
    pub host: Namespace,
    /// Its pods.
    pub pods: Vec<Pod>,
    /// With what ends when the agent has.
    agent: Option<(AgentHandle, oneshot::Receiver<agent::RetriesExhausted>)>,
}

/// Place where a packet can come out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// At the other pod of the node.
    Victim,
    /// At the pod of the other node.
    Remote,
    /// On the wire between the nodes.
    Wire,
    /// At a process of the node.
    Host,
    /// At a process of the other node.
    OtherHost,
}

/// Everything a test needs: the attacker is `nodes[0].pods[0]`, the victim `nodes[0].pods[1]`, and
/// the remote pod `nodes[1].pods[0]`.
pub struct Lab {
    /// The two nodes.
    pub nodes: [Node; 2],
    mouth: Tap,
    taps: Vec<(Place, Tap)>,
    /// Open sockets, so that no ICMP error reports a closed port: such a message contains the
    /// refused packet, and would be taken for it.
    sockets: Vec<(u16, UdpSocket)>,
    number: u16,
}

impl Lab {
    /// Nodes, pods and agents that enforce the records of `policy` besides those that routing
    /// needs.
    pub async fn new(policy: impl Fn(&mut Records)) -> Result<Self> {
        let mut nodes = [mk_node("n1", 1, 2)?, mk_node("n2", 2, 1)?];
        let [one, two] = &nodes;
        connect(
            (&one.host, "eth0", "172.30.0.1/24"),
            (&two.host, "eth0", "172.30.0.2/24"),
        )?;
        for node in &nodes {
            node.host
                .ip(&format!("addr add {}/64 dev eth0 nodad", node.addresses[1]))?;
            node.host.ip("route add default via 172.30.0.254")?;
        }
        let records = records(&nodes, policy);
        for node in &mut nodes {
            node.start_agent(&records).await?;
        }
        let [one, two] = &nodes;
        let mouth = one.pods[0].namespace.run(|| Tap::open("eth0"))?;
        let mut taps = vec![
            (
                Place::Victim,
                one.pods[1].namespace.run(|| Tap::open("eth0"))?,
            ),
            (
                Place::Remote,
                two.pods[0].namespace.run(|| Tap::open("eth0"))?,
            ),
            (Place::Wire, two.host.run(|| Tap::open("eth0"))?),
        ];
        for (place, node) in [(Place::Host, one), (Place::OtherHost, two)] {
            for (family, protocol) in [
                (AddressFamily::Inet, SockProtocol::Udp),
                (AddressFamily::Inet, SockProtocol::Tcp),
                (AddressFamily::Inet, SockProtocol::Icmp),
                (AddressFamily::Inet6, SockProtocol::Udp),
                (AddressFamily::Inet6, SockProtocol::Tcp),
                (AddressFamily::Inet6, SockProtocol::IcmpV6),
            ] {
                taps.push((place, node.host.run(|| Tap::accepted(family, protocol))?));
            }
        }
        let mut sockets = Vec::new();
        for namespace in [
            &one.host,
            &one.pods[1].namespace,
            &two.host,
            &two.pods[0].namespace,
        ] {
            for port in [PORT, DENIED, ALWAYS] {
                let socket = namespace.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)))?;
                socket.set_nonblocking(true)?;
                sockets.push((port, socket));
            }
        }
        let mut lab = Self {
            nodes,
            mouth,
            taps,
            sockets,
            number: 0,
        };
        // Neighbours are resolved by ARP and neighbour discovery now, so that packets of both
        // families come out in the order in which they went in.
        lab.send(&[])?;
        Ok(lab)
    }

    /// The attacker.
    pub fn attacker(&self) -> &Pod {
        &self.nodes[0].pods[0]
    }

    /// The pod that it tries to reach or to impersonate.
    pub fn victim(&self) -> &Pod {
        &self.nodes[0].pods[1]
    }

    /// The pod of the other node.
    pub fn remote(&self) -> &Pod {
        &self.nodes[1].pods[0]
    }

    /// A number for a packet that nobody else has.
    pub fn number(&mut self) -> u16 {
        self.number += 1;
        self.number
    }

    /// Sends frames out of the attacker's interface, and returns where packets with a number came
    /// out. The result is complete: the frames are followed by packets on every open path, whose
    /// arrival shows that those before them had their chance.
    pub fn send(&mut self, frames: &[Vec<u8>]) -> Result<BTreeMap<u16, BTreeSet<Place>>> {
        let ways = [
            (Place::Victim, self.victim().addresses),
            (Place::Remote, self.remote().addresses),
            (Place::Host, self.nodes[0].addresses),
            (Place::OtherHost, self.nodes[1].addresses),
        ];
        let mut awaited = BTreeSet::new();
        let mut last = Vec::new();
        for (place, addresses) in ways {
            for (own, address) in self.attacker().addresses.into_iter().zip(addresses) {
                self.number += 1;
                awaited.insert((place, self.number));
                if place == Place::OtherHost {
                    awaited.insert((Place::Wire, self.number));
                }
                let data = marked(self.number);
                let packet = Packet::new(
                    own,
                    address,
                    Transport::Udp {
                        ports: (4000, ALWAYS),
                        data,
                    },
                );
                last.push(self.frame(&packet));
            }
        }
        let mouth = &self.mouth;
        std::thread::scope(|scope| {
            scope
                .spawn(|| send_in_order(mouth, frames.iter().chain(&last)))
                .join()
        })
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let (mut seen, end) = (BTreeMap::new(), Instant::now() + PATIENCE);
        let own = awaited.clone();
        while !awaited.is_empty() {
            let any = self.listen(&mut seen)?;
            awaited.retain(|(place, number)| {
                !seen
                    .get(number)
                    .is_some_and(|places| places.contains(place))
            });
            ensure!(
                Instant::now() < end,
                "what is always open was closed: {awaited:?}"
            );
            if !any {
                std::thread::yield_now();
            }
        }
        self.listen(&mut seen)?;
        seen.retain(|number, _| !own.iter().any(|(_, own)| own == number));
        Ok(seen)
    }

    /// Takes what has come out; returns whether anything has.
    fn listen(&self, seen: &mut BTreeMap<u16, BTreeSet<Place>>) -> Result<bool> {
        let mut any = false;
        for (place, tap) in &self.taps {
            while let Some(frame) = tap.next()? {
                any = true;
                if matches!(place, Place::Host | Place::OtherHost) && is_complaint(&frame) {
                    continue;
                }
                for number in numbers(&frame) {
                    seen.entry(number).or_default().insert(*place);
                }
            }
        }
        Ok(any)
    }

    /// Number of datagrams received by processes at this port.
    pub fn received(&self, port: u16) -> usize {
        let own = self.sockets.iter().filter(|(own, _)| *own == port);
        own.map(|(_, socket)| std::iter::from_fn(|| socket.recv(&mut [0; 512]).ok()).count())
            .sum()
    }

    /// A packet as a frame from the attacker to its gateway.
    pub fn frame(&self, packet: &Packet) -> Vec<u8> {
        packet::ethernet(
            GATEWAY,
            self.attacker().mac,
            packet.ethertype(),
            &packet.encode(),
        )
    }

    /// The first node loses its agent; what is enforced stays.
    pub async fn leave(&mut self) -> Result<()> {
        if let Some((agent, fatal)) = self.nodes[0].agent.take() {
            drop(agent);
            ensure!(
                tokio::time::timeout(PATIENCE, fatal).await?.is_err(),
                "the agent had ended before"
            );
        }
        Ok(())
    }

    /// The first node loses its agent and its table: nothing is enforced any more.
    pub async fn disarm(&mut self) -> Result<()> {
        self.leave().await?;
        let node = &mut self.nodes[0];
        node.host
            .command("nft", &["delete", "table", "inet", "margay"], "")?;
        Ok(())
    }
}

impl Pod {
    /// Host side interface.
    pub fn interface(&self) -> String {
        interface_name(&self.key)
    }
}

impl Node {
    async fn start_agent(&mut self, records: &Records) -> Result<()> {
        let attached = self.pods.iter().map(|pod| {
            (
                pod.interface(),
                Attached {
                    endpoint: pod.key.clone(),
                    uid: String::new(),
                    addresses: pod.addresses.to_vec(),
                    host_ports: Vec::new(),
                },
            )
        });
        let attached = attached.collect();
        let runtime = tokio::runtime::Handle::current();
        let ((handle, fatal), network) = self.host.run(|| -> Result<_> {
            let _context = runtime.enter();
            let network = Network::spawn()?;
            let parts = AgentParts {
                node: self.name.to_owned(),
                view: Records::new(),
                attached,
                links: Default::default(),
                dataplane: Box::new(Nftables::new(self.name, Box::new(Netfilter::open()?))),
                routes: Some(Box::new(network.clone())),
                store: None,
                bgp: Default::default(),
                metrics: Metrics::new(&mut Default::default()),
            };
            Ok((agent::spawn(parts)?, network))
        })?;
        let (hello, held) = oneshot::channel();
        let (fault, _) = oneshot::channel();
        handle
            .send(AgentEvent::Connected {
                stream: 1,
                hello,
                fault,
                server: "test".to_owned(),
            })
            .await;
        held.await?;
        let own = records
            .iter()
            .filter(|(id, _)| !matches!(id, RecordId::Endpoint(key) if !self.has(key)));
        let changes = own
            .map(|(id, record)| Change::Upsert(id.clone(), record.clone()))
            .collect();
        let trailer = Trailer {
            revision: 1,
            restated_buckets: (0..256).collect(),
            in_sync: true,
            ..Trailer::default()
        };
        handle
            .send(AgentEvent::Frame {
                stream: 1,
                frame: Box::new(Frame { changes, trailer }),
            })
            .await;
        let mut acks = handle.acks();
        let acked = acks.wait_for(|ack| ack.as_ref().is_some_and(|ack| ack.revision == 1));
        let ack = tokio::time::timeout(PATIENCE, acked)
            .await
            .context("no acknowledgement")??
            .clone();
        let errors = &ack.as_deref().context("an acknowledgement")?.errors;
        ensure!(errors.is_empty(), "{errors:?}");
        let routed =
            network.wait_for(|progress| progress.generation > 0 && progress.failed.is_empty());
        tokio::time::timeout(PATIENCE, routed)
            .await
            .with_context(|| format!("routes: {:?}", network.progress()))?;
        self.agent = Some((handle, fatal));
        Ok(())
    }

    fn has(&self, key: &EndpointKey) -> bool {
        self.pods.iter().any(|pod| pod.key == *key)
    }
}

fn mk_node(name: &'static str, number: u8, pods: u8) -> Result<Node> {
    let host = Namespace::new()?;
    // Without this a link can send no neighbour discovery for a second or two.
    host.command("sysctl", &["-qw", "net.ipv6.conf.default.accept_dad=0"], "")?;
    let pods = (1..=pods)
        .map(|pod| mk_pod(&host, number, pod))
        .collect::<Result<_>>()?;
    let addresses = [
        IpAddr::V4(Ipv4Addr::new(172, 30, 0, number)),
        format!("fd10::{number}").parse()?,
    ];
    Ok(Node {
        name,
        addresses,
        host,
        pods,
        agent: None,
    })
}

fn mk_pod(host: &Namespace, node: u8, number: u8) -> Result<Pod> {
    let key = EndpointKey::new("x", format!("n{node}p{number}"));
    let addresses = [
        IpAddr::V4(Ipv4Addr::new(10, 244, node, number)),
        IpAddr::V6(Ipv6Addr::new(
            0xfd00,
            0x244,
            u16::from(node),
            0,
            0,
            0,
            0,
            u16::from(number),
        )),
    ];
    let namespace = Namespace::new()?;
    namespace.command("sysctl", &["-qw", "net.ipv6.conf.default.accept_dad=0"], "")?;
    let nets = addresses.map(IpNet::from);
    let mac = host.connect_pod(&namespace, &interface_name(&key), &nets)?;
    Ok(Pod {
        key,
        addresses,
        namespace,
        mac,
    })
}

fn records(nodes: &[Node; 2], policy: impl Fn(&mut Records)) -> Records {
    let net = |text: &str| text.parse::<IpNet>().expect("a range");
    let pool = |nat_outgoing, encapsulation| {
        Record::Pool(PoolRecord {
            nat_outgoing,
            encapsulation,
        })
    };
    let mut records = Records::from([
        (
            RecordId::Settings,
            Record::Settings(FelixSettings::default()),
        ),
        (
            RecordId::Pool(net("10.244.0.0/16")),
            pool(true, Encapsulation::Vxlan),
        ),
        (
            RecordId::Pool(net("fd00:244::/32")),
            pool(false, Encapsulation::None),
        ),
    ]);
    for (node, number) in nodes.iter().zip(1_u8..) {
        let info = NodeInfo {
            ipv4: format!("172.30.0.{number}/24").parse().ok(),
            ipv6: format!("fd10::{number}/64").parse().ok(),
            vtep: Some(Vtep {
                address: Ipv4Addr::new(10, 244, number, 0),
                mac: vtep_mac(number),
            }),
            ..NodeInfo::default()
        };
        records.insert(RecordId::Node(node.name.to_owned()), Record::Node(info));
        for (block, encapsulation) in [
            (net(&format!("10.244.{number}.0/26")), Encapsulation::Vxlan),
            (
                net(&format!("fd00:244:{number}::/122")),
                Encapsulation::None,
            ),
        ] {
            let route = RouteRecord {
                node: node.name.to_owned(),
                encapsulation,
            };
            records.insert(RecordId::Route(block), Record::Route(route));
        }
        for pod in &node.pods {
            let endpoint = EndpointRecord {
                interface: pod.interface(),
                uid: String::new(),
                addresses: pod.addresses.to_vec(),
                tiers: Vec::new(),
                unmatched: Action::Allow,
            };
            records.insert(
                RecordId::Endpoint(pod.key.clone()),
                Record::Endpoint(endpoint),
            );
        }
    }
    policy(&mut records);
    records
}

/// MAC address of a node's tunnel device.
pub fn vtep_mac(node: u8) -> Mac {
    Mac([0x66, 0, 0, 0, 0, node])
}

/// Data by which a packet is known wherever it comes out.
pub fn marked(number: u16) -> Vec<u8> {
    [&MARK[..], &number.to_be_bytes()].concat()
}

/// A MAC address by which a frame is known wherever it comes out.
pub fn marked_mac(number: u16) -> Mac {
    let [high, low] = number.to_be_bytes();
    let [a, b, c, d] = MARK;
    Mac([a, b, c, d, high, low])
}

/// Returns whether a packet that a host's socket received is an ICMP error, which contains the
/// packet that caused it. IPv4 comes with its header.
fn is_complaint(packet: &[u8]) -> bool {
    match packet.first() {
        Some(first) if first >> 4 == 4 => {
            let header = usize::from(first & 15) * 4;
            packet.get(9) == Some(&1)
                && packet
                    .get(header)
                    .is_some_and(|kind| [3, 11, 12].contains(kind))
        }
        Some(first) => (1..=4).contains(first),
        None => false,
    }
}

fn numbers(frame: &[u8]) -> impl Iterator<Item = u16> {
    let found = frame.windows(6).filter(|window| window.starts_with(&MARK));
    found.map(|window| u16::from_be_bytes([window[4], window[5]]))
}

/// On one processor, as each has a queue of its own for what comes in by a virtual link.
fn send_in_order<'a>(mouth: &Tap, frames: impl Iterator<Item = &'a Vec<u8>>) -> Result<()> {
    let own = Pid::from_raw(0);
    let allowed = sched_getaffinity(own)?;
    let first = (0..CpuSet::count())
        .find(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .context("a processor")?;
    let mut one = CpuSet::new();
    one.set(first)?;
    sched_setaffinity(own, &one)?;
    for frame in frames {
        mouth.send(frame)?;
    }
    Ok(())
}
