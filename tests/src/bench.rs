//! Benchmarks of the shipped programs, with anchors and budgets, on a real cluster and without
//! Kubernetes.
//!
//! Everything is measured on one machine: API server, kubelets and probes share the cores with what
//! is measured, and the report has how busy they were. Anchors and budgets are in [`lines`]; a
//! measurement selected by name brings up what it needs.

pub mod connect;
pub mod driver;
pub mod figure;
pub mod lines;
pub mod local;
pub mod machine;
pub mod memory;
pub mod objects;
pub mod plugin;
pub mod pods;
pub mod policy;
pub mod restart;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cluster::Cluster;
use crate::demo::{self, Stage};
use crate::install;
use crate::world::{self, World};
use figure::Sheet;
use machine::Ticks;
use objects::Objects;

/// Longest wait for the machine to become idle before a measurement.
const CALM: Duration = Duration::from_secs(60);

/// Options of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder of everything the cluster writes.
    pub state: PathBuf,
    /// Prefix of the cluster's namespaces.
    pub name: String,
    /// Folder of the programs that are measured.
    pub programs: PathBuf,
    /// Names of the measurements; none: all.
    pub only: Vec<String>,
    /// Path of the report, written as `NAME.md` and `NAME.json`.
    pub report: PathBuf,
}

type Measure = fn(&mut Bench) -> Result<()>;

/// Measurements in the order in which they are taken: what needs a fresh cluster first, what fills
/// it last.
const MEASURES: &[(&str, Measure)] = &[
    ("driver", driver::run),
    ("local", local::run),
    ("install", |bench| bench.stage().map(|_| ())),
    ("memory", memory::idle),
    ("pods", pods::serial),
    ("burst", pods::burst),
    ("restart", restart::run),
    ("policy", |bench| policy::run(bench, 0)),
    ("connect", connect::run),
    ("policy1000", |bench| policy::run(bench, 1_000)),
    ("memory1000", memory::full),
    ("policy10000", |bench| policy::run(bench, 10_000)),
    ("connect10000", connect::among_many),
    ("memory10000", memory::with_many_policies),
];

/// State shared by the measurements.
pub struct Bench {
    options: Options,
    /// The cluster, once it is up.
    stage: Option<Stage>,
    /// Objects written through the API.
    objects: Option<Objects>,
    /// Cost of a few policies while there are no others, relative to none.
    few: Option<f64>,
    /// The figures.
    pub sheet: Sheet,
}

/// Measures and prints; returns whether every budget is kept.
pub fn run(options: &Options) -> Result<bool> {
    let known = |name: &String| MEASURES.iter().any(|(own, _)| own == name);
    let names = || {
        MEASURES
            .iter()
            .map(|(name, _)| *name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    if let Some(unknown) = options.only.iter().find(|name| !known(name)) {
        anyhow::bail!("no measurement is named {unknown:?}; there are {}", names());
    }
    let chosen =
        |name: &str| options.only.is_empty() || options.only.iter().any(|only| only == name);
    let mut bench = Bench {
        options: options.clone(),
        stage: None,
        objects: None,
        few: None,
        sheet: Sheet::default(),
    };
    println!(
        "Programs of this build, API server, etcd, kubelets, containerds and probes on one \
         machine. Anchors were taken on another day."
    );
    let begin = Instant::now();
    for (name, measure) in MEASURES.iter().filter(|(name, _)| chosen(name)) {
        let (ticks, started) = (Ticks::now()?, Instant::now());
        println!("-- {name}");
        measure(&mut bench).with_context(|| format!("measurement {name}"))?;
        println!(
            "   {name}: {}, {:.0} s",
            machine::state(ticks)?,
            started.elapsed().as_secs_f32()
        );
        bench.write()?;
    }
    println!(
        "all after {:.0} s; table: {}.md",
        begin.elapsed().as_secs_f32(),
        options.report.display()
    );
    let missed = bench.sheet.missed();
    missed
        .iter()
        .for_each(|line| println!("budget missed: {line}"));
    Ok(missed.is_empty())
}

impl Bench {
    /// The cluster with Margay and the usual pods; brought up at the first call.
    pub fn stage(&mut self) -> Result<&Stage> {
        if self.stage.is_none() {
            let progress = |line: &str| eprintln!("{line}");
            let Options { name, state, .. } = &self.options;
            let folder = state.with_file_name(format!("{name}-images"));
            let images = vec![
                install::image_of(&|name| self.program(name), &folder)?,
                world::image(&folder)?,
            ];
            let cluster = demo::bring_up_with(name, state, images, &progress)?;
            let begin = Instant::now();
            install::install(&cluster, &install::Options::default(), &|_| {})?;
            self.sheet.put(
                "install.ready",
                begin.elapsed().as_secs_f64(),
                "through pods; images present",
            )?;
            let world = World::create(&cluster).with_context(|| install::diagnosis(&cluster))?;
            self.objects = Some(Objects::new(&cluster)?);
            self.stage = Some(Stage { cluster, world });
        }
        self.stage.as_ref().context("the stage was made above")
    }

    /// A program that is measured.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = self.options.programs.join(name);
        ensure!(
            path.exists(),
            "{} is not built: cargo build --release --bin {name}",
            path.display()
        );
        Ok(path)
    }

    /// The cluster.
    pub fn cluster(&mut self) -> Result<&Cluster> {
        Ok(&self.stage()?.cluster)
    }

    /// Objects written through the API.
    pub fn objects(&mut self) -> Result<&Objects> {
        self.stage()?;
        self.objects.as_ref().context("objects come with the stage")
    }

    /// Pids of the agents of all nodes.
    pub fn agents(&mut self) -> Result<Vec<i32>> {
        let nodes = self.cluster()?.nodes()?;
        let pids: Vec<i32> = nodes
            .iter()
            .flat_map(|node| install::processes(node, "node"))
            .collect();
        ensure!(
            pids.len() == nodes.len(),
            "{} agents run on {} nodes",
            pids.len(),
            nodes.len()
        );
        Ok(pids)
    }

    /// Prints a warning if the machine does not become idle.
    pub fn calm(&self) -> Result<()> {
        if !machine::calm(CALM)? {
            println!("   the machine did not become idle within {CALM:?}");
        }
        Ok(())
    }

    fn write(&self) -> Result<()> {
        let path = |end: &str| self.options.report.with_extension(end);
        if let Some(folder) = self.options.report.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path("md"), self.sheet.markdown())?;
        std::fs::write(
            path("json"),
            serde_json::to_string_pretty(&self.sheet.json())?,
        )?;
        Ok(())
    }
}
