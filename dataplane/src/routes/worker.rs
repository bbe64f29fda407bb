//! The thread that owns the [`Driver`], and the handle that others have of it.
//!
//! Only the newest plan matters: plans that arrive while one is being applied replace each other. A plan that failed in part is tried again with growing delay,
//! and at once when links or addresses change; what the kernel tells of and is not as wanted makes it read back and repair.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::driver::{Driver, Outcome, Part};
use super::hint::{self, Hint, Interest};
use super::monitor::Monitor;
use super::parameters;
use super::plan::{LocalPods, Plan};
use super::sysctl::Changed;
use margay_netlink::route::NetlinkError;
use margay_runtime::backoff::{Backoff, jitter};

/// Delays between attempts at what failed.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Everything is read back and compared this often even if nothing was noticed.
const FULL_CHECK: Duration = Duration::from_secs(120);
/// Interval of comparing kernel parameters, most of which have no notification. It takes about 8 us of CPU for each, and a pod's link has 17: for 110 pods
/// 15 ms.
const PARAMETERS: Duration = Duration::from_secs(10);
/// Notifications that come within this time are taken together.
const SETTLE: Duration = Duration::from_millis(50);
/// After a repair there is none for so many times as long as it took: whoever fights with us over a route costs no more than that.
const REST: u32 = 10;
/// What failed is named in the log up to so many at once.
const NAMED: usize = 10;
/// Notifications are read in turns of this length: many come together.
const TURN: Duration = Duration::from_millis(5);

/// How far the kernel has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Generation of the newest plan that has been applied, with or without failures.
    pub generation: u64,
    /// What of it failed, with the reason.
    pub failed: BTreeMap<Part, String>,
    /// How often the kernel had to be repaired after somebody else's change.
    pub repairs: u64,
    /// Parameters of the host itself that have been changed since the start, by name, with what they were first.
    pub changed: BTreeMap<String, Changed>,
}

enum Wake {
    /// There is a plan, or there are hints.
    Work,
    End,
}

/// Ends the owner with the last handle.
struct Life(SyncSender<Wake>);

impl Drop for Life {
    fn drop(&mut self) {
        // An owner that has ended already needs no word.
        let _ = self.0.send(Wake::End);
    }
}

#[derive(Default)]
struct Wanted {
    generation: u64,
    plan: Option<Plan>,
    /// Pods of the node that came after the plan.
    pods: Option<LocalPods>,
}

/// Hints that wait for the owner.
type Hints = Arc<Mutex<BTreeSet<Hint>>>;

/// A handle to the routing of this node, which ends with the last of them; what is in the kernel stays. Cheap to clone.
#[derive(Clone)]
pub struct Network {
    wanted: Arc<Mutex<Wanted>>,
    life: Arc<Life>,
    progress: watch::Receiver<Progress>,
}

impl Network {
    /// Starts the owner thread and the thread that listens to the kernel, both in the namespace of the calling thread.
    pub fn spawn() -> Result<Self, NetlinkError> {
        let (driver, monitor) = (Driver::open()?, Monitor::open()?);
        // One waiting wake-up is enough: what it stands for is read from `wanted` and `hints`.
        let (wake, woken) = mpsc::sync_channel(1);
        let (progress, seen) = watch::channel(Progress::default());
        let (wanted, hints) = (Arc::new(Mutex::new(Wanted::default())), Hints::default());
        let owner = Owner::new(driver, wanted.clone(), hints.clone(), progress);
        thread::Builder::new().name("net".to_owned()).spawn(move || owner.run(&woken))?;
        let surprise = wake.clone();
        thread::Builder::new().name("net-monitor".to_owned()).spawn(move || listen(monitor, &hints, &surprise))?;
        Ok(Self { wanted, life: Arc::new(Life(wake)), progress: seen })
    }

    /// Makes this the wanted plan; returns its generation.
    pub fn want(&self, plan: Plan) -> u64 {
        self.change(|wanted| (wanted.plan, wanted.pods) = (Some(plan), None))
    }

    /// Makes the newest plan one of these pods of the node; returns its generation. Without a plan, one of them alone.
    pub fn want_pods(&self, pods: LocalPods) -> u64 {
        self.change(|wanted| wanted.pods = Some(pods))
    }

    fn change(&self, change: impl FnOnce(&mut Wanted)) -> u64 {
        let mut wanted = self.wanted.lock();
        wanted.generation += 1;
        change(&mut wanted);
        let generation = wanted.generation;
        drop(wanted);
        // A full channel holds a wake-up already, and the owner reads the newest plan when it comes to it.
        let _ = self.life.0.try_send(Wake::Work);
        generation
    }

    /// Waits until the plan of this generation, or a newer one, has been applied.
    pub async fn applied(&self, generation: u64) -> Progress {
        self.until(|progress| progress.generation >= generation).await
    }

    /// Waits until the progress is as asked for; returns the progress. If the owner is gone, the last progress that it made.
    pub async fn until(&self, condition: impl Fn(&Progress) -> bool) -> Progress {
        let mut progress = self.progress.clone();
        match progress.wait_for(|progress| condition(progress)).await {
            Ok(progress) => progress.clone(),
            Err(_) => self.progress.borrow().clone(),
        }
    }

    /// How far the kernel has come, as that changes.
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// How far the kernel has come.
    pub fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }
}

/// Hands the kernel's notifications to the owner until that has ended.
fn listen(mut monitor: Monitor, hints: &Hints, wake: &SyncSender<Wake>) {
    loop {
        match monitor.wait() {
            Ok(new) => hint::merge(&mut hints.lock(), new),
            Err(error) => {
                tracing::error!(%error, "what others do to routes is found by the periodic check only; restart the agent");
                return;
            }
        }
        if let Err(mpsc::TrySendError::Disconnected(_)) = wake.try_send(Wake::Work) {
            return;
        }
        thread::sleep(TURN);
    }
}

struct Owner {
    driver: Driver,
    wanted: Arc<Mutex<Wanted>>,
    hints: Hints,
    progress: watch::Sender<Progress>,
    plan: Option<Plan>,
    /// What failed last.
    failed: BTreeMap<Part, String>,
    /// Whether that was a repair. Its later attempts are too: where the first one comes before a link is up again, they do the work.
    is_repairing: bool,
    /// The next attempt at what failed.
    retry: Option<Instant>,
    backoff: Backoff,
    /// When hints are looked at.
    look: Option<Instant>,
    check: Instant,
    /// When parameters are compared.
    parameters: Instant,
    /// No look before this.
    rested: Instant,
}

impl Owner {
    fn new(driver: Driver, wanted: Arc<Mutex<Wanted>>, hints: Hints, progress: watch::Sender<Progress>) -> Self {
        let now = Instant::now();
        Self {
            driver,
            wanted,
            hints,
            progress,
            plan: None,
            failed: BTreeMap::new(),
            is_repairing: false,
            retry: None,
            backoff: Backoff::new(RETRY.0, RETRY.1),
            look: None,
            check: now + FULL_CHECK,
            parameters: now + PARAMETERS,
            rested: now,
        }
    }

    fn run(mut self, woken: &mpsc::Receiver<Wake>) {
        loop {
            let periodic = self.check.min(self.parameters);
            let due = [self.retry, self.look].into_iter().flatten().fold(periodic, Instant::min);
            match woken.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(Wake::Work) => self.wake_up(),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Wake::End) | Err(RecvTimeoutError::Disconnected) => return,
            }
            self.overdue(Instant::now());
        }
    }

    fn wake_up(&mut self) {
        let is_new = {
            let wanted = self.wanted.lock();
            wanted.plan.is_some() || wanted.pods.is_some()
        };
        if is_new {
            self.apply(false);
        }
        if !self.hints.lock().is_empty() {
            let soon = (Instant::now() + SETTLE).max(self.rested);
            self.look.get_or_insert(soon);
        }
    }

    fn overdue(&mut self, now: Instant) {
        if self.look.is_some_and(|at| at <= now) {
            self.look = None;
            self.look();
            self.rested = Instant::now() + now.elapsed() * REST;
        }
        if self.parameters <= now {
            self.parameters = now + PARAMETERS;
            if self.plan.as_ref().is_some_and(parameters::differ) {
                self.driver.mark_stale();
                self.apply(true);
            }
        }
        if self.check <= now {
            self.check = now + FULL_CHECK;
            self.driver.mark_stale();
            self.apply(true);
        }
        if self.retry.is_some_and(|at| at <= now) {
            self.driver.mark_stale();
            self.apply(self.is_repairing);
        }
    }

    /// Reads back and repairs, if the kernel told of anything that is not as wanted.
    fn look(&mut self) {
        let hints = std::mem::take(&mut *self.hints.lock());
        let Some(plan) = &self.plan else { return };
        let interest = Interest { plan, missing: self.driver.missing(), is_failing: !self.failed.is_empty() };
        if interest.is_touched(&hints) {
            tracing::debug!(?hints, "the kernel told of changes by others");
            self.driver.mark_stale();
            // Whatever hindered may be gone.
            self.backoff.reset();
            self.apply(true);
        }
    }

    /// Brings the kernel to the newest plan. What is done though the plan is not new is a repair.
    fn apply(&mut self, is_repair: bool) {
        let (generation, newer, pods) = {
            let mut wanted = self.wanted.lock();
            (wanted.generation, wanted.plan.take(), wanted.pods.take())
        };
        let is_repair = is_repair && newer.is_none() && pods.is_none();
        // What failed is tried again with the whole plan.
        let is_whole = newer.is_some() || self.plan.is_none() || !self.failed.is_empty();
        if newer.is_some() {
            self.plan = newer;
        }
        if pods.is_some() {
            self.plan.get_or_insert_default();
        }
        let Some(plan) = &mut self.plan else { return };
        let updated = pods.map(|pods| plan.update_pods(&pods));
        let applied = match updated {
            Some(updated) if !is_whole => self.driver.apply_pods(plan, &updated),
            _ => self.driver.apply(plan),
        };
        let Outcome { done, failed, changed } = applied.unwrap_or_else(|error| Outcome {
            failed: BTreeMap::from([(Part::Netlink, error.to_string())]),
            ..Outcome::default()
        });
        for Changed { parameter, former, now } in &changed {
            tracing::warn!(parameter, former, now, "a kernel parameter of this host has been changed, as pods need it");
        }
        let news: Vec<_> = failed.iter().filter(|(what, reason)| self.failed.get(*what) != Some(*reason)).collect();
        for (what, reason) in news.iter().take(NAMED) {
            tracing::warn!(%what, reason, more = news.len().saturating_sub(NAMED), "routing is not as wanted; trying again");
        }
        if is_repair && done > 0 {
            tracing::info!(
                done,
                "others had changed routes, links or kernel parameters that pods need; they are as wanted again"
            );
        }
        if !self.failed.is_empty() && failed.is_empty() {
            tracing::info!("routing is as wanted again");
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
                progress.changed.entry(change.parameter.clone()).or_insert(change);
            }
        });
    }
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
        let output = Command::new("ip").args(words.split(' ')).output().expect("ip is installed");
        assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The first attempt comes while the gateway cannot be reached, as where somebody needs longer for `down` and `up` than notifications are waited for.
    fn repair_in_two_attempts() {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests make network namespaces: run them as root");
        ip("link add eth0 type veth peer name other");
        ip("link set eth0 up");
        ip("link set other up");
        ip("address add 172.30.0.1/24 dev eth0");
        let (progress, seen) = watch::channel(Progress::default());
        let mut owner = Owner::new(Driver::open().expect("root"), Arc::default(), Hints::default(), progress);
        let via: IpAddr = "172.30.0.2".parse().expect("an address");
        let destination = "10.244.2.0/26".parse().expect("a range");
        owner.plan = Some(Plan { routes: [(destination, Target::Gateway { via })].into(), ..Plan::default() });
        owner.apply(false);
        assert_eq!(seen.borrow().clone(), Progress::default(), "a plan is no repair");

        ip("address del 172.30.0.1/24 dev eth0");
        let own: IpAddr = "172.30.0.1".parse().expect("an address");
        owner.hints.lock().insert(Hint::AddressGone(own));
        owner.look();
        let early = seen.borrow().clone();
        assert_eq!((early.failed.len(), early.repairs), (1, 0), "{early:?}");

        ip("address add 172.30.0.1/24 dev eth0");
        owner.overdue(Instant::now() + RETRY.1);
        let late = seen.borrow().clone();
        assert_eq!((late.failed.len(), late.repairs), (0, 1), "{late:?}");
    }

    #[test]
    fn a_repair_that_takes_several_attempts_is_counted() {
        let thread = thread::spawn(repair_in_two_attempts);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}
