//! Host endpoints with real packets: to a node, from it and through it, from and to the outside,
//! other nodes and pods.
//!
//! `n1` serves some ports itself and has pod `x/a`, `n3` has `x/c`. What is outside the cluster is
//! the router between the nodes.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use margay_tests::lab::{Lab, Options, PATIENCE, check_enforced, wait};
use margay_tests::namespace::Namespace;
use margay_tests::probe::serve::Ports;
use margay_tests::probe::{Place, Protocol, Target, Verdict, ask};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

const WEB: u16 = 80;
const OTHER: u16 = 8080;
/// Failsafe inbound by default.
const SSH: u16 = 22;
/// Failsafe in both directions by default.
const API: u16 = 6443;
const PORTS: [u16; 4] = [WEB, OTHER, SSH, API];
const NODE: &str = "172.30.0.1";

struct Stage {
    lab: Lab,
    /// Serves the ports.
    _runtime: Runtime,
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Outside,
    Node,
    /// The pod on the node.
    Pod,
    /// The pod on the node beyond the tunnel.
    Far,
}

use End::{Far, Node, Outside, Pod};

#[path = "host/restart.rs"]
mod restart;

impl Stage {
    fn new() -> Result<Self> {
        let mut lab = Lab::new(&Options::default())?;
        lab.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}))?;
        for (node, name) in [("n1", "a"), ("n3", "c")] {
            let metadata = json!({"namespace": "x", "name": name, "labels": {"pod": name}});
            lab.add_pod(
                node,
                &json!({"metadata": metadata, "spec": {"containers": [{"name": "c"}]}}),
            )?;
        }
        lab.wait_enforced()?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let ports = PORTS.map(|port| (Protocol::Tcp, port));
        let pods = lab.pods().map(|pod| &pod.namespace);
        for place in pods.chain([&lab.node("n1")?.host, lab.fabric().namespace()]) {
            let opened = place.run(|| Ports::open(&ports))?;
            runtime.block_on(async { opened.serve() })?;
        }
        // The route from outside to pods, which a cluster would announce.
        for (pod, via) in [("x/a", NODE), ("x/c", "172.30.1.3")] {
            let address = lab.pod(pod)?.addresses[0];
            lab.fabric()
                .namespace()
                .ip(&format!("route add {address} via {via}"))?;
        }
        Ok(Self {
            lab,
            _runtime: runtime,
        })
    }

    fn namespace(&self, end: End) -> Result<&Namespace> {
        Ok(match end {
            Outside => self.lab.fabric().namespace(),
            Node => &self.lab.node("n1")?.host,
            Pod => &self.lab.pod("x/a")?.namespace,
            Far => &self.lab.pod("x/c")?.namespace,
        })
    }

    fn address(&self, end: End) -> Result<IpAddr> {
        Ok(match end {
            Outside => self.lab.fabric().router(),
            Node => NODE.parse()?,
            Pod => self.lab.pod("x/a")?.addresses[0],
            Far => self.lab.pod("x/c")?.addresses[0],
        })
    }

    /// Applies objects, and waits until they are in force as they are written.
    fn apply(&self, objects: &[Value]) -> Result<()> {
        for object in objects {
            let problems = self.lab.apply(object)?;
            ensure!(problems.is_empty(), "{object}: {problems:?}");
        }
        self.lab.wait_enforced()?;
        check_enforced(&self.lab)
    }

    fn delete(&self, objects: &[Value]) -> Result<()> {
        objects
            .iter()
            .try_for_each(|object| self.lab.delete(object))?;
        self.lab.wait_enforced()
    }

    /// Fails unless each connection is established or not, as expected.
    fn expect(&self, what: &str, expected: &[(End, End, u16, bool)]) -> Result<()> {
        for (from, to, port, open) in expected {
            let target = SocketAddr::new(self.address(*to)?, *port);
            self.expect_to(&format!("{what}: {from:?} to {to:?}"), *from, target, *open)?;
        }
        Ok(())
    }

    /// Policy does not change meanwhile, so one success is enough, and a slow machine is given time
    /// to answer.
    fn expect_to(&self, what: &str, from: End, to: SocketAddr, open: bool) -> Result<()> {
        let place = Place::of_namespace(self.namespace(from)?)?;
        let answers = || -> Result<bool> {
            let target = Target::new(Protocol::Tcp, to.ip(), to.port());
            Ok(ask(&place, &[target])? == [Verdict::Answered])
        };
        let since = Instant::now();
        let mut answered = answers()?;
        while open && !answered && since.elapsed() < PATIENCE {
            answered = answers()?;
        }
        if answered != open {
            let rules = self.lab.node("n1")?.ruleset()?;
            bail!(
                "{what}: {to} {}\n{rules}",
                if open { "is closed" } else { "is open" }
            );
        }
        Ok(())
    }

    /// Packets that a counter of another program's table has seen.
    fn counted(&self, counter: &str) -> Result<u64> {
        let listed = self.lab.node("n1")?.host.command(
            "nft",
            &["list", "counter", "inet", "others", counter],
            "",
        )?;
        let (_, rest) = listed
            .split_once("packets ")
            .with_context(|| format!("no number in {listed}"))?;
        Ok(rest.split_whitespace().next().unwrap_or_default().parse()?)
    }

    /// A table of another program on the node.
    fn others(&self, text: &str) -> Result<()> {
        self.lab
            .node("n1")?
            .host
            .command("nft", &["-f", "-"], text)
            .map(drop)
    }
}

fn host(interfaces: &Value, profiles: &[&str]) -> Value {
    let mut object = json!({
        "apiVersion": "projectcalico.org/v3", "kind": "HostEndpoint",
        "metadata": {"name": "n1-host", "labels": {"role": "host"}},
        "spec": {"node": "n1", "profiles": profiles},
    });
    for (field, value) in interfaces.as_object().into_iter().flatten() {
        object["spec"][field] = value.clone();
    }
    object
}

fn eth0() -> Value {
    json!({"interfaceName": "eth0"})
}

const DEFAULT_ALLOW: &[&str] = &["projectcalico-default-allow"];

fn policy(name: &str, selector: &str, spec: &Value) -> Value {
    let mut object = json!({
        "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy", "metadata": {
            "name": name,
        },
        "spec": {"selector": selector},
    });
    for (field, value) in spec.as_object().into_iter().flatten() {
        object["spec"][field] = value.clone();
    }
    object
}

fn rule(action: &str, port: u16) -> Value {
    json!({"action": action, "protocol": "TCP", "destination": {"ports": [port]}})
}

/// Connections under a host endpoint that allows nothing: failsafe ports, the node's pods and
/// forwarded packets pass.
const CLOSED: [(End, End, u16, bool); 14] = [
    (Outside, Node, WEB, false),
    (Outside, Node, OTHER, false),
    (Far, Node, WEB, false),
    (Outside, Node, SSH, true),
    (Outside, Node, API, true),
    (Node, Outside, WEB, false),
    (Node, Outside, SSH, false),
    (Node, Outside, API, true),
    (Node, Pod, WEB, true),
    (Pod, Node, WEB, true),
    (Pod, Outside, WEB, true),
    (Outside, Pod, WEB, true),
    (Pod, Far, WEB, true),
    (Far, Pod, WEB, true),
];

fn all_open() -> Vec<(End, End, u16, bool)> {
    CLOSED
        .iter()
        .map(|(from, to, port, _)| (*from, *to, *port, true))
        .collect()
}

#[test]
fn an_endpoint_closes_the_node_by_name_by_address_and_for_all_interfaces() -> Result<()> {
    let stage = Stage::new()?;
    stage.expect("without endpoints", &all_open())?;
    let allow = policy(
        "web",
        "role == 'host'",
        &json!({
            "types": ["Ingress", "Egress"],
            "ingress": [rule("Allow", WEB)],
            "egress": [rule("Allow", WEB)],
        }),
    );
    for interfaces in [
        eth0(),
        json!({"expectedIPs": [NODE]}),
        json!({"interfaceName": "*"}),
    ] {
        let endpoint = host(&interfaces, &[]);
        stage.apply(std::slice::from_ref(&endpoint))?;
        stage.expect(&format!("{interfaces} without policy"), &CLOSED)?;
        stage.apply(std::slice::from_ref(&allow))?;
        let web = [
            (Outside, Node, WEB, true),
            (Outside, Node, OTHER, false),
            (Far, Node, WEB, true),
            (Node, Outside, WEB, true),
            (Node, Outside, OTHER, false),
            (Outside, Node, SSH, true),
            (Far, Pod, OTHER, true),
            (Node, Far, WEB, true),
        ];
        stage.expect(&format!("{interfaces} with a policy"), &web)?;
        stage.delete(&[endpoint, allow.clone()])?;
    }
    stage.expect("once they are gone", &all_open())?;
    let rules = stage.lab.node("n1")?.ruleset()?;
    ensure!(
        !rules.contains("host-"),
        "nothing of host endpoints stays:\n{rules}"
    );
    Ok(())
}

#[test]
fn under_default_allow_nothing_changes_until_a_policy_for_all_denies() -> Result<()> {
    let stage = Stage::new()?;
    let any = json!({"interfaceName": "*"});
    stage.apply(&[host(&any, DEFAULT_ALLOW)])?;
    stage.expect("default allow", &all_open())?;
    let deny = policy("deny", "all()", &json!({"types": ["Ingress", "Egress"]}));
    stage.apply(std::slice::from_ref(&deny))?;
    let denied = [
        (Outside, Node, WEB, false),
        (Outside, Node, SSH, true),
        (Node, Outside, API, true),
        (Node, Outside, WEB, false),
        (Node, Pod, WEB, true),
        (Outside, Pod, WEB, false),
        (Far, Pod, WEB, false),
    ];
    stage.expect("everything denied", &denied)?;
    stage.delete(&[deny])?;
    for (action, open) in [("Drop", false), ("Return", true), ("Accept", true)] {
        let settings = json!({
            "apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration", "metadata": {
                "name": "default",
            },
            "spec": {"defaultEndpointToHostAction": action},
        });
        stage.apply(&[settings, host(&any, &[])])?;
        stage.expect(
            action,
            &[
                (Pod, Node, WEB, open),
                (Node, Pod, WEB, true),
                (Outside, Node, WEB, false),
            ],
        )?;
    }
    Ok(())
}

#[test]
fn what_is_forwarded_is_evaluated_by_forward_policy_alone() -> Result<()> {
    let stage = Stage::new()?;
    let forward = |spec: Value| policy("forward", "role == 'host'", &spec);
    let ingress = forward(
        json!({"applyOnForward": true, "types": ["Ingress"], "ingress": [rule("Allow", OTHER)]}),
    );
    stage.apply(&[host(&eth0(), DEFAULT_ALLOW), ingress])?;
    let expected = [
        (Outside, Pod, WEB, false),
        (Outside, Pod, SSH, false),
        (Outside, Pod, OTHER, true),
        (Pod, Outside, WEB, true),
        (Outside, Node, WEB, false),
        (Outside, Node, SSH, true),
        (Outside, Node, OTHER, true),
        (Far, Pod, WEB, true),
        (Pod, Far, WEB, true),
        (Node, Outside, WEB, true),
    ];
    stage.expect("ingress", &expected)?;
    let egress = forward(
        json!({"applyOnForward": true, "types": ["Egress"], "egress": [rule("Allow", OTHER)]}),
    );
    stage.apply(&[egress])?;
    let expected = [
        (Outside, Pod, WEB, true),
        (Pod, Outside, WEB, false),
        (Pod, Outside, API, false),
        (Pod, Outside, OTHER, true),
        (Node, Outside, WEB, false),
        (Node, Outside, API, true),
        (Pod, Far, WEB, true),
    ];
    stage.expect("egress", &expected)?;
    stage.apply(&[host(&json!({"interfaceName": "*"}), DEFAULT_ALLOW)])?;
    stage.expect(
        "egress of every interface",
        &[
            (Pod, Far, WEB, false),
            (Pod, Far, OTHER, true),
            (Far, Pod, WEB, true),
        ],
    )
}

#[test]
fn before_translation_a_policy_sees_the_port_that_was_asked_for() -> Result<()> {
    const ASKED: u16 = 8000;
    let stage = Stage::new()?;
    let pod = stage.address(Pod)?;
    stage.others(&format!(
        "table ip others {{ chain services {{ type nat hook prerouting priority dstnat; tcp dport \
         {ASKED} dnat to {pod}:{WEB}; }}; }}"
    ))?;
    let asked = SocketAddr::new(NODE.parse()?, ASKED);
    stage.apply(&[host(&eth0(), DEFAULT_ALLOW)])?;
    stage.expect_to("without policy", Outside, asked, true)?;
    let early = |action| {
        let spec = json!({
            "preDNAT": true,
            "applyOnForward": true,
            "types": ["Ingress"],
            "ingress": [rule(action, ASKED)],
        });
        policy("early", "role == 'host'", &spec)
    };
    stage.apply(&[early("Deny")])?;
    stage.expect_to("denied", Outside, asked, false)?;
    stage.expect(
        "what no rule decides",
        &[(Outside, Pod, WEB, true), (Outside, Node, WEB, true)],
    )?;
    let closed = policy(
        "closed",
        "role == 'host'",
        &json!({"applyOnForward": true, "types": ["Ingress"], "ingress": []}),
    );
    stage.apply(&[early("Allow"), closed])?;
    stage.expect_to("allowed for good", Outside, asked, true)?;
    stage.expect(
        "the rest",
        &[
            (Outside, Pod, WEB, false),
            (Outside, Node, WEB, false),
            (Outside, Node, SSH, true),
        ],
    )?;
    let isolated = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {
            "namespace": "x",
            "name": "isolated",
        },
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    });
    stage.apply(&[isolated])?;
    stage.expect_to("the pod has its own policy", Outside, asked, false)
}

/// The interface of a Service's address is not that of the endpoint that is chosen.
#[test]
fn what_the_node_sends_to_a_service_is_evaluated_where_it_goes() -> Result<()> {
    let stage = Stage::new()?;
    let (outside, pod) = (stage.address(Outside)?, stage.address(Pod)?);
    stage.others(&format!(
        "table ip others {{ chain services {{ type nat hook output priority -100;
            ip daddr 10.96.0.1 tcp dport 1 dnat to {outside}:{OTHER};
            ip daddr 10.96.0.1 tcp dport 2 dnat to {outside}:{WEB};
            ip daddr 10.96.0.1 tcp dport 443 dnat to {outside}:{API};
            ip daddr 10.96.0.1 tcp dport 3 dnat to {pod}:{WEB}; }}; }}"
    ))?;
    let egress = policy(
        "out",
        "role == 'host'",
        &json!({"types": ["Egress"], "egress": [rule("Allow", OTHER)]}),
    );
    for interfaces in [eth0(), json!({"interfaceName": "*"})] {
        stage.apply(&[host(&interfaces, &[]), egress.clone()])?;
        for (port, open) in [(1, true), (2, false), (443, true), (3, true)] {
            let service = SocketAddr::new("10.96.0.1".parse()?, port);
            stage.expect_to(&format!("{interfaces}"), Node, service, open)?;
        }
    }
    Ok(())
}

#[test]
fn what_is_not_tracked_passes_in_both_directions_and_has_no_connection() -> Result<()> {
    let stage = Stage::new()?;
    stage.others(&format!(
        "table inet others {{ counter untracked {{}}; counter tracked {{}};
            chain in {{ type filter hook input priority 10;
                tcp dport {WEB} ct state untracked counter name untracked;
                tcp dport {WEB} ct state != untracked counter name tracked; }}; }}"
    ))?;
    // An untracked packet cannot be translated, nor would a pod's answer be recognised: the server
    // is the node itself.
    let own = json!([format!("{NODE}/32")]);
    let answers =
        json!({"action": "Allow", "protocol": "TCP", "source": {"ports": [WEB], "nets": own}});
    let mut asked = rule("Allow", WEB);
    asked["destination"]["nets"] = own;
    let ways = json!({
        "doNotTrack": true, "applyOnForward": true, "types": ["Ingress", "Egress"],
        "ingress": [asked, rule("Deny", OTHER), rule("Deny", SSH)], "egress": [answers],
    });
    for interfaces in [eth0(), json!({"interfaceName": "*"})] {
        let before = stage.counted("untracked")?;
        let untracked = policy("untracked", "role == 'host'", &ways);
        stage.apply(&[host(&interfaces, &[]), untracked.clone()])?;
        let expected = [
            (Outside, Node, WEB, true),
            (Outside, Node, OTHER, false),
            (Outside, Node, SSH, true),
            (Node, Outside, API, true),
            (Node, Outside, WEB, false),
            (Pod, Outside, WEB, true),
            (Far, Pod, WEB, true),
            (Pod, Node, OTHER, true),
        ];
        stage.expect(&format!("{interfaces}"), &expected)?;
        ensure!(
            stage.counted("untracked")? > before && stage.counted("tracked")? == 0,
            "{interfaces}: it is tracked"
        );
        stage.delete(&[untracked])?;
    }
    Ok(())
}

#[test]
fn an_address_that_comes_and_goes_takes_its_endpoint_with_it() -> Result<()> {
    let stage = Stage::new()?;
    let moving = "172.30.0.101";
    let endpoint = host(&json!({"expectedIPs": [moving]}), &[]);
    stage.lab.apply(&endpoint)?;
    stage.lab.wait_enforced()?;
    let errors = |stage: &Stage| {
        stage
            .lab
            .node("n1")?
            .status()
            .map(|status| status.errors)
            .context("no agent")
    };
    ensure!(errors(&stage)?.len() == 1, "{:?}", errors(&stage)?);
    stage.expect("no interface has it", &[(Outside, Node, WEB, true)])?;
    for (verb, known) in [("add", 0), ("del", 1)] {
        stage
            .namespace(Node)?
            .ip(&format!("addr {verb} {moving}/32 dev eth0"))?;
        wait(&format!("addr {verb} to be seen"), || {
            Ok(errors(&stage)?.len() == known)
        })?;
        stage.expect(
            verb,
            &[
                (Outside, Node, WEB, verb == "del"),
                (Outside, Node, SSH, true),
            ],
        )?;
    }
    Ok(())
}

#[test]
fn ipv6_is_evaluated_too_and_neighbours_are_found() -> Result<()> {
    let stage = Stage::new()?;
    let (node, outside): (IpAddr, IpAddr) = ("fd00:30::1".parse()?, "fd00:30::fe".parse()?);
    for (end, address, link) in [(Node, node, "eth0"), (Outside, outside, "br0")] {
        let namespace = stage.namespace(end)?;
        namespace.command(
            "sysctl",
            &["-qw", &format!("net.ipv6.conf.{link}.disable_ipv6=0")],
            "",
        )?;
        namespace.ip(&format!("addr add {address}/64 dev {link} nodad"))?;
    }
    let deny = json!({
        "doNotTrack": true, "applyOnForward": true, "types": ["Ingress", "Egress"],
        "ingress": [rule("Deny", OTHER)], "egress": [rule("Deny", OTHER)],
    });
    for (objects, open) in [
        (vec![host(&eth0(), &[])], false),
        (
            vec![host(&eth0(), &[]), policy("early", "all()", &deny)],
            false,
        ),
        (vec![host(&eth0(), DEFAULT_ALLOW)], true),
    ] {
        stage.apply(&objects)?;
        stage.namespace(Outside)?.ip("neigh flush dev br0")?;
        for (port, open) in [(WEB, open), (SSH, true), (API, true)] {
            stage.expect_to("in", Outside, SocketAddr::new(node, port), open)?;
        }
        stage.namespace(Node)?.ip("neigh flush dev eth0")?;
        for (port, open) in [(WEB, open), (API, true)] {
            stage.expect_to("out", Node, SocketAddr::new(outside, port), open)?;
        }
    }
    Ok(())
}
