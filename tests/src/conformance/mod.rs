//! Runs tables of verdicts that others have computed, with real packets: on the kernel alone (test
//! layer 4) or on a real cluster (layer 5).
//!
//! Every step is all or nothing: the whole table is asked at once, wrong rows are asked again until
//! everything matches, and then it has to hold. The runner also shows that it can fail: with no
//! policy in force, or with everything denied, the score has to follow from the table.
//!
//! Reading order: [`table`] (the data), [`backend`] (where it runs: [`kernel`] or [`cluster`]),
//! [`stage`] (what is there now), [`report`].

pub mod backend;
pub mod cluster;
pub mod kernel;
pub mod report;
pub mod stage;
pub mod table;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

use self::backend::Backend;
use self::report::{Report, Score, StepReport, millis};
use self::stage::Stage;
use self::table::{Case, Row, Step, Table};
use crate::probe::Verdict;

/// Wrong rows that are named for each step.
const NAMED: usize = 12;

/// Policies in force during a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Enforce {
    /// The policies of the table.
    Full,
    /// No policy at all: every blocked row has to be found wrong.
    Off,
    /// One policy that denies everything: every allowed row has to be found wrong.
    Deny,
}

impl std::fmt::Display for Enforce {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Full => "full",
            Self::Off => "off",
            Self::Deny => "deny",
        })
    }
}

/// Options of a run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Policies in force.
    pub enforce: Enforce,
    /// Time without an answer after which a question counts as denied.
    pub patience: Duration,
    /// Number of further checks of a matching table before it is accepted.
    pub hold: usize,
    /// Time limit for a table to match.
    pub limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            enforce: Enforce::Full,
            patience: crate::probe::denied_after(),
            hold: 3,
            limit: Duration::from_secs(20),
        }
    }
}

/// Runs every case of the table; `progress` receives a line for each step.
pub fn run(
    backend: &mut dyn Backend,
    table: &Table,
    options: &Options,
    progress: &dyn Fn(&str),
) -> Result<Report> {
    let begin = Instant::now();
    let mut report = Report::new(options.enforce);
    let mut stage = Stage::set(backend, table).context("the fixture of the table")?;
    if options.enforce == Enforce::Deny {
        // Not through the stage, which removes with each case what it applied.
        backend.apply(&deny_everything())?;
    }
    for case in &table.cases {
        run_case(backend, &mut stage, case, options, &mut report, progress)
            .with_context(|| format!("case {}: {}", case.n, case.desc))?;
    }
    stage.clear(backend)?;
    if options.enforce == Enforce::Deny {
        backend.remove(&deny_everything())?;
    }
    report.seconds = begin.elapsed().as_secs_f64();
    Ok(report)
}

/// Runs every case as tests do, where a table that has matched is asked once more; an error lists
/// the wrong rows.
pub fn conform(backend: &mut dyn Backend, table: &Table, enforce: Enforce) -> Result<()> {
    let options = Options {
        enforce,
        hold: 1,
        ..Options::default()
    };
    let report = run(backend, table, &options, &|line| println!("{line}"))?;
    ensure!(report.is_good(), "{}", report.text());
    Ok(())
}

fn run_case(
    backend: &mut dyn Backend,
    stage: &mut Stage,
    case: &Case,
    options: &Options,
    report: &mut Report,
    progress: &dyn Fn(&str),
) -> Result<()> {
    for (index, step) in case.steps.iter().enumerate() {
        for action in &step.actions {
            if options.enforce == Enforce::Full || !stage::is_policy(action) {
                stage.act(backend, action)?;
            }
        }
        let (outcome, left_out) = run_step(stage, step, options)?;
        let step = StepReport {
            case: case.n,
            step: index + 1,
            desc: case.desc.clone(),
            ..outcome
        };
        let verdict = if step.is_right() { "right" } else { "WRONG" };
        let after = step.match_ms.map_or("no match in time".to_owned(), |ms| {
            format!("after {ms:.0} ms")
        });
        progress(&format!(
            "{verdict}  case {}.{}  allowed {}, blocked {}, {after}  {}",
            case.n, step.step, step.allowed, step.blocked, case.desc
        ));
        if options.enforce == Enforce::Full {
            step.wrong
                .iter()
                .for_each(|row| progress(&format!("       {row}")));
        }
        report.left_out += left_out;
        report.steps.push(step);
    }
    stage.restore(backend)
}

/// Asks until the rows are as they should be with what is in force, and scores what was found
/// against the table. Returns also how many rows were left out.
fn run_step(stage: &mut Stage, step: &Step, options: &Options) -> Result<(StepReport, usize)> {
    let since = Instant::now();
    // Implementations differ in which traffic of a pod to itself they allow.
    let is_asked = |row: &&Row| row.to != table::Target::Pod(row.from.clone());
    let rows: Vec<&Row> = step.rows.iter().filter(is_asked).collect();
    let expected = |row: &Row| match options.enforce {
        Enforce::Full => row.allowed,
        Enforce::Off => true,
        Enforce::Deny => false,
    };
    let (found, matched) = ask_until_match(stage, &rows, expected, options)?;
    let mut outcome = StepReport {
        case: 0,
        step: 0,
        desc: String::new(),
        allowed: Score::default(),
        blocked: Score::default(),
        by_protocol: BTreeMap::new(),
        match_ms: matched.map(|at| millis(at.saturating_duration_since(since))),
        wrong: Vec::new(),
    };
    for (row, verdict) in rows.iter().zip(&found) {
        let right = *verdict == wanted(row.allowed);
        if row.allowed {
            &mut outcome.allowed
        } else {
            &mut outcome.blocked
        }
        .count(right);
        outcome
            .by_protocol
            .entry(row.protocol.to_string())
            .or_default()
            .count(right);
        if !right && outcome.wrong.len() < NAMED {
            outcome.wrong.push(format!("{row}, found {verdict:?}"));
        }
    }
    Ok((outcome, step.rows.len() - rows.len()))
}

/// Asks all rows, and again those that differ, until everything is as expected and has held, or the
/// time is up. Returns the last verdicts, and the start of the first pass in which everything was
/// as expected.
fn ask_until_match(
    stage: &mut Stage,
    rows: &[&Row],
    expected: impl Fn(&Row) -> bool,
    options: &Options,
) -> Result<(Vec<Verdict>, Option<Instant>)> {
    let end = Instant::now() + options.limit;
    let all: Vec<usize> = (0..rows.len()).collect();
    let mut found = vec![Verdict::Broken; rows.len()];
    let (mut asked, mut held, mut first) = (all.clone(), 0, None);
    loop {
        let begun = Instant::now();
        let questions: Vec<&Row> = asked.iter().map(|index| rows[*index]).collect();
        for (index, verdict) in asked.iter().zip(stage.ask(&questions, options.patience)?) {
            found[*index] = verdict;
        }
        let differs = |index: &usize| found[*index] != wanted(expected(rows[*index]));
        let wrong: Vec<usize> = all.iter().copied().filter(differs).collect();
        if wrong.is_empty() {
            let matched = *first.get_or_insert(begun);
            if held == options.hold {
                return Ok((found, Some(matched)));
            }
            // Rows that were right in an earlier pass have not been asked together with the others.
            held += 1;
            asked.clone_from(&all);
            continue;
        }
        if begun >= end {
            return Ok((found, None));
        }
        (held, first) = (0, None);
        asked = wrong;
    }
}

/// A blocked question is silence; a refusal would be an answer.
fn wanted(allowed: bool) -> Verdict {
    if allowed {
        Verdict::Answered
    } else {
        Verdict::Silent
    }
}

fn deny_everything() -> Value {
    let deny = json!([{"action": "Deny"}]);
    json!({
        "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy",
        "metadata": {"name": "conformance-deny"},
        "spec": {
            "tier": "default", "order": 1, "selector": "all()", "types": ["Ingress", "Egress"],
            "ingress": deny, "egress": deny,
        },
    })
}
