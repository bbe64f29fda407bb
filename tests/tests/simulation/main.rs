//! Deterministic simulation. In one thread and virtual time, from one seed: a model of the API
//! server, the real replicas of typha with their watches, cache, graph, sessions and wire, and the
//! real agents over kernels that are what was committed; beside them IPAM's allocators over one
//! storage. The network and everybody's life are random.
//!
//! Every event, frame and commit is checked: objects never go back, frames are complete and in
//! order, a kernel holds a state that its replica has had, no packet passes that neither the state
//! before nor the one after allows. When faults stop, everybody comes to what the objects say, and
//! a stream to another replica brings nothing. No address is given twice, and none is lost.
//!
//! `make simulate SEED=7` plays a seed and prints what happens. What once failed is kept in
//! `tests/data/simulation.json`.

mod addresses;
mod api;
mod cluster;
mod frames;
mod judge;
mod kernel;
mod network;
mod node;
mod objects;
mod oracle;
mod plant;
mod replica;
mod run;
mod schedule;
mod serve;
mod storage;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use plant::Plant;
use schedule::{Schedule, World};

/// Steps of a schedule, unless set otherwise.
const STEPS: usize = 60;
/// Schedules that are played each time.
const SCHEDULES: u64 = 40;
/// Seeds in which a planted fault must show.
const HUNT: u64 = 60;
/// Lines of a trace that are printed of a failure; `make simulate` prints all.
const LINES: usize = 60;

/// Schedules of a seed: one of each world.
fn schedules(seed: u64, steps: usize) -> [Schedule; 2] {
    [World::Cluster, World::Addresses].map(|world| Schedule::new(world, seed, steps))
}

/// Plays seeds from `first` on in as many threads as there are processors, until `is_over` says so
/// of a number of seeds. Returns that number, or the first failure as text.
fn play_from(first: u64, steps: usize, is_over: impl Fn(u64) -> bool + Sync) -> Result<u64> {
    let (next, failure) = (AtomicU64::new(0), Mutex::new(None));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let has_failed = || {
                        failure
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .is_some()
                    };
                    if is_over(number) || has_failed() {
                        return;
                    }
                    for schedule in schedules(first + number, steps) {
                        if schedule.play(None, false).violation.is_some() {
                            *failure.lock().unwrap_or_else(PoisonError::into_inner) =
                                Some(schedule);
                            return;
                        }
                    }
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(schedule) => Err(anyhow::Error::msg(describe(
            &schedule.minimise(None),
            LINES,
        ))),
        None => Ok(next.into_inner().saturating_sub(threads as u64)),
    }
}

/// A failing schedule with the end of its trace, in the form in which it is kept.
fn describe(schedule: &Schedule, most: usize) -> String {
    let outcome = schedule.play(None, true);
    let skipped = outcome.lines.len().saturating_sub(most);
    let kept = serde_json::to_string(schedule).unwrap_or_default();
    let lines = outcome.lines[skipped..].join("\n");
    format!(
        "{}\n{lines}\nkeep it in tests/data/simulation.json: {kept}",
        outcome.violation.unwrap_or_default()
    )
}

fn number(name: &str) -> Result<Option<u64>> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty());
    text.map(|text| {
        text.parse()
            .with_context(|| format!("{name}: {text:?} is not a number"))
    })
    .transpose()
}

/// SIMULATE_SEED plays this seed with its trace; SIMULATE_SECONDS goes on for that long with seeds
/// that were not tried before; without both, a bounded number of seeds is played.
#[test]
fn every_schedule_holds() -> Result<()> {
    let steps = number("SIMULATE_STEPS")?.map_or(Ok(STEPS), usize::try_from)?;
    if let Some(seed) = number("SIMULATE_SEED")? {
        for schedule in schedules(seed, steps) {
            let outcome = schedule.play(None, true);
            println!("{}", outcome.lines.join("\n"));
            let violation = outcome.violation;
            ensure!(
                violation.is_none(),
                "{}",
                describe(&schedule.minimise(None), usize::MAX)
            );
        }
        return Ok(());
    }
    let seconds = number("SIMULATE_SECONDS")?;
    let (start, first) = (
        Instant::now(),
        if seconds.is_some() {
            fastrand::u64(..1 << 48)
        } else {
            1
        },
    );
    let played = play_from(first, steps, |number| match seconds {
        Some(seconds) => start.elapsed() >= Duration::from_secs(seconds),
        None => number >= SCHEDULES,
    })?;
    let rate = 2.0 * played as f64 * 60.0 / start.elapsed().as_secs_f64();
    println!(
        "{} schedules of {steps} steps from seed {first}: {rate:.0} a minute",
        2 * played
    );
    Ok(())
}

#[test]
fn what_failed_before_holds() -> Result<()> {
    let kept: Vec<Schedule> = serde_json::from_str(include_str!("../../data/simulation.json"))?;
    for schedule in kept {
        ensure!(
            schedule.play(None, false).violation.is_none(),
            "{}",
            describe(&schedule, LINES)
        );
    }
    Ok(())
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 1..8 {
        for schedule in schedules(seed, STEPS) {
            let (first, again) = (schedule.play(None, true), schedule.play(None, true));
            let differs = first
                .lines
                .iter()
                .zip(&again.lines)
                .position(|(first, again)| first != again);
            let around =
                |lines: &[String]| differs.map(|at| lines[at.saturating_sub(3)..=at].join("\n"));
            assert_eq!(around(&first.lines), around(&again.lines), "seed {seed}");
            assert_eq!(first, again, "seed {seed}");
        }
    }
}

/// The world in which a planted fault acts.
fn world(plant: Plant) -> World {
    match plant {
        Plant::UncheckedWrite | Plant::LostHandle | Plant::LostRelease => World::Addresses,
        _ => World::Cluster,
    }
}

#[test]
fn planted_faults_are_found() {
    let mut unseen = Vec::new();
    for plant in Plant::ALL {
        let find = |seed| {
            Schedule::new(world(plant), seed, STEPS)
                .play(Some(plant), false)
                .violation
        };
        match (1..=HUNT).find_map(|seed| Some((seed, find(seed)?))) {
            Some((seed, violation)) => println!("{plant:?}: seed {seed}: {violation:.160}"),
            None => unseen.push(plant),
        }
    }
    assert!(unseen.is_empty(), "not found in {HUNT} seeds: {unseen:?}");
}

#[test]
fn a_failing_schedule_gets_smaller() {
    let plant = Some(Plant::MissedRecord);
    let mut all = (1..=HUNT).map(|seed| Schedule::new(World::Cluster, seed, STEPS));
    let failing = all.find(|schedule| schedule.play(plant, false).violation.is_some());
    let small = failing.expect("a planted fault is found").minimise(plant);
    assert!(small.play(plant, false).violation.is_some(), "{small:?}");
    let kept = small.kept.map_or(STEPS, |kept| kept.len());
    assert!(kept < STEPS / 4, "{kept} of {STEPS} steps are left");
}
