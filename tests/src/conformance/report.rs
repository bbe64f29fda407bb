//! Results of a run, with allowed and blocked rows apart, because most rows of any table are
//! allowed and a dataplane that enforces nothing has them right.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::Enforce;
use crate::probe::sctp::has_sockets;

/// Rows that were right, of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Score {
    /// Number of right rows.
    pub right: usize,
    /// Number of rows.
    pub all: usize,
}

impl Score {
    fn add(&mut self, other: Self) {
        self.right += other.right;
        self.all += other.all;
    }

    /// Counts one row.
    pub fn count(&mut self, right: bool) {
        self.add(Self {
            right: usize::from(right),
            all: 1,
        });
    }
}

impl std::fmt::Display for Score {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} of {}", self.right, self.all)
    }
}

/// A step that was run.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// Number of the case.
    pub case: u32,
    /// Which step of it, from 1.
    pub step: usize,
    /// Description of the case.
    pub desc: String,
    /// Rows that are allowed.
    pub allowed: Score,
    /// Rows that are blocked.
    pub blocked: Score,
    /// The same rows by transport.
    pub by_protocol: BTreeMap<String, Score>,
    /// Milliseconds from the last action to the start of the first pass in which every row was as
    /// expected, and stayed so.
    pub match_ms: Option<f64>,
    /// Some of the rows that were wrong, as they should have been, with what was found.
    pub wrong: Vec<String>,
}

impl StepReport {
    /// Returns whether every row of the table was right.
    pub fn is_right(&self) -> bool {
        let right = |score: Score| score.right == score.all;
        right(self.allowed) && right(self.blocked)
    }
}

/// A run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Policies that were in force.
    pub enforce: Enforce,
    /// Method for SCTP rows: this kernel may have no sockets for them.
    pub sctp: &'static str,
    /// Every step that was run.
    pub steps: Vec<StepReport>,
    /// Rows that were left out: what a pod asks of itself.
    pub left_out: usize,
    /// Seconds that the whole took.
    pub seconds: f64,
}

/// The sum of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Cases whose every step was right.
    pub cases: Score,
    /// Steps whose every row was right.
    pub steps: Score,
    /// Rows that are allowed.
    pub allowed: Score,
    /// Rows that are blocked.
    pub blocked: Score,
    /// Milliseconds until the whole table matched: median, 99th percentile, longest.
    pub match_ms: Option<[f64; 3]>,
}

impl Report {
    /// Nothing was run yet.
    pub fn new(enforce: Enforce) -> Self {
        let sctp = match has_sockets() {
            true => "sockets of the kernel; associations",
            false => "raw INIT, INIT-ACK, ABORT; policy and connection tracking, not associations",
        };
        Self {
            enforce,
            sctp,
            steps: Vec::new(),
            left_out: 0,
            seconds: 0.0,
        }
    }

    /// Adds up.
    pub fn summary(&self) -> Summary {
        let mut cases: BTreeMap<u32, bool> = BTreeMap::new();
        let mut sum = Summary {
            cases: Score::default(),
            steps: Score::default(),
            allowed: Score::default(),
            blocked: Score::default(),
            match_ms: None,
        };
        for step in &self.steps {
            sum.steps.count(step.is_right());
            sum.allowed.add(step.allowed);
            sum.blocked.add(step.blocked);
            *cases.entry(step.case).or_insert(true) &= step.is_right();
        }
        cases.values().for_each(|right| sum.cases.count(*right));
        let mut times: Vec<f64> = self.steps.iter().filter_map(|step| step.match_ms).collect();
        times.sort_by(f64::total_cmp);
        let rank = |share: f64| {
            times[((times.len() as f64 * share).ceil() as usize).clamp(1, times.len()) - 1]
        };
        sum.match_ms = (!times.is_empty()).then(|| [rank(0.5), rank(0.99), rank(1.0)]);
        sum
    }

    /// Returns whether the run shows what it should: with policy in force, every row is right; with
    /// nothing or everything denied, the packets confirm that.
    pub fn is_good(&self) -> bool {
        let Summary {
            allowed,
            blocked,
            steps,
            ..
        } = self.summary();
        let none = |score: Score| score.right == 0;
        let every = |score: Score| score.right == score.all;
        match self.enforce {
            Enforce::Full => steps.all > 0 && every(steps),
            Enforce::Off => steps.all > 0 && every(allowed) && none(blocked),
            Enforce::Deny => steps.all > 0 && none(allowed) && every(blocked),
        }
    }

    /// For a person.
    pub fn text(&self) -> String {
        let sum = self.summary();
        let mut by_protocol: BTreeMap<&str, Score> = BTreeMap::new();
        for (protocol, score) in self.steps.iter().flat_map(|step| &step.by_protocol) {
            by_protocol.entry(protocol).or_default().add(*score);
        }
        let protocols: Vec<String> = by_protocol
            .iter()
            .map(|(protocol, score)| format!("{protocol} {score}"))
            .collect();
        let mut text = format!(
            "cases right     {}\n\
             steps right     {}\n\
             allowed rows    {}\n\
             blocked rows    {}\n\
             by transport    {}\n",
            sum.cases,
            sum.steps,
            sum.allowed,
            sum.blocked,
            protocols.join(", ")
        );
        if let Some([median, most, longest]) = sum.match_ms {
            let _ = writeln!(
                text,
                "time to match   p50 {median:.0} ms, p99 {most:.0} ms, max {longest:.0} ms"
            );
        }
        let _ = writeln!(
            text,
            "left out        {} rows of pods to themselves\nSCTP            {}",
            self.left_out, self.sctp
        );
        let _ = writeln!(
            text,
            "in {:.0} s, with enforcement {}",
            self.seconds, self.enforce
        );
        text
    }
}

/// Milliseconds.
pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(
        case: u32,
        allowed: (usize, usize),
        blocked: (usize, usize),
        match_ms: f64,
    ) -> StepReport {
        let score = |(right, all)| Score { right, all };
        StepReport {
            case,
            step: 1,
            desc: String::new(),
            allowed: score(allowed),
            blocked: score(blocked),
            by_protocol: BTreeMap::new(),
            match_ms: Some(match_ms),
            wrong: Vec::new(),
        }
    }

    #[test]
    fn a_case_is_right_when_all_its_steps_are() {
        let mut report = Report::new(Enforce::Full);
        assert!(!report.is_good(), "a run of nothing shows nothing");
        report.steps = vec![
            step(1, (4, 4), (2, 2), 10.0),
            step(1, (4, 4), (1, 2), 30.0),
            step(2, (6, 6), (0, 0), 20.0),
        ];
        let sum = report.summary();
        let score = |right, all| Score { right, all };
        assert_eq!((sum.cases, sum.steps), (score(1, 2), score(2, 3)));
        assert_eq!((sum.allowed, sum.blocked), (score(14, 14), score(3, 4)));
        assert_eq!(sum.match_ms, Some([20.0, 30.0, 30.0]));
        assert!(!report.is_good());
        report.steps.remove(1);
        assert!(report.is_good());
    }

    #[test]
    fn what_enforces_nothing_must_have_every_blocked_row_wrong() {
        let with = |enforce, allowed, blocked| {
            let mut report = Report::new(enforce);
            report.steps = vec![step(1, allowed, blocked, 1.0)];
            report.is_good()
        };
        assert!(with(Enforce::Off, (4, 4), (0, 2)));
        assert!(!with(Enforce::Off, (4, 4), (1, 2)));
        assert!(with(Enforce::Deny, (0, 4), (2, 2)));
        assert!(!with(Enforce::Deny, (1, 4), (2, 2)));
    }
}
