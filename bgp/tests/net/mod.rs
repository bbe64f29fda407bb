//! Speakers in memory: connections are queues of bytes, time is a number, and chance comes from a
//! seed.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use margay_bgp::config::{PORT, PeerConfig, PeerId, SpeakerConfig};
use margay_bgp::export::ExportPolicy;
use margay_bgp::rib::{KernelRoute, LocalRoute, RouteChange};
use margay_bgp::session::{ConnectionId, Moment, SessionState};
use margay_bgp::speaker::{Speaker, SpeakerAction};

/// Bytes that one call of `transmit` is asked for.
const BUDGET: usize = 3000;

pub fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

pub fn address(node: usize) -> IpAddr {
    Ipv4Addr::new(10, 9, 0, u8::try_from(node).expect("few nodes") + 1).into()
}

/// A node: a speaker, and what its caller would do with what it says.
pub struct Node {
    pub speaker: Speaker,
    pub kernel: BTreeMap<IpNet, Arc<KernelRoute>>,
    pub log: Vec<String>,
    pub synced: usize,
}

struct Pipe {
    ends: [(usize, ConnectionId); 2],
    /// Bytes on their way to each end.
    bytes: [VecDeque<u8>; 2],
    /// Bytes to an end are held up.
    is_slow: bool,
    /// The end has closed: what is on the way still arrives.
    closed: [bool; 2],
}

/// Nodes and the connections between them.
pub struct Net {
    pub nodes: Vec<Node>,
    pipes: Vec<Pipe>,
    pub now: Duration,
    seed: u64,
    /// No connection can be made to these nodes.
    pub unreachable: BTreeSet<usize>,
}

impl Net {
    pub fn new(seed: u64) -> Self {
        let now = Duration::from_secs(1);
        let unreachable = BTreeSet::new();
        Self { nodes: Vec::new(), pipes: Vec::new(), now, seed: seed | 1, unreachable }
    }

    pub fn random(&mut self, below: usize) -> usize {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        usize::try_from(self.seed >> 11).expect("64 bits") % below.max(1)
    }

    pub fn moment(&mut self) -> Moment {
        let jitter = u8::try_from(self.random(256)).expect("a byte");
        Moment { now: self.now, jitter }
    }

    /// Adds a speaker that exports everything of 10.65.0.0/16 and fd00:65::/48.
    pub fn add(&mut self, asn: u32, change: impl FnOnce(&mut SpeakerConfig)) -> usize {
        let node = self.nodes.len();
        let IpAddr::V4(router_id) = address(node) else { panic!("IPv4") };
        let mut config = SpeakerConfig::new(asn, router_id);
        change(&mut config);
        let mut speaker = Speaker::new(config, self.now).expect("a configuration");
        let mut policy = ExportPolicy::default();
        policy.pools.insert(net("10.65.0.0/16"), true);
        policy.pools.insert(net("fd00:65::/48"), true);
        let moment = self.moment();
        speaker.set_export_policy(policy, moment);
        self.nodes.push(Node { speaker, kernel: BTreeMap::new(), log: Vec::new(), synced: 0 });
        node
    }

    /// What `node` has configured of `peer`.
    pub fn config(&self, peer: usize, asn: u32) -> PeerConfig {
        PeerConfig::new(SocketAddr::new(address(peer), PORT), asn)
    }

    pub fn peer(&mut self, node: usize, peer: usize, config: PeerConfig) {
        let moment = self.moment();
        let id = id(peer);
        self.nodes[node].speaker.set_peer(id, config, moment).expect("a configuration");
    }

    pub fn announce(&mut self, node: usize, text: &str) {
        let moment = self.moment();
        let route = LocalRoute { net: net(text), interface: None, priority: None };
        self.nodes[node].speaker.announce(route, moment);
    }

    pub fn withdraw(&mut self, node: usize, text: &str) {
        let moment = self.moment();
        self.nodes[node].speaker.withdraw(&net(text), moment);
    }

    pub fn state(&self, node: usize, peer: usize) -> SessionState {
        self.nodes[node].speaker.status(id(peer)).expect("a peer").state
    }

    /// Prefixes in a node's kernel.
    pub fn kernel(&self, node: usize) -> Vec<String> {
        self.nodes[node].kernel.keys().map(ToString::to_string).collect()
    }

    /// Lets everything happen that happens within this time.
    pub fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            while self.step() {}
            let next = self.nodes.iter().filter_map(|node| node.speaker.deadline()).min();
            match next.filter(|next| *next <= end) {
                // A deadline that has passed is due at this very moment.
                Some(next) => self.now = self.now.max(next),
                None => break,
            }
            for node in 0..self.nodes.len() {
                let moment = self.moment();
                self.nodes[node].speaker.tick(moment);
            }
        }
        self.now = end;
    }

    /// Runs until something holds, for ten minutes at most.
    pub fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..6000 {
            self.run(Duration::from_millis(100));
            if holds(self) {
                return;
            }
        }
        let logs: Vec<String> = self.nodes.iter().map(|node| node.log.join("\n")).collect();
        panic!("not within ten minutes: {what}\n{}", logs.join("\n--\n"));
    }

    /// One thing that can happen now; false if nothing can.
    pub fn step(&mut self) -> bool {
        for node in 0..self.nodes.len() {
            let actions = self.nodes[node].speaker.poll();
            if !actions.is_empty() {
                for action in actions {
                    self.act(node, action);
                }
                return true;
            }
        }
        self.write() | self.deliver()
    }

    fn act(&mut self, node: usize, action: SpeakerAction) {
        let line = format!("{:?} {action:?}", self.now);
        match action {
            SpeakerAction::Connect { peer, connection } => self.connect(node, peer, connection),
            SpeakerAction::Close { connection, last } => self.close(node, connection, &last),
            SpeakerAction::Route(RouteChange::Set { net, route }) => {
                self.nodes[node].kernel.insert(net, route);
            }
            SpeakerAction::Route(RouteChange::Remove { net }) => {
                self.nodes[node].kernel.remove(&net).expect("a route that is there");
            }
            SpeakerAction::Synced(_) => self.nodes[node].synced += 1,
            _ => {}
        }
        self.nodes[node].log.push(line);
    }

    fn connect(&mut self, node: usize, peer: PeerId, connection: ConnectionId) {
        let target = usize::try_from(peer.0).expect("a number of a node");
        let moment = self.moment();
        let accepted = (!self.unreachable.contains(&target) && !self.unreachable.contains(&node))
            .then(|| self.nodes[target].speaker.accept(address(node), address(target), moment))
            .flatten();
        let Some(accepted) = accepted else {
            return self.nodes[node].speaker.closed(connection, moment);
        };
        self.pipes.push(Pipe {
            ends: [(node, connection), (target, accepted)],
            bytes: Default::default(),
            is_slow: false,
            closed: [false; 2],
        });
        self.nodes[node].speaker.connected(connection, address(node), moment);
    }

    fn close(&mut self, node: usize, connection: ConnectionId, last: &[u8]) {
        for pipe in &mut self.pipes {
            for end in 0..2 {
                if pipe.ends[end] == (node, connection) {
                    pipe.bytes[1 - end].extend(last);
                    pipe.closed[end] = true;
                }
            }
        }
    }

    fn write(&mut self) -> bool {
        let mut wrote = false;
        for node in 0..self.nodes.len() {
            for connection in self.nodes[node].speaker.pending() {
                let moment = self.moment();
                let Some((pipe, end)) = self.end(node, connection) else { continue };
                if self.pipes[pipe].is_slow || self.pipes[pipe].closed[end] {
                    continue;
                }
                let mut out = Vec::new();
                self.nodes[node].speaker.transmit(connection, BUDGET, moment, &mut out);
                wrote |= !out.is_empty();
                self.pipes[pipe].bytes[1 - end].extend(out);
            }
        }
        wrote
    }

    fn end(&self, node: usize, connection: ConnectionId) -> Option<(usize, usize)> {
        self.pipes.iter().enumerate().find_map(|(at, pipe)| {
            pipe.ends.iter().position(|end| *end == (node, connection)).map(|end| (at, end))
        })
    }

    /// Delivers a piece of what is on the way, or an end.
    fn deliver(&mut self) -> bool {
        for at in 0..self.pipes.len() {
            for end in 0..2 {
                let (node, connection) = self.pipes[at].ends[end];
                if self.pipes[at].is_slow {
                    continue;
                }
                let waiting = self.pipes[at].bytes[end].len();
                if waiting > 0 {
                    let size = 1 + self.random(waiting.min(9000));
                    let piece: Vec<u8> = self.pipes[at].bytes[end].drain(..size).collect();
                    if !self.pipes[at].closed[end] {
                        let moment = self.moment();
                        self.nodes[node].speaker.receive(connection, &piece, moment);
                    }
                    return true;
                }
                if self.pipes[at].closed[1 - end] {
                    let pipe = self.pipes.remove(at);
                    if !pipe.closed[end] {
                        let moment = self.moment();
                        self.nodes[node].speaker.closed(connection, moment);
                    }
                    return true;
                }
            }
        }
        false
    }

    /// Breaks every connection between two nodes: what is on the way is lost.
    pub fn cut(&mut self, one: usize, other: usize) {
        let is_between = |pipe: &Pipe| {
            let nodes = pipe.ends.map(|(node, _)| node);
            nodes.contains(&one) && nodes.contains(&other)
        };
        let (cut, kept) = std::mem::take(&mut self.pipes).into_iter().partition(is_between);
        self.pipes = kept;
        let cut: Vec<Pipe> = cut;
        for (node, connection) in cut.into_iter().flat_map(|pipe| pipe.ends) {
            let moment = self.moment();
            self.nodes[node].speaker.closed(connection, moment);
        }
    }

    /// The connections to a node, which itself is no more, are lost.
    pub fn lose(&mut self, node: usize, is_noticed: bool) {
        let pipes = std::mem::take(&mut self.pipes);
        for pipe in pipes {
            if pipe.ends.iter().all(|(end, _)| *end != node) {
                self.pipes.push(pipe);
            } else if is_noticed {
                for (other, connection) in pipe.ends.into_iter().filter(|(end, _)| *end != node) {
                    let moment = self.moment();
                    self.nodes[other].speaker.closed(connection, moment);
                }
            }
        }
    }

    /// Holds up all bytes between two nodes, or lets them go on.
    pub fn hold(&mut self, one: usize, other: usize, is_slow: bool) {
        for pipe in &mut self.pipes {
            let nodes = pipe.ends.map(|(node, _)| node);
            if nodes.contains(&one) && nodes.contains(&other) {
                pipe.is_slow = is_slow;
            }
        }
    }

    /// Hands bytes to a node as if its peer had sent them.
    pub fn inject(&mut self, node: usize, peer: usize, bytes: &[u8]) {
        let found = self.pipes.iter().find_map(|pipe| {
            let (one, other) = (pipe.ends[0], pipe.ends[1]);
            if (one.0, other.0) == (node, peer) {
                Some(one.1)
            } else {
                ((other.0, one.0) == (node, peer)).then_some(other.1)
            }
        });
        let moment = self.moment();
        self.nodes[node].speaker.receive(found.expect("a connection"), bytes, moment);
    }

    /// Whether a line of a node's log has this text.
    pub fn has_logged(&self, node: usize, text: &str) -> bool {
        self.nodes[node].log.iter().any(|line| line.contains(text))
    }
}

pub fn id(node: usize) -> PeerId {
    PeerId(u32::try_from(node).expect("few nodes"))
}

/// Two nodes of these autonomous systems that are each other's peers.
pub fn pair(seed: u64, asns: [u32; 2], change: impl Fn(&mut PeerConfig)) -> Net {
    let mut net = Net::new(seed);
    for asn in asns {
        net.add(asn, |_| {});
    }
    for (node, peer) in [(0, 1), (1, 0)] {
        let mut config = net.config(peer, asns[peer]);
        change(&mut config);
        net.peer(node, peer, config);
    }
    net
}
