//! One node as a namespace with the real agent, pods as namespaces: real packets obey the view that
//! was sent to the agent.
//!
//! Drops are detected without waiting: a later packet on a path that is always open has arrived.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, interface_name};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::{Action, IpVersion, PortRange, Protocol};
use margay_calc::flush::MemberDelta;
use margay_calc::model::{
    EndpointRecord, IpSetRecord, Member, PolicyRecord, Record, RecordId, RuleRecord, SetId,
    SetKind, SideMatch, TierBinding,
};
use margay_dataplane::Attached;
use margay_dataplane::nftables::{Netfilter, Nftables};
use margay_dataplane::routes::parameters;
use margay_node::agent::{self, AgentEvent, AgentHandle, AgentParts, watch_drift};
use margay_node::metrics::Metrics;
use margay_proto::sync::{Change, Frame, Trailer};
use margay_tests::namespace::Namespace;
use margay_tests::probe::slowness;
use tokio::sync::oneshot;

#[path = "enforcement/spoofing.rs"]
mod spoofing;

/// Longest wait for what must happen; it takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Port that every policy of these tests lets in.
const ALWAYS: u16 = 9;
const WEB: u16 = 80;

type Records = BTreeMap<RecordId, Record>;

struct Pod {
    key: EndpointKey,
    address: Ipv4Addr,
    address6: Ipv6Addr,
    namespace: Namespace,
}

impl Pod {
    fn interface(&self) -> String {
        interface_name(&self.key)
    }

    fn attached(&self) -> Attached {
        Attached {
            endpoint: self.key.clone(),
            uid: String::new(),
            addresses: self.addresses().to_vec(),
            host_ports: Vec::new(),
        }
    }

    fn addresses(&self) -> [IpAddr; 2] {
        [self.address.into(), self.address6.into()]
    }

    fn socket(&self, port: u16) -> Result<UdpSocket> {
        self.socket_of(self.address.into(), port)
    }

    fn socket_of(&self, address: IpAddr, port: u16) -> Result<UdpSocket> {
        let socket = self.namespace.run(|| UdpSocket::bind((address, port)))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    }
}

/// A node with its agent, and pods `p1`, `p2`, ...
struct Node {
    host: Namespace,
    pods: Vec<Pod>,
    records: Records,
    revision: u64,
    agent: Option<AgentHandle>,
}

impl Node {
    fn new(pods: u8) -> Result<Self> {
        let host = Namespace::new()?;
        // An unprepared host, with the parameters that the routes thread, which does not run here,
        // would set.
        for parameter in ["ipv4.ip_forward", "ipv6.conf.all.forwarding"] {
            host.command("sysctl", &["-qw", &format!("net.{parameter}=0")], "")?;
        }
        host.run(|| {
            IpVersion::ALL
                .into_iter()
                .try_for_each(|version| parameters::set_forwarding(version).map(drop))
        })?;
        let pods = (1..=pods)
            .map(|number| mk_pod(&host, number))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            host,
            pods,
            records: Records::new(),
            revision: 0,
            agent: None,
        })
    }

    /// A new agent in the namespace of the node, in the place of the present one, which ends as if
    /// killed.
    async fn start_agent(&mut self, view: Records) -> Result<()> {
        self.agent = None;
        let attached = self
            .pods
            .iter()
            .map(|pod| (pod.interface(), pod.attached()))
            .collect();
        let runtime = tokio::runtime::Handle::current();
        let handle = self.host.run(|| -> Result<AgentHandle> {
            let _context = runtime.enter();
            let mut kernel = Netfilter::open()?;
            let table = kernel.watch()?;
            let parts = AgentParts {
                node: "n1".to_owned(),
                view,
                attached,
                links: Default::default(),
                dataplane: Box::new(Nftables::new("n1", Box::new(kernel))),
                routes: None,
                store: None,
                bgp: Default::default(),
                metrics: Metrics::new(&mut Default::default()),
            };
            let (handle, _) = agent::spawn(parts)?;
            watch_drift(table, handle.clone())?;
            Ok(handle)
        })?;
        self.agent = Some(handle);
        Ok(())
    }

    fn agent(&self) -> &AgentHandle {
        self.agent.as_ref().expect("it was started")
    }

    /// Opens a new stream with the whole view.
    async fn connect(&mut self) -> Result<()> {
        let (hello, held) = oneshot::channel();
        let (fault, _) = oneshot::channel();
        self.agent()
            .send(AgentEvent::Connected {
                stream: 1,
                hello,
                fault,
                server: "test".to_owned(),
            })
            .await;
        held.await?;
        let all = self
            .records
            .clone()
            .into_iter()
            .map(|(id, record)| Change::Upsert(id, record))
            .collect();
        self.send(all, (0..256).collect()).await
    }

    /// Sends changes, and returns when they are in the kernel.
    async fn send(&mut self, changes: Vec<Change>, restated_buckets: Vec<u32>) -> Result<()> {
        self.revision += 1;
        let trailer = Trailer {
            revision: self.revision,
            restated_buckets,
            in_sync: true,
            ..Trailer::default()
        };
        self.agent()
            .send(AgentEvent::Frame {
                stream: 1,
                frame: Box::new(Frame { changes, trailer }),
            })
            .await;
        let mut acks = self.agent().acks();
        let revision = self.revision;
        let acked = acks.wait_for(|ack| ack.as_ref().is_some_and(|ack| ack.revision == revision));
        let ack = tokio::time::timeout(PATIENCE, acked)
            .await
            .context("no acknowledgement")??;
        let errors = &ack.as_deref().context("an acknowledgement")?.errors;
        ensure!(errors.is_empty(), "{errors:?}");
        Ok(())
    }

    async fn put(&mut self, id: RecordId, record: Record) -> Result<()> {
        self.records.insert(id.clone(), record.clone());
        self.send(vec![Change::Upsert(id, record)], Vec::new())
            .await
    }

    /// Returns whether UDP packets get from one pod to a port of another.
    fn passes(&self, from: usize, to: usize, port: u16) -> Result<bool> {
        let (from, to) = (&self.pods[from], &self.pods[to]);
        Self::passes_between((from, from.address.into()), (to, to.address.into()), port)
    }

    /// The same by IPv6.
    fn passes6(&self, from: usize, to: usize, port: u16) -> Result<bool> {
        let (from, to) = (&self.pods[from], &self.pods[to]);
        Self::passes_between((from, from.address6.into()), (to, to.address6.into()), port)
    }

    fn passes_between(from: (&Pod, IpAddr), to: (&Pod, IpAddr), port: u16) -> Result<bool> {
        let sender = from.0.socket_of(from.1, 0)?;
        let (receiver, always) = (to.0.socket_of(to.1, port)?, to.0.socket_of(to.1, ALWAYS)?);
        // A refusal of an earlier packet by ICMP is reported at the next send.
        let send = |port| {
            sender
                .send_to(b"x", (to.1, port))
                .or_else(|_| sender.send_to(b"x", (to.1, port)))
        };
        send(port)?;
        send(ALWAYS)?;
        always
            .recv(&mut [0; 8])
            .context("the port that is always open")?;
        receiver.set_nonblocking(true)?;
        Ok(receiver.recv(&mut [0; 8]).is_ok())
    }
}

fn mk_pod(host: &Namespace, number: u8) -> Result<Pod> {
    let key = EndpointKey::new("x", format!("p{number}"));
    let address = Ipv4Addr::new(10, 244, 1, number);
    let address6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, number.into());
    let namespace = Namespace::new()?;
    let nets = [
        IpNet::from(IpAddr::V4(address)),
        IpNet::from(IpAddr::V6(address6)),
    ];
    host.connect_pod(&namespace, &interface_name(&key), &nets)?;
    Ok(Pod {
        key,
        address,
        address6,
        namespace,
    })
}

fn mk_key(name: &str) -> PolicyKey {
    PolicyKey {
        kind: PolicyKind::NetworkPolicy,
        namespace: "x".to_owned(),
        name: name.to_owned(),
    }
}

fn mk_rule(action: Action, protocol: Protocol, port: u16, sets: Vec<SetId>) -> RuleRecord {
    RuleRecord {
        action,
        ip_version: None,
        protocol: Some(protocol),
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: SideMatch {
            sets,
            ..SideMatch::default()
        },
        destination: SideMatch {
            ports: [PortRange::single(port)].into(),
            ..SideMatch::default()
        },
    }
}

fn friends() -> SetId {
    SetId("s:friends".to_owned())
}

fn set_of(addresses: &[Ipv4Addr]) -> Record {
    let members = addresses
        .iter()
        .map(|address| Member::Net(IpNet::from(IpAddr::V4(*address))))
        .collect();
    Record::IpSet(IpSetRecord {
        kind: SetKind::Net,
        members,
    })
}

fn policy_of(ingress: Vec<RuleRecord>) -> Record {
    let always = mk_rule(Action::Allow, Protocol::UDP, ALWAYS, Vec::new());
    Record::Policy(PolicyRecord {
        ingress: [always].into_iter().chain(ingress).collect(),
        egress: Vec::new(),
    })
}

fn endpoint(pod: &Pod, ingress: &[&str]) -> (RecordId, Record) {
    let tier = TierBinding {
        name: "default".to_owned(),
        default_action: Action::Deny,
        ingress: ingress.iter().map(|name| mk_key(name)).collect(),
        egress: Vec::new(),
    };
    let record = EndpointRecord {
        interface: pod.interface(),
        uid: String::new(),
        addresses: pod.addresses().to_vec(),
        tiers: if ingress.is_empty() {
            Vec::new()
        } else {
            vec![tier]
        },
        unmatched: Action::Allow,
    };
    (
        RecordId::Endpoint(pod.key.clone()),
        Record::Endpoint(record),
    )
}

/// Two unrestricted pods, and a third, whose web port only the first may reach, and everybody its
/// port that is always open.
async fn mk_node() -> Result<Node> {
    let mut node = Node::new(3)?;
    let friend = node.pods[0].address;
    node.records = BTreeMap::from([
        (RecordId::IpSet(friends()), set_of(&[friend])),
        (
            RecordId::Policy(mk_key("web")),
            policy_of(vec![
                mk_rule(Action::Allow, Protocol::UDP, WEB, vec![friends()]),
                mk_rule(Action::Allow, Protocol::TCP, WEB, vec![friends()]),
            ]),
        ),
        endpoint(&node.pods[0], &[]),
        endpoint(&node.pods[1], &[]),
        endpoint(&node.pods[2], &["web"]),
    ]);
    node.start_agent(Records::new()).await?;
    node.connect().await?;
    Ok(node)
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_obey_members_rules_and_passes() -> Result<()> {
    let mut node = mk_node().await?;
    ensure!(node.passes(0, 2, WEB)?, "the friend is let in");
    ensure!(!node.passes(1, 2, WEB)?, "a stranger is not");
    ensure!(node.passes(1, 0, WEB)?, "a pod without policy is open");

    let delta = MemberDelta {
        added: [Member::Net("10.244.1.2/32".parse()?)].into(),
        removed: [Member::Net("10.244.1.1/32".parse()?)].into(),
    };
    node.send(
        vec![Change::Members(friends(), SetKind::Net, delta)],
        Vec::new(),
    )
    .await?;
    ensure!(!node.passes(0, 2, WEB)?, "no friend any more");
    ensure!(node.passes(1, 2, WEB)?, "a new friend");

    node.put(
        RecordId::Policy(mk_key("web")),
        policy_of(vec![mk_rule(
            Action::Deny,
            Protocol::UDP,
            WEB,
            vec![friends()],
        )]),
    )
    .await?;
    ensure!(!node.passes(1, 2, WEB)?, "a rule that denies");
    node.put(
        RecordId::Policy(mk_key("web")),
        policy_of(vec![mk_rule(
            Action::Pass,
            Protocol::UDP,
            WEB,
            vec![friends()],
        )]),
    )
    .await?;
    ensure!(
        node.passes(1, 2, WEB)?,
        "a rule that passes, to a profile that allows"
    );
    ensure!(!node.passes(0, 2, WEB)?, "the end of the tier");
    Ok(())
}

/// A hundred thousand addresses and a thousand ranges: they are loaded, they decide, and adding one
/// costs one element. Nothing listens to nftables' notifications meanwhile, which would cost the
/// kernel more than the set does (see `margay_nft::MonitorPause`), and no name is made for each
/// member.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_set_is_loaded_and_decides() -> Result<()> {
    let mut node = mk_node().await?;
    let address = |number: u32| {
        Member::Net(IpNet::from(IpAddr::V4(Ipv4Addr::from_bits(
            0x0b00_0000 + number,
        ))))
    };
    let range = |number: u32| {
        Member::Net(IpNet::new_assert(
            Ipv4Addr::from_bits(0x0c00_0000 + number * 512).into(),
            24,
        ))
    };
    let friend = Member::Net(IpNet::from(IpAddr::V4(node.pods[0].address)));
    // Fewer in emulation, which takes longer over 100,000 than a test waits.
    let members: BTreeSet<Member> = (0..100_000 / slowness())
        .map(address)
        .chain((0..1000).map(range))
        .chain([friend.clone()])
        .collect();
    node.put(
        RecordId::IpSet(friends()),
        Record::IpSet(IpSetRecord {
            kind: SetKind::Net,
            members,
        }),
    )
    .await?;
    ensure!(
        node.passes(0, 2, WEB)? && !node.passes(1, 2, WEB)?,
        "one pod is among them, the other is not"
    );
    let around = Member::Net("10.244.1.2/31".parse()?);
    let delta = MemberDelta {
        added: [around.clone()].into(),
        removed: [friend].into(),
    };
    node.send(
        vec![Change::Members(friends(), SetKind::Net, delta)],
        Vec::new(),
    )
    .await?;
    ensure!(
        !node.passes(0, 2, WEB)? && node.passes(1, 2, WEB)?,
        "an address less, a range more"
    );
    let delta = MemberDelta {
        added: [].into(),
        removed: [around].into(),
    };
    node.send(
        vec![Change::Members(friends(), SetKind::Net, delta)],
        Vec::new(),
    )
    .await?;
    ensure!(!node.passes(1, 2, WEB)?, "and that range less");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_leaves_what_it_enforced_and_its_successor_opens_nothing() -> Result<()> {
    /// Denied packets in each phase, at least.
    const EACH: u64 = 10;
    let mut node = mk_node().await?;
    let (address, port) = (node.pods[2].address, WEB);
    let listener = node.pods[2]
        .namespace
        .run(|| TcpListener::bind((address, port)))?;
    let mut client = node.pods[0]
        .namespace
        .run(|| TcpStream::connect(SocketAddr::from((address, port))))?;
    let (mut server, _) = listener.accept()?;
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE))?;
    }

    let denied = node.pods[2].socket(WEB)?;
    let flood = node.pods[1].socket(0)?;
    let (stop, sent) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let (stopped, sending) = (stop.clone(), sent.clone());
    let flooding = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            sending.fetch_add(
                u64::from(flood.send_to(b"x", (address, WEB)).is_ok()),
                Ordering::Relaxed,
            );
            std::thread::yield_now();
        }
    });
    let some_more = async || -> Result<()> {
        let enough = sent.load(Ordering::Relaxed) + EACH;
        let flown = async {
            while sent.load(Ordering::Relaxed) < enough {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, flown)
            .await
            .context("the flood ended early")
    };
    for round in 0..10_u8 {
        node.start_agent(Records::new()).await?;
        // While no agent runs, and after one runs again.
        for _ in 0..2 {
            client.write_all(&[round])?;
            let mut echo = [0; 1];
            server.read_exact(&mut echo)?;
            ensure!(echo == [round]);
            some_more().await?;
            node.connect().await?;
        }
    }
    stop.store(true, Ordering::Relaxed);
    flooding
        .join()
        .map_err(|_| anyhow::anyhow!("the flood ended early"))?;
    ensure!(
        node.passes(0, 2, WEB + 1).is_ok(),
        "a packet after the flood"
    );
    denied.set_nonblocking(true)?;
    ensure!(
        denied.recv(&mut [0; 8]).is_err(),
        "a denied packet has arrived"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_do_to_the_table_is_undone() -> Result<()> {
    let node = mk_node().await?;
    let before = node
        .host
        .command("nft", &["-n", "list", "table", "inet", "margay"], "")?;
    let mischief = [
        "flush chain inet margay guard",
        "add rule inet margay to-workload accept",
        "delete table inet margay",
    ];
    for mischief in mischief {
        node.host.command("nft", &["-f", "-"], mischief)?;
        let repaired = async {
            loop {
                // Each check comes after a commit, which comes after the monitor's report.
                node.agent().inspect(|_, _| ()).await;
                let now = node
                    .host
                    .command("nft", &["-n", "list", "table", "inet", "margay"], "");
                if now.is_ok_and(|now| without_counters(&now) == without_counters(&before)) {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, repaired)
            .await
            .with_context(|| format!("{mischief}: not repaired"))?;
    }
    Ok(())
}

/// Counters count, and elements have no order.
fn without_counters(text: &str) -> Vec<String> {
    let words = text.lines().map(|line| {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        if let Some(at) = words.iter().position(|word| *word == "counter") {
            words.drain(at + 1..at + 5);
        }
        words.join(" ").trim_end_matches(',').to_owned()
    });
    let mut lines: Vec<String> = words.collect();
    lines.sort();
    lines
}
