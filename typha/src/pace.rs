//! Rate limits for messages of nodes, so that a node that sends without pause costs the others
//! nothing. No clock: the time is an argument.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Hellos of a node: some agents restart twice in a row. Each one makes the owner of the graph
/// compute the node's whole view.
pub const HELLOS: Rate = Rate {
    burst: 4,
    every: Duration::from_secs(1),
};
/// Other messages on one stream: one per pod of a booting node, and an ack per frame, with ample
/// room.
pub const MESSAGES: Rate = Rate {
    burst: 1024,
    every: Duration::from_millis(2),
};
/// Number of nodes from which on rate limits that are fully replenished are dropped.
const MAX_REMEMBERED: usize = 1024;

/// Token rate: a burst, and one further token per interval.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Tokens available at once.
    pub burst: u32,
    /// Interval between tokens in the long run.
    pub every: Duration,
}

/// Token bucket.
#[derive(Debug, Clone, Copy)]
pub struct TokenBucket {
    rate: Rate,
    /// Time at which the bucket is full again.
    full: Instant,
}

impl TokenBucket {
    /// Creates a full bucket.
    pub const fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, full: now }
    }

    /// Time until the next token is available; takes none.
    pub fn wait(&self, now: Instant) -> Duration {
        let allowed = self.rate.every * self.rate.burst.saturating_sub(1);
        self.full
            .saturating_duration_since(now)
            .saturating_sub(allowed)
    }

    /// Takes a token.
    pub fn consume(&mut self, now: Instant) {
        self.full = self.full.max(now) + self.rate.every;
    }
}

/// Hellos of all nodes. If several streams of a node wait, only the latest may proceed.
#[derive(Debug, Default)]
pub struct Hellos(HashMap<String, (TokenBucket, u64)>);

/// Decision on a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HelloTurn {
    /// Handle it now.
    Now,
    /// Ask again after this time.
    After(Duration),
    /// Refuse it: the node has opened another stream.
    Never,
}

impl Hellos {
    /// Handles the hello of a new stream. Later streams have larger numbers.
    pub fn arrive(&mut self, node: &str, session: u64, now: Instant) -> HelloTurn {
        if self.0.len() >= MAX_REMEMBERED {
            // A full bucket is what an unknown node starts with.
            self.0.retain(|_, (bucket, _)| bucket.full > now);
        }
        let (_, newest) = self
            .0
            .entry(node.to_owned())
            .or_insert_with(|| (TokenBucket::new(HELLOS, now), session));
        *newest = session.max(*newest);
        self.retry(node, session, now)
    }

    /// Handles a hello that has waited.
    pub fn retry(&mut self, node: &str, session: u64, now: Instant) -> HelloTurn {
        let Some((bucket, newest)) = self.0.get_mut(node) else {
            return HelloTurn::Now;
        };
        if *newest != session {
            return HelloTurn::Never;
        }
        let wait = bucket.wait(now);
        if wait > Duration::ZERO {
            return HelloTurn::After(wait);
        }
        bucket.consume(now);
        HelloTurn::Now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_repeats_hello_is_accepted_once_a_second_and_others_at_once() {
        let (start, mut hellos, mut accepted) = (Instant::now(), Hellos::default(), 0);
        let mut waiting = Vec::new();
        for step in 0..10_000_u64 {
            let now = start + Duration::from_millis(step);
            if hellos.arrive("bad", step, now) == HelloTurn::Now {
                accepted += 1;
            } else {
                waiting.push(step);
            }
            if step % 2000 == 0 {
                assert_eq!(hellos.arrive("good", step, now), HelloTurn::Now);
            }
        }
        assert_eq!(
            accepted,
            HELLOS.burst + 9,
            "a burst, and one for each full second after it"
        );
        let last = waiting.pop().expect("the last one waits");
        let later = start + Duration::from_secs(60);
        assert!(
            waiting
                .iter()
                .all(|session| hellos.retry("bad", *session, later) == HelloTurn::Never)
        );
        assert_eq!(hellos.retry("bad", last, later), HelloTurn::Now);
    }

    #[test]
    fn replenished_rates_are_dropped() {
        let (start, mut hellos) = (Instant::now(), Hellos::default());
        for number in 0..10 * MAX_REMEMBERED as u64 {
            hellos.arrive(
                &format!("n{number}"),
                number,
                start + Duration::from_secs(number),
            );
        }
        assert!(hellos.0.len() <= MAX_REMEMBERED);
    }
}
