//! The source: writes the lists of the model to every server, and events at scheduled times.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use margay_typha::object::POD;
use serde_json::{Value, json};

use super::clock::{now_ns, until};
use super::control::{Orders, count, number, reply};
use super::model::{self, ClusterModel, Numbers};

/// Size and seed of the model.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Number of pods.
    #[arg(long)]
    pods: usize,
    /// Number of nodes that connect; there may be more.
    #[arg(long)]
    nodes: usize,
    /// With a policy that every node has, about all pods.
    #[arg(long)]
    everything: bool,
    /// Seed of names, placement and events.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Takes orders until there are no more:
///
/// - `{"attach": PATH}` writes all lists to a server;
/// - `{"start_ns": T, "rate": R, "count": N}` writes N events, the first at T, R per second;
/// - `{"policy": NAME}` adds a policy that selects a pod of the first node and refers to all pods.
pub async fn run(args: Args) -> Result<()> {
    let mut source = EventSource::new(&args);
    let mut orders = Orders::new();
    while let Some(order) = orders.next().await? {
        let answer = tokio::task::block_in_place(|| source.obey(&order))?;
        reply(&answer)?;
    }
    Ok(())
}

/// Connections to one server, one per kind.
struct WatchTarget {
    pods: UnixStream,
    global: UnixStream,
    /// Kinds that never change, whose watches stay open.
    _others: Vec<UnixStream>,
}

struct EventSource {
    model: ClusterModel,
    everything: bool,
    /// Pods that events may concern.
    within: usize,
    /// Last event of each pod.
    last: Vec<Option<u32>>,
    events: u32,
    numbers: Numbers,
    targets: Vec<WatchTarget>,
}

impl EventSource {
    fn new(args: &Args) -> Self {
        let model = ClusterModel::new(args.pods, args.nodes, args.seed);
        Self {
            model,
            everything: args.everything,
            within: model.pods_within(args.nodes),
            last: vec![None; args.pods],
            events: 0,
            numbers: Numbers::new(args.seed ^ 0x5eed),
            targets: Vec::new(),
        }
    }

    fn obey(&mut self, order: &Value) -> Result<Value> {
        if let Some(path) = order["attach"].as_str() {
            let target = self.attach(Path::new(path))?;
            self.targets.push(target);
            return Ok(json!({"attached": path}));
        }
        if let Some(name) = order["policy"].as_str() {
            let pod = (0..self.within)
                .find(|pod| self.model.node_of(*pod) == 0)
                .unwrap_or_default();
            let selector = format!("app.kubernetes.io/instance == 'instance-{pod}'");
            let (line, at_ns) = (model::everything(name, &selector), now_ns());
            // A server that was killed takes no more.
            self.targets
                .retain_mut(|target| target.global.write_all(line.as_bytes()).is_ok());
            return Ok(json!({"written_ns": at_ns}));
        }
        if order["rate"].is_number() {
            return self.send_events(
                count(order, "start_ns")?,
                number(order, "rate")?,
                count(order, "count")?,
            );
        }
        bail!("unknown order {order}")
    }

    /// Writes all lists to a new server.
    fn attach(&self, path: &Path) -> Result<WatchTarget> {
        let list = |kind: &str, lines: &mut dyn Iterator<Item = String>| -> Result<UnixStream> {
            let mut stream = UnixStream::connect(path)
                .with_context(|| format!("connect to {}", path.display()))?;
            let mut buffer = std::io::BufWriter::with_capacity(64 << 10, &mut stream);
            writeln!(buffer, "{kind}")?;
            for line in lines {
                buffer.write_all(line.as_bytes())?;
            }
            buffer.write_all(model::list_end().as_bytes())?;
            buffer.flush()?;
            drop(buffer);
            Ok(stream)
        };
        let model = &self.model;
        let namespaces = 0..model.namespaces();
        let tiers = list("Tier", &mut std::iter::once(model::tier()))?;
        let named = list(
            "Namespace",
            &mut namespaces
                .clone()
                .map(|namespace| model.namespace(namespace)),
        )?;
        let policies = list(
            "KubernetesNetworkPolicy",
            &mut namespaces.flat_map(|namespace| model.policies(namespace)),
        )?;
        let global = list(
            "GlobalNetworkPolicy",
            &mut self
                .everything
                .then(|| model::everything("everything", "all()"))
                .into_iter(),
        )?;
        let pods = self
            .last
            .iter()
            .enumerate()
            .map(|(pod, event)| model.pod("ADDED", pod, *event));
        let pods = list(POD, &mut { pods })?;
        Ok(WatchTarget {
            pods,
            global,
            _others: vec![tiers, named, policies],
        })
    }

    /// Writes events at their times; a late one is written at once and does not delay the next.
    fn send_events(&mut self, start_ns: u64, rate: f64, count: u64) -> Result<Value> {
        let first = self.events;
        let mut latest = Duration::ZERO;
        for number in 0..count {
            let pod = self.numbers.below(self.within);
            let event = self.events;
            self.events += 1;
            self.last[pod] = Some(event);
            let line = self.model.pod("MODIFIED", pod, Some(event));
            let at_ns = start_ns + (number as f64 * 1e9 / rate) as u64;
            std::thread::sleep(until(at_ns));
            self.targets
                .retain_mut(|target| target.pods.write_all(line.as_bytes()).is_ok());
            latest = latest.max(Duration::from_nanos(now_ns().saturating_sub(at_ns)));
        }
        Ok(json!({"first": first, "late_ms": latest.as_secs_f64() * 1e3}))
    }
}
