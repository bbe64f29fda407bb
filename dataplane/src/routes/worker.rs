//! The route worker: the thread that owns the [`Driver`], and its handle.
//!
//! Only the newest plan matters: plans that arrive while one is applied replace each other. A plan
//! that failed in part is retried with growing delay, and at once when links or addresses change. A
//! notification that differs from the plan makes it read back and repair.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::driver::{ApplyOutcome, Driver, RoutingPart};
use super::hint::{self, Hint, HintFilter};
use super::learned::{Learned, LearnedRoutes};
use super::monitor::Monitor;
use super::parameters;
use super::plan::{LocalPods, Plan};
use super::sysctl::ChangedParameter;
use margay_netlink::route::{NetlinkError, RouteSocket};
use margay_runtime::backoff::{Backoff, jitter};

/// Minimal and maximal delay between attempts.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Interval of reading back and comparing everything, even if no change was noticed.
const FULL_CHECK: Duration = Duration::from_secs(120);
/// Interval of comparing kernel parameters, most of which have no notification. One takes about 8
/// us of CPU, and a pod's link has 17: 15 ms for 110 pods.
const PARAMETERS: Duration = Duration::from_secs(10);
/// Notifications within this time are handled together.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// After a repair, the next one waits this many times the CPU time that it took: a program that
/// keeps changing our routes costs no more than that. On a busy machine a repair lasts longer, but
/// does not cost more.
const REPAIR_REST: u32 = 10;
/// Maximal wait after a repair: what others change is noticed within a second.
const MAX_REST: Duration = Duration::from_millis(500);
/// Maximal number of failed parts logged at once.
const MAX_LOGGED: usize = 10;
/// Minimal interval between reads of notifications: many come together.
const READ_INTERVAL: Duration = Duration::from_millis(5);

/// Progress of the kernel towards the newest plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Generation of the newest plan applied, with or without failures.
    pub generation: u64,
    /// Failed parts of the plan, with the reason.
    pub failed: BTreeMap<RoutingPart, String>,
    /// Number of repairs after changes by other programs.
    pub repairs: u64,
    /// Parameters of the host itself that were changed since the start, by name, with their first
    /// value.
    pub changed: BTreeMap<String, ChangedParameter>,
}

enum Wake {
    /// There is a new plan, or there are hints.
    Work,
    End,
}

/// Ends the worker when the last handle is dropped.
struct WorkerGuard(SyncSender<Wake>);

impl Drop for WorkerGuard {
    fn drop(&mut self) {
        // The worker may have ended already.
        let _ = self.0.send(Wake::End);
    }
}

#[derive(Default)]
struct Wanted {
    generation: u64,
    plan: Option<Plan>,
    /// Pods of the node, newer than the plan.
    pods: Option<LocalPods>,
}

/// Pending hints.
type Hints = Arc<Mutex<BTreeSet<Hint>>>;

/// Handle to the route worker. Cheap to clone. The worker ends with the last handle; what is in the
/// kernel stays.
#[derive(Clone)]
pub struct Network {
    wanted: Arc<Mutex<Wanted>>,
    guard: Arc<WorkerGuard>,
    progress: watch::Receiver<Progress>,
    learned: LearnedRoutes,
}

impl Network {
    /// Starts the worker and the monitor thread in the calling thread's network namespace.
    pub fn spawn() -> Result<Self, NetlinkError> {
        let (driver, monitor) = (Driver::open()?, Monitor::open()?);
        // One queued wake-up is enough: the worker reads `wanted` and `hints`.
        let (wake, woken) = mpsc::sync_channel(1);
        let (progress, seen) = watch::channel(Progress::default());
        let (wanted, hints) = (Arc::new(Mutex::new(Wanted::default())), Hints::default());
        let guard = Arc::new(WorkerGuard(wake.clone()));
        let waker = guard.clone();
        let (learned, learned_routes) = Learned::new(move || {
            // As in `change_wanted`.
            let _ = waker.0.try_send(Wake::Work);
        });
        let parts = (driver, learned, RouteSocket::open()?);
        let owner = RouteOwner::new(parts, wanted.clone(), hints.clone(), progress);
        thread::Builder::new()
            .name("net".to_owned())
            .spawn(move || owner.run(&woken))?;
        let monitor_wake = wake.clone();
        thread::Builder::new()
            .name("net-monitor".to_owned())
            .spawn(move || listen(monitor, &hints, &monitor_wake))?;
        Ok(Self {
            wanted,
            guard,
            progress: seen,
            learned: learned_routes,
        })
    }

    /// Where routes that BGP peers have sent are set.
    pub fn learned(&self) -> LearnedRoutes {
        self.learned.clone()
    }

    /// Replaces the wanted plan and returns its generation.
    pub fn set_plan(&self, plan: Plan) -> u64 {
        self.change_wanted(|wanted| (wanted.plan, wanted.pods) = (Some(plan), None))
    }

    /// Replaces the node's own pods in the newest plan and returns its generation. Without a plan,
    /// these pods are the plan.
    pub fn set_pods(&self, pods: LocalPods) -> u64 {
        self.change_wanted(|wanted| wanted.pods = Some(pods))
    }

    fn change_wanted(&self, change: impl FnOnce(&mut Wanted)) -> u64 {
        let mut wanted = self.wanted.lock();
        wanted.generation += 1;
        change(&mut wanted);
        let generation = wanted.generation;
        drop(wanted);
        // A full channel holds a wake-up already, and the worker reads the newest plan when it
        // handles it.
        let _ = self.guard.0.try_send(Wake::Work);
        generation
    }

    /// Waits until the plan of this generation or a newer one is applied.
    pub async fn wait_applied(&self, generation: u64) -> Progress {
        self.wait_for(|progress| progress.generation >= generation)
            .await
    }

    /// Waits until the progress meets a condition and returns it; if the worker has ended, returns
    /// the last progress.
    pub async fn wait_for(&self, condition: impl Fn(&Progress) -> bool) -> Progress {
        let mut progress = self.progress.clone();
        match progress.wait_for(|progress| condition(progress)).await {
            Ok(progress) => progress.clone(),
            Err(_) => self.progress.borrow().clone(),
        }
    }

    /// Progress of the kernel towards the newest plan.
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Progress of the kernel towards the newest plan.
    pub fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }
}

/// Forwards the kernel's notifications to the worker until it ends.
fn listen(mut monitor: Monitor, hints: &Hints, wake: &SyncSender<Wake>) {
    loop {
        match monitor.wait() {
            Ok(new) => hint::merge_hints(&mut hints.lock(), new),
            Err(error) => {
                tracing::error!(
                    %error,
                    "the route monitor failed: changes by other programs are found by the periodic \
                     check only; restart the agent",
                );
                return;
            }
        }
        if let Err(mpsc::TrySendError::Disconnected(_)) = wake.try_send(Wake::Work) {
            return;
        }
        thread::sleep(READ_INTERVAL);
    }
}

struct RouteOwner {
    driver: Driver,
    wanted: Arc<Mutex<Wanted>>,
    hints: Hints,
    progress: watch::Sender<Progress>,
    learned: Learned,
    /// For learnt routes.
    socket: RouteSocket,
    learned_backoff: Backoff,
    /// Time of the next retry of learnt routes.
    learned_retry: Option<Instant>,
    plan: Option<Plan>,
    /// Parts that failed last.
    failed: BTreeMap<RoutingPart, String>,
    /// Whether the failed apply was a repair. Its retries are repairs too: if the first attempt
    /// comes before a link is up again, a retry does the work.
    is_repairing: bool,
    /// Time of the next retry.
    retry: Option<Instant>,
    backoff: Backoff,
    /// When pending hints are checked.
    look: Option<Instant>,
    check: Instant,
    /// When kernel parameters are compared.
    parameters: Instant,
    /// Earliest time of the next check of hints.
    next_look: Instant,
}

impl RouteOwner {
    fn new(
        (driver, learned, socket): (Driver, Learned, RouteSocket),
        wanted: Arc<Mutex<Wanted>>,
        hints: Hints,
        progress: watch::Sender<Progress>,
    ) -> Self {
        let now = Instant::now();
        Self {
            driver,
            wanted,
            hints,
            progress,
            learned,
            socket,
            learned_backoff: Backoff::new(RETRY.0, RETRY.1),
            learned_retry: None,
            plan: None,
            failed: BTreeMap::new(),
            is_repairing: false,
            retry: None,
            backoff: Backoff::new(RETRY.0, RETRY.1),
            look: None,
            check: now + FULL_CHECK,
            parameters: now + PARAMETERS,
            next_look: now,
        }
    }

    fn run(mut self, woken: &mpsc::Receiver<Wake>) {
        loop {
            let periodic = self.check.min(self.parameters);
            let learned = self.has_learned_work().then(Instant::now);
            let due = [self.retry, self.look, learned, self.learned_retry]
                .into_iter()
                .flatten()
                .fold(periodic, Instant::min);
            match woken.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(Wake::Work) => self.handle_wake(),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Wake::End) | Err(RecvTimeoutError::Disconnected) => return,
            }
            self.run_due(Instant::now());
        }
    }

    fn handle_wake(&mut self) {
        let is_new = {
            let wanted = self.wanted.lock();
            wanted.plan.is_some() || wanted.pods.is_some()
        };
        self.learned.take_changes();
        if is_new {
            self.apply(false);
        }
        if !self.hints.lock().is_empty() {
            let soon = (Instant::now() + DEBOUNCE).max(self.next_look);
            self.look.get_or_insert(soon);
        }
    }

    fn run_due(&mut self, now: Instant) {
        if self.look.is_some_and(|at| at <= now) {
            self.look = None;
            let before = thread_cpu_time();
            self.check_hints();
            self.next_look = Instant::now() + rest_after(thread_cpu_time().saturating_sub(before));
        }
        if self.parameters <= now {
            self.parameters = now + PARAMETERS;
            if self.plan.as_ref().is_some_and(parameters::any_differs) {
                self.driver.mark_stale();
                self.apply(true);
            }
        }
        if self.check <= now {
            self.check = now + FULL_CHECK;
            self.learned.mark_stale();
            self.driver.mark_stale();
            self.apply(true);
        }
        if self.retry.is_some_and(|at| at <= now) {
            self.driver.mark_stale();
            self.apply(self.is_repairing);
        }
        if self.learned_retry.is_some_and(|at| at <= now) {
            self.learned_retry = None;
            self.learned.retry();
        }
        if self.has_learned_work() {
            self.exec_learned(None);
        }
    }

    /// Learnt routes are to be written. Not before the first plan, which may hide them.
    fn has_learned_work(&self) -> bool {
        self.plan.is_some() && self.learned.has_work()
    }

    /// Writes learnt routes: these, or a turn of what is pending.
    fn exec_learned(&mut self, nets: Option<&[IpNet]>) {
        let Some(plan) = &self.plan else { return };
        let hides = |net: &IpNet| plan.routes.contains_key(net);
        let written = match nets {
            Some(nets) => self.learned.exec_nets(&mut self.socket, nets, &hides),
            None => self.learned.exec(&mut self.socket, &hides),
        };
        if let Err(error) = &written {
            tracing::warn!(%error, "learnt routes could not be written; trying again");
        }
        if written.is_err() || self.learned.is_failing() {
            let soon = Instant::now() + self.learned_backoff.next(jitter());
            self.learned_retry.get_or_insert(soon);
        } else {
            self.learned_backoff.reset();
        }
    }

    /// Reads back and repairs if pending hints concern the plan.
    fn check_hints(&mut self) {
        let hints = std::mem::take(&mut *self.hints.lock());
        if self.learned.is_concerned(&hints) {
            self.learned.mark_stale();
            self.learned_backoff.reset();
            // Here, so that the rest after it grows with its cost.
            self.exec_learned(None);
        }
        let Some(plan) = &self.plan else { return };
        let filter = HintFilter {
            plan,
            missing: self.driver.missing(),
            is_failing: !self.failed.is_empty(),
        };
        if filter.needs_resync(&hints) {
            tracing::debug!(?hints, "notifications of changes by other programs");
            self.driver.mark_stale();
            // The cause of the failure may be gone: retry without delay.
            self.backoff.reset();
            self.apply(true);
        }
    }

    /// Takes the newest plan over. Returns the routes of the node's own pods that changed, if pods
    /// were given, and what concerns learnt routes: prefixes whose planned route came, changed or
    /// went.
    fn replace_plan(
        &mut self,
        newer: Option<Plan>,
        pods: Option<&LocalPods>,
    ) -> (Option<BTreeSet<IpNet>>, BTreeSet<IpNet>) {
        let mut touched = BTreeSet::new();
        if let Some(newer) = newer {
            let former = self.plan.take().unwrap_or_default();
            let routes = former.routes.keys().chain(newer.routes.keys());
            touched.extend(routes.filter(|net| self.learned.has(net)));
            self.plan = Some(newer);
        }
        if pods.is_some() {
            self.plan.get_or_insert_default();
        }
        let plan = self.plan.as_mut();
        let updated = pods.zip(plan).map(|(pods, plan)| plan.update_pods(pods));
        touched.extend(updated.iter().flatten());
        (updated, touched)
    }

    /// Applies the newest plan. Changes made without a new plan count as a repair.
    fn apply(&mut self, is_repair: bool) {
        let (generation, newer, pods) = {
            let mut wanted = self.wanted.lock();
            (wanted.generation, wanted.plan.take(), wanted.pods.take())
        };
        let is_repair = is_repair && newer.is_none() && pods.is_none();
        // Failed parts are retried with the whole plan.
        let is_whole = newer.is_some() || self.plan.is_none() || !self.failed.is_empty();
        let (updated, touched) = self.replace_plan(newer, pods.as_ref());
        // A learnt route that comes in the place of a planned one is written before that goes, and
        // one that is hidden goes afterwards: no packet falls in between.
        let Some(plan) = &self.plan else { return };
        let (planned, unplanned): (Vec<IpNet>, Vec<IpNet>) = touched
            .into_iter()
            .partition(|net| plan.routes.contains_key(net));
        self.exec_learned(Some(&unplanned));
        self.learned.touch(&planned);
        let Some(plan) = &self.plan else { return };
        let applied = match updated {
            Some(updated) if !is_whole => self.driver.apply_pods(plan, &updated),
            _ => self.driver.apply(plan),
        };
        let ApplyOutcome {
            done,
            failed,
            changed,
        } = applied.unwrap_or_else(|error| ApplyOutcome {
            failed: BTreeMap::from([(RoutingPart::Netlink, error.to_string())]),
            ..ApplyOutcome::default()
        });
        for ChangedParameter {
            parameter,
            former,
            now,
        } in &changed
        {
            tracing::warn!(
                parameter,
                former,
                now,
                "changed a kernel parameter of this host, as pods need it"
            );
        }
        let new_failures: Vec<_> = failed
            .iter()
            .filter(|(what, reason)| self.failed.get(*what) != Some(*reason))
            .collect();
        for (what, reason) in new_failures.iter().take(MAX_LOGGED) {
            tracing::warn!(
                %what,
                reason,
                more = new_failures.len().saturating_sub(MAX_LOGGED),
                "routing could not be programmed; trying again",
            );
        }
        if is_repair && done > 0 {
            tracing::info!(
                done,
                "other programs had changed routes, links or kernel parameters that pods need; \
                 they have been restored"
            );
        }
        if !self.failed.is_empty() && failed.is_empty() {
            tracing::info!("routing is programmed again");
        }
        self.retry = (!failed.is_empty()).then(|| Instant::now() + self.backoff.next(jitter()));
        if self.retry.is_none() {
            self.backoff.reset();
        }
        self.is_repairing = is_repair && !failed.is_empty();
        self.failed.clone_from(&failed);
        self.progress.send_modify(|progress| {
            progress.generation = generation;
            progress.repairs += u64::from(is_repair && done > 0);
            progress.failed = failed;
            for change in changed {
                progress
                    .changed
                    .entry(change.parameter.clone())
                    .or_insert(change);
            }
        });
    }
}

/// CPU time of the calling thread, in the kernel too.
fn thread_cpu_time() -> Duration {
    // It fails only where the kernel has no such clock; the rest is then the shortest.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Time from a repair of this cost to the next one.
fn rest_after(cost: Duration) -> Duration {
    (cost * REPAIR_REST).min(MAX_REST)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::routes::plan::Target;

    /// Runs `ip` in the namespace of the calling thread.
    fn ip(words: &str) {
        let output = Command::new("ip")
            .args(words.split(' '))
            .output()
            .expect("ip is installed");
        assert!(
            output.status.success(),
            "ip {words}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// The first attempt comes while the gateway is unreachable, as if another program took longer
    /// between `down` and `up` than notifications are delayed.
    fn repair_in_two_attempts() {
        unshare(CloneFlags::CLONE_NEWNET)
            .expect("these tests make network namespaces: run them as root");
        ip("link add eth0 type veth peer name other");
        ip("link set eth0 up");
        ip("link set other up");
        ip("address add 172.30.0.1/24 dev eth0");
        let (progress, seen) = watch::channel(Progress::default());
        let (learned, _routes) = Learned::new(|| ());
        let socket = RouteSocket::open().expect("root");
        let mut owner = RouteOwner::new(
            (Driver::open().expect("root"), learned, socket),
            Arc::default(),
            Hints::default(),
            progress,
        );
        let via: IpAddr = "172.30.0.2".parse().expect("an address");
        let destination = "10.244.2.0/26".parse().expect("a range");
        owner.plan = Some(Plan {
            routes: [(destination, Target::Gateway { via })].into(),
            ..Plan::default()
        });
        owner.apply(false);
        assert_eq!(
            seen.borrow().clone(),
            Progress::default(),
            "a plan is no repair"
        );

        ip("address del 172.30.0.1/24 dev eth0");
        let own: IpAddr = "172.30.0.1".parse().expect("an address");
        owner.hints.lock().insert(Hint::AddressRemoved(own));
        owner.check_hints();
        let early = seen.borrow().clone();
        assert_eq!((early.failed.len(), early.repairs), (1, 0), "{early:?}");

        ip("address add 172.30.0.1/24 dev eth0");
        owner.run_due(Instant::now() + RETRY.1);
        let late = seen.borrow().clone();
        assert_eq!((late.failed.len(), late.repairs), (0, 1), "{late:?}");
    }

    #[test]
    fn the_rest_after_a_repair_grows_with_its_cost_up_to_a_bound() {
        for (cost, rest) in [(0, 0), (1, 10), (40, 400), (50, 500), (5_000, 500)] {
            assert_eq!(
                rest_after(Duration::from_millis(cost)),
                Duration::from_millis(rest),
                "{cost} ms"
            );
        }
        let before = thread_cpu_time();
        while thread_cpu_time() == before {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn a_repair_that_takes_several_attempts_is_counted() {
        let thread = thread::spawn(repair_in_two_attempts);
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}
