//! Exponential backoff as a value.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Exponential delays with a ceiling, of which the upper half is random.
///
/// The lower half is kept so that a failing peer is never asked in a tight loop; the upper half
/// spreads the hundreds of agents that lost the same server at the same moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backoff {
    base: Duration,
    ceiling: Duration,
    attempt: u32,
}

impl Backoff {
    /// Creates a backoff whose first delay is at most `base` and none above `ceiling`.
    pub fn new(base: Duration, ceiling: Duration) -> Self {
        Self {
            base,
            ceiling: ceiling.max(base),
            attempt: 0,
        }
    }

    /// Returns the next delay and counts one failed attempt. `jitter` is in `0.0..1.0` (see
    /// [`jitter`]).
    pub fn next(&mut self, jitter: f64) -> Duration {
        let factor = 1_u32.checked_shl(self.attempt).unwrap_or(u32::MAX);
        let whole = self.base.saturating_mul(factor).min(self.ceiling);
        if whole < self.ceiling {
            self.attempt += 1;
        }
        let half = whole / 2;
        half + (whole - half).mul_f64(jitter.clamp(0.0, 1.0))
    }

    /// Records a success: the next failure starts with a short delay again.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

/// Returns a random value in `0.0..1.0` for [`Backoff::next`]; not for secrets.
pub fn jitter() -> f64 {
    let bits = RandomState::new().hash_one(0_u8) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_ceiling() {
        let table = [
            // base ms, ceiling ms, jitter, delays ms
            (100, 1000, 0.0, vec![50, 100, 200, 400, 500, 500]),
            (100, 1000, 1.0, vec![100, 200, 400, 800, 1000, 1000]),
            (100, 1000, 0.5, vec![75, 150, 300, 600, 750, 750]),
            (500, 100, 1.0, vec![500, 500]),
            (0, 0, 1.0, vec![0, 0]),
        ];
        for (base, ceiling, jitter, wanted) in table {
            let mut backoff =
                Backoff::new(Duration::from_millis(base), Duration::from_millis(ceiling));
            let got: Vec<u64> = wanted
                .iter()
                .map(|_| backoff.next(jitter).as_millis() as u64)
                .collect();
            assert_eq!(got, wanted, "base {base} ceiling {ceiling} jitter {jitter}");
        }
    }

    #[test]
    fn success_starts_again_at_the_base() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
        for _ in 0..100 {
            backoff.next(1.0);
        }
        assert_eq!(backoff.next(1.0), Duration::from_secs(1));
        backoff.reset();
        assert_eq!(backoff.next(1.0), Duration::from_millis(10));
    }

    #[test]
    fn jitter_outside_its_range_is_clamped() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(10));
        assert_eq!(backoff.next(7.0), Duration::from_millis(10));
        assert_eq!(backoff.next(-7.0), Duration::from_millis(5));
    }

    #[test]
    fn the_random_source_varies_within_its_range() {
        let values: Vec<f64> = (0..32).map(|_| jitter()).collect();
        assert!(values.iter().all(|v| (0.0..1.0).contains(v)), "{values:?}");
        assert!(values.windows(2).any(|w| w[0] != w[1]), "{values:?}");
    }
}
