//! The whole path with a running commentary: a real Kubernetes, Margay installed as a user does it,
//! pods that talk, policies that cut them off.
//!
//! Reading order: [`run`], then [`examples`] (what is applied and expected), [`flips`] (how long it
//! takes).

pub mod examples;
pub mod flips;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};

use crate::cluster::layout::Topology;
use crate::cluster::{self, Cluster};
use crate::install;
use crate::matrix::{self, Matrix, Port};
use crate::probe::Verdict;
use crate::trace::{self, Collector};
use crate::world::{self, PODS, World};

/// Port of the trace collector, in the control plane's network.
const COLLECTOR_PORT: u16 = 4317;
/// Number of times that the timed policy is written and deleted.
const FLIPS: usize = 40;
/// Time limit for packets to obey, on a busy machine.
pub const OBEY: Duration = Duration::from_secs(20);

/// Options of the demo.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder of everything it writes.
    pub state: PathBuf,
    /// Prefix of the cluster's namespaces.
    pub name: String,
    /// Leave the cluster up.
    pub keep: bool,
}

/// A cluster with Margay on it and the usual pods, as the demo and the scenarios use it.
#[derive(Debug)]
pub struct Stage {
    /// The cluster.
    pub cluster: Cluster,
    /// Its pods.
    pub world: World,
}

/// Shows everything; true if every matrix was as expected.
pub fn run(options: &Options) -> Result<bool> {
    let begin = Instant::now();
    print_line(
        "Margay on a real Kubernetes of three nodes, all on this machine, in their own namespaces.",
    );
    print_line(
        "Required, and installed if missing: iproute2 nftables conntrack runc busybox-static \
         ethtool util-linux (apt), Go modules of",
    );
    print_line(
        "Kubernetes, etcd and containerd (built once, kept in ~/.cache/margay). Nothing else \
         outside the folder is changed.",
    );

    title("1. A cluster without a network");
    let mut cluster = bring_up(&options.name, &options.state, &print_line)?;
    if options.keep {
        cluster = cluster.keep();
    }
    show(&cluster, &["get", "nodes", "-o", "wide"])?;

    title("2. Margay: the operator, then the Installation");
    let collector = Collector::start(
        &cluster.layout().netns_path("cp"),
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, COLLECTOR_PORT)),
    )?;
    let address = cluster.layout().control_plane().address;
    let wanted = install::Options {
        collector: Some(format!("http://{address}:{COLLECTOR_PORT}")),
        ..install::Options::default()
    };
    let installing = Instant::now();
    install::install(&cluster, &wanted, &|line| print_line(&format!("  {line}")))?;
    print_line(&format!(
        "every node Ready and enforcing {:.1} s after the first command",
        installing.elapsed().as_secs_f32()
    ));
    show(&cluster, &["get", "nodes"])?;
    show(&cluster, &["get", "pods", "-A", "-o", "wide"])?;
    show(&cluster, &["get", "tigerastatus"])?;

    title("3. Nine pods in two namespaces on three nodes");
    let world = World::create(&cluster)?;
    show(&cluster, &["get", "pods", "-A", "-l", "pod", "-o", "wide"])?;
    routes(&cluster)?;
    let open = Matrix::open(&PODS, &ports());
    let outcome = matrix::wait_for_match(&world, &open, OBEY)?;
    print_line(&outcome.measured.of_port(ports()[0]).print(None));
    let mut good = print_outcome(&outcome, &open, None);

    title("4. Policies: each applied, measured, compared with the expected matrix, and deleted");
    for example in examples::all()? {
        good &= show_example(&cluster, &world, &example)?;
    }

    title("5. Time from the API to the packets");
    good &= show_flips(&cluster, &world)?;

    title("6. One change, traced from the API to the kernel's commit");
    good &= show_trace(&cluster, &world, &collector)?;

    print_line(&format!(
        "\n{} after {:.0} s",
        if good {
            "Everything was as expected"
        } else {
            "NOT everything was as expected"
        },
        begin.elapsed().as_secs_f32()
    ));
    if options.keep {
        hand_over(&cluster)?;
    } else {
        cluster.down()?;
    }
    Ok(good)
}

/// A cluster whose nodes have the images of Margay and of the test pods.
pub fn bring_up(name: &str, state: &Path, progress: &dyn Fn(&str)) -> Result<Cluster> {
    let images = state.with_file_name(format!("{name}-images"));
    bring_up_with(
        name,
        state,
        vec![install::image(&images)?, world::image(&images)?],
        progress,
    )
}

/// A cluster whose nodes have these images.
pub fn bring_up_with(
    name: &str,
    state: &Path,
    images: Vec<PathBuf>,
    progress: &dyn Fn(&str),
) -> Result<Cluster> {
    let options = cluster::Options {
        name: name.to_owned(),
        nodes: 3,
        topology: Topology::Routed,
        dual_stack: false,
        state: state.to_owned(),
        images,
        proxy: cluster::ProxyMode::Nftables,
        audit: false,
        suite: false,
    };
    Cluster::up(&options, progress)
}

/// A cluster with Margay and the usual pods.
pub fn stage(
    name: &str,
    state: &Path,
    options: &install::Options,
    progress: &dyn Fn(&str),
) -> Result<Stage> {
    let cluster = bring_up(name, state, progress)?;
    install::install(&cluster, options, progress)?;
    let world = World::create(&cluster).with_context(|| install::diagnosis(&cluster))?;
    Ok(Stage { cluster, world })
}

/// Every port that the usual pods serve.
pub fn ports() -> Vec<Port> {
    world::PORTS
        .iter()
        .map(|(_, protocol, port)| (*protocol, *port))
        .collect()
}

fn show_example(cluster: &Cluster, world: &World, example: &examples::Example) -> Result<bool> {
    print_line(&format!("\n-- {}: {}", example.name, example.about));
    print_line(&format!(
        "$ kubectl apply -f deploy/examples/{}.yaml",
        example.name
    ));
    let (outcome, applied) = example.apply(cluster, world)?;
    let good = print_outcome(&outcome, &example.expected, Some(applied));
    let removed = example.delete(cluster, world)?;
    if removed.matched.is_none() {
        print_line("after its deletion, not everything is open again:");
        print_line(&removed.measured.print(Some(&Matrix::open(&PODS, &ports()))));
    }
    Ok(good && removed.matched.is_some())
}

/// Prints a measurement with what was expected; true if they agree.
fn print_outcome(outcome: &matrix::Outcome, expected: &Matrix, applied: Option<Instant>) -> bool {
    let (answered, all) = (
        outcome.measured.count(Verdict::Answered),
        outcome.measured.cells.len(),
    );
    match outcome.matched {
        Some(at) => {
            if applied.is_some() {
                print_line(&outcome.measured.beside(expected));
            }
            let when = applied.map(|applied| {
                format!(
                    ", {:.0} ms after kubectl was started",
                    at.saturating_duration_since(applied).as_secs_f64() * 1e3
                )
            });
            print_line(&format!(
                "as expected: {answered} of {all} connects are answered{}",
                when.unwrap_or_default()
            ));
            true
        }
        None => {
            print_line(&outcome.measured.beside(expected));
            print_line(&format!(
                "NOT as expected: {} of {all} connects differ (*)",
                expected.differing(&outcome.measured).len()
            ));
            false
        }
    }
}

fn show_flips(cluster: &Cluster, world: &World) -> Result<bool> {
    for (from, to) in [("x/a", "x/d"), ("x/a", "x/b")] {
        let times = flips::measure(cluster, world, from, to, FLIPS)?;
        let place = if world.pod(from)?.node == world.pod(to)?.node {
            "same node"
        } else {
            "across nodes"
        };
        print_line(&format!(
            "{from} -> {to} ({place}), a policy that denies all ingress is written and deleted \
             {FLIPS} times, with a connect every 0.5 ms:"
        ));
        print_line(&format!(
            "  from the request to the first packet that obeys: {}",
            times.from_send
        ));
        print_line(&format!(
            "  from the API's answer:                           {}",
            times.from_answer
        ));
    }
    Ok(true)
}

fn show_trace(cluster: &Cluster, world: &World, collector: &Collector) -> Result<bool> {
    let since = SystemTime::now();
    flips::measure(cluster, world, "x/a", "x/b", 2)?;
    let spans = collector.trace(
        ("policy.change", "policy", flips::NAME),
        since,
        ("margay-node", 2),
        Duration::from_secs(15),
    );
    let Some(spans) = spans else {
        print_line("NO trace of the change came within 15 s");
        return Ok(false);
    };
    print_line(&trace::tree(&spans));
    let arrived = spans.iter().any(|span| span.service == "margay-node");
    if !arrived {
        print_line("NO node has reported a span of it within 15 s");
    }
    Ok(arrived)
}

fn routes(cluster: &Cluster) -> Result<()> {
    print_line("\nn1 and n2 share a subnet, n3 is behind a router; the pool has VXLANCrossSubnet:");
    print_line("$ nsenter --target (n1) --net ip route show proto 82");
    print_line(&indent(
        &cluster
            .node("n1")?
            .exec(&["ip", "route", "show", "proto", "82"])?,
    ));
    Ok(())
}

fn show(cluster: &Cluster, arguments: &[&str]) -> Result<()> {
    print_line(&format!("$ kubectl {}", arguments.join(" ")));
    print_line(&indent(&cluster.kubectl(arguments)?));
    Ok(())
}

/// Prints what to try.
fn hand_over(cluster: &Cluster) -> Result<()> {
    let folder = cluster.folder().display();
    let netns = cluster.layout().netns("cp");
    let n1 = cluster.node("n1")?;
    let secret = |key: &str| {
        format!(
            "$KUBECTL get secret -n margay-system margay-reader-tls -o jsonpath='{{.data.{key}}}' \
             | base64 -d"
        )
    };
    let ca = "$KUBECTL get configmap -n margay-system margay-ca -o jsonpath='{.data.ca\\.crt}'";
    ensure!(
        cluster.folder().join("env").exists(),
        "the cluster has no env file"
    );
    print_line(&format!(
        "\n\
         The cluster is left up. To play with it:\n\
         . {folder}/env\n\
         $KUBECTL get pods -A -o wide\n\
         $KUBECTL apply -f deploy/examples/deny-all-ingress.yaml\n\
         $KUBECTL exec -n x a -- /probe connect {example}:80\n\
         $KUBECTL logs -n margay-system daemonset/margay-node\n\
         nsenter --target {pid} --net nft list table inet margay        # what node n1 enforces\n\
         {crt} > {folder}/reader.crt; {key} > {folder}/reader.key; {ca} > {folder}/reader-ca.crt\n\
         ip netns exec {netns} grpcurl -cacert {folder}/reader-ca.crt -cert {folder}/reader.crt \
         -key {folder}/reader.key -authority margay-node {n1}:5474 list\n\
         make cluster-down STATE={folder}",
        example = "ADDRESS",
        pid = n1.process.pid,
        crt = secret("tls\\.crt"),
        key = secret("tls\\.key"),
        n1 = n1.host.address,
    ));
    Ok(())
}

fn indent(text: &str) -> String {
    text.trim_end()
        .lines()
        .map(|line| format!("    {line}\n"))
        .collect()
}

fn title(text: &str) {
    print_line(&format!("\n== {text}"));
}

fn print_line(text: &str) {
    println!("{}", text.trim_end());
}
