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
pub mod connections;
mod hops;
mod listeners;
pub mod metrics;
pub mod passwords;
pub mod report;
pub mod sockets;
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
/// Delay until a thread that is ending is looked at.
const ENDING: Duration = Duration::from_millis(100);
/// Delay until a thread that has ended by itself is started again.
const RESTART: Duration = Duration::from_secs(5);

/// Sender of what BGP follows from; `None`: no complete view has come yet.
pub type InputsSender = watch::Sender<Option<Arc<BgpInputs>>>;

/// Receiver of what BGP follows from.
pub type InputsReceiver = watch::Receiver<Option<Arc<BgpInputs>>>;

/// Dependencies of BGP.
pub struct BgpParts<S> {
    /// What it follows from. BGP ends silently when the sender is dropped.
    pub inputs: InputsReceiver,
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
        let is_other = tokio::select! {
            changed = inputs.changed() => match changed {
                Ok(()) => true,
                Err(_) => return,
            },
            () = owner.passwords.changed() => true,
            () = changed(owner.running.as_mut()) => false,
            Ok(()) = owner.progress.changed() => false,
            () = tokio::time::sleep_until(due.unwrap_or(far)) => false,
        };
        if is_other || owner.needs_start() {
            let now = inputs.borrow_and_update().clone();
            if let Some(now) = now {
                owner.apply(&now).await;
            }
        }
        owner.report_state();
    }
}

/// Waits until the thread has published something, or has ended.
async fn changed(running: Option<&mut Running>) {
    let Some(running) = running else {
        return std::future::pending().await;
    };
    if running.report.changed().await.is_err() {
        // It is ending, which takes no longer.
        tokio::time::sleep(ENDING).await;
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
    /// When a thread that has ended by itself, or could not be started, is started again.
    restart: Option<Instant>,
    without: WithoutPassword,
    reading_since: Option<Instant>,
    failing_since: Option<Instant>,
}

impl<S: SecretSource> Owner<S> {
    /// Makes the thread what follows from the inputs.
    async fn apply(&mut self, inputs: &BgpInputs) {
        self.passwords.follow(&inputs.secrets());
        self.reading_since = self
            .passwords
            .is_waiting()
            .then(|| self.reading_since.unwrap_or_else(Instant::now));
        let wanted = wanted_speaker(inputs, &|key| self.passwords.find(key));
        let Some((wanted, without)) = wanted else {
            return self.end().await;
        };
        self.without = without;
        if self.has_failed() {
            tracing::error!("the thread of BGP has ended; it is started again");
            self.running = None;
            self.restart = Some(Instant::now() + RESTART);
        }
        self.start(wanted);
    }

    /// The thread has ended by itself.
    fn has_failed(&self) -> bool {
        let running = self.running.as_ref();
        running.is_some_and(|running| running.thread.is_finished())
    }

    /// A thread is to be started although nothing else is wanted.
    fn needs_start(&self) -> bool {
        let is_due = |at: Instant| at <= Instant::now();
        self.has_failed() || (self.running.is_none() && self.restart.is_some_and(is_due))
    }

    fn start(&mut self, wanted: WantedSpeaker) {
        if let Some(running) = &self.running {
            running.wanted.send_if_modified(|known| {
                let is_new = known.as_deref() != Some(&wanted);
                *known = Some(Arc::new(wanted));
                is_new
            });
            return;
        }
        if self.restart.is_some_and(|at| at > Instant::now()) {
            return;
        }
        let (sender, receiver) = watch::channel(Some(Arc::new(wanted)));
        let (report, seen) = watch::channel(None);
        let parts = ThreadParts {
            wanted: receiver,
            routes: Box::new(self.routes.clone()),
            report,
            is_restarting: self.is_restarting,
            jitter: self.jitter,
        };
        // From now on the kernel has what this process has made of it.
        self.is_restarting = true;
        match thread::spawn(parts) {
            Ok(thread) => {
                self.restart = None;
                self.running = Some(Running {
                    wanted: sender,
                    report: seen,
                    thread,
                });
            }
            Err(error) => {
                tracing::error!(%error, "BGP cannot be started; trying again");
                self.restart = Some(Instant::now() + RESTART);
            }
        }
    }

    /// The node has no BGP: sessions are closed, and learnt routes removed.
    async fn end(&mut self) {
        self.without.clear();
        self.restart = None;
        let Some(running) = self.running.take() else {
            if std::mem::take(&mut self.is_restarting) {
                self.routes.clear();
            }
            return;
        };
        running.wanted.send_replace(None);
        // The port is free when the thread has ended, which takes a second at most.
        let ended = tokio::task::spawn_blocking(move || running.thread.join()).await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::error!("the thread of BGP has failed");
        }
        self.routes.clear();
        self.is_restarting = false;
    }

    fn report_state(&mut self) {
        let now = Instant::now();
        let running = self.running.as_mut();
        let report = running.and_then(|running| running.report.borrow_and_update().clone());
        self.metrics.set_sessions(report.as_ref(), &mut self.known);
        let sessions = report
            .as_ref()
            .and_then(|report| report.session_problem(now));
        self.problems
            .report("bgp-sessions", false, sessions.as_deref());
        let listener = report.as_ref().and_then(BgpReport::listen_problem);
        self.problems
            .report("bgp-listener", true, listener.as_deref());
        let is_reading = self
            .reading_since
            .is_some_and(|since| now < since + READING);
        let lines = self.without.iter().filter(|_| !is_reading);
        let lines = lines.map(|(address, reason)| format!("{address}, {reason}"));
        let passwords = listed("BGP peers have no session: ", lines);
        self.problems
            .report("bgp-passwords", true, passwords.as_deref());
        self.report_routes(now);
        self.report.send_if_modified(|known| {
            let is_new = *known != report;
            *known = report;
            is_new
        });
    }

    fn report_routes(&mut self, now: Instant) {
        let progress = self.progress.borrow_and_update().clone();
        self.metrics.set_routes(&progress);
        let failure = progress.failure;
        self.failing_since = failure.is_some().then(|| self.failing_since.unwrap_or(now));
        let lasts = self.failing_since.is_some_and(|since| now >= since + GRACE);
        let text = failure.filter(|_| lasts).map(|failure| {
            format!(
                "the kernel refuses {} routes of BGP peers, such as {failure}; packets take other \
                 routes or none",
                progress.failed
            )
        });
        self.problems.report("bgp-routes", true, text.as_deref());
    }

    /// When something is due although nothing happens.
    fn next_due(&self) -> Option<Instant> {
        let now = Instant::now();
        let report = self.running.as_ref().map(|running| running.report.borrow());
        let sessions = report
            .as_ref()
            .and_then(|report| report.as_ref()?.next_problem(now));
        let lasting = [
            self.reading_since.map(|since| since + READING),
            self.failing_since.map(|since| since + GRACE),
        ];
        let due = lasting.into_iter().flatten().filter(|at| *at > now);
        due.chain(sessions).chain(self.restart).min()
    }
}
