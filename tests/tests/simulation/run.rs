//! What every part of a run has at hand: the log, the first violation, the planted fault and the
//! virtual clock.

use std::fmt::Display;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::plant::Plant;

/// A run of one schedule; cheap to clone.
#[derive(Clone)]
pub struct Run(Arc<Inner>);

struct Inner {
    seed: u64,
    plant: Option<Plant>,
    start: Instant,
    /// Lines are kept only where somebody will read them.
    is_traced: bool,
    lines: Mutex<Vec<String>>,
    violation: Mutex<Option<String>>,
}

impl Run {
    /// Starts a run now.
    pub fn new(seed: u64, plant: Option<Plant>, is_traced: bool) -> Self {
        Self(Arc::new(Inner {
            seed,
            plant,
            start: Instant::now(),
            is_traced,
            lines: Mutex::default(),
            violation: Mutex::default(),
        }))
    }

    /// Random numbers of one part of the run. Parts with names of their own do not disturb each
    /// other.
    pub fn dice(&self, part: &str) -> fastrand::Rng {
        // FNV-1a: the same on every machine and in every version.
        let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let part = part.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
        fastrand::Rng::with_seed(self.0.seed ^ part)
    }

    /// Notes what happens, for whoever reads the trace.
    pub fn note(&self, who: &str, text: impl FnOnce() -> String) {
        if self.0.is_traced {
            let at = self.0.start.elapsed().as_millis();
            self.0
                .lines
                .lock()
                .push(format!("{at:>7} ms  {who:<10} {}", text()));
        }
    }

    /// Records a violation; only the first counts, as others follow from it.
    pub fn fail(&self, who: &str, violation: impl Display) {
        let mut first = self.0.violation.lock();
        if first.is_none() {
            let at = self.0.start.elapsed().as_millis();
            *first = Some(format!("{who}: {violation}"));
            if self.0.is_traced {
                self.0
                    .lines
                    .lock()
                    .push(format!("{at:>7} ms  {who:<10} VIOLATION: {violation}"));
            }
        }
    }

    /// The first violation.
    pub fn violation(&self) -> Option<String> {
        self.0.violation.lock().clone()
    }

    /// Returns true if this fault is planted.
    pub fn has(&self, plant: Plant) -> bool {
        self.0.plant == Some(plant)
    }

    /// The trace so far.
    pub fn lines(&self) -> Vec<String> {
        self.0.lines.lock().clone()
    }

    /// Virtual time since the start, in milliseconds.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.0.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
