//! The node's BGP speaker.
//!
//! ```text
//!  records, pods --BgpInputs--> run --WantedSpeaker--> thread --LearnedRoutes--> route worker
//!  Secrets ------passwords------^ ^                     |  ^
//!                                 +------BgpReport------+  +--> sockets of peers
//! ```
//!
//! What the speaker is to be is computed from the node's records ([`config`]). A thread of its own
//! owns the speaker, its sockets and its timers ([`thread`]); it runs while the node has BGP. It
//! ends silently with the process, so that peers keep the routes to this node while the agent
//! restarts (RFC 4724), and with a NOTIFICATION when the node has no BGP any more.

pub mod config;
mod connections;
mod hops;
mod listeners;
pub mod metrics;
pub mod passwords;
pub mod report;
mod sockets;
pub mod thread;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use margay_dataplane::routes::learned::{LearnedProgress, LearnedRoutes};
use tokio::sync::watch;
use tokio::time::Instant;

use self::config::{BgpInputs, WantedSpeaker, WithoutPassword, wanted_speaker};
use self::metrics::{BgpMetrics, PeerLabels};
use self::passwords::{Passwords, SecretSource};
use self::report::{BgpReport, listed};
use self::thread::ThreadParts;
use crate::problems::Problems;

/// How long the kernel may refuse routes before it is a problem of the node: links go down and
/// come back.
const GRACE: Duration = Duration::from_secs(10);
/// How long passwords may take to be read before peers without one are a problem.
const READING: Duration = Duration::from_secs(10);
/// Delay until a thread that has ended by itself is started again.
const RESTART: Duration = Duration::from_secs(5);

/// Sender of what BGP follows from; `None`: no complete view has come yet.
pub type InputsSender = watch::Sender<Option<Arc<BgpInputs>>>;

/// Dependencies of BGP.
pub struct BgpParts<S> {
    /// What it follows from. BGP ends silently when the sender is dropped.
    pub inputs: watch::Receiver<Option<Arc<BgpInputs>>>,
    /// Where learnt routes go.
    pub routes: LearnedRoutes,
    /// Where passwords are read.
    pub secrets: S,
    /// Problems of the node.
    pub problems: Problems,
    /// Metrics.
    pub metrics: BgpMetrics,
    /// Where the state of sessions is published; `None`: no BGP.
    pub report: watch::Sender<Option<BgpReport>>,
    /// The kernel had routes of ours when this process began.
    pub had_routes: bool,
    /// Random number in `0.0..1.0`.
    pub jitter: fn() -> f64,
}

/// A thread that runs.
struct Running {
    wanted: watch::Sender<Option<Arc<WantedSpeaker>>>,
    report: watch::Receiver<Option<BgpReport>>,
    thread: JoinHandle<()>,
}

/// Starts and ends the speaker's thread as the inputs have it, and reports. Threads begin in the
/// network namespace of the calling one.
pub async fn run<S: SecretSource>(parts: BgpParts<S>) {
    let mut inputs = parts.inputs.clone();
    let mut owner = Owner {
        passwords: Passwords::new(parts.secrets),
        progress: parts.routes.watch(),
        routes: parts.routes,
        problems: parts.problems,
        metrics: parts.metrics,
        report: parts.report,
        is_restarting: parts.had_routes,
        jitter: parts.jitter,
        known: BTreeSet::new(),
        running: None,
        restart: None,
        without: WithoutPassword::new(),
        reading_since: None,
        failing_since: None,
    };
    loop {
        let due = owner.next_due();
        let far = Instant::now() + GRACE;
        tokio::select! {
            changed = inputs.changed() => if changed.is_err() { return },
            () = owner.passwords.changed() => {}
            () = changed(owner.running.as_mut()) => {}
            Ok(()) = owner.progress.changed() => {}
            () = tokio::time::sleep_until(due.unwrap_or(far)) => {}
        }
        let now = inputs.borrow_and_update().clone();
        if let Some(now) = now {
            owner.apply(&now).await;
        }
        owner.report_state();
    }
}

/// Waits until the thread has published something, or has ended.
async fn changed(running: Option<&mut Running>) {
    match running {
        Some(running) if running.report.changed().await.is_ok() => {}
        // Its end is noticed once.
        Some(running) if !running.thread.is_finished() => {}
        _ => std::future::pending().await,
    }
}

struct Owner<S> {
    passwords: Passwords<S>,
    progress: watch::Receiver<LearnedProgress>,
    routes: LearnedRoutes,
    problems: Problems,
    metrics: BgpMetrics,
    report: watch::Sender<Option<BgpReport>>,
    is_restarting: bool,
    jitter: fn() -> f64,
    known: BTreeSet<PeerLabels>,
    running: Option<Running>,
    /// When a thread that has ended by itself is started again.
    restart: Option<Instant>,
    without: WithoutPassword,
    reading_since: Option<Instant>,
    failing_since: Option<Instant>,
}
