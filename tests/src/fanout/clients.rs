//! The nodes: one process with the streams of all of them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::clock::now_ns;
use super::control::{Orders, count, number, reply};
use super::identity::Identities;
use super::stats::quantile;
use super::stream::{Depth, Measured, RunState, Schedule, SimulatedNode};

/// Time for all nodes to come in sync.
const PATIENCE: Duration = Duration::from_secs(120);

/// Arguments of the nodes.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Folder of certificates.
    #[arg(long)]
    tls: PathBuf,
    /// Number of nodes.
    #[arg(long)]
    count: usize,
    /// Number of nodes, spread over all, that decode everything; latencies are theirs.
    #[arg(long)]
    probes: usize,
    /// All nodes hold their view, so that they can resume.
    #[arg(long)]
    hold: bool,
    /// The server rebroadcasts.
    #[arg(long)]
    rebroadcast: bool,
}

/// Takes orders until there are no more:
///
/// - `{"ports": [P...]}` connects to one of these servers, now and whenever a stream ends;
/// - `{"synced": true}` waits until all nodes are in sync; with `"since_ns"` again after that time;
/// - `{"first": N, "start_ns": T, "rate": R}` starts to measure events from this one on;
/// - `{"progress": true}` answers with the last event that every probe has heard of;
/// - `{"report": true}` answers with what was measured since.
pub async fn run(args: Args) -> Result<()> {
    let nodes = SimulatedNodes::start(&args)?;
    let mut orders = Orders::new();
    while let Some(order) = orders.next().await? {
        reply(&nodes.obey(&order).await?)?;
    }
    Ok(())
}

struct SimulatedNodes {
    common: Arc<RunState>,
    measured: Vec<Arc<Measured>>,
    probes: Vec<usize>,
}

impl SimulatedNodes {
    fn start(args: &Args) -> Result<Self> {
        let ports = watch::Sender::new(Vec::new());
        let common = Arc::new(RunState {
            schedule: Schedule::default(),
            ports,
            rebroadcast: args.rebroadcast,
        });
        let identities = Identities::at(&args.tls);
        let probes = args.probes.clamp(1, args.count);
        let probes: Vec<usize> = (0..probes)
            .map(|probe| probe * args.count / probes)
            .collect();
        let mut measured = Vec::with_capacity(args.count);
        for number in 0..args.count {
            let depth = match probes.binary_search(&number) {
                _ if args.hold => Depth::Hold,
                Ok(_) => Depth::Decode,
                Err(_) => Depth::Glance,
            };
            let of_node = Arc::new(Measured::default());
            let node = SimulatedNode::new(
                identities.node(number)?,
                depth,
                common.clone(),
                of_node.clone(),
            );
            tokio::spawn(node.run(number));
            measured.push(of_node);
        }
        Ok(Self {
            common,
            measured,
            probes,
        })
    }

    async fn obey(&self, order: &Value) -> Result<Value> {
        if let Some(ports) = order["ports"].as_array() {
            let ports = ports
                .iter()
                .filter_map(|port| port.as_u64().and_then(|port| u16::try_from(port).ok()));
            let at_ns = now_ns();
            self.common.ports.send_replace(ports.collect());
            return Ok(json!({"at_ns": at_ns}));
        }
        if order["synced"].is_boolean() {
            return self
                .wait_until_synced(order["since_ns"].as_u64().unwrap_or_default())
                .await;
        }
        if order["first"].is_number() {
            let interval = 1e9 / number(order, "rate")?;
            self.reset();
            let first = u32::try_from(count(order, "first")?)?;
            self.common
                .schedule
                .set(first, count(order, "start_ns")?, interval as u64);
            return Ok(json!({"measuring": first}));
        }
        if order["progress"].is_boolean() {
            return Ok(json!({"slowest_probe": self.slowest_probe()}));
        }
        if order["report"].is_boolean() {
            return Ok(self.report());
        }
        bail!("unknown order {order}")
    }

    async fn wait_until_synced(&self, since_ns: u64) -> Result<Value> {
        let deadline = now_ns() + u64::try_from(PATIENCE.as_nanos())?;
        let is_synced = |node: &Arc<Measured>| {
            node.is_synced.load(Ordering::Relaxed)
                && node.synced_ns.load(Ordering::Relaxed) > since_ns
        };
        while !self.measured.iter().all(is_synced) {
            if now_ns() > deadline {
                let missing = self.measured.iter().filter(|node| !is_synced(node)).count();
                bail!(
                    "{missing} of {} nodes are not in sync after {PATIENCE:?}",
                    self.measured.len()
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut at: Vec<u64> = self
            .measured
            .iter()
            .map(|node| node.synced_ns.load(Ordering::Relaxed))
            .collect();
        let bytes: u64 = self
            .measured
            .iter()
            .map(|node| node.sync_bytes.load(Ordering::Relaxed))
            .sum();
        Ok(json!({
            "p50_ns": quantile(&mut at, 0.5),
            "last_ns": quantile(&mut at, 1.0),
            "bytes": bytes / self.measured.len() as u64,
        }))
    }

    fn reset(&self) {
        for node in &self.measured {
            node.latencies.lock().clear();
            node.frames.store(0, Ordering::Relaxed);
            node.bytes.store(0, Ordering::Relaxed);
        }
    }

    fn slowest_probe(&self) -> u32 {
        let last = self
            .probes
            .iter()
            .map(|probe| &self.measured[*probe].last_event);
        last.map(|last| last.load(Ordering::Relaxed))
            .min()
            .unwrap_or_default()
    }

    fn report(&self) -> Value {
        let latencies = self
            .measured
            .iter()
            .map(|node| std::mem::take(&mut *node.latencies.lock()));
        let mut latencies: Vec<u64> = latencies.flatten().collect();
        let milliseconds = |ns: u64| ns as f64 / 1e6;
        let quantiles =
            [0.5, 0.9, 0.99, 1.0].map(|share| milliseconds(quantile(&mut latencies, share)));
        let sum = |of: fn(&Measured) -> u64| self.measured.iter().map(|node| of(node)).sum::<u64>();
        json!({
            "heard": latencies.len(),
            "p50_ms": quantiles[0], "p90_ms": quantiles[1], "p99_ms": quantiles[2],
            "max_ms": quantiles[3],
            "frames": sum(|node| node.frames.load(Ordering::Relaxed)),
            "bytes": sum(|node| node.bytes.load(Ordering::Relaxed)),
            "synced": self.measured
                .iter()
                .filter(|node| node.is_synced.load(Ordering::Relaxed))
                .count(),
        })
    }
}
