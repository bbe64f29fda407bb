//! A fresh question at a fixed pace, none of them waiting for the one before: shows to half a
//! millisecond when packets began to obey.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::{Attempt, Place, Target, Verdict};

/// How often answers are collected; verdicts are dated by their start, so this costs no precision.
const COLLECT: Duration = Duration::from_millis(5);
/// How many verdicts of one kind in a row make it certain that it is the new state.
const CERTAIN: usize = 5;

/// One question that was judged.
#[derive(Debug, Clone, Copy)]
pub struct Knocked {
    /// When it was asked.
    pub start: Instant,
    /// Result.
    pub verdict: Verdict,
}

/// Questions in flight, in the order of their starts. It lives on a thread inside the asking pod's
/// network.
#[derive(Debug)]
pub struct Knocker {
    target: Target,
    patience: Duration,
    open: VecDeque<(Attempt, Option<Verdict>)>,
}

impl Knocker {
    /// Asks `target`; what stays without an answer for `patience` is denied.
    pub fn new(target: Target, patience: Duration) -> Self {
        Self { target, patience, open: VecDeque::new() }
    }

    /// Asks once more.
    pub fn knock(&mut self) {
        self.open.push_back((Attempt::start(self.target), None));
    }

    /// Takes out what has been judged, oldest first, up to the first that is still open.
    pub fn collect(&mut self) -> Vec<Knocked> {
        let now = Instant::now();
        for (attempt, verdict) in self.open.iter_mut().filter(|(_, verdict)| verdict.is_none()) {
            let late = now.duration_since(attempt.start) >= self.patience;
            *verdict = attempt.look().or(late.then_some(Verdict::Silent));
        }
        let mut judged = Vec::new();
        while let Some((attempt, Some(verdict))) = self.open.front() {
            judged.push(Knocked { start: attempt.start, verdict: *verdict });
            self.open.pop_front();
        }
        judged
    }

    /// Whether every question was judged and taken.
    pub fn is_idle(&self) -> bool {
        self.open.is_empty()
    }
}

/// A [`Knocker`] on a thread of its own, until it is finished or dropped.
#[derive(Debug)]
pub struct Knock {
    records: Arc<Mutex<Vec<Knocked>>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Knock {
    /// Knocks at `target` from `place` every `interval`.
    pub fn start(place: &Place, target: Target, interval: Duration, patience: Duration) -> Result<Self> {
        let file = place.handle()?;
        let records = Arc::new(Mutex::new(Vec::new()));
        let end = Arc::new(AtomicBool::new(false));
        let (into, stop) = (records.clone(), end.clone());
        let thread = std::thread::spawn(move || {
            Place { file }.run(|| run(Knocker::new(target, patience), interval, &into, &stop))
        });
        Ok(Self { records, end, thread: Some(thread) })
    }

    /// What is known so far, ordered by start.
    pub fn records(&self) -> Vec<Knocked> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the first of five questions in a row that were asked after `since` and judged as
    /// wanted, and returns when it was asked.
    pub fn until(&self, wanted: Verdict, since: Instant, limit: Duration) -> Result<Instant> {
        let begin = Instant::now();
        loop {
            {
                let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
                let from = records.partition_point(|record| record.start < since);
                if let Some(run) =
                    records[from..].windows(CERTAIN).find(|run| run.iter().all(|record| record.verdict == wanted))
                {
                    return Ok(run[0].start);
                }
            }
            let running = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
            ensure!(running, "the prober ended");
            ensure!(begin.elapsed() < limit, "no {CERTAIN} questions in a row were {wanted:?} within {limit:?}");
            std::thread::sleep(COLLECT);
        }
    }

    /// Ends it and returns all that was found.
    pub fn finish(mut self) -> Result<Vec<Knocked>> {
        self.end.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else {
            bail!("the prober was finished before");
        };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(self.records())
    }
}

impl Drop for Knock {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

fn run(mut knocker: Knocker, interval: Duration, into: &Mutex<Vec<Knocked>>, end: &AtomicBool) {
    let (mut next, mut collected) = (Instant::now(), Instant::now());
    while !end.load(Ordering::Relaxed) || !knocker.is_idle() {
        let now = Instant::now();
        if !end.load(Ordering::Relaxed) {
            knocker.knock();
        }
        if now.duration_since(collected) >= COLLECT {
            collected = now;
            let judged = knocker.collect();
            into.lock().unwrap_or_else(PoisonError::into_inner).extend(judged);
        }
        // A late thread does not catch up by knocking in bursts.
        next = (next + interval).max(now);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}
