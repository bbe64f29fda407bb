//! Every parser of outside input, on seeds, on earlier findings, and on simple mutations of these.

mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use targets::{TARGETS, Target};

/// Changed inputs for each target.
const CHANGED: u32 = 2000;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("data/fuzz")
        .join(name)
}

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(folder(name)).expect("every target has a folder of seeds");
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{name} has no seeds");
    paths
        .iter()
        .map(|path| fs::read(path).expect("a seed"))
        .collect()
}

fn run(target: Target, input: &[u8]) -> Result<(), String> {
    let result = catch_unwind(AssertUnwindSafe(|| target(input)));
    result.map_err(|_| format!("{:?}", String::from_utf8_lossy(input)))
}

#[test]
fn every_target_takes_its_seeds() {
    for (name, target) in TARGETS {
        let bad: Vec<String> = seeds(name)
            .iter()
            .filter_map(|input| run(target, input).err())
            .collect();
        assert!(bad.is_empty(), "{name}: {bad:#?}");
    }
}

/// One input, with bytes of others written over, cut out and put in.
fn changed(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let edit = (
        any::<prop::sample::Index>(),
        0..4_u8,
        any::<u8>(),
        any::<prop::sample::Index>(),
        1..24_usize,
    );
    let seed = prop::sample::select(seeds.clone());
    (seed, prop::collection::vec(edit, 1..6)).prop_map(move |(mut input, edits)| {
        for (place, how, byte, other, length) in edits {
            let at = place.index(input.len() + 1);
            let end = (at + length).min(input.len());
            match how {
                0 => input.splice(at..at, [byte]).for_each(drop),
                1 => input.drain(at..end).for_each(drop),
                2 => input
                    .iter_mut()
                    .skip(at)
                    .take(1)
                    .for_each(|found| *found ^= 1 << (byte % 8)),
                _ => {
                    let donor = &seeds[other.index(seeds.len())];
                    let from = usize::from(byte) % (donor.len() + 1);
                    let piece = donor[from..(from + length).min(donor.len())].to_vec();
                    input.splice(at..end, piece).for_each(drop);
                }
            }
        }
        input
    })
}

#[test]
fn every_target_takes_changed_seeds() {
    for (name, target) in TARGETS {
        let config = Config {
            cases: CHANGED,
            failure_persistence: None,
            ..Config::default()
        };
        let mut runner =
            TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[9; 32]));
        let result = runner.run(&changed(seeds(name)), |input| {
            run(target, &input).map_err(TestCaseError::fail)
        });
        assert!(
            result.is_ok(),
            "{name}: {}",
            result.expect_err("it is not ok")
        );
    }
}
