//! Tests of the harness: a real cluster comes up, survives what tests do to it, and leaves nothing
//! behind.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use margay_tests::cluster::layout::Topology;
use margay_tests::cluster::process::{marked, wait_for};
use margay_tests::cluster::{Cluster, Options, ProxyMode};
use margay_tests::image::Image;

const LIMIT: Duration = Duration::from_secs(60);

/// A pod that needs no network plugin, on a node that is not ready.
const POD: &str = r#"{
    "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "guest"},
    "spec": {
        "nodeName": "n2", "hostNetwork": true, "terminationGracePeriodSeconds": 0,
        "tolerations": [{"operator": "Exists"}],
        "containers": [{"name": "guest", "image": "margay.test/busybox:1", "command": ["sh", "-c", "hostname; exec sleep 100000"]}]
    }
}"#;

fn mk_options(name: &str, nodes: u8) -> Options {
    let state = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cluster-{name}"));
    Options {
        name: format!("mgy-{name}"),
        nodes,
        topology: Topology::Routed,
        dual_stack: false,
        state,
        images: Vec::new(),
        proxy: ProxyMode::Nftables,
        audit: true,
        suite: false,
    }
}

fn mk_cluster(name: &str, nodes: u8) -> Cluster {
    Cluster::up(&mk_options(name, nodes), &|line| eprintln!("{line}")).unwrap()
}

#[test]
fn a_cluster_lives_and_leaves_nothing_behind() {
    let mut cluster = mk_cluster("life", 3);
    assert_eq!(
        column(&cluster, "{.metadata.name} {.status.addresses[0].address}"),
        ["n1 172.30.0.11", "n2 172.30.0.12", "n3 172.30.1.13"]
    );
    // The heartbeat with the reason comes with the registration.
    let ready = r#"{.status.conditions[?(@.type=="Ready")].status}"#;
    assert_eq!(column(&cluster, ready), ["False", "False", "False"]);

    a_guest_runs(&cluster);
    an_image_is_imported_everywhere(&cluster);
    nodes_are_machines_of_their_own(&cluster);
    a_reboot_keeps_the_disk_and_forgets_the_network(&mut cluster);
    cluster.restart_apiserver().unwrap();
    assert_eq!(column(&cluster, "{.metadata.name}").len(), 3);

    // Another process takes over, as after a crash of the one that began; one part has died
    // meanwhile.
    let folder = cluster.keep().folder().to_owned();
    let cluster = Cluster::attach(&folder).unwrap();
    assert!(
        Cluster::up(&mk_options("life", 3), &|_| ()).is_err(),
        "a second cluster in the same folder"
    );
    let inhabitants = inhabitants(&cluster);
    assert!(inhabitants.len() > 12, "{inhabitants:?}");
    marked(&folder)[0].kill();
    cluster.down().unwrap();
    assert_nothing_left("mgy-life", &folder, &inhabitants);
}

#[test]
fn two_clusters_stand_side_by_side() {
    let (first, second) = (mk_cluster("left", 1), mk_cluster("right", 1));
    first
        .kubectl(&["create", "configmap", "only-here"])
        .unwrap();
    assert!(first.kubectl(&["get", "configmap", "only-here"]).is_ok());
    assert!(second.kubectl(&["get", "configmap", "only-here"]).is_err());
    assert_eq!(
        first.layout().nodes,
        second.layout().nodes,
        "the same addresses, in networks that do not meet"
    );
    let (folder, people) = (first.folder().to_owned(), inhabitants(&first));
    drop(first);
    assert_nothing_left("mgy-left", &folder, &people);
    assert_eq!(
        column(&second, "{.metadata.name}"),
        ["n1"],
        "the other one is not disturbed"
    );
}

fn a_guest_runs(cluster: &Cluster) {
    let file = cluster.folder().join("guest.json");
    std::fs::write(&file, POD).unwrap();
    cluster.kubectl(&["apply", "-f", "guest.json"]).unwrap();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Ready",
            "pod/guest",
            "--timeout=60s",
        ])
        .unwrap();
    assert_eq!(cluster.kubectl(&["logs", "guest"]).unwrap().trim(), "n2");
    assert_eq!(
        cluster
            .kubectl(&["exec", "guest", "--", "cat", "/proc/1/comm"])
            .unwrap()
            .trim(),
        "sleep"
    );
}

fn an_image_is_imported_everywhere(cluster: &Cluster) {
    let archive = cluster.folder().join("probe.tar");
    let entry = "/bin/busybox=usr/bin/probe".parse().unwrap();
    let image = Image {
        name: "margay.test/probe:7".into(),
        entries: vec![entry],
        entrypoint: vec!["probe".into()],
    };
    let digest = image.write(&archive).unwrap();
    cluster.load(&archive).unwrap();
    for node in cluster.nodes().unwrap() {
        let images = node.exec(&["ctr", "-n", "k8s.io", "images", "ls"]).unwrap();
        let line = images
            .lines()
            .find(|line| line.starts_with("margay.test/probe:7"))
            .unwrap();
        assert!(line.contains(&digest), "{line}");
    }
}

fn nodes_are_machines_of_their_own(cluster: &Cluster) {
    let node = cluster.node("n1").unwrap();
    assert_eq!(node.exec(&["hostname"]).unwrap().trim(), "n1");
    node.exec(&["touch", "/usr/mark", "/etc/mark", "/run/mark"])
        .unwrap();
    assert!(
        !Path::new("/usr/mark").exists()
            && !Path::new("/etc/mark").exists()
            && !Path::new("/run/mark").exists()
    );
    assert!(
        cluster
            .node("n2")
            .unwrap()
            .exec(&["ls", "/usr/mark"])
            .is_err()
    );
    let devices = node.exec(&["ls", "/sys/class/net"]).unwrap();
    assert_eq!(
        devices.split_whitespace().collect::<Vec<_>>(),
        ["eth0", "lo"]
    );
    // Across the router, and to the world behind it.
    for address in ["172.30.1.13", "198.51.100.1"] {
        let ping = format!(
            "{address} through {:?}",
            node.exec(&["ip", "route", "get", address])
        );
        assert!(
            node.exec(&["busybox", "ping", "-c1", "-W5", address])
                .is_ok(),
            "{ping}"
        );
    }
}

fn a_reboot_keeps_the_disk_and_forgets_the_network(cluster: &mut Cluster) {
    let before = cluster.node("n2").unwrap();
    before
        .exec(&["ip", "link", "add", "br7", "type", "bridge"])
        .unwrap();
    before
        .exec(&["touch", "/var/lib/kept", "/run/lost"])
        .unwrap();
    cluster.reboot("n2").unwrap();
    let after = cluster.node("n2").unwrap();
    assert_ne!(before.process, after.process);
    let again = || r#"{.status.containerStatuses[0].restartCount}"#;
    let restarted = || {
        let count = cluster.kubectl(&[
            "get",
            "pod",
            "guest",
            "-o",
            &format!("jsonpath={}", again()),
        ]);
        count.is_ok_and(|count| count.trim() == "1")
    };
    wait_for(LIMIT, || "the guest to be started again".into(), restarted).unwrap();
    assert!(
        after.exec(&["ls", "/var/lib/kept"]).is_ok() && after.exec(&["ls", "/run/lost"]).is_err()
    );
    assert!(after.exec(&["ip", "link", "show", "br7"]).is_err());
}

/// One line for each node, from a JSONPath expression on it.
fn column(cluster: &Cluster, path: &str) -> Vec<String> {
    let template = format!("jsonpath={{range .items[*]}}{path}{{\"\\n\"}}{{end}}");
    let text = cluster.kubectl(&["get", "nodes", "-o", &template]).unwrap();
    text.lines().map(|line| line.trim().to_owned()).collect()
}

/// Every process that has the pid namespace of a node, or the marker of the cluster.
fn inhabitants(cluster: &Cluster) -> BTreeSet<(String, String)> {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let nodes: BTreeSet<PathBuf> = cluster
        .nodes()
        .unwrap()
        .iter()
        .filter_map(|node| namespace(&node.process.pid.to_string()))
        .collect();
    let marked: BTreeSet<String> = marked(cluster.folder())
        .iter()
        .map(|process| process.pid.to_string())
        .collect();
    let pids = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    pids.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()))
        .filter(|pid| {
            marked.contains(pid) || namespace(pid).is_some_and(|found| nodes.contains(&found))
        })
        .filter_map(|pid| started(&pid).map(|started| (pid, started)))
        .collect()
}

/// Start time of a process, which distinguishes it from a later one with the same pid.
fn started(pid: &str) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    (fields.next()? != "Z").then(|| fields.nth(18).map(str::to_owned))?
}

fn assert_nothing_left(name: &str, folder: &Path, inhabitants: &BTreeSet<(String, String)>) {
    let alive: Vec<_> = inhabitants
        .iter()
        .filter(|(pid, then)| started(pid).as_ref() == Some(then))
        .collect();
    assert!(alive.is_empty(), "processes: {alive:?}");
    assert_eq!(marked(folder), []);
    let namespaces = std::fs::read_dir("/run/netns").unwrap().flatten();
    let ours: Vec<_> = namespaces
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(name))
        .collect();
    assert!(ours.is_empty(), "namespaces: {ours:?}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours: Vec<_> = mounts
        .lines()
        .filter(|line| line.contains(name) || line.contains(&*folder.to_string_lossy()))
        .collect();
    assert!(ours.is_empty(), "mounts: {ours:?}");
    let groups = groups_named(Path::new("/sys/fs/cgroup"), name);
    assert!(groups.is_empty(), "control groups: {groups:?}");
    let files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    assert_eq!(files, ["logs"]);
}

fn groups_named(folder: &Path, name: &str) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = folders.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders
        .flat_map(|entry| {
            let own = entry
                .file_name()
                .to_string_lossy()
                .starts_with(name)
                .then(|| entry.path());
            own.into_iter()
                .chain(groups_named(&entry.path(), name))
                .collect::<Vec<_>>()
        })
        .collect()
}
