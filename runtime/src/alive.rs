//! Signs of life: a process in which a loop hangs looks as if it served, so its liveness probe must
//! fail.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Loops of this process that give signs of life. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Liveness(Arc<Mutex<Vec<Arc<Part>>>>);

#[derive(Debug)]
struct Part {
    name: &'static str,
    limit: Duration,
    last: Mutex<Instant>,
}

impl Liveness {
    /// Adds a loop, which must call [`Pulse::beat`] more often than every `limit`.
    pub fn part(&self, name: &'static str, limit: Duration) -> Pulse {
        let part = Arc::new(Part {
            name,
            limit,
            last: Mutex::new(Instant::now()),
        });
        self.0.lock().push(part.clone());
        Pulse {
            part,
            liveness: self.clone(),
        }
    }

    /// Loops without a sign of life within their limit, and the time since the last one.
    pub fn stuck(&self, now: Instant) -> Vec<(&'static str, Duration)> {
        let parts = self.0.lock();
        let silences = parts.iter().map(|part| {
            let silence = now.saturating_duration_since(*part.last.lock());
            (part, silence)
        });
        silences
            .filter(|(part, silence)| *silence > part.limit)
            .map(|(part, silence)| (part.name, silence))
            .collect()
    }
}

/// Gives the signs of life of one loop. A loop that ends normally need not give them any more; one
/// that panics is missed.
#[derive(Debug)]
pub struct Pulse {
    part: Arc<Part>,
    liveness: Liveness,
}

impl Pulse {
    /// Gives a sign of life.
    pub fn beat(&self) {
        *self.part.last.lock() = Instant::now();
    }

    /// Longest time between two signs of life that leaves ample room to the limit.
    pub fn interval(&self) -> Duration {
        self.part.limit / 4
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let mut parts = self.liveness.0.lock();
            parts.retain(|part| !Arc::ptr_eq(part, &self.part));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn a_loop_that_hangs_is_named_until_it_goes_on_or_ends() {
        let liveness = Liveness::default();
        let (owner, other) = (
            liveness.part("owner", LIMIT),
            liveness.part("other", 2 * LIMIT),
        );
        let later = Instant::now() + LIMIT + Duration::from_secs(1);
        assert_eq!(liveness.stuck(Instant::now()), []);
        let stuck = liveness.stuck(later);
        assert!(
            matches!(stuck[..], [("owner", silence)] if silence > LIMIT),
            "{stuck:?}"
        );
        owner.beat();
        assert_eq!(liveness.stuck(Instant::now() + LIMIT / 2), []);
        drop(owner);
        assert_eq!(liveness.stuck(later), [], "it has ended");
        assert_eq!(liveness.stuck(later + 2 * LIMIT).len(), 1);
        drop(other);
    }

    #[test]
    fn a_loop_that_panics_is_missed() {
        let liveness = Liveness::default();
        let pulse = liveness.part("owner", LIMIT);
        let thread = std::thread::spawn(move || {
            let _pulse = pulse;
            panic!("expected by this test");
        });
        assert!(thread.join().is_err());
        assert_eq!(liveness.stuck(Instant::now() + 2 * LIMIT).len(), 1);
    }
}
