//! How current this replica is: whether the API server answers its watches, and which version of
//! each kind it knows. No clock: times are arguments.
//!
//! A node that has been served by another replica may hold more than this one knows. Its hello has
//! the versions of the API that its view takes into account, and a replica that is behind one of
//! them does not answer: it would take back policy that is in force. Resource versions of one kind
//! are compared as numbers (Kubernetes 1.35, KEP-5504).

use std::collections::BTreeMap;
use std::time::Duration;

use margay_proto::sync::Versions;
use tokio::time::Instant;

/// Time without an answer to a watch from which on the replica counts as cut off from the API. A
/// restart of an API server takes less.
pub const CUT_OFF: Duration = Duration::from_secs(30);
/// Time in which a replica that is behind by the delay of an event catches up.
pub const CATCH_UP: Duration = Duration::from_secs(2);
/// Time for which it is remembered that a node was ahead.
const REMEMBERED: Duration = Duration::from_secs(600);

/// What is known of the watches.
#[derive(Debug, Default)]
pub struct Freshness {
    kinds: BTreeMap<&'static str, KindState>,
    /// Nodes that hold more than this replica knows, and since when that is known.
    ahead: BTreeMap<String, Instant>,
}

#[derive(Debug, Default)]
struct KindState {
    /// Latest version known; 0 if versions are not numbers.
    version: u64,
    /// Time of the latest answer of the API server.
    answered: Option<Instant>,
    /// Time and reason of the first failure since that answer.
    failing: Option<(Instant, String)>,
}

/// A watch that has not been answered for [`CUT_OFF`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutOff {
    /// Its kind.
    pub kind: &'static str,
    /// Reason of the first failure.
    pub reason: String,
}

/// What a node holds, compared with what this replica knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Nothing newer.
    Current,
    /// A newer version of the kind, of which this replica may not have heard yet.
    Behind(String),
    /// A newer version of the kind, although the API server has answered since that was known: its
    /// state is older than it was, as after a restore from a backup.
    Reverted(String),
}

impl Freshness {
    /// Records an answer of the API server, and the version of the kind after it; 0: not known.
    pub fn record_answer(&mut self, kind: &'static str, version: u64, now: Instant) {
        let state = self.kinds.entry(kind).or_default();
        state.version = state.version.max(version);
        state.answered = Some(now);
        state.failing = None;
    }

    /// Records that the watch of the kind got no answer.
    pub fn record_failure(&mut self, kind: &'static str, reason: String, now: Instant) {
        let state = self.kinds.entry(kind).or_default();
        state.failing.get_or_insert((now, reason));
    }

    /// Latest version of a kind that is known; 0: none.
    pub fn version(&self, kind: &str) -> u64 {
        self.kinds.get(kind).map_or(0, |state| state.version)
    }

    /// Returns a kind whose watch has not been answered for [`CUT_OFF`].
    pub fn cut_off(&self, now: Instant) -> Option<CutOff> {
        self.kinds.iter().find_map(|(kind, state)| {
            let (since, reason) = state.failing.as_ref()?;
            (now >= *since + CUT_OFF).then(|| CutOff {
                kind,
                reason: reason.clone(),
            })
        })
    }

    /// Time from which on a watch that fails now counts as cut off.
    pub fn next_cut_off(&self, now: Instant) -> Option<Instant> {
        let times = self.kinds.values().filter_map(|state| {
            let (since, _) = state.failing.as_ref()?;
            Some(*since + CUT_OFF).filter(|time| *time > now)
        });
        times.min()
    }

    /// Compares what a node holds with what this replica knows. Kinds that it does not watch, and
    /// versions that are not numbers, do not count.
    pub fn compare(&mut self, node: &str, held: &Versions, now: Instant) -> Comparison {
        let newer: Vec<(&str, &KindState)> = held
            .iter()
            .filter_map(|(kind, version)| {
                let state = self.kinds.get(kind.as_str())?;
                (state.version > 0 && state.version < *version).then_some((kind.as_str(), state))
            })
            .collect();
        let Some((kind, _)) = newer.first().copied() else {
            self.ahead.remove(node);
            return Comparison::Current;
        };
        let since = self.ahead.get(node).copied().unwrap_or(now);
        let is_answered = |(_, state): &(&str, &KindState)| {
            state
                .answered
                .is_some_and(|answered| answered >= since + CATCH_UP)
        };
        let kind = kind.to_owned();
        if newer.iter().all(is_answered) {
            return Comparison::Reverted(kind);
        }
        self.ahead.retain(|_, since| now < *since + REMEMBERED);
        self.ahead.entry(node.to_owned()).or_insert(since);
        Comparison::Behind(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(pairs: &[(&str, u64)]) -> Versions {
        let pairs = pairs.iter();
        pairs
            .map(|(kind, version)| ((*kind).to_owned(), *version))
            .collect()
    }

    #[test]
    fn a_replica_is_behind_until_it_knows_what_the_node_holds_or_the_api_is_older() {
        let (start, mut freshness) = (Instant::now(), Freshness::default());
        freshness.record_answer("Pod", 7, start);
        freshness.record_answer("Tier", 0, start);
        let compare = |freshness: &mut Freshness, pairs: &[(&str, u64)], now| {
            freshness.compare("n1", &held(pairs), now)
        };
        for pairs in [&[][..], &[("Pod", 7)], &[("Tier", 9)], &[("Unknown", 9)]] {
            assert_eq!(compare(&mut freshness, pairs, start), Comparison::Current);
        }
        let behind = Comparison::Behind("Pod".to_owned());
        let newer = &[("Pod", 8), ("Tier", 3)];
        assert_eq!(compare(&mut freshness, newer, start), behind);
        // A failing watch says nothing about the API's state.
        freshness.record_failure("Pod", "refused".to_owned(), start);
        assert_eq!(compare(&mut freshness, newer, start + 9 * CATCH_UP), behind);
        // An answer that was under way already does not either.
        freshness.record_answer("Pod", 7, start + CATCH_UP / 2);
        assert_eq!(compare(&mut freshness, newer, start + CATCH_UP), behind);
        freshness.record_answer("Pod", 7, start + CATCH_UP);
        let reverted = Comparison::Reverted("Pod".to_owned());
        assert_eq!(compare(&mut freshness, newer, start + CATCH_UP), reverted);
        freshness.record_answer("Pod", 8, start + CATCH_UP);
        assert_eq!(
            compare(&mut freshness, newer, start + CATCH_UP),
            Comparison::Current
        );
        assert_eq!(
            compare(&mut freshness, &[("Pod", 9)], start + CATCH_UP),
            behind,
            "anew"
        );
    }

    #[test]
    fn a_watch_without_answer_for_a_while_cuts_the_replica_off_until_the_next_answer() {
        let (start, mut freshness) = (Instant::now(), Freshness::default());
        freshness.record_answer("Pod", 7, start);
        assert_eq!(
            (freshness.cut_off(start), freshness.next_cut_off(start)),
            (None, None)
        );
        freshness.record_failure("Pod", "refused".to_owned(), start);
        freshness.record_failure("Pod", "reset".to_owned(), start + CUT_OFF / 2);
        assert_eq!(freshness.next_cut_off(start), Some(start + CUT_OFF));
        assert_eq!(freshness.cut_off(start + CUT_OFF / 2), None);
        let reason = "refused".to_owned();
        let cut_off = freshness.cut_off(start + CUT_OFF);
        assert_eq!(
            cut_off,
            Some(CutOff {
                kind: "Pod",
                reason
            })
        );
        assert_eq!(freshness.next_cut_off(start + CUT_OFF), None);
        freshness.record_answer("Pod", 7, start + CUT_OFF);
        assert_eq!(freshness.cut_off(start + 2 * CUT_OFF), None);
    }
}
