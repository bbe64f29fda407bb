//! Packets between two network namespaces, forwarded by a third one that has the table.

use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use super::sample::{port, v4};
use super::support::{chain_name, ifname, in_namespace, run, set_name, table};
use crate::*;

/// Longest wait for a packet that must arrive; an arrival takes microseconds.
const PATIENCE: Duration = Duration::from_secs(10);

const SENDER: Ipv4Addr = Ipv4Addr::new(10, 65, 1, 2);
const RECEIVER: Ipv4Addr = Ipv4Addr::new(10, 65, 2, 2);

/// A namespace of its own, kept by an open file.
fn namespace() -> File {
    in_namespace(|| File::open("/proc/thread-self/ns/net").expect("a namespace"))
}

/// Runs something in that namespace.
fn within<T: Send>(namespace: &File, action: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("root");
            action()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Connects a namespace to that of the calling thread, as a pod is connected to its node.
fn plug(pod: &File, host_side: &str, address: Ipv4Addr) {
    let [a, b, c, _] = address.octets();
    let gateway = Ipv4Addr::new(a, b, c, 1);
    let path = format!("/proc/{}/fd/{}", std::process::id(), pod.as_raw_fd());
    let ip = |commands: &str| run("ip", &["-batch", "-"], commands);
    ip(&format!(
        "link add {host_side} type veth peer name eth0 netns {path}\n\
         address add {gateway}/24 dev {host_side}\n\
         link set {host_side} up\n"
    ));
    within(pod, || {
        run(
            "ip",
            &["-batch", "-"],
            &format!(
                "link set lo up\n\
                 address add {address}/24 dev eth0\n\
                 link set eth0 up\n\
                 route add default via {gateway}\n"
            ),
        )
    });
}

/// The two ends of a path, one socket at each end per port.
struct Path {
    sender: UdpSocket,
    receivers: [(u16, UdpSocket); 3],
}

/// A port that every ruleset of the test accepts: when its packet arrives, those sent before it
/// have been judged.
const ALWAYS: u16 = 9;

impl Path {
    fn new(from: &File, to: &File) -> Self {
        let sender = within(from, || {
            UdpSocket::bind((SENDER, 5000)).expect("its address")
        });
        let receivers = [1, 2, ALWAYS].map(|port| {
            let socket = within(to, || {
                UdpSocket::bind((RECEIVER, port)).expect("its address")
            });
            socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
            (port, socket)
        });
        Self { sender, receivers }
    }

    /// The ports that a packet arrives at.
    fn open_ports(&self) -> Vec<u16> {
        for (port, _) in &self.receivers {
            self.sender
                .send_to(b"x", (RECEIVER, *port))
                .expect("a way to the gateway");
        }
        let [others @ .., (_, always)] = &self.receivers;
        always.recv(&mut [0; 8]).expect("this port is always open");
        let arrived = |socket: &UdpSocket| {
            socket.set_nonblocking(true).expect("a socket");
            socket.recv(&mut [0; 8]).is_ok()
        };
        others
            .iter()
            .filter(|(_, socket)| arrived(socket))
            .map(|(port, _)| *port)
            .collect()
    }
}

/// Forwarding as on a node: a verdict map by interface, and nothing for an interface that is not in
/// it.
fn node_rules() -> Ruleset {
    let mut ruleset = Ruleset::new(table());
    let base = Base {
        kind: ChainType::Filter,
        hook: Hook::Forward,
        priority: 0,
        policy: ChainPolicy::Drop,
    };
    let udp = |to| Match::is(Selector::Dport(Transport::Udp), port(to));
    ruleset.put_chain(
        chain_name("forward-1"),
        Chain::base(
            base,
            vec![
                Rule::new().when(udp(ALWAYS)).accept(),
                Rule::new().vmap(Selector::Iifname, &set_name("dispatch-1")),
                Rule::new()
                    .when(Match::iif_prefix(ifname("cali")))
                    .counter()
                    .drop(),
            ],
        ),
    );
    let members = Match::in_set(Selector::Daddr4, &set_name("members-1"));
    let ports = [Selector::L4proto, Selector::Dport(Transport::Any)];
    let policy = vec![
        Rule::new().when(members).accept(),
        Rule::new().inline_vmap(ports, [([Proto::UDP.into(), port(2)], Verdict::Accept)]),
        Rule::new().drop(),
    ];
    ruleset.put_chain(chain_name("from-1"), Chain::regular(policy));
    ruleset.put_set(
        set_name("members-1"),
        Set::new(SetKind::of(FieldType::Ipv4)),
    );
    ruleset.put_set(
        set_name("dispatch-1"),
        Set::new(SetKind::of(FieldType::Iface).with_verdicts()),
    );
    ruleset
}

#[test]
fn packets_obey_maps_sets_and_chains() {
    let (sender, receiver) = (namespace(), namespace());
    in_namespace(|| {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("root");
        plug(&sender, "cali1", SENDER);
        plug(&receiver, "cali2", RECEIVER);
        let path = Path::new(&sender, &receiver);
        let mut socket = NftSocket::open().expect("root");
        let mut present = Ruleset::new(table());
        let mut wanted = node_rules();
        let mut apply = |wanted: &Ruleset, expected: &[u16], why: &str| {
            socket
                .exec(&diff(&present, wanted))
                .unwrap_or_else(|error| panic!("{why}: {error}"));
            present = wanted.clone();
            assert_eq!(path.open_ports(), expected, "{why}");
        };
        let goto = Verdict::Goto(chain_name("from-1"));
        apply(&wanted, &[], "an interface that is not in the map");
        wanted.put_set(set_name("dispatch-1"), dispatch("cali1", goto.clone()));
        apply(&wanted, &[2], "its chain, where a map allows one port");
        let members = Set::members(SetKind::of(FieldType::Ipv4), [v4("10.65.2.2")]);
        wanted.put_set(set_name("members-1"), members);
        apply(&wanted, &[1, 2], "a member of the allowed set");
        wanted.put_set(
            set_name("members-1"),
            Set::new(SetKind::of(FieldType::Ipv4)),
        );
        apply(&wanted, &[2], "a member no more");
        wanted.put_set(set_name("dispatch-1"), dispatch("cali1", Verdict::Drop));
        apply(&wanted, &[], "the map drops");
        wanted.put_set(set_name("dispatch-1"), dispatch("cali1", Verdict::Accept));
        apply(&wanted, &[1, 2], "the map accepts");
        wanted.put_set(set_name("dispatch-1"), dispatch("cali1", goto));
        let chain = wanted.chains.get_mut("from-1").expect("in the ruleset");
        let nets = [Field::from(
            "10.65.2.0/24".parse::<ipnet::IpNet>().expect("a prefix"),
        )];
        let udp = Match::is(Selector::Dport(Transport::Udp), port(1));
        let rule = Rule::new()
            .when(Match::any_of(Selector::Daddr4, nets))
            .when(udp)
            .accept();
        *chain = Arc::new(Chain::regular(vec![rule, Rule::new().drop()]));
        apply(&wanted, &[1], "the chain, rewritten");
        let range = Match::is(Selector::Dport(Transport::Udp), 2..=3);
        let source = Match::is(
            Selector::Saddr4,
            Field::range(v4("10.65.1.0").into(), v4("10.65.1.2").into()),
        );
        let rules = vec![
            Rule::new().when(source).when(range).accept(),
            Rule::new().drop(),
        ];
        wanted.put_chain(chain_name("from-1"), Chain::regular(rules));
        apply(&wanted, &[2], "ranges of addresses and ports");
        let established = [
            (CtState::ESTABLISHED, Verdict::Accept),
            (CtState::INVALID, Verdict::Drop),
        ];
        let rules = vec![
            Rule::new().inline_vmap(Selector::CtState, established),
            Rule::new().drop(),
        ];
        wanted.put_chain(chain_name("from-1"), Chain::regular(rules));
        apply(
            &wanted,
            &[],
            "nothing was answered, so nothing is established",
        );
    });
}

fn dispatch(interface: &str, verdict: Verdict) -> Set {
    Set::verdicts(
        SetKind::of(FieldType::Iface).with_verdicts(),
        [(ifname(interface), verdict)],
    )
}
