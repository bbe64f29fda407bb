//! Cost of policies per connection: connects to pods that they select, relative to connects to a
//! pod that none selects, alternating from the same client.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};

use super::{Bench, policy};
use crate::demo::flips::{self, Quantiles};
use crate::probe::Place;
use crate::world::Pod;

/// Port of the servers.
const PORT: u16 = 80;
/// Policies, and rules of each.
const POLICIES: usize = 200;
const RULES: usize = 5;
/// Policies of a pod that a handful select.
const FEW: usize = 5;
/// Connects to each server, and how many in a row.
const COUNT: usize = 4000;
const BLOCK: usize = 100;
/// Namespace of the servers under many policies.
const MANY: &str = "rules";
/// Namespace of the servers under few policies.
const SPARSE: &str = "few";

/// 200 policies of 5 rules over none.
pub fn run(bench: &mut Bench) -> Result<()> {
    baseline(bench)?;
    let pods = [
        ("plain", "n1"),
        ("ruled", "n1"),
        ("ported", "n1"),
        ("same", "n1"),
        ("cross", "n2"),
    ];
    let pods = mk_pods(bench, MANY, &pods)?;
    bench.calm()?;
    times(&pods, "same", &["plain", "ruled"])?;
    let bare = times(&pods, "same", &["plain", "ruled"])?;
    bench.sheet.put(
        "connect.control",
        over(&bare, "ruled", "plain"),
        show(&bare),
    )?;
    let worst = |server: &'static str, own_ports: bool| {
        (0..POLICIES).map(move |index| many(server, index, own_ports))
    };
    bench.objects()?.policies(
        MANY,
        worst("ruled", false).chain(worst("ported", true)).collect(),
    )?;
    wait_until_enforced(bench)?;
    let same = times(&pods, "same", &["plain", "ruled", "ported"])?;
    bench
        .sheet
        .put("connect.same", over(&same, "ruled", "plain"), show(&same))?;
    bench
        .sheet
        .put("connect.ports", over(&same, "ported", "plain"), "")?;
    let cross = times(&pods, "cross", &["plain", "ruled"])?;
    bench.sheet.put(
        "connect.cross",
        over(&cross, "ruled", "plain"),
        show(&cross),
    )?;
    bench.objects()?.drop_namespace(MANY)?;
    Ok(())
}

/// A pod that few of 10,000 policies select, over the same pod while there are ten.
pub fn among_many(bench: &mut Bench) -> Result<()> {
    let few = baseline(bench)?;
    policy::fill_node(bench)?;
    policy::background(bench, 10_000)?;
    let pods = find(bench, SPARSE, &["plain", "few", "same"])?;
    wait_until_enforced(bench)?;
    let among = times(&pods, "same", &["plain", "few"])?;
    let among_ratio = over(&among, "few", "plain");
    let detail = format!(
        "over a pod without policy: {few:.3}x before, {among_ratio:.3}x now; {}",
        show(&among)
    );
    bench.sheet.put("connect.10k", among_ratio / few, detail)
}

/// The cost of few policies while there are no others; measured once.
fn baseline(bench: &mut Bench) -> Result<f64> {
    if let Some(few) = bench.few {
        return Ok(few);
    }
    let pods = mk_pods(
        bench,
        SPARSE,
        &[("plain", "n1"), ("few", "n1"), ("same", "n1")],
    )?;
    let wanted = (0..FEW)
        .map(|index| one("few", index, &rule(PORT, index + 1 == FEW, index)))
        .collect();
    bench.objects()?.policies(SPARSE, wanted)?;
    wait_until_enforced(bench)?;
    times(&pods, "same", &["plain", "few"])?;
    let few = over(&times(&pods, "same", &["plain", "few"])?, "few", "plain");
    bench.few = Some(few);
    Ok(few)
}

/// Waits until everything written so far is enforced, by writing one more policy.
fn wait_until_enforced(bench: &mut Bench) -> Result<()> {
    let stage = bench.stage()?;
    flips::measure(&stage.cluster, &stage.world, "x/a", "x/d", 2)?;
    bench.calm()
}

fn mk_pods(
    bench: &mut Bench,
    namespace: &str,
    pods: &[(&str, &str)],
) -> Result<BTreeMap<String, Pod>> {
    let wanted: Vec<(String, String)> = pods
        .iter()
        .map(|(name, node)| ((*name).to_owned(), (*node).to_owned()))
        .collect();
    let objects = bench.objects()?;
    objects.namespace(namespace)?;
    objects.pods(namespace, &wanted, false)?;
    find(
        bench,
        namespace,
        &pods.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
    )
}

fn find(bench: &mut Bench, namespace: &str, names: &[&str]) -> Result<BTreeMap<String, Pod>> {
    let cluster = bench.cluster()?;
    names
        .iter()
        .map(|name| {
            Ok((
                (*name).to_owned(),
                Pod::find(cluster, &format!("{namespace}/{name}"))?,
            ))
        })
        .collect()
}

/// A policy of the server. Only the last rule of the policy whose name sorts last admits the
/// client: the worst place.
fn many(server: &str, index: usize, own_ports: bool) -> Value {
    let rules: Vec<Value> = (0..RULES)
        .map(|number| {
            let admits = index + 1 == POLICIES && number + 1 == RULES;
            let nth = index * RULES + number;
            let port = if own_ports && !admits {
                1000 + nth as u16
            } else {
                PORT
            };
            rule(port, admits, nth)
        })
        .collect();
    one(server, index, &Value::Array(rules))
}

fn rule(port: u16, admits: bool, number: usize) -> Value {
    let label = if admits {
        json!({"pod": "same"})
    } else {
        json!({"nobody": format!("g{number}")})
    };
    let peers = if admits {
        json!([
            {
                "podSelector": {
                    "matchExpressions": [{
                        "key": "pod",
                        "operator": "In",
                        "values": ["same", "cross"],
                    }],
                },
            },
        ])
    } else {
        json!([{"podSelector": {"matchLabels": label}}])
    };
    json!({"from": peers, "ports": [{"protocol": "TCP", "port": port}]})
}

fn one(server: &str, index: usize, rules: &Value) -> Value {
    let rules = if rules.is_array() {
        rules.clone()
    } else {
        json!([rules])
    };
    json!({
        "metadata": {"name": format!("{server}-{index:03}")},
        "spec": {
            "podSelector": {"matchLabels": {"pod": server}},
            "policyTypes": ["Ingress"],
            "ingress": rules,
        },
    })
}

/// Times of connects from one pod to each of these.
fn times(
    pods: &BTreeMap<String, Pod>,
    from: &str,
    to: &[&str],
) -> Result<BTreeMap<String, Quantiles>> {
    let pod = |name: &str| pods.get(name).with_context(|| format!("no pod {name}"));
    let targets: Vec<SocketAddrV4> = to
        .iter()
        .map(|name| Ok(SocketAddrV4::new(pod(name)?.address, PORT)))
        .collect::<Result<_>>()?;
    let times = connects(&pod(from)?.place, &targets)?;
    Ok(to
        .iter()
        .map(|name| (*name).to_owned())
        .zip(times.into_iter().map(Quantiles::new))
        .collect())
}

fn over(times: &BTreeMap<String, Quantiles>, one: &str, other: &str) -> f64 {
    let p50 = |name: &str| {
        times
            .get(name)
            .map_or(f64::NAN, |times| times.at(0.5).as_secs_f64())
    };
    p50(one) / p50(other)
}

fn show(times: &BTreeMap<String, Quantiles>) -> String {
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let each = times.iter().map(|(name, times)| {
        format!(
            "{name} p50 {:.1}, p90 {:.1}, p99 {:.1} us",
            us(times.at(0.5)),
            us(times.at(0.9)),
            us(times.at(0.99))
        )
    });
    each.collect::<Vec<_>>().join("; ")
}

/// Connects to the targets in turn, several times each, one connection at a time.
fn connects(place: &Place, targets: &[SocketAddrV4]) -> Result<Vec<Vec<Duration>>> {
    place.run(|| {
        let mut times = vec![Vec::with_capacity(COUNT); targets.len()];
        for _ in 0..COUNT / BLOCK {
            for (target, times) in targets.iter().zip(&mut times) {
                for _ in 0..BLOCK {
                    times.push(timed(*target).with_context(|| format!("connect to {target}"))?);
                }
            }
        }
        Ok(times)
    })?
}

/// Closing sends a reset: neither end keeps an entry, so that a long run does not use up the ports.
fn timed(target: SocketAddrV4) -> Result<Duration> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    setsockopt(
        &socket,
        sockopt::Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 0,
        },
    )?;
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(1, 0))?;
    let address = SockaddrIn::from(target);
    let begin = Instant::now();
    connect(socket.as_raw_fd(), &address)?;
    Ok(begin.elapsed())
}
