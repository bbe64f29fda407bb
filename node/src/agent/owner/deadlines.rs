//! Work that is due at a time and not because of an event: comparisons and saves.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::metrics::Kind;

use super::{SAVE_DELAY, StateOwner};

/// Interval of reading back and comparing the whole table even if no change was noticed.
pub(super) const FULL_CHECK: Duration = Duration::from_secs(120);
/// After a save, the next one waits this many times as long as it took, so that a large view that
/// changes all the time is not written all the time.
const SAVE_REST: u32 = 500;

const KINDS: [&str; 8] = [
    "settings",
    "pool",
    "node",
    "route",
    "ip-set",
    "policy",
    "endpoint",
    "host-endpoint",
];

/// Deadlines of work that no event triggers.
pub(super) struct Deadlines {
    pub(super) check: Instant,
    pub(super) save: Option<Instant>,
    /// Earliest time of the next save.
    pub(super) next_save: Instant,
    pub(super) retry: Option<Instant>,
    /// When routing that differs from the plan has to be reported.
    pub(super) fault: Option<Instant>,
}

impl Deadlines {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            check: now + FULL_CHECK,
            save: None,
            next_save: now,
            retry: None,
            fault: None,
        }
    }

    pub(super) fn next(&self) -> Instant {
        [self.save, self.retry, self.fault]
            .into_iter()
            .flatten()
            .fold(self.check, Instant::min)
    }
}

/// The time by tokio's clock, which stands still in simulations.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl StateOwner {
    /// Runs work that is due.
    pub(super) fn run_due(&mut self) {
        let now = now();
        if now >= self.due.check {
            self.due.check = now + FULL_CHECK;
            self.dataplane.request_comparison();
        }
        self.dataplane.retry_refused(self.state.records(), now);
        if self.due.save.is_some_and(|due| now >= due) {
            self.due.save = None;
            self.count_records();
            let is_saving = self
                .saving
                .as_ref()
                .is_some_and(|thread| !thread.is_finished());
            if self.state.is_in_sync() && !is_saving {
                self.save();
                self.due.next_save = now + now.elapsed() * SAVE_REST;
            } else {
                self.due.save = Some(now + SAVE_DELAY);
            }
        }
    }

    /// Updates the record metrics. It visits every record, so it does not run for every frame.
    fn count_records(&self) {
        let mut counts: BTreeMap<&'static str, i64> = KINDS.iter().map(|kind| (*kind, 0)).collect();
        for id in self.state.records().keys() {
            *counts.entry(id.kind()).or_default() += 1;
        }
        for (kind, count) in counts {
            self.metrics
                .records
                .get_or_create(&Kind {
                    kind: kind.to_owned(),
                })
                .set(count);
        }
    }
}
