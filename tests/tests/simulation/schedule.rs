//! Schedules: what happens in a run, from a seed; playing one, and making one that fails smaller.

use serde::{Deserialize, Serialize};

use crate::addresses::{self, Addresses};
use crate::cluster::{self, Cluster};
use crate::plant::Plant;
use crate::run::Run;

/// Attempts to make a failing schedule smaller.
const ATTEMPTS: usize = 100;

/// Part of the system that is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum World {
    /// From objects to kernels: the API server, replicas of typha, agents.
    Cluster,
    /// Who has which address: allocators over one storage.
    Addresses,
}

/// A schedule, as it is kept in `tests/data/simulation.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The world.
    pub world: World,
    /// Where all randomness comes from.
    pub seed: u64,
    /// Number of steps.
    pub steps: usize,
    /// Only these of them, if a part is enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Vec<usize>>,
    /// What it is kept for.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub about: String,
}

/// What became of a schedule.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The first violation.
    pub violation: Option<String>,
    /// What happened, if it was traced.
    pub lines: Vec<String>,
}

impl Schedule {
    /// The schedule of a seed.
    pub fn new(world: World, seed: u64, steps: usize) -> Self {
        Self {
            world,
            seed,
            steps,
            kept: None,
            about: String::new(),
        }
    }

    /// Plays it, in virtual time and on this thread.
    pub fn play(&self, plant: Option<Plant>, is_traced: bool) -> Outcome {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let mut dice = fastrand::Rng::with_seed(self.seed);
        runtime.block_on(async {
            let run = Run::new(self.seed, plant, is_traced);
            match self.world {
                World::Cluster => {
                    let steps: Vec<_> = (0..self.steps)
                        .map(|_| cluster::Step::random(&mut dice))
                        .collect();
                    Cluster::new(&run).play(&self.select(&steps)).await;
                }
                World::Addresses => {
                    let steps: Vec<_> = (0..self.steps)
                        .map(|_| addresses::Step::random(&mut dice))
                        .collect();
                    Addresses::new(&run).play(&self.select(&steps)).await;
                }
            }
            Outcome {
                violation: run.violation(),
                lines: run.lines(),
            }
        })
    }

    fn select<T: Copy>(&self, steps: &[T]) -> Vec<T> {
        match &self.kept {
            Some(kept) => kept
                .iter()
                .filter_map(|step| steps.get(*step))
                .copied()
                .collect(),
            None => steps.to_vec(),
        }
    }

    /// A part of this failing schedule that fails as well: steps are left out, many at once at
    /// first, as long as something fails.
    pub fn minimise(&self, plant: Option<Plant>) -> Self {
        let mut kept = self
            .kept
            .clone()
            .unwrap_or_else(|| (0..self.steps).collect());
        let (mut size, mut attempts) = (kept.len().div_ceil(2), 0);
        while size > 0 && attempts < ATTEMPTS {
            let mut place = 0;
            while place < kept.len() && attempts < ATTEMPTS {
                let end = (place + size).min(kept.len());
                let fewer: Vec<usize> = kept[..place].iter().chain(&kept[end..]).copied().collect();
                let candidate = Self {
                    kept: Some(fewer.clone()),
                    ..self.clone()
                };
                attempts += 1;
                match candidate.play(plant, false).violation {
                    Some(_) => kept = fewer,
                    None => place = end,
                }
            }
            size /= 2;
        }
        Self {
            kept: Some(kept),
            ..self.clone()
        }
    }
}
