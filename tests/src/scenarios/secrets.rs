//! No secret shows: not in logs at their most verbose, not in traces, metrics, debug services,
//! files, events or other objects, even while keys are lost, damaged and recreated.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use margay_proto::debug::debug_client::DebugClient;
use margay_proto::debug::node_debug_client::NodeDebugClient;
use margay_proto::debug::{
    ExplainRequest, KernelRequest, ListNodesRequest, ListRecordsRequest, Party, StatusRequest,
    ViewRequest, party,
};
use margay_runtime::tls::{Connector, Files, Tls};
use serde_json::Value;
use tempfile::TempDir;
use tonic::Request;

use super::Environment;
use super::policy::all_open;
use crate::canary::{Canaries, Search};
use crate::cluster::Cluster;
use crate::cluster::node::Node;
use crate::cluster::process::{self, wait_for};
use crate::demo::flips;
use crate::install::{self, NAMESPACES};
use crate::suite::Suite;
use crate::trace::Collector;
use crate::world;

/// Time limit for the programs to restart, one after the other, while they log everything.
const PATIENCE: Duration = Duration::from_secs(240);
/// How long a new authority may take to be known everywhere: kubelets bring it to the pods within a
/// minute or so.
const NEW_AUTHORITY: Duration = Duration::from_secs(120);
/// Port of the trace collector, in the control plane's network.
const COLLECTOR_PORT: u16 = 4317;
/// Header that a collector might require.
const HEADER: &str = "canary-4f1b8c7e90d2a653";
/// Each program and where its admin port is.
const PROGRAMS: [(&str, u16); 3] = [
    ("operator", 9097),
    ("typha", install::TYPHA_ADMIN),
    ("node", 9099),
];
/// Folders of a node that our programs write into; keys have a folder of their own there.
const FOLDERS: [&str; 2] = ["var/lib/margay", "etc/cni/net.d"];
/// Path of a program's API token, below its own root.
const TOKEN: &str = "var/run/secrets/kubernetes.io/serviceaccount/token";
/// Name of folders with keys.
const KEYS: &str = "tls";

/// Runs it. All programs log everything from then on, so it is the last.
pub fn run(suite: &mut Suite, environment: &Environment) {
    suite.case("a_new_authority_is_noticed_at_once", || {
        lose_authority(&environment.stage.cluster)
    });
    suite.case("no_secret_shows", || nothing_shows(environment));
}

fn nothing_shows(environment: &Environment) -> Result<()> {
    let cluster = &environment.stage.cluster;
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, COLLECTOR_PORT));
    let collector = Collector::start(&cluster.layout().netns_path("cp"), address)?;
    collector.record();
    let mut canaries = Canaries::default();
    canaries.add("what the collector of traces demands", HEADER.as_bytes())?;
    gather(cluster, &mut canaries)?;
    speak_up(cluster)?;
    gather(cluster, &mut canaries)?;
    lose_keys(cluster)?;
    gather(cluster, &mut canaries)?;
    act(environment, &collector)?;

    let search = canaries.search()?;
    let secrets = cluster.kubectl(&["get", "secrets", "-n", NAMESPACES[1], "-o", "json"])?;
    ensure!(
        search.find(secrets.as_bytes()).is_some(),
        "the search does not find keys where they are"
    );
    let look = |place: &str, text: &[u8]| -> Result<()> {
        ensure!(!text.is_empty(), "{place}: there is nothing");
        let found = search.find(text);
        ensure!(
            found.is_none(),
            "{place}: {} shows at byte {}",
            found.unwrap_or_default().0,
            found.unwrap_or_default().1
        );
        Ok(())
    };
    look("traces", &collector.recorded())?;
    for node in cluster.nodes()? {
        logs(&node, &look)?;
        processes(&node, &look)?;
        for folder in FOLDERS {
            files(&node.folder.join("root").join(folder), &search)?;
        }
    }
    objects(cluster, &look)?;
    for (place, text) in debug_services(cluster)? {
        look(&place, text.as_bytes())?;
    }
    Ok(())
}

// -- secrets, and what makes programs handle them

/// Every key in a Secret or on a node, and the API token of every program that runs.
fn gather(cluster: &Cluster, canaries: &mut Canaries) -> Result<()> {
    for namespace in NAMESPACES {
        let list: Value = serde_json::from_str(
            &cluster.kubectl(&["get", "secrets", "-n", namespace, "-o", "json"])?,
        )?;
        for secret in list["items"].as_array().into_iter().flatten() {
            let name = secret["metadata"]["name"].as_str().unwrap_or_default();
            for (field, value) in secret["data"].as_object().into_iter().flatten() {
                let text = String::from_utf8(STANDARD.decode(value.as_str().unwrap_or_default())?)?;
                if text.contains("PRIVATE KEY") {
                    canaries.add_key(&format!("{field} of Secret {namespace}/{name}"), &text)?;
                }
            }
        }
    }
    for node in cluster.nodes()? {
        let name = &node.host.name;
        canaries.add_key(
            &format!("the key of {name}"),
            &std::fs::read_to_string(key(&node))?,
        )?;
        for (program, _) in PROGRAMS {
            for pid in install::processes(&node, program) {
                let path = Path::new(&format!("/proc/{pid}/root")).join(TOKEN);
                let token = std::fs::read_to_string(&path);
                let token =
                    token.with_context(|| format!("{program} on {name}: {}", path.display()))?;
                canaries.add_token(&format!("the API token of {program} on {name}"), &token)?;
            }
        }
    }
    Ok(())
}

fn key(node: &Node) -> PathBuf {
    node.folder
        .join("root/var/lib/margay")
        .join(KEYS)
        .join("tls.key")
}

/// Makes every program log and report everything, as an administrator would: the operator passes
/// its settings on to the others.
fn speak_up(cluster: &Cluster) -> Result<()> {
    let collector = format!(
        "http://{}:{COLLECTOR_PORT}",
        cluster.layout().control_plane().address
    );
    let endpoint = format!("OTEL_EXPORTER_OTLP_ENDPOINT={collector}");
    let header = format!("OTEL_EXPORTER_OTLP_HEADERS=authorization={HEADER}");
    let names = [
        "MARGAY_LOG=trace",
        "OTEL_BSP_SCHEDULE_DELAY=200",
        &endpoint,
        &header,
    ];
    let deployment = [
        "set",
        "env",
        "-n",
        NAMESPACES[0],
        "deployment/margay-operator",
    ];
    cluster.kubectl(&[&deployment[..], &names[..]].concat())?;
    let nodes = cluster.nodes()?;
    let logs_all = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment
            .split(|byte| *byte == 0)
            .any(|variable| variable == names[0].as_bytes())
    };
    let all = |program: &str, least: usize| {
        let pids: Vec<i32> = nodes
            .iter()
            .flat_map(|node| install::processes(node, program))
            .collect();
        pids.len() >= least && pids.iter().all(logs_all)
    };
    let all_log = || all("operator", 1) && all("typha", 1) && all("node", nodes.len());
    wait_for(
        PATIENCE,
        || "every program to log everything".into(),
        all_log,
    )?;
    install::wait(cluster, &|_| ())
}

/// The key of one node is gone, that of another cut off in the middle; typha's and the readers'
/// Secrets are gone. All of it is recreated.
fn lose_keys(cluster: &Cluster) -> Result<()> {
    let (gone, cut) = (cluster.node("n1")?, cluster.node("n2")?);
    let half = |path: &Path| -> Result<String> {
        let text = std::fs::read_to_string(path)?;
        Ok(text[..text.len() / 2].to_owned())
    };
    std::fs::remove_file(key(&gone))?;
    std::fs::write(key(&cut), half(&key(&cut))?)?;
    for node in [&gone, &cut] {
        install::kill(node, "node")?;
    }
    let is_whole = |node: &Node| {
        std::fs::read_to_string(key(node)).is_ok_and(|key| key.contains("END PRIVATE KEY"))
    };
    wait_for(
        PATIENCE,
        || "new keys of n1 and n2".into(),
        || is_whole(&gone) && is_whole(&cut),
    )?;
    for name in [
        "margay-typha-tls",
        "margay-reader-tls",
        "margay-capture-tls",
    ] {
        cluster.kubectl(&["delete", "secret", "-n", NAMESPACES[1], name])?;
        let is_there = || {
            cluster
                .kubectl(&["get", "secret", "-n", NAMESPACES[1], name])
                .is_ok()
        };
        wait_for(PATIENCE, || format!("a new {name}"), is_there)?;
    }
    install::wait(cluster, &|_| ())
}

/// The authority is lost, with everything that it has signed, as when the operator's namespace
/// goes: every node gets a certificate of the next one without anybody's help, and is in sync again
/// by it.
fn lose_authority(cluster: &Cluster) -> Result<()> {
    let nodes = cluster.nodes()?;
    let certificate =
        |node: &Node| std::fs::read(key(node).with_file_name("tls.crt")).unwrap_or_default();
    let before: Vec<Vec<u8>> = nodes.iter().map(certificate).collect();
    cluster.kubectl(&["delete", "secret", "-n", NAMESPACES[0], "margay-ca"])?;
    // Streams that stand ask for no certificate.
    for node in &nodes {
        if !install::processes(node, "typha").is_empty() {
            install::kill(node, "typha")?;
        }
    }
    let is_renewed = || {
        nodes.iter().zip(&before).all(|(node, before)| {
            let is_in_sync =
                install::metric(node, 9099, "margay_node_in_sync").is_ok_and(|value| value >= 1.0);
            is_in_sync && certificate(node) != *before
        })
    };
    wait_for(
        NEW_AUTHORITY,
        || "certificates of the new authority, and streams by them".into(),
        is_renewed,
    )?;
    install::wait(cluster, &|_| ())
}

/// Pods start and end, policies come and go, and what was done is reported.
fn act(environment: &Environment, collector: &Collector) -> Result<()> {
    let cluster = &environment.stage.cluster;
    all_open(environment)?;
    flips::measure(cluster, &environment.stage.world, "x/a", "x/b", 2)?;
    let file = cluster.folder().join("guest.json");
    std::fs::write(&file, world::server("x/guest", "n1")?.to_string())?;
    cluster.kubectl(&["create", "-f", &file.display().to_string()])?;
    cluster.kubectl(&[
        "wait",
        "-n",
        "x",
        "--for=condition=Ready",
        "pod/guest",
        "--timeout=60s",
    ])?;
    cluster.kubectl(&["delete", "pod", "-n", "x", "guest", "--wait=true"])?;
    let reported = || {
        ["margay-node", "margay-typha"]
            .iter()
            .all(|program| collector.services().contains(*program))
    };
    wait_for(
        PATIENCE,
        || {
            format!(
                "spans of typha and agents; there are those of {:?}",
                collector.services()
            )
        },
        reported,
    )
}

// -- where they could show

/// Logs of our pods, as they lie on the node's disk: whole, also of containers that have ended.
fn logs(node: &Node, look: &dyn Fn(&str, &[u8]) -> Result<()>) -> Result<()> {
    let mut logging = Vec::new();
    let pods = std::fs::read_dir(node.folder.join("root/var/log/pods"))?;
    for pod in pods {
        let pod = pod?.path();
        let name = pod
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if !NAMESPACES
            .iter()
            .any(|namespace| name.starts_with(&format!("{namespace}_")))
        {
            continue;
        }
        for path in tree(&pod)? {
            let text = lines(&path)?;
            if !text.is_empty() {
                look(&path.display().to_string(), &text)?;
            }
            if text.windows(7).any(|window| window == b"\"TRACE\"") {
                logging.push(name.clone());
            }
        }
    }
    for (program, _) in PROGRAMS {
        let runs = !install::processes(node, program).is_empty();
        let is_of = |name: &String| name.contains(&format!("_margay-{program}-"));
        ensure!(
            !runs || logging.iter().any(is_of),
            "{program} on {} logs no details: {logging:?}",
            node.host.name
        );
    }
    Ok(())
}

/// What a container has written; the runtime's own additions are removed, because they split long
/// lines.
fn lines(path: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let mut file = std::fs::File::open(path)?;
    if path.extension().is_some_and(|end| end == "gz") {
        flate2::read::GzDecoder::new(file).read_to_end(&mut text)?;
    } else {
        file.read_to_end(&mut text)?;
    }
    let mut whole = Vec::with_capacity(text.len());
    for line in text.split(|byte| *byte == b'\n') {
        // Time, stream, P where the line goes on or F, and what was written.
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (tag, written) = (
            parts.nth(2).unwrap_or_default(),
            parts.next().unwrap_or_default(),
        );
        whole.extend(written);
        if tag != b"P" {
            whole.push(b'\n');
        }
    }
    Ok(whole)
}

/// What a program's endpoints and its command line reveal.
fn processes(node: &Node, look: &dyn Fn(&str, &[u8]) -> Result<()>) -> Result<()> {
    for (program, port) in PROGRAMS {
        for pid in install::processes(node, program) {
            let place = format!("{program} on {}", node.host.name);
            look(
                &format!("command line of {place}"),
                &std::fs::read(format!("/proc/{pid}/cmdline"))?,
            )?;
            for path in ["metrics", "readyz"] {
                let url = format!("http://127.0.0.1:{port}/{path}");
                let output = node.exec(&["busybox", "wget", "-q", "-O", "-", &url])?;
                look(&format!("{path} of {place}"), output.as_bytes())?;
            }
        }
    }
    Ok(())
}

fn files(folder: &Path, search: &Search) -> Result<()> {
    for path in tree(folder)? {
        let is_key = path
            .parent()
            .and_then(Path::file_name)
            .is_some_and(|name| name == KEYS);
        if path.is_file() && !is_key {
            let found = search
                .find(&std::fs::read(&path)?)
                .map(|(name, _)| name.to_owned());
            ensure!(
                found.is_none(),
                "{} shows {}",
                path.display(),
                found.unwrap_or_default()
            );
        }
    }
    Ok(())
}

/// Every file below a folder; links are not followed.
fn tree(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => found.extend(tree(&entry.path())?),
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    Ok(found)
}

/// Objects that many may read. What the programs are started with is not among them: the
/// collector's header is there, where users put it.
fn objects(cluster: &Cluster, look: &dyn Fn(&str, &[u8]) -> Result<()>) -> Result<()> {
    const KINDS: [&str; 9] = [
        "events",
        "certificatesigningrequests",
        "nodes",
        "tigerastatuses",
        "installations",
        "configmaps",
        "leases",
        "serviceaccounts",
        "hostendpoints.projectcalico.org",
    ];
    for kind in KINDS {
        look(
            kind,
            cluster
                .kubectl(&["get", kind, "-A", "-o", "json"])?
                .as_bytes(),
        )?;
    }
    Ok(())
}

/// Every answer of every debug service, as a reader gets it.
fn debug_services(cluster: &Cluster) -> Result<Vec<(String, String)>> {
    let folder = TempDir::new()?;
    let field = |object: &[&str], path: &str| {
        cluster.kubectl(
            &[
                &["get", "-n", NAMESPACES[1]],
                object,
                &["-o", &format!("jsonpath={{.data.{path}}}")],
            ]
            .concat(),
        )
    };
    for name in ["tls.crt", "tls.key"] {
        let text = field(&["secret", "margay-reader-tls"], &name.replace('.', "\\."))?;
        std::fs::write(folder.path().join(name), STANDARD.decode(text.trim())?)?;
    }
    std::fs::write(
        folder.path().join("ca.crt"),
        field(&["configmap", "margay-ca"], "ca\\.crt")?,
    )?;
    let tls = Tls::load(Files::in_dirs(folder.path(), folder.path()))?;
    let nodes = cluster.nodes()?;
    process::in_netns(&cluster.layout().netns_path("cp"), || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let mut answers = Vec::new();
            for node in &nodes {
                if !install::processes(node, "typha").is_empty() {
                    answers.push((
                        format!("typha's answers on {}", node.host.name),
                        of_typha(&tls, node).await?,
                    ));
                }
                answers.push((
                    format!("the agent's answers on {}", node.host.name),
                    of_agent(&tls, node).await?,
                ));
            }
            Ok(answers)
        })
    })
}

async fn channel(
    tls: &Tls,
    node: &Node,
    port: u16,
    name: &str,
) -> Result<tonic::transport::Channel> {
    let connector = Connector::new(tls.clone(), &format!("{}:{port}", node.host.address), name)?;
    let connected = connector.endpoint().connect_with_connector(connector).await;
    connected.with_context(|| format!("{name} on {}", node.host.name))
}

async fn of_typha(tls: &Tls, node: &Node) -> Result<String> {
    let mut client = DebugClient::new(channel(tls, node, 5473, "margay-typha").await?);
    let pod = |name: &str| {
        Some(Party {
            party: Some(party::Party::Pod(name.to_owned())),
        })
    };
    let question = ExplainRequest {
        from: pod("x/a"),
        to: pod("x/b"),
        ..ExplainRequest::default()
    };
    let view = ViewRequest {
        node: node.host.name.clone(),
    };
    let answers = [
        format!(
            "{:?}",
            client.list_nodes(Request::new(ListNodesRequest {})).await?
        ),
        format!(
            "{:?}",
            client
                .list_records(Request::new(ListRecordsRequest::default()))
                .await?
        ),
        format!("{:?}", client.view(Request::new(view)).await?),
        format!("{:?}", client.explain(Request::new(question)).await?),
    ];
    Ok(answers.join("\n"))
}

async fn of_agent(tls: &Tls, node: &Node) -> Result<String> {
    let mut client = NodeDebugClient::new(channel(tls, node, 5474, "margay-node").await?);
    let answers = [
        format!("{:?}", client.status(Request::new(StatusRequest {})).await?),
        format!(
            "{:?}",
            client.view(Request::new(ViewRequest::default())).await?
        ),
        format!("{:?}", client.kernel(Request::new(KernelRequest {})).await?),
    ];
    Ok(answers.join("\n"))
}
