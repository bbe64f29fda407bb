//! The thread that owns the [`Driver`], and the handle that others have of it.
//!
//! Only the newest plan matters: plans that arrive while one is being applied replace each other. A plan that failed in part is tried again with growing delay,
//! a surprise from the kernel makes it read back and repair.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tokio::sync::watch;

use super::driver::Driver;
use super::monitor::Monitor;
use super::netlink::NetlinkError;
use super::plan::Plan;

/// Delay before the first retry; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Everything is read back and compared this often even if nothing was noticed.
const FULL_CHECK: Duration = Duration::from_secs(120);
/// Notifications that follow a removal of ours within this time are taken together.
const SETTLE: Duration = Duration::from_millis(50);

/// How far the kernel has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Generation of the newest plan that has been applied, with or without failures.
    pub generation: u64,
    /// What of it failed, by what it was about.
    pub failed: BTreeMap<String, String>,
    /// How often the kernel had to be repaired after somebody else's change.
    pub repairs: u64,
}

enum Wake {
    Plan,
    Surprise,
}

#[derive(Default)]
struct Wanted {
    generation: u64,
    plan: Option<Plan>,
}

/// A handle to the routing of this node. Cheap to clone.
#[derive(Clone)]
pub struct Network {
    wanted: Arc<Mutex<Wanted>>,
    wake: SyncSender<Wake>,
    progress: watch::Receiver<Progress>,
}

impl Network {
    /// Starts the owner thread and the thread that listens to the kernel, both in the namespace of the calling thread.
    pub fn spawn() -> Result<Self, NetlinkError> {
        let (driver, mut monitor) = (Driver::open()?, Monitor::open()?);
        // One waiting wake-up of each kind is enough: what it stands for is read from `wanted` and the kernel.
        let (wake, woken) = mpsc::sync_channel(2);
        let (progress, seen) = watch::channel(Progress::default());
        let wanted = Arc::new(Mutex::new(Wanted::default()));
        let owner = Owner { driver, wanted: wanted.clone(), progress, plan: None };
        thread::Builder::new().name("net".to_owned()).spawn(move || owner.run(&woken))?;
        let surprise = wake.clone();
        thread::Builder::new().name("net-monitor".to_owned()).spawn(move || {
            while monitor.wait().is_ok() {
                if let Err(mpsc::TrySendError::Disconnected(_)) = surprise.try_send(Wake::Surprise) {
                    return;
                }
            }
        })?;
        Ok(Self { wanted, wake, progress: seen })
    }

    /// Makes this the wanted plan; returns its generation.
    pub fn want(&self, plan: Plan) -> u64 {
        let mut wanted = self.wanted.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        wanted.generation += 1;
        wanted.plan = Some(plan);
        let generation = wanted.generation;
        drop(wanted);
        // A full channel holds a wake-up already, and the owner reads the newest plan when it comes to it.
        let _ = self.wake.try_send(Wake::Plan);
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

    /// How far the kernel has come.
    pub fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }
}

struct Owner {
    driver: Driver,
    wanted: Arc<Mutex<Wanted>>,
    progress: watch::Sender<Progress>,
    plan: Option<Plan>,
}

impl Owner {
    fn run(mut self, woken: &mpsc::Receiver<Wake>) {
        let mut retry = None;
        loop {
            let mut repaired = false;
            match woken.recv_timeout(retry.unwrap_or(FULL_CHECK)) {
                Ok(Wake::Plan) => {}
                Ok(Wake::Surprise) => {
                    thread::sleep(SETTLE);
                    if !self.is_surprise() {
                        continue;
                    }
                    repaired = true;
                }
                Err(RecvTimeoutError::Timeout) => self.driver.mark_stale(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            retry = if self.apply(repaired) {
                None
            } else {
                Some(retry.map_or(RETRY_MIN, |delay: Duration| (delay * 2).min(RETRY_MAX)))
            };
        }
    }

    /// Whether the kernel lacks something wanted: our own removals are notified too.
    fn is_surprise(&mut self) -> bool {
        self.driver.mark_stale();
        self.plan.as_ref().is_some_and(|plan| self.driver.lacks(plan).unwrap_or(true))
    }

    /// Whether everything wanted is in force.
    fn apply(&mut self, repaired: bool) -> bool {
        let (generation, newer) = {
            let mut wanted = self.wanted.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            (wanted.generation, wanted.plan.take())
        };
        if let Some(plan) = newer {
            self.plan = Some(plan);
        }
        let Some(plan) = &self.plan else { return true };
        let failed = match self.driver.apply(plan) {
            Ok(outcome) => outcome.failed,
            Err(error) => BTreeMap::from([("netlink".to_owned(), error.to_string())]),
        };
        for (what, error) in &failed {
            tracing::warn!(what, error, "routing is not as wanted; trying again");
        }
        let done = failed.is_empty();
        self.progress.send_modify(|progress| {
            progress.generation = generation;
            progress.repairs += u64::from(repaired);
            progress.failed = failed;
        });
        done
    }
}
