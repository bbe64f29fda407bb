//! Tests in the lab: typha, agents, plugin and IPAM together on three nodes without Kubernetes,
//! with real packets.
//!
//! Drops are detected without waiting: a later packet on a path that is always open has arrived.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, interface_name};
use margay_api::meta::ANNOTATION_POD_ADDRESSES;
use margay_tests::lab::pod::Pod;
use margay_tests::lab::{Lab, Options, PATIENCE, check_enforced, wait};
use serde_json::{Value, json};

/// Port that every policy here lets in.
const ALWAYS: u16 = 9;
const WEB: u16 = 80;

fn mk_pod(name: &str) -> Value {
    let ports = json!([{"name": "web", "containerPort": WEB, "protocol": "UDP"}]);
    json!({
        "metadata": {"namespace": "x", "name": name, "labels": {"pod": name}},
        "spec": {"containers": [{"name": "c", "ports": ports}]},
    })
}

/// Three nodes with pods `x/a`, `x/b`, `x/c` on `n1`, `n2`, `n3`.
fn mk_lab() -> Result<Lab> {
    mk_lab_of(&Options::default())
}

fn mk_lab_of(options: &Options) -> Result<Lab> {
    let mut lab = Lab::new(options)?;
    lab.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}))?;
    for (node, name) in [("n1", "a"), ("n2", "b"), ("n3", "c")] {
        lab.add_pod(node, &mk_pod(name))?;
    }
    lab.wait_enforced()?;
    Ok(lab)
}

/// Lets the pods of that label in to the web port of `x/c`.
fn policy(friend: &str) -> Value {
    let always = json!({"ports": [{"protocol": "UDP", "port": ALWAYS}]});
    let from = json!([{"podSelector": {"matchLabels": {"pod": friend}}}]);
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {
            "namespace": "x",
            "name": "web",
        },
        "spec": {
            "podSelector": {"matchLabels": {"pod": "c"}},
            "policyTypes": ["Ingress"],
            "ingress": [always, {"from": from, "ports": [{"protocol": "UDP", "port": "web"}]}],
        },
    })
}

fn socket(pod: &Pod, port: u16) -> Result<UdpSocket> {
    let socket = pod
        .namespace
        .run(|| UdpSocket::bind((pod.addresses[0], port)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Returns whether datagrams get from one pod to the web port of another.
fn passes(lab: &Lab, from: &str, to: &str) -> Result<bool> {
    let (from, to) = (lab.pod(from)?, lab.pod(to)?);
    let (sender, receiver, always) = (socket(from, 0)?, socket(to, WEB)?, socket(to, ALWAYS)?);
    for port in [WEB, ALWAYS] {
        sender.send_to(b"x", (to.addresses[0], port))?;
    }
    always.recv(&mut [0; 8]).with_context(|| {
        format!(
            "{} to the port of {} that is always open",
            from.name, to.name
        )
    })?;
    receiver.set_nonblocking(true)?;
    Ok(receiver.recv(&mut [0; 8]).is_ok())
}

#[test]
fn new_pods_have_the_mtu_that_the_nodes_link_has_now() -> Result<()> {
    let mut lab = mk_lab()?;
    lab.node("n1")?.host.ip("link set eth0 mtu 1400")?;
    // A pod that is created before the agent knows of it has the former one.
    for number in 0.. {
        let pod = lab.add_pod("n1", &mk_pod(&format!("late{number}")))?;
        let found = pod.namespace.ip("link show eth0")?;
        if found.contains("mtu 1350 ") {
            break;
        }
        ensure!(number < 20, "{found}");
    }
    Ok(())
}

/// Both ends of the links of pods that are there, and those that come up while it happens; a larger
/// MTU is for new pods.
#[test]
fn pods_follow_an_mtu_that_becomes_smaller() -> Result<()> {
    let mut lab = mk_lab()?;
    let mtus = |lab: &Lab| -> Result<Vec<String>> {
        let (pod, node) = (lab.pod("x/a")?, lab.node("n1")?);
        let host = interface_name(&EndpointKey::new("x", "a"));
        let links = [
            pod.namespace.ip("-o link show eth0")?,
            node.host.ip(&format!("-o link show {host}"))?,
        ];
        Ok(links
            .iter()
            .filter_map(|link| {
                link.split_once(" mtu ")?
                    .1
                    .split(' ')
                    .next()
                    .map(str::to_owned)
            })
            .collect())
    };
    let first = mtus(&lab)?;
    for (underlay, expected) in [(1400, "1350"), (1350, "1300"), (1500, "1300")] {
        lab.node("n1")?
            .host
            .ip(&format!("link set eth0 mtu {underlay}"))?;
        wait(&format!("{expected} at both ends, not {first:?}"), || {
            Ok(mtus(&lab)? == [expected, expected])
        })?;
        ensure!(
            passes(&lab, "x/a", "x/c")? && passes(&lab, "x/c", "x/a")?,
            "no packets with {expected}"
        );
    }
    // While the agent is away too.
    lab.stop_agent("n1")?;
    lab.node("n1")?.host.ip("link set eth0 mtu 1330")?;
    lab.start_agent("n1")?;
    wait("1280 at both ends", || Ok(mtus(&lab)? == ["1280", "1280"]))
}

/// A tunnel that cannot have the configured MTU has the largest that its link allows, and the node
/// reports it.
#[test]
fn an_mtu_that_does_not_fit_is_reported() -> Result<()> {
    let mut lab = mk_lab()?;
    let settings = |mtu: u32| {
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration",
            "metadata": {"name": "default"}, "spec": {"vxlanMTU": mtu},
        })
    };
    let problems = |lab: &Lab| -> Result<Vec<String>> {
        let found = lab
            .node("n1")?
            .problems()
            .into_iter()
            .filter(|problem| problem.code == "mtu");
        Ok(found.map(|problem| problem.message).collect())
    };
    lab.apply(&settings(8950))?;
    wait("the problem", || {
        Ok(problems(&lab)?
            .iter()
            .any(|problem| problem.contains("vxlanMTU")))
    })?;
    ensure!(
        lab.node("n1")?
            .host
            .ip("link show vxlan.calico")?
            .contains("mtu 1450 "),
        "the tunnel's MTU"
    );
    lab.apply(&settings(1400))?;
    wait("no problem", || Ok(problems(&lab)?.is_empty()))?;
    let pod = lab.add_pod("n1", &mk_pod("late"))?;
    let found = pod.namespace.ip("link show eth0")?;
    ensure!(found.contains("mtu 1400 "), "{found}");
    Ok(())
}

#[test]
fn packets_of_three_nodes_obey_objects() -> Result<()> {
    obey_objects(mk_lab()?)
}

#[test]
fn packets_of_nodes_with_ipv6_alone_obey_objects() -> Result<()> {
    let lab = mk_lab_of(&Options::ipv6())?;
    for pod in lab.pods() {
        ensure!(
            pod.addresses.len() == 1 && pod.addresses[0].is_ipv6(),
            "{}: {:?}",
            pod.name,
            pod.addresses
        );
    }
    obey_objects(lab)
}

fn obey_objects(mut lab: Lab) -> Result<()> {
    for (from, to) in [
        ("x/a", "x/b"),
        ("x/b", "x/a"),
        ("x/a", "x/c"),
        ("x/c", "x/a"),
        ("x/b", "x/c"),
    ] {
        ensure!(
            passes(&lab, from, to)?,
            "{from} does not reach {to}, and there is no policy"
        );
    }
    ensure!(
        lab.apply(&policy("a"))?.is_empty(),
        "the policy is as it should be"
    );
    lab.wait_enforced()?;
    check_enforced(&lab)?;
    ensure!(passes(&lab, "x/a", "x/c")?, "the friend is let in");
    ensure!(!passes(&lab, "x/b", "x/c")?, "a stranger is not");
    lab.label_pod("x/b", &json!({"pod": "a"}))?;
    lab.wait_enforced()?;
    ensure!(passes(&lab, "x/b", "x/c")?, "a friend by its new label");
    lab.add_pod("n2", &mk_pod("d"))?;
    ensure!(!passes(&lab, "x/d", "x/c")?, "a new stranger");
    lab.delete(&policy("a"))?;
    lab.wait_enforced()?;
    ensure!(passes(&lab, "x/d", "x/c")?, "without policy");
    Ok(())
}

#[test]
fn what_is_enforced_outlives_the_agent_and_addresses_come_back() -> Result<()> {
    let mut lab = mk_lab()?;
    lab.apply(&policy("a"))?;
    lab.wait_enforced()?;
    lab.stop_agent("n3")?;
    ensure!(
        passes(&lab, "x/a", "x/c")? && !passes(&lab, "x/b", "x/c")?,
        "without an agent"
    );
    lab.apply(&policy("b"))?;
    lab.start_agent("n3")?;
    lab.wait_enforced()?;
    ensure!(
        !passes(&lab, "x/a", "x/c")? && passes(&lab, "x/b", "x/c")?,
        "what changed meanwhile"
    );
    let handles = lab.blocks().handles().len();
    lab.remove_pod("x/c")?;
    ensure!(
        lab.blocks().handles().len() == handles - 1,
        "the address of x/c is not given back"
    );
    Ok(())
}

/// The address is in another node's block; its pod is reachable at it and sends from it.
#[test]
fn a_pod_has_the_address_that_it_names() -> Result<()> {
    let mut lab = mk_lab()?;
    let block = IpNet::new(lab.pod("x/a")?.addresses[0], 26)?;
    let mut pinned = mk_pod("d");
    pinned["metadata"]["annotations"] =
        json!({ANNOTATION_POD_ADDRESSES: json!([block.broadcast()]).to_string()});
    ensure!(
        lab.add_pod("n3", &pinned)?.addresses == [block.broadcast()],
        "x/d has not the address that it names"
    );
    lab.wait_enforced()?;
    for (from, to) in [
        ("x/d", "x/a"),
        ("x/a", "x/d"),
        ("x/b", "x/d"),
        ("x/d", "x/b"),
        ("x/c", "x/d"),
    ] {
        ensure!(passes(&lab, from, to)?, "{from} does not reach {to}");
    }
    let handles = lab.blocks().handles();
    for (address, why) in [
        (block.broadcast().to_string(), "is taken by pod x/d"),
        ("192.0.2.1".to_owned(), "in no IPPool"),
    ] {
        let mut refused = mk_pod("e");
        refused["metadata"]["annotations"] =
            json!({ANNOTATION_POD_ADDRESSES: json!([address]).to_string()});
        let error = format!("{:#}", lab.add_pod("n2", &refused).err().context(why)?);
        ensure!(error.contains(why), "{error}");
    }
    ensure!(
        lab.blocks().handles() == handles,
        "a pod that was refused has left something behind"
    );
    lab.remove_pod("x/d")?;
    lab.add_pod("n1", &pinned)?;
    lab.wait_enforced()?;
    // The link that x/d had on n3 goes a moment after its DEL; until then its address leads there
    // on that node.
    let (begin, former) = (Instant::now(), &lab.node("n3")?.host);
    while former
        .ip(&format!("route get {}", block.broadcast()))?
        .contains("dev cali")
    {
        ensure!(
            begin.elapsed() < Duration::from_secs(30),
            "the former link stays"
        );
        std::thread::yield_now();
    }
    ensure!(
        passes(&lab, "x/c", "x/d")?,
        "at the node that has the block"
    );
    Ok(())
}

/// A policy with an invalid range is reported, and closes the pods that it selects instead of
/// opening them.
#[test]
fn a_refused_object_reports_why_and_opens_nothing() -> Result<()> {
    let lab = mk_lab()?;
    let mut refused = policy("a");
    refused["spec"]["ingress"][1]["from"] = json!([{"ipBlock": {"cidr": "not-a-range"}}]);
    let problems = lab.apply(&refused)?;
    ensure!(
        problems
            .iter()
            .any(|problem| problem.contains("not-a-range")),
        "{problems:?}"
    );
    lab.wait_enforced()?;
    let (to, sender) = (lab.pod("x/c")?, socket(lab.pod("x/a")?, 0)?);
    let receiver = socket(to, WEB)?;
    sender.send_to(b"early", (to.addresses[0], WEB))?;
    ensure!(
        passes(&lab, "x/a", "x/b")?,
        "pods that it does not select stay open"
    );
    lab.delete(&refused)?;
    lab.wait_enforced()?;
    sender.send_to(b"late", (to.addresses[0], WEB))?;
    let mut buffer = [0; 8];
    let length = receiver.recv(&mut buffer)?;
    ensure!(
        &buffer[..length] == b"late",
        "a packet passed a policy that was refused"
    );
    Ok(())
}
