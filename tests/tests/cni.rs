//! The agent's CNI service behind the real plugin, in namespaces: the result of ADD, what DEL,
//! CHECK, STATUS and GC do with it, and that a failed ADD leaves nothing behind.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use data_encoding::HEXLOWER;
use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, interface_name};
use margay_proto::cni::code;
use margay_runtime::telemetry::{self, Format};
use margay_tests::cluster::process::wait_for;
use margay_tests::lab::fabric::Topology;
use margay_tests::lab::node::Node;
use margay_tests::lab::{Lab, Options, PATIENCE};
use margay_tests::namespace::Namespace;
use margay_tests::plugin::{Answer, Call, NETWORK};
use margay_tests::trace::{Collector, Span};
use serde_json::{Value, json};

#[path = "cni/restart.rs"]
mod restart;

const NODE: &str = "n1";
/// Seconds for which an ADD waits for policy that never arrives.
const SOON: u64 = 1;

fn mk_lab(pool: Value) -> Result<Lab> {
    let lab = Lab::new(&Options {
        nodes: 1,
        topology: Topology::Flat,
        pool,
        ..Options::default()
    })?;
    lab.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}))?;
    Ok(lab)
}

fn usual() -> Value {
    json!({"cidr": "10.65.0.0/16", "vxlanMode": "Never"})
}

/// Schedules the pod to the node: typha sends its policy to the agent.
fn schedule(lab: &Lab, name: &str) -> Result<()> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {
            "namespace": "x",
            "name": name,
            "labels": {"pod": name},
        },
        "spec": {"nodeName": NODE, "serviceAccountName": "default", "containers": []},
    });
    lab.apply(&pod).map(drop)
}

fn node(lab: &Lab) -> Result<&Node> {
    lab.node(NODE)
}

/// A sandbox as a runtime makes it, and the calls for it.
struct Sandbox {
    namespace: Namespace,
    call: Call,
}

impl Sandbox {
    fn new(lab: &Lab, pod: &str, container: &str) -> Result<Self> {
        let namespace = Namespace::new()?;
        let call = Call::new(
            &node(lab)?.socket(),
            &format!("x/{pod}"),
            container,
            &namespace.path(),
        )?;
        Ok(Self { namespace, call })
    }

    fn add(&self) -> Result<Value> {
        self.call.exec("ADD")?.success()
    }

    fn add_refused(&self) -> Result<(u64, String)> {
        self.call.exec("ADD")?.refusal()
    }

    fn del(&self) -> Result<()> {
        self.call.exec("DEL")?.success().map(drop)
    }

    /// CHECK after an ADD that gave `result`.
    fn check(&self, result: &Value) -> Result<Answer> {
        let mut call = self.call.clone();
        call.config["prevResult"] = result.clone();
        call.exec("CHECK")
    }
}

fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let nets = result["ips"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip["address"].as_str());
    nets.map(|net| Ok(net.parse::<IpNet>()?.addr())).collect()
}

/// Everything that an ADD leaves on the node and in storage.
#[derive(Debug, PartialEq)]
struct Footprint {
    links: Vec<String>,
    routes: Vec<String>,
    handles: BTreeMap<String, BTreeSet<IpNet>>,
    allocated: BTreeSet<IpAddr>,
    attachments: Vec<String>,
    ruleset: String,
}

/// Links of detached pods are removed some time after the DEL, and files record them until then.
fn footprint(lab: &Lab) -> Result<Footprint> {
    let node = node(lab)?;
    let is_settled = || {
        node.attachments()
            .is_ok_and(|names| !names.iter().any(|name| name.ends_with(".gone")))
    };
    wait_for(
        PATIENCE,
        || "links of detached pods to go".to_owned(),
        is_settled,
    )?;
    let of_pods = |text: String| -> Vec<String> {
        // The kernel decides when a link notices its other end.
        let lines = text.lines().filter(|line| line.contains("cali"));
        lines
            .map(|line| {
                line.replace("NO-CARRIER,", "")
                    .replace("state DOWN", "state UP")
                    .replace("linkdown ", "")
            })
            .collect()
    };
    let allocated = lab
        .blocks()
        .all()
        .iter()
        .flat_map(|block| {
            block
                .allocated()
                .map(|(address, _)| address)
                .collect::<Vec<_>>()
        })
        .collect();
    Ok(Footprint {
        links: of_pods(node.host.ip("-o link")?),
        routes: of_pods(node.host.ip("route show table all")?),
        handles: lab.blocks().handles(),
        allocated,
        attachments: node.attachments()?,
        ruleset: uncounted(&node.ruleset()?),
    })
}

/// A ruleset without what its counters have counted.
fn uncounted(ruleset: &str) -> String {
    let mut words = ruleset.split(' ').peekable();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        kept.push(word);
        if word.trim_end().ends_with("counter") && words.peek() == Some(&"packets") {
            words.by_ref().take(4).for_each(drop);
        }
    }
    kept.join(" ")
}

#[test]
fn add_again_is_the_same_answer_and_del_takes_everything_back() -> Result<()> {
    let lab = mk_lab(usual())?;
    let before = footprint(&lab)?;
    schedule(&lab, "a")?;
    let sandbox = Sandbox::new(&lab, "a", "c1")?;
    let first = sandbox.add()?;
    let after = footprint(&lab)?;
    ensure!(
        addresses(&first)?.len() == 1
            && after
                .allocated
                .is_superset(&addresses(&first)?.into_iter().collect()),
        "{first}"
    );
    ensure!(sandbox.add()? == first, "ADD twice is ADD once");
    ensure!(footprint(&lab)? == after, "and changes nothing");
    sandbox.del()?;
    assert_eq!(footprint(&lab)?, before, "DEL leaves what was there before");
    sandbox.del()?;
    assert_eq!(
        footprint(&lab)?,
        before,
        "DEL of what is gone is a success, and nothing else"
    );
    Ok(())
}

#[test]
fn del_succeeds_on_whatever_is_left() -> Result<()> {
    let lab = mk_lab(usual())?;
    let before = footprint(&lab)?;
    let stranger = Sandbox::new(&lab, "nobody", "never-seen")?;
    stranger.del().context("a container that was never added")?;
    schedule(&lab, "a")?;
    let mut sandbox = Sandbox::new(&lab, "a", "c1")?;
    sandbox.add()?;
    let gone = sandbox.namespace.path();
    sandbox.namespace = Namespace::new()?;
    ensure!(
        std::fs::metadata(&gone).is_err() || gone == sandbox.namespace.path(),
        "the namespace should be gone"
    );
    sandbox.call.netns = String::new();
    sandbox
        .del()
        .context("a namespace that is gone, and no CNI_NETNS")?;
    assert_eq!(footprint(&lab)?, before);
    schedule(&lab, "b")?;
    let sandbox = Sandbox::new(&lab, "b", "c2")?;
    sandbox.add()?;
    let link = interface(&lab, "b")?;
    node(&lab)?.host.ip(&format!("link del {link}"))?;
    sandbox.del().context("a link that somebody has removed")?;
    assert_eq!(footprint(&lab)?, before);
    Ok(())
}

/// Host side interface of a pod that is attached.
fn interface(lab: &Lab, pod: &str) -> Result<String> {
    let name = interface_name(&EndpointKey::new("x", pod));
    ensure!(
        node(lab)?.host.ip("-o link")?.contains(&name),
        "{name} does not exist"
    );
    Ok(name)
}

#[test]
fn add_into_no_namespace_is_refused_and_leaves_nothing() -> Result<()> {
    let lab = mk_lab(usual())?;
    let before = footprint(&lab)?;
    schedule(&lab, "a")?;
    let mut call = Sandbox::new(&lab, "a", "c1")?.call;
    for wrong in ["/var/run/netns/not-there", "/etc/hostname"] {
        call.netns = wrong.to_owned();
        let (code, message) = call.exec("ADD")?.refusal()?;
        ensure!(
            code == u64::from(code::INVALID_ENVIRONMENT) && message.contains(wrong),
            "{code}: {message}"
        );
    }
    assert_eq!(footprint(&lab)?, before);
    Ok(())
}

#[test]
fn check_sees_what_is_missing() -> Result<()> {
    let lab = mk_lab(usual())?;
    schedule(&lab, "a")?;
    let sandbox = Sandbox::new(&lab, "a", "c1")?;
    let nothing = json!({"cniVersion": "1.1.0"});
    let (unknown, message) = sandbox.check(&nothing)?.refusal()?;
    ensure!(
        unknown == u64::from(code::UNKNOWN_CONTAINER),
        "{unknown}: {message}"
    );
    let drifts = [
        "route del default",
        "addr flush dev eth0",
        "link set eth0 down",
    ];
    for drift in drifts {
        let result = sandbox.add()?;
        sandbox
            .check(&result)?
            .success()
            .context("as it was made")?;
        sandbox.namespace.ip(drift)?;
        let (code, message) = sandbox.check(&result)?.refusal().context(drift)?;
        ensure!(
            code == u64::from(code::KERNEL) && message.contains("eth0"),
            "{drift}: {code}: {message}"
        );
        sandbox.del()?;
    }
    let result = sandbox.add()?;
    node(&lab)?
        .host
        .ip(&format!("link del {}", interface(&lab, "a")?))?;
    ensure!(
        sandbox.check(&result)?.refusal()?.0 == u64::from(code::KERNEL),
        "without a link"
    );
    sandbox.add().context("ADD repairs what CHECK has found")?;
    sandbox.check(&result)?.success()?;
    Ok(())
}

/// typha knows no such pod, so its policy cannot be in force and the ADD fails. The address and the
/// link that were made meanwhile are removed.
#[test]
fn an_add_without_policy_fails_and_leaves_nothing() -> Result<()> {
    let lab = mk_lab(usual())?;
    let before = footprint(&lab)?;
    let mut sandbox = Sandbox::new(&lab, "unheard-of", "c1")?;
    sandbox.call.config["policy_setup_timeout_seconds"] = SOON.into();
    let (code, message) = sandbox.call.exec("ADD")?.refusal()?;
    ensure!(
        code == u64::from(code::TRY_AGAIN) && message.contains("x/unheard-of"),
        "{code}: {message}"
    );
    assert_eq!(footprint(&lab)?, before);
    schedule(&lab, "unheard-of")?;
    sandbox.add().context("again, once the pod is known")?;
    Ok(())
}

/// The state of a pod does not apply to the next pod of its name, which may have other labels and
/// policies. A static pod has a mirror in the API server.
#[test]
fn a_pod_made_again_waits_for_its_own_policy() -> Result<()> {
    let lab = mk_lab(usual())?;
    let known = |uid: &str, annotations: Value| {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "x", "name": "a", "uid": uid, "annotations": annotations},
            "spec": {"nodeName": NODE, "containers": []},
        });
        lab.apply(&pod).and_then(|_| lab.wait_enforced())
    };
    let sandbox = |container: &str, uid: &str| -> Result<Sandbox> {
        let mut sandbox = Sandbox::new(&lab, "a", container)?;
        sandbox.call.arguments += &format!(";K8S_POD_UID={uid}");
        sandbox.call.config["policy_setup_timeout_seconds"] = SOON.into();
        Ok(sandbox)
    };
    known("u1", json!({}))?;
    let first = sandbox("c1", "u1")?;
    first.add()?;
    first.del()?;
    let (nothing, second) = (footprint(&lab)?, sandbox("c2", "u2")?);
    let (code, message) = second.add_refused()?;
    ensure!(
        code == u64::from(code::TRY_AGAIN) && message.contains("UID"),
        "{code}: {message}"
    );
    assert_eq!(footprint(&lab)?, nothing);
    known("u2", json!({}))?;
    second.add().context("once the new pod is known")?;
    second.del()?;
    known(
        "of-the-mirror",
        json!({"kubernetes.io/config.mirror": "of-the-file"}),
    )?;
    sandbox("c3", "of-the-file")?
        .add()
        .context("a static pod")?;
    Ok(())
}

/// A runtime creates a new sandbox for a pod whose old one has died, and deletes the old one at any
/// later time.
#[test]
fn a_late_del_of_the_old_sandbox_leaves_the_new_one_alone() -> Result<()> {
    let lab = mk_lab(usual())?;
    let before = footprint(&lab)?;
    schedule(&lab, "a")?;
    let (old, new) = (
        Sandbox::new(&lab, "a", "old")?,
        Sandbox::new(&lab, "a", "new")?,
    );
    old.add()?;
    let result = new.add()?;
    let after = footprint(&lab)?;
    old.del()?;
    assert_eq!(
        footprint(&lab)?,
        after,
        "nothing is left of the old one to delete"
    );
    new.check(&result)?.success()?;
    new.del()?;
    assert_eq!(footprint(&lab)?, before);
    Ok(())
}

#[test]
fn gc_keeps_what_is_listed() -> Result<()> {
    let lab = mk_lab(usual())?;
    let mut made = BTreeMap::new();
    for pod in ["a", "b", "c"] {
        schedule(&lab, pod)?;
        let sandbox = Sandbox::new(&lab, pod, &format!("sandbox-{pod}"))?;
        made.insert(pod, (sandbox.add()?, sandbox));
    }
    let (kept, sandbox) = &made["b"];
    let mut call = sandbox.call.clone();
    call.config["name"] = "another-network".into();
    call.config["cni.dev/valid-attachments"] = json!([]);
    let all = footprint(&lab)?;
    call.exec("GC")?.success()?;
    assert_eq!(
        footprint(&lab)?,
        all,
        "attachments of other networks are not its business"
    );
    call.config["name"] = NETWORK.into();
    call.config["cni.dev/valid-attachments"] =
        json!([{"containerID": "sandbox-b", "ifname": "eth0"}]);
    call.exec("GC")?.success()?;
    let left = footprint(&lab)?;
    ensure!(
        left.links.len() == 1 && left.attachments.len() == 1,
        "{left:?}"
    );
    ensure!(
        addresses(kept)?
            .iter()
            .all(|address| left.allocated.contains(address)),
        "{left:?}"
    );
    sandbox.check(kept)?.success()?;
    Ok(())
}

#[test]
fn adds_at_once_get_addresses_of_their_own() -> Result<()> {
    let lab = mk_lab(usual())?;
    let before = footprint(&lab)?;
    let pods: Vec<String> = (0..16).map(|number| format!("p{number}")).collect();
    for pod in &pods {
        schedule(&lab, pod)?;
    }
    let sandboxes = pods
        .iter()
        .map(|pod| Sandbox::new(&lab, pod, pod))
        .collect::<Result<Vec<_>>>()?;
    let results = at_once(&sandboxes, Sandbox::add)?;
    let given = results
        .iter()
        .map(addresses)
        .collect::<Result<Vec<_>>>()?
        .concat();
    let distinct: BTreeSet<&IpAddr> = given.iter().collect();
    ensure!(
        given.len() == pods.len() && distinct.len() == given.len(),
        "{given:?}"
    );
    for (sandbox, result) in sandboxes.iter().zip(&results) {
        sandbox.check(result)?.success()?;
    }
    at_once(&sandboxes, Sandbox::del)?;
    assert_eq!(footprint(&lab)?, before);
    Ok(())
}

fn at_once<T: Send>(sandboxes: &[Sandbox], work: fn(&Sandbox) -> Result<T>) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let running: Vec<_> = sandboxes
            .iter()
            .map(|sandbox| scope.spawn(move || work(sandbox)))
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    })
}

/// Four addresses, one of them the tunnel's. The pod without one gets one as soon as one is free.
#[test]
fn a_full_pool_is_reported() -> Result<()> {
    let lab = mk_lab(json!({"cidr": "10.65.0.0/30", "blockSize": 30, "vxlanMode": "Never"}))?;
    let mut sandboxes = Vec::new();
    let refusal = loop {
        let pod = format!("p{}", sandboxes.len());
        schedule(&lab, &pod)?;
        let sandbox = Sandbox::new(&lab, &pod, &pod)?;
        let full = footprint(&lab)?;
        match sandbox.call.exec("ADD")? {
            Answer::Success(_) => sandboxes.push(sandbox),
            refusal => {
                assert_eq!(footprint(&lab)?, full, "the refused ADD leaves nothing");
                break (sandbox, refusal.refusal()?);
            }
        }
        ensure!(sandboxes.len() <= 3, "more pods than addresses");
    };
    let (waiting, (code, message)) = refusal;
    ensure!(
        code == u64::from(code::NO_ADDRESS) && message.contains("lab"),
        "{code}: {message}"
    );
    ensure!(
        sandboxes.len() == 3,
        "{} pods got an address",
        sandboxes.len()
    );
    sandboxes.pop().context("a pod")?.del()?;
    waiting.add()?;
    Ok(())
}

/// A runtime that traces passes its context in the plugin's environment: the agent's spans for the
/// call belong to that trace, below the runtime's own span.
#[test]
fn an_add_continues_the_trace_of_its_caller() -> Result<()> {
    let (trace, parent) = ([0x4b; 16], [0x00, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7]);
    let collector = Collector::start(
        Path::new("/proc/self/ns/net"),
        (Ipv4Addr::LOCALHOST, 0).into(),
    )?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    // For the whole process: the calls of other tests are exported too, with traces of their own.
    let settings = telemetry::Settings {
        format: Format::Text,
        service: "margay-node".to_owned(),
        endpoint: Some(format!("http://{}", collector.address())),
        certificate: None,
        timeout: Duration::from_secs(5),
        attributes: Vec::new(),
    };
    let exporting = runtime.block_on(async { telemetry::start(&settings, "off") })?;
    let lab = mk_lab(usual())?;
    let traceparent = format!(
        "00-{}-{}-01",
        HEXLOWER.encode(&trace),
        HEXLOWER.encode(&parent)
    );
    for (pod, traceparent) in [
        ("a", traceparent.as_str()),
        ("b", ""),
        ("c", "00-not-a-parent-01"),
    ] {
        schedule(&lab, pod)?;
        let mut sandbox = Sandbox::new(&lab, pod, pod)?;
        sandbox.call.traceparent = traceparent.to_owned();
        sandbox
            .add()
            .with_context(|| format!("TRACEPARENT={traceparent:?}"))?;
    }
    // The agent's own part ends, and leaves, after the plugin has its answer.
    let call = || {
        collector
            .of(&trace)
            .into_iter()
            .find(|span| span.name == "cni")
    };
    wait_for(
        PATIENCE,
        || format!("the collector has {:?}", collector.of(&trace)),
        || call().is_some(),
    )?;
    runtime.block_on(exporting.shutdown());
    let (call, spans) = (call().context("a call")?, collector.of(&trace));
    ensure!(
        call.parent == parent && call.service == "margay-node",
        "{call:?}"
    );
    let below: BTreeSet<&str> = spans
        .iter()
        .filter(|span| span.parent == call.id)
        .map(|span| span.name.as_str())
        .collect();
    for wanted in [
        "ipam.assign",
        "link.create",
        "link.configure",
        "conntrack.purge",
        "attachment.sync",
        "policy.attach",
    ] {
        ensure!(
            below.contains(wanted),
            "no {wanted} below the call: {spans:?}"
        );
    }
    let calls: Vec<&Span> = spans.iter().filter(|span| span.name == "cni").collect();
    ensure!(
        calls.len() == 1,
        "calls without a parent, or with an invalid one, have traces of their own: {calls:?}"
    );
    Ok(())
}
