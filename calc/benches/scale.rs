//! Time and memory of the graph at scale, beside figures of others for the same work.
//!
//! `cargo bench -p margay-calc --bench scale`. Times are wall time of one thread; memory is the
//! resident size of the process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use margay_api::endpoint::{EndpointKey, NamedPort, WorkloadEndpoint};
use margay_api::meta::{LABEL_ORCHESTRATOR, Labels};
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, Tier, Traffic};
use margay_api::rule::{Action, EntityMatch, Port, PortRange, Protocol, Rule};
use margay_api::selector::Selector;
use margay_calc::graph::Graph;
use margay_calc::update::Update;

fn main() {
    // Names select parts; without names all parts run.
    let named: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let parts: [(&str, fn()); 5] = [
        ("cluster", cluster),
        ("endpoint", endpoint_updates),
        ("namespace", namespace_updates),
        ("selector", selector_additions),
        ("limits", beside_large_policies),
    ];
    for (_, part) in parts
        .iter()
        .filter(|(name, _)| named.is_empty() || named.iter().any(|part| part == name))
    {
        part();
    }
}

/// 25k namespaces, 100k pods on 1000 nodes, 75k policies.
fn cluster() {
    const NAMESPACES: usize = 25_000;
    let before = resident();
    let (started, used) = (Instant::now(), cpu_time());
    let mut graph = Graph::default();
    let mut worked = Duration::ZERO;
    let mut apply = |graph: &mut Graph, update: Update| {
        let started = Instant::now();
        graph.apply(update);
        worked += started.elapsed();
    };
    apply(&mut graph, default_tier());
    for number in 0..NAMESPACES {
        let labels = labels(&[
            ("kubernetes.io/metadata.name", &namespace(number)),
            ("team", &format!("t{}", number % 500)),
        ]);
        apply(
            &mut graph,
            Update::Namespace(namespace(number), Some(labels.into())),
        );
    }
    for number in 0..NAMESPACES {
        for (name, policy) in policies(number) {
            apply(
                &mut graph,
                Update::Policy(policy_key(&namespace(number), name), Some(policy)),
            );
        }
    }
    for number in 0..4 * NAMESPACES {
        let app = ["web", "db", "api", "job"][number % 4];
        apply(&mut graph, pod(&namespace(number / 4), number, app));
    }
    let flushing = Instant::now();
    let flush = graph.flush();
    let (records, flushed) = (flush.records.len(), flushing.elapsed());
    let held = resident();
    drop(flush);
    println!("25k namespaces, 100k pods, 75k policies on 1000 nodes ({records} records)");
    println!("  apply {worked:.2?}, flush {flushed:.2?}   [budget 3 s; Antrea 6 s]");
    println!(
        "  with making the objects {:.2?}, of CPU time {:.2?}",
        started.elapsed(),
        cpu_time() - used
    );
    println!(
        "  memory {} MB with the flush, {} MB without   [budget 400 MB; Antrea 1500 to 1700 MB]",
        (held - before) >> 20,
        resident().saturating_sub(before) >> 20
    );

    changes(&mut graph);
}

/// One change in the whole cluster.
fn changes(graph: &mut Graph) {
    let view = timed(20, |iteration| {
        graph.view(&format!("node{iteration}")).buckets();
    });
    println!("  digests of one node's view: {view:.2?}");
    let change = timed(200, |iteration| {
        graph.apply(pod(
            &namespace(iteration),
            4 * iteration,
            ["db", "web"][iteration % 2],
        ));
        graph.flush();
    });
    println!("  one pod's labels change, flushed: {change:.2?}");
    let policy = timed(200, |iteration| {
        let name = namespace(iteration);
        let policy = Policy {
            ingress: vec![allow(
                selector(&format!(
                    "projectcalico.org/namespace == '{name}' && app == 'job'"
                )),
                99,
            )],
            ..isolate(&name, "app == 'db'")
        };
        graph.apply(Update::Policy(policy_key(&name, "ingress"), Some(policy)));
        graph.flush();
    });
    println!("  one policy's rules change, flushed: {policy:.2?}");
}

/// An endpoint whose labels change, against live selectors.
fn endpoint_updates() {
    println!(
        "endpoint update against 10 / 100 / 1k / 10k selectors   [Felix 12 us / 31 us / 287 us / \
         8.36 ms]"
    );
    type Shape = fn(usize) -> String;
    let shapes: [(&str, Shape); 3] = [
        ("of other namespaces", |number| {
            format!("projectcalico.org/namespace == 'other{number}' && app == 'web'")
        }),
        ("of other values", |number| {
            format!("app == 'app{number}' && tier == 'front'")
        }),
        ("that all look at it, half select it", |number| {
            format!(
                "has(app) && app != 'app{}'",
                if number % 2 == 0 { 1 } else { number }
            )
        }),
    ];
    for (name, shape) in shapes {
        let times = [10, 100, 1_000, 10_000].map(|count| {
            let mut graph = watched(count, shape);
            timed(200, |iteration| {
                graph.apply(pod("here", 1, ["app1", "app2"][iteration % 2]));
                graph.flush();
            })
        });
        println!("  {name}: {times:.2?}");
    }
}

/// A namespace with one pod whose labels change, against selectors of which one uses them.
fn namespace_updates() {
    println!("namespace update against 100 / 10k / 100k selectors   [Felix 8 to 17 us]");
    let times = [100, 10_000, 100_000].map(|count| {
        let mut graph = watched(count, |number| format!("pcns.team == 'team{number}'"));
        graph.apply(pod("here", 1, "web"));
        timed(200, |iteration| {
            graph.apply(Update::Namespace(
                String::from("here"),
                Some(labels(&[("team", ["team1", "x"][iteration % 2])]).into()),
            ));
            graph.flush();
        })
    });
    println!("  {times:.2?}");
}

/// A selector that becomes live.
fn selector_additions() {
    println!(
        "selector added with 100 / 1k / 10k / 100k endpoints   [Felix 19 us / 168 us / 1.81 ms / \
         24 ms]"
    );
    type Shape = fn(usize) -> String;
    let shapes: [(&str, Shape); 3] = [
        ("of one namespace", |number| {
            format!("projectcalico.org/namespace == 'n{number}' && app == 'web'")
        }),
        ("of one value in 64", |number| {
            format!("app == 'app{}' && zone != '{number}'", number % 64)
        }),
        ("that selects all", |number| format!("zone != '{number}'")),
    ];
    for (name, shape) in shapes {
        let times = [100, 1_000, 10_000, 100_000].map(|count| {
            let mut graph = watched(0, shape);
            for number in 0..count {
                graph.apply(pod(
                    &format!("n{}", number / 64),
                    number,
                    &format!("app{}", number % 64),
                ));
            }
            graph.flush();
            timed(8, |iteration| {
                graph.apply(watch(iteration, &[shape(iteration)]))
            })
        });
        println!("  {name}: {times:.2?}");
    }
}

/// A small policy that changes, beside policies of another namespace of the maximal size.
fn beside_large_policies() {
    const LARGE: usize = 16;
    let mut graph = Graph::default();
    graph.apply(default_tier());
    for number in 4..8 {
        graph.apply(pod("small", number, "web"));
        graph.apply(pod("large", 4 + number, "web"));
    }
    graph.flush();
    let change = |graph: &mut Graph| {
        let mut times: Vec<Duration> = (0..2000_u16)
            .map(|iteration| {
                let ingress = vec![allow(
                    selector("projectcalico.org/namespace == 'small' && app == 'job'"),
                    1 + iteration,
                )];
                let policy = Policy {
                    ingress,
                    ..isolate("small", "app == 'web'")
                };
                let started = Instant::now();
                graph.apply(Update::Policy(policy_key("small", "p"), Some(policy)));
                graph.flush();
                started.elapsed()
            })
            .collect();
        times.sort_unstable();
        times[times.len() * 99 / 100]
    };
    let (alone, before, started) = (change(&mut graph), resident(), Instant::now());
    let ports: Arc<[Port]> = (0..300)
        .map(|number| Port::Named(format!("p{number}")))
        .collect();
    for number in 0..LARGE {
        let rule = |peer: usize| Rule {
            destination: EntityMatch {
                ports: ports.clone(),
                ..EntityMatch::default()
            },
            ..allow(
                selector(&format!(
                    "projectcalico.org/namespace == 'large' && app == 'a{}'",
                    200 * number + peer
                )),
                1,
            )
        };
        let policy = Policy {
            ingress: (0..200).map(rule).collect(),
            ..isolate("large", "app == 'web'")
        };
        graph.apply(Update::Policy(
            policy_key("large", &format!("p{number}")),
            Some(policy),
        ));
    }
    graph.flush();
    let (took, grown, beside) = (
        started.elapsed(),
        resident().saturating_sub(before) >> 20,
        change(&mut graph),
    );
    println!(
        "{LARGE} policies of 200 peers x 300 named ports: {took:.2?}, {grown} MB   [budget 50 MB]"
    );
    let ratio = beside.as_secs_f64() / alone.as_secs_f64();
    println!(
        "  a small policy's change beside them, p99: {beside:.2?}, {ratio:.2} x without   [budget \
         1.2 x]"
    );
}

/// A graph with one pod whose policy refers to this many selectors.
fn watched(count: usize, shape: fn(usize) -> String) -> Graph {
    let mut graph = Graph::default();
    graph.apply(pod("watch", 999_999, "watcher"));
    let shapes: Vec<String> = (0..count).map(shape).collect();
    graph.apply(watch(usize::MAX, &shapes));
    graph.flush();
    graph
}

fn watch(number: usize, selectors: &[String]) -> Update {
    let policy = Policy {
        ingress: selectors
            .iter()
            .map(|text| allow(selector(text), 80))
            .collect(),
        ..isolate("watch", "app == 'watcher'")
    };
    Update::Policy(policy_key("watch", &format!("watch{number}")), Some(policy))
}

/// Median over iterations.
fn timed(iterations: usize, mut work: impl FnMut(usize)) -> Duration {
    let mut times: Vec<Duration> = (0..iterations)
        .map(|iteration| {
            let started = Instant::now();
            work(iteration);
            started.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[iterations / 2]
}

/// CPU time of this process, which does not depend on the load of the machine.
fn cpu_time() -> Duration {
    let status = std::fs::read_to_string("/proc/self/stat").expect("the kernel reports CPU time");
    // Fields after the name in parentheses: user and system time are the 12th and 13th, in
    // hundredths of a second (proc(5)).
    let fields = status
        .rsplit(") ")
        .next()
        .unwrap_or_default()
        .split(' ')
        .skip(11)
        .take(2);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(10 * ticks)
}

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").expect("the kernel reports memory");
    let pages = status
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<usize>().ok());
    pages.expect("the second field is the resident size in pages") * 4096
}

fn default_tier() -> Update {
    let tier = Tier {
        order: Order(Some(1_000_000.0)),
        default_action: Action::Deny,
    };
    Update::Tier(String::from("default"), Some(tier))
}

fn namespace(number: usize) -> String {
    format!("namespace-{number}")
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn selector(text: &str) -> Selector {
    Selector::parse(text).expect("the bench writes valid selectors")
}

fn policy_key(namespace: &str, name: &str) -> PolicyKey {
    PolicyKey {
        kind: PolicyKind::KubernetesNetworkPolicy,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}

fn pod(namespace: &str, number: usize, app: &str) -> Update {
    let name = format!("{app}-5d9c7b{:x}-{:x}", number % 4096, number);
    let key = EndpointKey::new(namespace, if number >= 4 { &name } else { "pod" });
    let [_, a, b, c] = (number as u32).to_be_bytes();
    Update::Endpoint(
        key,
        Some(WorkloadEndpoint {
            node: format!("node{}", number % 1000),
            labels: labels(&[
                ("app", app),
                ("pod-template-hash", &format!("5d9c7b{:x}", number % 4096)),
                ("tier", "front"),
                (LABEL_ORCHESTRATOR, "k8s"),
            ]),
            service_account: String::from("default"),
            addresses: vec![std::net::IpAddr::from([10, a, b, c])],
            ports: vec![NamedPort {
                name: String::from("http"),
                protocol: Protocol::TCP,
                port: 8080,
            }],
            uid: String::new(),
            interface: format!("cali{number:011x}"),
        }),
    )
}

fn isolate(namespace: &str, pods: &str) -> Policy {
    Policy {
        tier: String::from("default"),
        order: Order(Some(1000.0)),
        selector: selector(&format!(
            "projectcalico.org/namespace == '{namespace}' && projectcalico.org/orchestrator == \
             'k8s' && {pods}"
        )),
        traffic: Traffic::Normal,
        applies_ingress: true,
        applies_egress: false,
        ingress: Vec::new(),
        egress: Vec::new(),
    }
}

fn allow(from: Selector, port: u16) -> Rule {
    let ports = [Port::Range(PortRange::single(port))].into();
    Rule {
        protocol: Some(Protocol::TCP),
        source: EntityMatch {
            selector: Some(from),
            ..EntityMatch::default()
        },
        destination: EntityMatch {
            ports,
            ..EntityMatch::default()
        },
        ..Rule::any(Action::Allow)
    }
}

/// Three policies of a namespace: isolate all pods; allow its own pods; allow another namespace and
/// a team.
fn policies(number: usize) -> [(&'static str, Policy); 3] {
    let name = namespace(number);
    let own = selector(&format!(
        "projectcalico.org/namespace == '{name}' && projectcalico.org/orchestrator == 'k8s' && app \
         == 'web'"
    ));
    let other = selector(&format!(
        "pcns.kubernetes.io/metadata.name == '{}' && projectcalico.org/orchestrator == 'k8s'",
        namespace(number / 2)
    ));
    let team = selector(&format!(
        "pcns.team == 't{}' && projectcalico.org/orchestrator == 'k8s' && app == 'api'",
        number % 500
    ));
    [
        ("isolate", isolate(&name, "has(app)")),
        (
            "ingress",
            Policy {
                ingress: vec![allow(own, 5432)],
                ..isolate(&name, "app == 'db'")
            },
        ),
        (
            "others",
            Policy {
                ingress: vec![allow(other, 80), allow(team, 443)],
                ..isolate(&name, "app == 'web'")
            },
        ),
    ]
}
