//! Compact notation for objects, and scripts of them, for golden tests.
//!
//! ```text
//! tier default 1000 deny
//! node n1 192.0.2.1/24
//! pool main 10.0.0.0/16 vxlan nat
//! block 10.0.0.0/26 n1 10.0.0.5=n2
//! namespace red team=a
//! account red/robot role=admin
//! pod red/web n1 10.0.0.1,fd00::1 app=web sa:robot port:http:tcp:8080
//! host edge n1 eth0 192.0.2.1 role=edge profile:allow port:http:tcp:80
//! netset red/nets 10.1.0.0/24,10.2.0.0/24 app=web
//! service red/svc 10.0.0.1:tcp:80
//! policy NetworkPolicy red/p default 10 in,out app == 'web'
//!   in allow tcp from app == 'db' to port 80,http
//!   out deny to net 10.0.0.0/8
//! ```
//!
//! Directions of a policy may include forward, prednat or untracked for such packets of host
//! endpoints. The profile of a host endpoint is allow, NAMESPACE, NAMESPACE/ACCOUNT or unknown; a
//! minus stands for no address or no interface. A node may have an IPv6 address after the IPv4 one,
//! and tunnel addresses as `ADDRESS@MAC`. A minus before an object removes it. `flush`,
//! `view NODE`, `digests NODE`, `connect POD POD PROTOCOL PORT`, `pending POD POD PROTOCOL PORT`
//! and `meet HOST STAGE in|out SOURCE DESTINATION PROTOCOL PORT` print. Printed sets of a selector
//! are named by the selector.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::{
    EndpointKey, HostEndpoint, HostInterface, NamedPort, Profile, WorkloadEndpoint, interface_name,
};
use margay_api::meta::{LABEL_ORCHESTRATOR, Labels, NamespacedName};
use margay_api::network::{BlockInfo, Encapsulation, NetworkSet, NodeInfo, Pool, Standing, Vtep};
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, StagedPolicy, Tier, Traffic};
use margay_api::rule::{Action, EntityMatch, Port, PortRange, Protocol, Rule};
use margay_api::selector::Selector;
use margay_calc::digest;
use margay_calc::evaluate::{Direction, HostStage, Packet, Records, connect, evaluate_host};
use margay_calc::graph::Graph;
use margay_calc::text;
use margay_calc::update::{Backend, Update};

/// Runs a script and returns what it printed.
pub fn run(script: &str) -> String {
    let mut run = Run::default();
    let mut lines = script
        .lines()
        .filter(|line| !line.trim().is_empty())
        .peekable();
    while let Some(line) = lines.next() {
        let mut rules = Vec::new();
        while let Some(rule) = lines.next_if(|line| line.starts_with("  ")) {
            rules.push(rule.trim());
        }
        run.line(line.trim(), &rules);
    }
    run.names
        .iter()
        .fold(run.printed, |printed, (id, name)| printed.replace(id, name))
}

fn verdicts(records: &impl Records, from: &str, args: &[&str]) -> String {
    let [to, name, port] = args else {
        panic!("connect POD POD PROTOCOL PORT");
    };
    match connect(
        records,
        &pair(from),
        &pair(to),
        protocol(name),
        port.parse().expect("a port"),
    ) {
        None => String::from("cannot\n"),
        Some(connection) => {
            let answer = if connection.is_allowed() {
                "allowed"
            } else {
                "denied"
            };
            let (egress, ingress) = (
                text::verdict(&connection.egress),
                text::verdict(&connection.ingress),
            );
            format!("egress\n{egress}ingress\n{ingress}{answer}\n")
        }
    }
}

#[derive(Default)]
struct Run {
    graph: Graph,
    printed: String,
    /// Selectors by id.
    names: BTreeMap<String, String>,
}

impl Run {
    fn line(&mut self, line: &str, rules: &[&str]) {
        let (is_there, line) = line
            .strip_prefix("- ")
            .map_or((true, line), |line| (false, line));
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let args: Vec<&str> = rest.split(' ').filter(|arg| !arg.is_empty()).collect();
        let update = match kind {
            "flush" => {
                let flush = self.graph.flush();
                return self.print(line, &text::flush(&flush));
            }
            "view" => {
                let view = self.graph.view(name);
                let records = view
                    .ids()
                    .filter_map(|id| Some(text::record(&id, &*view.record(&id)?)));
                let records: String = records.collect();
                return self.print(line, &records);
            }
            "digests" => {
                let view = self.graph.view(name);
                let digests = view.ids().filter_map(|id| {
                    Some(format!(
                        "{:016x} {:3} {}\n",
                        view.digest(&id)?,
                        digest::bucket(&id),
                        text::id_text(&id)
                    ))
                });
                let digests: String = digests.collect();
                return self.print(line, &digests);
            }
            "problems" => {
                let conflicts = self.graph.conflicts().into_iter();
                let conflicts = conflicts
                    .map(|problem| format!("{}: {}\n", problem.object(), problem.reason()));
                let conflicts: String = conflicts.collect();
                return self.print(line, &conflicts);
            }
            "connect" | "pending" => return self.connect(line, name, &args),
            "meet" => return self.meet(line, name, &args),
            "host" => Update::HostEndpoint(name.to_owned(), is_there.then(|| host(&args))),
            "tier" => Update::Tier(name.to_owned(), is_there.then(|| tier(&args))),
            "node" => Update::Node(name.to_owned(), is_there.then(|| node(&args))),
            "pool" => Update::Pool(name.to_owned(), is_there.then(|| pool(&args))),
            "block" => Update::Block(
                name.parse().expect("a range"),
                is_there.then(|| block(&args)),
            ),
            "namespace" => {
                Update::Namespace(name.to_owned(), is_there.then(|| labels(&args).into()))
            }
            "account" => Update::ServiceAccount(pair(name), is_there.then(|| labels(&args))),
            "pod" => Update::Endpoint(pair(name), is_there.then(|| pod(&pair(name), &args))),
            "netset" => Update::NetworkSet(pair(name), is_there.then(|| network_set(&args))),
            "service" => Update::Service(
                pair(name),
                is_there.then(|| args.iter().map(|arg| backend(arg)).collect()),
            ),
            "policy" => {
                let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                let (namespace, of) = name.split_once('/').expect("namespace/name");
                let kind = PolicyKind::parse(line.split(' ').nth(1).expect("a kind"))
                    .expect("a kind of policy");
                let key = PolicyKey {
                    kind,
                    namespace: namespace.to_owned(),
                    name: of.to_owned(),
                };
                match kind.is_staged() {
                    true => Update::Staged(key, is_there.then(|| self.staged(rest, rules))),
                    false => Update::Policy(key, is_there.then(|| self.policy(rest, rules))),
                }
            }
            other => panic!("unknown object {other:?}"),
        };
        self.graph.apply(update);
    }

    fn print(&mut self, line: &str, text: &str) {
        writeln!(self.printed, "> {line}\n{text}").expect("writing to a string");
    }

    fn connect(&mut self, line: &str, from: &str, args: &[&str]) {
        let text = match line.starts_with("pending") {
            true => verdicts(
                &self.graph.staged_view().expect("something is staged"),
                from,
                args,
            ),
            false => verdicts(&self.graph, from, args),
        };
        self.print(line, &text);
    }

    fn meet(&mut self, line: &str, name: &str, args: &[&str]) {
        let [stage, way, source, destination, name_of_protocol, port] = args else {
            panic!("meet HOST STAGE in|out SOURCE DESTINATION PROTOCOL PORT");
        };
        let stage = match *stage {
            "untracked" => HostStage::Untracked,
            "prednat" => HostStage::PreDnat,
            "normal" => HostStage::Normal,
            "forward" => HostStage::Forward,
            other => panic!("unknown stage {other:?}"),
        };
        let packet = Packet {
            source: source.parse().expect("an address"),
            destination: destination.parse().expect("an address"),
            protocol: protocol(name_of_protocol),
            source_port: 49_152,
            destination_port: port.parse().expect("a port"),
            icmp: (8, 0),
        };
        let direction = if *way == "in" {
            Direction::Ingress
        } else {
            Direction::Egress
        };
        let verdict = evaluate_host(&self.graph, name, stage, direction, &packet);
        self.print(line, &text::verdict(&verdict));
    }

    fn selector(&mut self, text: &str) -> Selector {
        let selector = Selector::parse(text).expect("a selector");
        self.names.insert(selector.id(), format!("{{{text}}}"));
        selector
    }

    /// `delete`, `ignore`, or a policy.
    fn staged(&mut self, text: &str, rules: &[&str]) -> StagedPolicy {
        match text {
            "delete" => StagedPolicy::Delete,
            "ignore" => StagedPolicy::Ignore,
            policy => StagedPolicy::Set(self.policy(policy, rules)),
        }
    }

    /// `TIER ORDER DIRECTIONS SELECTOR`.
    fn policy(&mut self, text: &str, rules: &[&str]) -> Policy {
        let [tier, order, types, selector] = text.splitn(4, ' ').collect::<Vec<_>>()[..] else {
            panic!("policy KIND NAMESPACE/NAME TIER ORDER DIRECTIONS SELECTOR");
        };
        let selector = self.selector(selector);
        let (mut ingress, mut egress) = (Vec::new(), Vec::new());
        for rule in rules {
            match rule.split_once(' ') {
                Some(("in", rule)) => ingress.push(self.rule(rule)),
                Some(("out", rule)) => egress.push(self.rule(rule)),
                _ => panic!("a rule begins with in or out: {rule:?}"),
            }
        }
        Policy {
            tier: tier.to_owned(),
            order: Order(order.parse().ok()),
            selector,
            traffic: match types.rsplit(',').next() {
                Some("forward") => Traffic::Forwarded,
                Some("prednat") => Traffic::PreDnat,
                Some("untracked") => Traffic::Untracked,
                _ => Traffic::Normal,
            },
            applies_ingress: types.contains("in"),
            applies_egress: types.contains("out"),
            ingress,
            egress,
        }
    }

    /// `ACTION [PROTOCOL] [from SIDE] [to SIDE]`.
    fn rule(&mut self, text: &str) -> Rule {
        let (head, to) = text
            .split_once(" to ")
            .map_or((text, None), |(head, to)| (head, Some(to)));
        let (head, from) = head
            .split_once(" from ")
            .map_or((head, None), |(head, from)| (head, Some(from)));
        let (name, proto) = head
            .split_once(' ')
            .map_or((head, None), |(name, proto)| (name, Some(proto)));
        Rule {
            protocol: proto.map(protocol),
            source: from.map(|side| self.side(side)).unwrap_or_default(),
            destination: to.map(|side| self.side(side)).unwrap_or_default(),
            ..Rule::any(action(name))
        }
    }

    /// `[net RANGES] [!net RANGES] [service NAME] [port PORTS] [SELECTOR]`.
    fn side(&mut self, text: &str) -> EntityMatch {
        let mut entity = EntityMatch::default();
        let mut rest = text;
        while let Some((arg, after)) = rest.split_once(' ') {
            let (value, after) = after.split_once(' ').unwrap_or((after, ""));
            let nets = || {
                value
                    .split(',')
                    .map(|net| net.parse().expect("a range"))
                    .collect()
            };
            match arg {
                "net" => entity.nets = nets(),
                "!net" => entity.not_nets = nets(),
                "service" => entity.service = Some(pair(value)),
                "port" => entity.ports = value.split(',').map(port).collect(),
                _ => break,
            }
            rest = after;
        }
        entity.selector = (!rest.is_empty()).then(|| self.selector(rest));
        entity
    }
}

fn pair(name: &str) -> NamespacedName {
    let (namespace, name) = name.split_once('/').expect("namespace/name");
    NamespacedName::new(namespace, name)
}

fn labels(args: &[&str]) -> Labels {
    let pairs = args.iter().filter_map(|arg| arg.split_once('='));
    pairs
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn action(name: &str) -> Action {
    match name {
        "allow" => Action::Allow,
        "deny" => Action::Deny,
        "pass" => Action::Pass,
        "log" => Action::Log,
        other => panic!("unknown action {other:?}"),
    }
}

pub fn protocol(name: &str) -> Protocol {
    match name {
        "tcp" => Protocol::TCP,
        "udp" => Protocol::UDP,
        "sctp" => Protocol::SCTP,
        "icmp" => Protocol::ICMP,
        other => panic!("unknown protocol {other:?}"),
    }
}

fn port(text: &str) -> Port {
    match text.parse() {
        Ok(port) => Port::Range(PortRange::single(port)),
        Err(_) => Port::Named(text.to_owned()),
    }
}

fn tier(args: &[&str]) -> Tier {
    Tier {
        order: Order(args[0].parse().ok()),
        default_action: action(args[1]),
    }
}

/// Creation time of the object.
fn since(args: &[&str]) -> i64 {
    args.iter()
        .find_map(|arg| arg.strip_prefix("since:"))
        .map_or(0, |text| text.parse().expect("a number"))
}

fn node(args: &[&str]) -> NodeInfo {
    let reported = args.contains(&"reported");
    let standing = Standing {
        ipv4_reported: reported,
        ipv6_reported: reported,
        created: since(args),
    };
    let mut info = NodeInfo {
        standing,
        ..NodeInfo::default()
    };
    for arg in args
        .iter()
        .filter(|arg| **arg != "reported" && !arg.starts_with("since:"))
    {
        if let Some(address) = arg.strip_prefix("ipip:") {
            info.ipip = Some(address.parse().expect("an address"));
            continue;
        }
        if let Some((address, mac)) = arg.split_once('@') {
            let mac = mac.parse().expect("a MAC address");
            match address.parse().expect("an address") {
                IpAddr::V4(address) => info.vtep = Some(Vtep { address, mac }),
                IpAddr::V6(address) => info.vtep6 = Some(Vtep { address, mac }),
            }
            continue;
        }
        match arg.parse().expect("an address with its prefix length") {
            IpNet::V4(net) => info.ipv4 = Some(net),
            IpNet::V6(net) => info.ipv6 = Some(net),
        }
    }
    info
}

fn pool(args: &[&str]) -> Pool {
    let encapsulation = match args.get(1) {
        Some(&"vxlan") => Encapsulation::Vxlan,
        Some(&"vxlan-cross-subnet") => Encapsulation::VxlanCrossSubnet,
        _ => Encapsulation::None,
    };
    let cidr = args[0].parse().expect("a range");
    let size = args
        .iter()
        .find_map(|arg| arg.strip_prefix("size:"))
        .map(|text| text.parse().expect("a length"));
    Pool {
        cidr,
        encapsulation,
        nat_outgoing: args.contains(&"nat"),
        block_size: size.unwrap_or(Pool::default_block_size(cidr)),
        is_exported: true,
        created: since(args),
    }
}

fn block(args: &[&str]) -> BlockInfo {
    let borrowed = args.iter().filter_map(|arg| arg.split_once('='));
    let tunnels = args.iter().filter_map(|arg| arg.split_once('@'));
    BlockInfo {
        node: args
            .first()
            .filter(|arg| !arg.contains(['=', ':', '@']))
            .map(|node| (*node).to_owned()),
        borrowed: borrowed
            .map(|(address, node)| (address.parse().expect("an address"), node.to_owned()))
            .collect(),
        tunnels: tunnels
            .map(|(address, node)| (address.parse().expect("an address"), node.to_owned()))
            .collect(),
        created: since(args),
    }
}

fn pod(key: &EndpointKey, args: &[&str]) -> WorkloadEndpoint {
    let mut labels = labels(args);
    labels.insert(LABEL_ORCHESTRATOR.to_owned(), "k8s".to_owned());
    WorkloadEndpoint {
        node: if args[0] == "-" {
            String::new()
        } else {
            args[0].to_owned()
        },
        labels,
        service_account: args
            .iter()
            .find_map(|arg| arg.strip_prefix("sa:"))
            .unwrap_or_default()
            .to_owned(),
        addresses: args[1]
            .split(',')
            .filter_map(|address| address.parse().ok())
            .collect(),
        ports: named_ports(args),
        uid: args
            .iter()
            .find_map(|arg| arg.strip_prefix("uid:"))
            .unwrap_or_default()
            .to_owned(),
        interface: interface_name(key),
    }
}

fn host(args: &[&str]) -> HostEndpoint {
    let profiles = args.iter().filter_map(|arg| arg.strip_prefix("profile:"));
    let profile = |name: &str| match (name, name.contains('/')) {
        ("allow", _) => Profile::Allow,
        ("unknown", _) => Profile::Unknown,
        (account, true) => Profile::ServiceAccount(pair(account)),
        (namespace, false) => Profile::Namespace(namespace.to_owned()),
    };
    HostEndpoint {
        node: args[0].to_owned(),
        labels: labels(args),
        interface: match args[1] {
            "*" => HostInterface::All,
            "-" => HostInterface::ByAddress,
            name => HostInterface::Named(name.to_owned()),
        },
        addresses: args[2]
            .split(',')
            .filter_map(|address| address.parse().ok())
            .collect(),
        ports: named_ports(args),
        profiles: profiles.map(profile).collect(),
    }
}

fn named_ports(args: &[&str]) -> Vec<NamedPort> {
    let ports = args.iter().filter_map(|arg| arg.strip_prefix("port:"));
    let named = |text: &str| {
        let [name, proto, port] = text.split(':').collect::<Vec<_>>()[..] else {
            panic!("port:NAME:PROTOCOL:PORT");
        };
        NamedPort {
            name: name.to_owned(),
            protocol: protocol(proto),
            port: port.parse().expect("a port"),
        }
    };
    ports.map(named).collect()
}

fn network_set(args: &[&str]) -> NetworkSet {
    NetworkSet {
        labels: labels(args),
        nets: args[0]
            .split(',')
            .map(|net| net.parse().expect("a range"))
            .collect(),
    }
}

fn backend(arg: &str) -> Backend {
    let [address, proto, port] = arg.split(':').collect::<Vec<_>>()[..] else {
        panic!("ADDRESS:PROTOCOL:PORT");
    };
    Backend {
        address: address.parse().expect("an address"),
        protocol: protocol(proto),
        port: port.parse().expect("a port"),
        ready_on: None,
    }
}
