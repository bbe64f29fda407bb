//! What is tried, and what a failure is likely to come from. Pure.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

/// Port of the servers, of HTTP and UDP.
pub const HTTP: u16 = 8080;
/// Port of the servers for UDP.
pub const UDP: u16 = 8081;
/// Bytes of a message that takes several packets of full size, below the limit of a line of HTTP.
const LARGE: usize = 4000;

/// A node that takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of the node.
    pub node: String,
    /// Address of the node.
    pub address: Option<IpAddr>,
    /// Addresses of the server on it.
    pub servers: Vec<IpAddr>,
}

/// What a client talks to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "kind", rename_all = "camelCase")]
pub enum Target {
    /// The server on a node.
    Pod {
        /// The node.
        node: String,
    },
    /// The same, with packets of full size.
    LargePackets {
        /// The node.
        node: String,
    },
    /// The Service by its address.
    Service,
    /// The Service by its name.
    Dns,
    /// The Service at the address of a node.
    NodePort {
        /// The node.
        node: String,
    },
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { node } => write!(f, "pod on {node}"),
            Self::LargePackets { node } => write!(f, "pod on {node}, packets of full size"),
            Self::Service => write!(f, "Service"),
            Self::Dns => write!(f, "Service by name"),
            Self::NodePort { node } => write!(f, "node port of {node}"),
        }
    }
}

/// Policies that are there while something is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// None.
    Open,
    /// One that lets a single client in.
    Policy,
    /// None any more.
    OpenAgain,
}

impl Phase {
    /// The phase for people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Open => "without a policy",
            Self::Policy => "with a policy",
            Self::OpenAgain => "after the policy",
        }
    }
}

/// One thing to try.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// Policies that are there.
    pub phase: Phase,
    /// Node of the client.
    pub from: String,
    /// Whether the client is the one that the policy lets in.
    pub is_guest: bool,
    /// What it talks to.
    pub target: Target,
    /// `http` or `udp`.
    pub protocol: &'static str,
    /// Address or name.
    pub host: String,
    /// Port.
    pub port: u16,
    /// What it asks.
    #[serde(skip)]
    pub request: String,
    /// Whether it must get an answer.
    pub is_allowed: bool,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// What was tried.
    #[serde(flatten)]
    pub check: Check,
    /// Whether it is as it must be.
    pub holds: bool,
    /// What was seen, if it is not.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub seen: String,
    /// What that is likely to come from.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cause: String,
}

/// How the Service is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceFacts {
    /// Its address.
    pub address: Option<IpAddr>,
    /// Its name in DNS, where there is DNS.
    pub name: Option<String>,
    /// Its port on every node.
    pub node_port: Option<u16>,
}

/// Everything that is tried without policies.
pub fn open(places: &[Place], service: &ServiceFacts) -> Vec<Check> {
    let mut checks = between_pods(Phase::Open, places, true);
    for from in places {
        let check = |target: Target, host: String, port: u16| Check {
            phase: Phase::Open,
            from: from.node.clone(),
            is_guest: false,
            target,
            protocol: "http",
            host,
            port,
            request: "hostname".to_owned(),
            is_allowed: true,
        };
        for to in places {
            checks.extend(to.servers.iter().map(|server| Check {
                request: format!("echo?msg={}", "x".repeat(LARGE)),
                ..check(
                    Target::LargePackets {
                        node: to.node.clone(),
                    },
                    server.to_string(),
                    HTTP,
                )
            }));
            if let (Some(address), Some(port)) = (to.address, service.node_port) {
                let target = Target::NodePort {
                    node: to.node.clone(),
                };
                checks.push(check(target, address.to_string(), port));
            }
        }
        let by_address = service
            .address
            .map(|address| (Target::Service, address.to_string()));
        let by_name = service.name.clone().map(|name| (Target::Dns, name));
        let both = by_address.into_iter().chain(by_name);
        checks.extend(both.map(|(target, host)| check(target, host, HTTP)));
    }
    checks
}

/// What is tried while the policy is there: the guest gets answers to HTTP, nobody else any.
pub fn closed(places: &[Place]) -> Vec<Check> {
    let mut checks = between_pods(Phase::Policy, places, false);
    let Some(first) = places.first() else {
        return checks;
    };
    for to in places {
        let target = Target::Pod {
            node: to.node.clone(),
        };
        checks.extend(to.servers.iter().map(|server| Check {
            is_guest: true,
            ..pod_check(
                Phase::Policy,
                &first.node,
                target.clone(),
                "http",
                *server,
                true,
            )
        }));
    }
    checks
}

/// What is tried when the policy is gone.
pub fn reopened(places: &[Place]) -> Vec<Check> {
    between_pods(Phase::OpenAgain, places, true)
}

fn between_pods(phase: Phase, places: &[Place], is_allowed: bool) -> Vec<Check> {
    let mut checks = Vec::new();
    for from in places {
        for to in places {
            for (protocol, server) in to
                .servers
                .iter()
                .flat_map(|one| [("http", one), ("udp", one)])
            {
                let target = Target::Pod {
                    node: to.node.clone(),
                };
                checks.push(pod_check(
                    phase, &from.node, target, protocol, *server, is_allowed,
                ));
            }
        }
    }
    checks
}

fn pod_check(
    phase: Phase,
    from: &str,
    target: Target,
    protocol: &'static str,
    server: IpAddr,
    is_allowed: bool,
) -> Check {
    Check {
        phase,
        from: from.to_owned(),
        is_guest: false,
        target,
        protocol,
        host: server.to_string(),
        port: if protocol == "udp" { UDP } else { HTTP },
        request: "hostname".to_owned(),
        is_allowed,
    }
}

/// Adds to each failure what it is likely to come from, given all others.
pub fn explain(outcomes: &mut [Outcome]) {
    let failed: BTreeSet<Check> = outcomes
        .iter()
        .filter(|outcome| !outcome.holds)
        .map(|outcome| outcome.check.clone())
        .collect();
    for outcome in outcomes.iter_mut().filter(|outcome| !outcome.holds) {
        outcome.cause = cause(&outcome.check, &failed);
    }
}

fn cause(check: &Check, failed: &BTreeSet<Check>) -> String {
    let from = &check.from;
    let pods_fail = |from: &str, to: &str| {
        failed.iter().any(|other| {
            other.phase == Phase::Open
                && other.from == from
                && matches!(&other.target, Target::Pod { node } if node == to)
        })
    };
    let any_pod_fails = failed.iter().any(|other| {
        other.phase == Phase::Open
            && other.from == *from
            && matches!(other.target, Target::Pod { .. })
    });
    match (&check.target, check.phase) {
        (Target::Pod { node }, Phase::Policy) if !check.is_allowed => format!(
            "the agent of {node} does not enforce the policy: `kubectl margay node status {node}`"
        ),
        (Target::Pod { node }, Phase::Policy | Phase::OpenAgain) if !pods_fail(from, node) => {
            format!(
                "it was answered before the policy came; the agent of {node} is behind, or another \
                 policy selects the pods: `kubectl margay node status {node}`"
            )
        }
        (Target::Pod { node }, _) if node == from => format!(
            "no tunnel is between them: a policy of the cluster, or the agent of {node}: \
             `kubectl margay node status {node}`, `kubectl margay explain`"
        ),
        (Target::Pod { node }, _) if pods_fail(from, from) || pods_fail(node, node) => {
            "pods of one node fail too: begin there".to_owned()
        }
        (Target::Pod { node }, _) => format!(
            "packets between {from} and {node} are lost: a firewall for UDP 4789 (VXLAN), or \
             without a tunnel the routes of the network between them"
        ),
        (Target::LargePackets { node }, _) if pods_fail(from, node) => {
            "small packets are lost too".to_owned()
        }
        (Target::LargePackets { node }, _) => format!(
            "small packets pass, so the network between {from} and {node} carries less than the \
             MTU of pods: set spec.calicoNetwork.mtu of the Installation"
        ),
        (Target::Service | Target::Dns | Target::NodePort { .. }, _) if any_pod_fails => {
            "pods fail too: begin there".to_owned()
        }
        (Target::Service, _) => format!("pods are reached: kube-proxy on {from}"),
        (Target::Dns, _) => {
            "the cluster's DNS: its pods, and policies that select them or keep clients from port \
             53"
            .to_owned()
        }
        (Target::NodePort { node }, _) => format!(
            "pods are reached: kube-proxy on {node}, a firewall, or a policy of a host endpoint"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Vec<Place> {
        let place = |number: u8| Place {
            node: format!("n{number}"),
            address: Some(IpAddr::from([192, 0, 2, number])),
            servers: vec![IpAddr::from([10, 0, 0, number])],
        };
        vec![place(1), place(2)]
    }

    fn service() -> ServiceFacts {
        ServiceFacts {
            address: Some(IpAddr::from([10, 96, 0, 1])),
            name: Some("server.ns.svc".to_owned()),
            node_port: Some(30_000),
        }
    }

    #[test]
    fn everything_is_tried_from_every_node() {
        let checks = open(&places(), &service());
        // From each of two nodes: 2 pods by HTTP and UDP, 2 with large packets, 2 node ports, the
        // Service by address and by name.
        assert_eq!(checks.len(), 2 * (4 + 2 + 2 + 2));
        assert!(checks.iter().all(|check| check.is_allowed));
        let nothing = open(&places(), &ServiceFacts::default());
        assert_eq!(nothing.len(), 2 * (4 + 2), "without Services");
    }

    #[test]
    fn the_policy_lets_one_client_in() {
        let checks = closed(&places());
        let (guests, others): (Vec<_>, Vec<_>) = checks.iter().partition(|check| check.is_guest);
        assert_eq!((guests.len(), others.len()), (2, 8));
        assert!(
            guests
                .iter()
                .all(|check| check.is_allowed && check.from == "n1")
        );
        assert!(others.iter().all(|check| !check.is_allowed));
    }

    fn fail(checks: Vec<Check>, is_failed: impl Fn(&Check) -> bool) -> Vec<Outcome> {
        let outcome = |check: Check| Outcome {
            holds: !is_failed(&check),
            check,
            seen: String::new(),
            cause: String::new(),
        };
        let mut outcomes: Vec<Outcome> = checks.into_iter().map(outcome).collect();
        explain(&mut outcomes);
        outcomes.retain(|outcome| !outcome.holds);
        outcomes
    }

    #[test]
    fn causes_depend_on_what_else_fails() {
        let to = |check: &Check, wanted: &str| {
            let node = wanted.to_owned();
            check.target == Target::Pod { node }
        };
        let table: [(&str, Vec<Outcome>); 5] = [
            (
                "UDP 4789",
                fail(open(&places(), &service()), |check| {
                    check.from == "n1" && to(check, "n2")
                }),
            ),
            (
                "no tunnel is between them",
                fail(open(&places(), &service()), |check| {
                    check.from == "n1" && to(check, "n1")
                }),
            ),
            (
                "spec.calicoNetwork.mtu",
                fail(open(&places(), &service()), |check| {
                    matches!(check.target, Target::LargePackets { .. })
                }),
            ),
            (
                "kube-proxy on n1",
                fail(open(&places(), &service()), |check| {
                    check.from == "n1" && check.target == Target::Service
                }),
            ),
            (
                "does not enforce the policy",
                fail(closed(&places()), |check| !check.is_guest),
            ),
        ];
        for (wanted, outcomes) in table {
            assert!(!outcomes.is_empty(), "{wanted}");
            for outcome in outcomes {
                assert!(outcome.cause.contains(wanted), "{wanted}: {outcome:?}");
            }
        }
        let both = fail(open(&places(), &service()), |check| {
            to(check, "n2") || check.target == Target::Service
        });
        let of_service = both
            .iter()
            .find(|outcome| outcome.check.target == Target::Service);
        assert!(of_service.expect("a failure").cause.contains("begin there"));
    }
}
