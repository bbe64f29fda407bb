//! Time that the frames of a flush need to reach their streams, from which the time until the next
//! flush follows. No clock: times are arguments.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Frames of one flush.
#[derive(Debug)]
pub struct Delivery {
    begun: Instant,
    taken: AtomicU64,
    /// Sum of the times after which they were taken, in microseconds.
    waited_us: AtomicU64,
}

impl Delivery {
    /// A flush that begins now.
    pub fn new(now: Instant) -> Self {
        Self {
            begun: now,
            taken: AtomicU64::new(0),
            waited_us: AtomicU64::new(0),
        }
    }

    /// Records that a stream has taken its frame.
    pub fn record_taken(&self, now: Instant) {
        let waited = now.saturating_duration_since(self.begun).as_micros();
        self.waited_us
            .fetch_add(u64::try_from(waited).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.taken.fetch_add(1, Ordering::Relaxed);
    }

    /// Mean time until streams took their frames; `None` before the first one has.
    pub fn mean(&self) -> Option<Duration> {
        let waited = self.waited_us.load(Ordering::Relaxed);
        let taken = self.taken.load(Ordering::Relaxed);
        waited.checked_div(taken).map(Duration::from_micros)
    }

    /// Time that the delivery of `sent` frames took. Streams take them one after the other, so that
    /// is twice the mean; a few that take none, or late, change little. While most frames wait, it
    /// is the time since the flush.
    pub fn duration(&self, sent: u64, now: Instant) -> Duration {
        let (taken, waited) = (
            self.taken.load(Ordering::Relaxed),
            self.waited_us.load(Ordering::Relaxed),
        );
        if sent == 0 {
            return Duration::ZERO;
        }
        if taken < sent.div_ceil(2) {
            return now.saturating_duration_since(self.begun);
        }
        Duration::from_micros(2 * waited / taken)
    }
}

/// Pace of flushes under load.
#[derive(Debug)]
pub struct FlushPace {
    /// Smoothed duration of deliveries.
    delivery: Duration,
}

/// Shortest and longest time between two flushes under load. The longest is what a change may wait
/// in a large cluster that changes all the time.
const TICK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(30));
/// Ticks are longer than deliveries by this factor, which leaves processors to others and lets more
/// changes share a frame.
const SLACK: u32 = 2;

impl FlushPace {
    /// Time between two flushes.
    pub fn tick(&self) -> Duration {
        (self.delivery * SLACK).clamp(TICK.0, TICK.1)
    }

    /// Records the duration of a delivery.
    pub fn record(&mut self, delivery: Duration) {
        self.delivery = (self.delivery * 3 + delivery) / 4;
    }
}

impl Default for FlushPace {
    fn default() -> Self {
        Self {
            delivery: Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_delivery_takes_twice_the_mean_and_stalled_streams_do_not_count() {
        let start = Instant::now();
        let delivery = Delivery::new(start);
        assert_eq!(delivery.duration(100, start + 7 * MS), 7 * MS, "all wait");
        for frame in 1..=90 {
            delivery.record_taken(start + MS * frame / 10);
        }
        let took = delivery.duration(100, start + 50 * MS);
        assert!(took >= 9 * MS && took < 10 * MS, "{took:?}");
        assert_eq!(
            delivery.duration(0, start + MS),
            Duration::ZERO,
            "nothing was sent"
        );
    }

    #[test]
    fn ticks_follow_deliveries_within_limits() {
        let mut pace = FlushPace::default();
        assert_eq!(pace.tick(), TICK.0);
        for (delivery, tick) in [
            (MS, TICK.0),
            (6 * MS, 12 * MS),
            (100 * MS, TICK.1),
            (Duration::ZERO, TICK.0),
        ] {
            (0..64).for_each(|_| pace.record(delivery));
            assert!(
                pace.tick().abs_diff(tick) < MS,
                "{delivery:?}: {:?}",
                pace.tick()
            );
        }
    }
}
