//! How often a node is listened to, so that one that says as much as it can costs the others nothing. No clock: the time is an argument.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Hellos that a node may say at once: some agents are restarted twice in a row. Each costs the owner of the graph a look at the node's whole view.
pub const HELLOS: Rate = Rate { burst: 4, every: Duration::from_secs(1) };
/// Other messages of one stream: a word for each pod of a node that boots, and an ack for each frame, with room.
pub const MESSAGES: Rate = Rate { burst: 1024, every: Duration::from_millis(2) };
/// Nodes whose last hello is remembered though it does not count any more.
const REMEMBERED: usize = 1024;

/// So many at once, and one more after each such time.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// How many at once.
    pub burst: u32,
    /// Time between two in the long run.
    pub every: Duration,
}

/// How much of a rate is used up.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    rate: Rate,
    /// When all of the burst is there again.
    full: Instant,
}

impl Bucket {
    /// Nothing is used up.
    pub const fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, full: now }
    }

    /// How long to wait for the next; nothing is used up by asking.
    pub fn wait(&self, now: Instant) -> Duration {
        let allowed = self.rate.every * self.rate.burst.saturating_sub(1);
        self.full.saturating_duration_since(now).saturating_sub(allowed)
    }

    /// Uses one up.
    pub fn take(&mut self, now: Instant) {
        self.full = self.full.max(now) + self.rate.every;
    }
}

/// Hellos of all nodes. Of the streams on which a node waits with one, the newest counts.
#[derive(Debug, Default)]
pub struct Hellos(HashMap<String, (Bucket, u64)>);

/// What becomes of a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It is taken now.
    Now,
    /// It is asked for again after this time.
    After(Duration),
    /// The node has opened another stream.
    Never,
}

impl Hellos {
    /// A stream says hello for the first time. A number of a later stream is larger.
    pub fn come(&mut self, node: &str, session: u64, now: Instant) -> Turn {
        if self.0.len() >= REMEMBERED {
            self.0.retain(|_, (bucket, _)| bucket.full > now);
        }
        let (_, newest) = self.0.entry(node.to_owned()).or_insert_with(|| (Bucket::new(HELLOS, now), session));
        *newest = session.max(*newest);
        self.again(node, session, now)
    }

    /// It has waited.
    pub fn again(&mut self, node: &str, session: u64, now: Instant) -> Turn {
        let Some((bucket, newest)) = self.0.get_mut(node) else { return Turn::Now };
        if *newest != session {
            return Turn::Never;
        }
        let wait = bucket.wait(now);
        if wait > Duration::ZERO {
            return Turn::After(wait);
        }
        bucket.take(now);
        Turn::Now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_says_hello_all_the_time_is_heard_once_a_second_and_others_at_once() {
        let (start, mut hellos, mut heard) = (Instant::now(), Hellos::default(), 0);
        let mut waiting = Vec::new();
        for step in 0..10_000_u64 {
            let now = start + Duration::from_millis(step);
            if hellos.come("bad", step, now) == Turn::Now {
                heard += 1;
            } else {
                waiting.push(step);
            }
            if step % 2000 == 0 {
                assert_eq!(hellos.come("good", step, now), Turn::Now);
            }
        }
        assert_eq!(heard, HELLOS.burst + 9, "a burst, and one for each full second after it");
        let last = waiting.pop().expect("the last one waits");
        let later = start + Duration::from_secs(60);
        assert!(waiting.iter().all(|session| hellos.again("bad", *session, later) == Turn::Never));
        assert_eq!(hellos.again("bad", last, later), Turn::Now);
    }

    #[test]
    fn names_are_forgotten_when_they_do_not_count_any_more() {
        let (start, mut hellos) = (Instant::now(), Hellos::default());
        for number in 0..10 * REMEMBERED as u64 {
            hellos.come(&format!("n{number}"), number, start + Duration::from_secs(number));
        }
        assert!(hellos.0.len() <= REMEMBERED);
    }
}
