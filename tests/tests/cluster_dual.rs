//! On a real Kubernetes of two IP versions, with kube-proxy in its default mode, iptables: pods
//! have an address of each, and packets of both are allowed and denied alike.

use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::{Ipv4Net, Ipv6Net};
use margay_api::rule::IpVersion;
use margay_tests::cluster::layout::{OUTSIDE_V6, Topology};
use margay_tests::cluster::process::wait_for;
use margay_tests::cluster::{self, Cluster, ProxyMode};
use margay_tests::demo::{self, OBEY, Stage};
use margay_tests::install;
use margay_tests::matrix::{self, Matrix, Port};
use margay_tests::probe::{Protocol, Target, Verdict, ask};
use margay_tests::suite::Suite;
use margay_tests::world::{self, PODS, World};
use serde_json::Value;

const POOL_V4: &str = "10.244.0.0/16";
const POOL_V6: &str = "fd00:10:244::/56";
const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];
const WEB: Port = (Protocol::Tcp, 80);

fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let mut stage = match stage() {
        Ok(stage) => stage,
        Err(error) => {
            suite.case("a_dual_stack_cluster_with_margay", || Err(error));
            return suite.finish();
        }
    };
    suite.case(
        "an_installation_with_two_pools_makes_every_node_ready",
        || installed(&stage),
    );
    suite.case("every_pod_has_an_address_of_each_version", || {
        addresses(&stage)
    });
    suite.case("everybody_reaches_everybody_by_both", || {
        all_open(&mut stage)
    });
    suite.case("each_version_travels_as_its_pool_says", || {
        routes(&stage, "vxlan-v6.calico")
    });
    suite.case(
        "pods_reach_the_world_behind_their_nodes_ipv6_address",
        || world_outside(&stage),
    );
    suite.case("a_policy_cuts_both", || policy(&mut stage));
    suite.case("a_range_of_ipv6_cuts_ipv6_alone", || range(&mut stage));
    suite.case("kube_proxy_is_in_iptables_mode", || iptables(&stage));
    suite.case("a_service_answers_by_both", || service(&stage));
    suite.case("a_policy_cuts_what_a_service_leads_to", || {
        service_under_policy(&stage)
    });
    suite.case(
        "without_encapsulation_everybody_still_reaches_everybody",
        || without_encapsulation(&mut stage),
    );
    suite.finish()
}

fn stage() -> Result<Stage> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-dual");
    // Several checkouts may run tests at the same time.
    let name = format!("mgy-dual-{}", std::process::id());
    let images = folder.with_file_name(format!("{name}-images"));
    let options = cluster::Options {
        name,
        nodes: 2,
        topology: Topology::Flat,
        dual_stack: true,
        proxy: ProxyMode::Iptables,
        state: folder,
        images: vec![install::image(&images)?, world::image(&images)?],
        ..cluster::Options::default()
    };
    let progress = |line: &str| println!("{line}");
    let cluster = Cluster::up(&options, &progress)?;
    let options = install::Options {
        cidr: POOL_V4.to_owned(),
        ipv6: Some((POOL_V6.to_owned(), "VXLAN".to_owned())),
        ..install::Options::default()
    };
    install::install(&cluster, &options, &progress)?;
    let world = World::create(&cluster).with_context(|| install::diagnosis(&cluster))?;
    Ok(Stage { cluster, world })
}

fn installed(stage: &Stage) -> Result<()> {
    install::check_status(&stage.cluster)?;
    let nodes: Value =
        serde_json::from_str(&stage.cluster.kubectl(&["get", "nodes", "-o", "json"])?)?;
    for node in nodes["items"].as_array().context("nodes")? {
        let annotation = |name: &str| {
            node["metadata"]["annotations"][format!("projectcalico.org/{name}")].as_str()
        };
        let own: Ipv6Net = annotation("IPv6Address")
            .context("no IPv6 address")?
            .parse()?;
        ensure!(
            own.prefix_len() == 64,
            "the subnet of the node is not known: {own}"
        );
        let tunnel: Ipv6Addr = annotation("IPv6VXLANTunnelAddr")
            .context("no tunnel address")?
            .parse()?;
        ensure!(
            POOL_V6.parse::<Ipv6Net>()?.contains(&tunnel),
            "{tunnel} is not of the pool"
        );
        ensure!(
            annotation("VXLANTunnelMACAddrV6").is_some_and(|mac| mac.starts_with("66:")),
            "{node}"
        );
    }
    Ok(())
}

fn addresses(stage: &Stage) -> Result<()> {
    let (four, six): (Ipv4Net, Ipv6Net) = (POOL_V4.parse()?, POOL_V6.parse()?);
    for pod in &stage.world.pods {
        let second = pod
            .address_v6
            .with_context(|| format!("{} has no IPv6 address", pod.name))?;
        ensure!(
            four.contains(&pod.address) && six.contains(&second),
            "{}: {} {second}",
            pod.name,
            pod.address
        );
    }
    Ok(())
}

fn all_open(stage: &mut Stage) -> Result<()> {
    let open = Matrix::open(&PODS, &demo::ports());
    VERSIONS
        .iter()
        .try_for_each(|version| expect(stage, *version, &open))
}

fn expect(stage: &mut Stage, version: IpVersion, expected: &Matrix) -> Result<()> {
    stage.world.version = version;
    let outcome = matrix::wait_for_match(&stage.world, expected, OBEY)?;
    ensure!(
        outcome.matched.is_some(),
        "{version:?}: packets do not obey\n{}",
        outcome.measured.beside(expected)
    );
    Ok(())
}

/// The nodes share a link, so IPv4 is not encapsulated: its pool does so across subnets only.
fn routes(stage: &Stage, device: &str) -> Result<()> {
    let node = stage.cluster.node("n1")?;
    for (family, range, device) in [("-4", "10.244.", "eth0"), ("-6", "fd00:10:244:", device)] {
        let routes = node.exec(&["ip", family, "route", "show", "proto", "82"])?;
        let leads = |line: &str| {
            line.starts_with(range)
                && line.contains(" via ")
                && line.contains(&format!("dev {device}"))
        };
        ensure!(
            routes.lines().any(leads),
            "no route to n2 by {device}:\n{routes}"
        );
        ensure!(
            routes
                .lines()
                .any(|line| line.starts_with(&format!("blackhole {range}"))),
            "{routes}"
        );
    }
    Ok(())
}

/// The outside world has no route to pods: its answers have crossed address translation both ways.
fn world_outside(stage: &Stage) -> Result<()> {
    let outside = Target::new(Protocol::Tcp, OUTSIDE_V6, 9);
    for pod in &stage.world.pods {
        let begin = Instant::now();
        // Nothing listens there, so that a reset is the answer.
        while ask(&pod.place, &[outside])? != [Verdict::Refused] {
            ensure!(
                begin.elapsed() < OBEY,
                "{} gets no answer from {}",
                pod.name,
                outside.address
            );
        }
    }
    Ok(())
}

/// Expects the effect of a policy on each IP version while it exists, and that everything is open
/// after it.
fn with_policy(stage: &mut Stage, policy: &str, expected: [&Matrix; 2]) -> Result<()> {
    let path = stage.cluster.folder().join("dual.yaml");
    std::fs::write(&path, policy)?;
    let path = path.display().to_string();
    stage.cluster.kubectl(&["apply", "-f", &path])?;
    let obeyed = VERSIONS
        .iter()
        .zip(expected)
        .try_for_each(|(version, expected)| expect(stage, *version, expected));
    stage.cluster.kubectl(&["delete", "-f", &path])?;
    obeyed?;
    let open = Matrix::open(&PODS, &[WEB]);
    VERSIONS
        .iter()
        .try_for_each(|version| expect(stage, *version, &open))
        .context("after its deletion")
}

fn policy(stage: &mut Stage) -> Result<()> {
    let mut expected = Matrix::open(&PODS, &[WEB]);
    for ((_, from, to), verdict) in &mut expected.cells {
        if to == "x/b" && from != "y/a" {
            *verdict = Verdict::Silent;
        }
    }
    with_policy(stage, ONLY_FROM_A, [&expected, &expected])
}

fn range(stage: &mut Stage) -> Result<()> {
    let open = Matrix::open(&PODS, &[WEB]);
    let mut expected = open.clone();
    let cell = (WEB, "x/a".to_owned(), "x/b".to_owned());
    ensure!(
        expected.cells.insert(cell, Verdict::Silent).is_some(),
        "x/a asks x/b"
    );
    let denied = stage
        .world
        .pod("x/a")?
        .address_v6
        .context("x/a has no IPv6 address")?;
    with_policy(
        stage,
        &EXCEPT_ONE.replace("DENIED", &denied.to_string()),
        [&open, &expected],
    )
}

/// Services are in another table than in the other suites.
fn iptables(stage: &Stage) -> Result<()> {
    for (node, family) in [("n1", ""), ("n2", "6")] {
        let node = stage.cluster.node(node)?;
        let save = format!("ip{family}tables-save");
        let served = || {
            node.exec(&[save.as_str(), "-t", "nat"])
                .is_ok_and(|rules| rules.contains(":KUBE-SERVICES"))
        };
        wait_for(OBEY, || format!("chains of kube-proxy in {save}"), served)?;
        let tables = node.exec(&["nft", "list", "tables"])?;
        ensure!(
            !tables.contains("kube-proxy"),
            "kube-proxy has a table of its own:\n{tables}"
        );
    }
    Ok(())
}

/// Targets of the Service in [`SERVICE`]: its own addresses, and a port of each node.
fn service_targets(stage: &Stage) -> Result<Vec<Target>> {
    let get = |path: &str| {
        stage.cluster.kubectl(&[
            "get",
            "service",
            "-n",
            "x",
            "both",
            "-o",
            &format!("jsonpath={path}"),
        ])
    };
    let text = get("{.spec.clusterIPs[*]}")?;
    let addresses = text
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<Vec<IpAddr>, _>>()?;
    ensure!(
        addresses.len() == 2,
        "a Service of both versions has the addresses {text:?}"
    );
    let port: u16 = get("{.spec.ports[0].nodePort}")?
        .trim()
        .parse()
        .context("a port of the nodes")?;
    let own = addresses
        .into_iter()
        .map(|address| Target::new(Protocol::Tcp, address, 8080));
    let node = |node| {
        Ok(Target::new(
            Protocol::Tcp,
            stage.cluster.node(node)?.host.address,
            port,
        ))
    };
    let nodes: [Result<Target>; 2] = ["n1", "n2"].map(node);
    own.map(Ok).chain(nodes).collect()
}

fn wait_for_verdicts(stage: &Stage, pod: &str, targets: &[Target], wanted: Verdict) -> Result<()> {
    let place = &stage.world.pod(pod)?.place;
    let verdicts = || ask(place, targets);
    let is_so = || verdicts().is_ok_and(|found| found.iter().all(|verdict| *verdict == wanted));
    wait_for(
        OBEY,
        || {
            format!(
                "{wanted:?} for {pod} from each of {targets:?}: {:?}",
                verdicts()
            )
        },
        is_so,
    )
}

fn service(stage: &Stage) -> Result<()> {
    let path = stage.cluster.folder().join("service.yaml");
    std::fs::write(&path, SERVICE)?;
    stage
        .cluster
        .kubectl(&["apply", "-f", &path.display().to_string()])?;
    let targets = service_targets(stage)?;
    ["y/a", "y/b"]
        .iter()
        .try_for_each(|pod| wait_for_verdicts(stage, pod, &targets, Verdict::Answered))
}

/// The backend sees the source of a connection to a Service's address; a connection to a node's
/// port may come with the node's address, which is not allowed either.
fn service_under_policy(stage: &Stage) -> Result<()> {
    let path = stage.cluster.folder().join("service-policy.yaml");
    std::fs::write(&path, ONLY_FROM_A)?;
    let path = path.display().to_string();
    stage.cluster.kubectl(&["apply", "-f", &path])?;
    let targets = service_targets(stage)?;
    wait_for_verdicts(stage, "y/b", &targets, Verdict::Silent)?;
    wait_for_verdicts(stage, "y/a", &targets[..2], Verdict::Answered)?;
    stage.cluster.kubectl(&["delete", "-f", &path])?;
    wait_for_verdicts(stage, "y/b", &targets, Verdict::Answered)
}

fn without_encapsulation(stage: &mut Stage) -> Result<()> {
    const PATCH: &str = r#"[{"op": "replace", "path": "/spec/calicoNetwork/ipPools/1/encapsulation", "value": "None"}]"#;
    stage.cluster.kubectl(&[
        "patch",
        "installation",
        "default",
        "--type=json",
        "-p",
        PATCH,
    ])?;
    wait_for(
        Duration::from_secs(30),
        || "routes without encapsulation".to_owned(),
        || routes(stage, "eth0").is_ok(),
    )?;
    all_open(stage)
}

const ONLY_FROM_A: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-from-a, namespace: x}
spec:
  podSelector: {matchLabels: {pod: b}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {ns: "y"}}
      podSelector: {matchLabels: {pod: a}}
"#;

const EXCEPT_ONE: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: except-one, namespace: x}
spec:
  podSelector: {matchLabels: {pod: b}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - ipBlock: {cidr: 0.0.0.0/0}
    - ipBlock: {cidr: "::/0", except: ["DENIED/128"]}
"#;

const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: both, namespace: x}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {pod: b}
  ports: [{port: 8080, targetPort: 80, protocol: TCP}]
"#;
