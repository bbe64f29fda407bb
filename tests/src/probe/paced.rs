//! Asks at a fixed pace without waiting for earlier questions: shows to half a millisecond when
//! packets began to obey.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use parking_lot::Mutex;

use super::{Attempt, Place, Target, Verdict};

/// Interval at which answers are collected; verdicts are dated by their start, so this costs no
/// precision.
const COLLECT: Duration = Duration::from_millis(5);
/// Number of equal verdicts in a row that confirm a new state.
const CERTAIN: usize = 5;

/// A decided question.
#[derive(Debug, Clone, Copy)]
pub struct ProbeResult {
    /// When it was asked.
    pub start: Instant,
    /// Result.
    pub verdict: Verdict,
}

/// Questions in flight, in the order of their starts. It lives on a thread inside the asking pod's
/// network.
#[derive(Debug)]
pub struct PacedProber {
    target: Target,
    patience: Duration,
    open: VecDeque<(Attempt, Option<Verdict>)>,
}

impl PacedProber {
    /// Asks `target`; a question without an answer for `patience` is denied.
    pub fn new(target: Target, patience: Duration) -> Self {
        Self {
            target,
            patience,
            open: VecDeque::new(),
        }
    }

    /// Asks once more.
    pub fn probe(&mut self) {
        self.open.push_back((Attempt::start(self.target), None));
    }

    /// Takes decided questions, oldest first, up to the first that is still open.
    pub fn collect(&mut self) -> Vec<ProbeResult> {
        let now = Instant::now();
        for (attempt, verdict) in self
            .open
            .iter_mut()
            .filter(|(_, verdict)| verdict.is_none())
        {
            let late = now.duration_since(attempt.start) >= self.patience;
            *verdict = attempt.look().or(late.then_some(Verdict::Silent));
        }
        let mut decided = Vec::new();
        while let Some((attempt, Some(verdict))) = self.open.front() {
            decided.push(ProbeResult {
                start: attempt.start,
                verdict: *verdict,
            });
            self.open.pop_front();
        }
        decided
    }

    /// Returns whether every question was decided and taken.
    pub fn is_idle(&self) -> bool {
        self.open.is_empty()
    }
}

/// A [`PacedProber`] on a thread of its own, until it is finished or dropped.
#[derive(Debug)]
pub struct PacedProbe {
    records: Arc<Mutex<Vec<ProbeResult>>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl PacedProbe {
    /// Probes `target` from `place` every `interval`.
    pub fn start(
        place: &Place,
        target: Target,
        interval: Duration,
        patience: Duration,
    ) -> Result<Self> {
        let file = place.handle()?;
        let records = Arc::new(Mutex::new(Vec::new()));
        let end = Arc::new(AtomicBool::new(false));
        let (into, stop) = (records.clone(), end.clone());
        let thread = std::thread::spawn(move || {
            Place { file }.run(|| run(PacedProber::new(target, patience), interval, &into, &stop))
        });
        Ok(Self {
            records,
            end,
            thread: Some(thread),
        })
    }

    /// Results so far, ordered by start.
    pub fn records(&self) -> Vec<ProbeResult> {
        self.records.lock().clone()
    }

    /// Waits for the first of five questions in a row that were asked after `since` and decided as
    /// wanted, and returns when it was asked.
    pub fn until(&self, wanted: Verdict, since: Instant, limit: Duration) -> Result<Instant> {
        let begin = Instant::now();
        loop {
            {
                let records = self.records.lock();
                let from = records.partition_point(|record| record.start < since);
                if let Some(run) = records[from..]
                    .windows(CERTAIN)
                    .find(|run| run.iter().all(|record| record.verdict == wanted))
                {
                    return Ok(run[0].start);
                }
            }
            let running = self
                .thread
                .as_ref()
                .is_some_and(|thread| !thread.is_finished());
            ensure!(running, "the prober ended");
            ensure!(
                begin.elapsed() < limit,
                "no {CERTAIN} questions in a row were {wanted:?} within {limit:?}"
            );
            std::thread::sleep(COLLECT);
        }
    }

    /// Ends it and returns all results.
    pub fn finish(mut self) -> Result<Vec<ProbeResult>> {
        self.end.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else {
            bail!("the prober was finished before");
        };
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(self.records())
    }
}

impl Drop for PacedProbe {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

fn run(
    mut prober: PacedProber,
    interval: Duration,
    into: &Mutex<Vec<ProbeResult>>,
    end: &AtomicBool,
) {
    let (mut next, mut collected) = (Instant::now(), Instant::now());
    while !end.load(Ordering::Relaxed) || !prober.is_idle() {
        let now = Instant::now();
        if !end.load(Ordering::Relaxed) {
            prober.probe();
        }
        if now.duration_since(collected) >= COLLECT {
            collected = now;
            let decided = prober.collect();
            into.lock().extend(decided);
        }
        // A late thread does not catch up with bursts of probes.
        next = (next + interval).max(now);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}
