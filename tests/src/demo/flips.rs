//! How long packets take to obey: a policy is written and deleted again and again, while a prober
//! asks every half millisecond.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;

use super::OBEY;
use crate::cluster::Cluster;
use crate::probe::paced::PacedProbe;
use crate::probe::{Protocol, Target, Verdict};
use crate::world::{World, split};

/// Name of the policy that is written and deleted.
pub const NAME: &str = "flip";
/// Interval of the prober.
const INTERVAL: Duration = Duration::from_micros(500);
/// A connect without an answer for this long counts as denied; shorter than the first
/// retransmission.
const SILENT: Duration = Duration::from_millis(100);
/// Gap before each write, in milliseconds: changed by a step that never falls into step with any
/// timer of the cluster.
const GAPS: [u64; 5] = [130, 190, 70, 230, 110];

/// Times of all flips.
#[derive(Debug, Clone)]
pub struct Times {
    /// From the moment before the request was sent.
    pub from_send: Quantiles,
    /// From the API's answer; negative times, where packets obeyed before the answer came, count as
    /// zero.
    pub from_answer: Quantiles,
}

/// Sorted times.
#[derive(Debug, Clone)]
pub struct Quantiles(Vec<Duration>);

impl Quantiles {
    /// Sorts.
    pub fn new(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    /// The time below which the share `part` of all times is.
    pub fn at(&self, part: f64) -> Duration {
        let index = (part * self.0.len() as f64) as usize;
        self.0
            .get(index.min(self.0.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    }
}

impl fmt::Display for Quantiles {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |part: f64| self.at(part).as_secs_f64() * 1e3;
        write!(
            out,
            "p50 {:6.1} ms   p99 {:6.1} ms   max {:6.1} ms   (n={})",
            ms(0.5),
            ms(0.99),
            ms(1.0),
            self.0.len()
        )
    }
}

/// Denies all ingress to `to` and allows it again, `count` times in all, and times what `from`
/// sees.
pub fn measure(
    cluster: &Cluster,
    world: &World,
    from: &str,
    to: &str,
    count: usize,
) -> Result<Times> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let client = runtime.block_on(cluster.client())?;
    let (namespace, pod) = split(to)?;
    let policies: Api<NetworkPolicy> = Api::namespaced(client, namespace);
    let policy: NetworkPolicy = serde_json::from_value(json!({
        "metadata": {"name": NAME},
        "spec": {"podSelector": {"matchLabels": {"pod": pod}}, "policyTypes": ["Ingress"]},
    }))?;
    let target = Target::new(Protocol::Tcp, world.pod(to)?.address, 80);
    let probe = PacedProbe::start(&world.pod(from)?.place, target, INTERVAL, SILENT)?;
    probe.until(Verdict::Answered, Instant::now(), OBEY)?;
    let (mut from_send, mut from_answer) = (Vec::new(), Vec::new());
    for flip in 0..count {
        std::thread::sleep(Duration::from_millis(GAPS[flip % GAPS.len()]));
        let sent = Instant::now();
        let wanted = if flip % 2 == 0 {
            runtime.block_on(policies.create(&PostParams::default(), &policy))?;
            Verdict::Silent
        } else {
            runtime.block_on(policies.delete(NAME, &DeleteParams::default()))?;
            Verdict::Answered
        };
        let answered = Instant::now();
        let obeyed = probe.until(wanted, sent, OBEY)?;
        from_send.push(obeyed.saturating_duration_since(sent));
        from_answer.push(obeyed.saturating_duration_since(answered));
    }
    if count % 2 == 1 {
        runtime.block_on(policies.delete(NAME, &DeleteParams::default()))?;
    }
    let records = probe.finish()?;
    ensure!(
        !records
            .iter()
            .any(|record| record.verdict == Verdict::Broken),
        "the prober could not ask"
    );
    Ok(Times {
        from_send: Quantiles::new(from_send),
        from_answer: Quantiles::new(from_answer),
    })
}
