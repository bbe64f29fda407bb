//! Kernels that people run: each boots in a virtual machine whose root is this machine's own,
//! read-only under a file system in memory, and runs the compiled test programs of the kernel
//! layers from their own paths. Without KVM: emulation boots a distribution's kernel in seconds,
//! and is 10 to 20 times slower than the machine, which no test may notice.
//!
//! [`packages`] fetches kernels, [`initramfs`] packs what finds the root, [`boot`] runs a script in
//! it, [`programs`] builds and names what runs, [`results`] reads the programs' output, [`table`]
//! prints it.

pub mod boot;
pub mod initramfs;
pub mod packages;
pub mod programs;
pub mod results;
pub mod table;

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::boot::Machine;
use self::packages::{Kernel, RELEASES, Release};
use self::programs::{Program, Selection};
use self::results::{Results, Verdict};
use crate::cluster::preflight;

/// Programs beyond those of clusters, and the Debian packages that have them.
const PACKAGES: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("modprobe", "kmod"),
    ("xz", "xz-utils"),
    ("ipvsadm", "ipvsadm"),
];

/// Options of a run.
#[derive(Debug)]
pub struct Options {
    /// Names of kernels, as in [`RELEASES`]; all when empty.
    pub kernels: Vec<String>,
    /// Parts of the names of suites; all when empty.
    pub suites: Vec<String>,
    /// The subset that depends on the kernel most, with the programs that `cargo test` builds.
    pub quick: bool,
    /// Ask for newer kernels than those that are cached.
    pub refresh: bool,
    /// Folder for the consoles' logs.
    pub state: PathBuf,
}

/// Runs the chosen suites on the chosen kernels and prints a table. True: every suite ran, and
/// nothing failed.
pub fn run(options: &Options, progress: &dyn Fn(&str)) -> Result<bool> {
    preflight::prepare(progress)?;
    preflight::prepare_also(&PACKAGES, progress)?;
    let releases = chosen(&options.kernels)?;
    let selection = if options.quick {
        Selection::Quick
    } else {
        Selection::All
    };
    let programs = programs::built(selection, &options.suites, progress)?;
    std::fs::create_dir_all(&options.state)?;
    let mut columns = Vec::new();
    for release in releases {
        let kernel = packages::fetch(release, options.refresh, progress)?;
        columns.push((
            kernel.version.clone(),
            run_on(&kernel, &programs, options, progress)?,
        ));
    }
    println!("{}", table::render(&programs, &columns));
    Ok(columns.iter().all(|(_, results)| {
        programs
            .iter()
            .all(|program| results.verdict(program.suite).is_passed())
    }))
}

fn chosen(names: &[String]) -> Result<Vec<&'static Release>> {
    let known = || {
        RELEASES
            .iter()
            .map(|release| release.name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let find = |name: &String| {
        let found = RELEASES.iter().find(|release| release.name == name);
        found.with_context(|| format!("no kernel {name:?}; there are {}", known()))
    };
    if names.is_empty() {
        Ok(RELEASES.iter().collect())
    } else {
        names.iter().map(find).collect()
    }
}

/// Machines of one kernel at once, each with a part of the programs: emulation has one processor's
/// work for each.
const MACHINES: usize = 2;

/// Boots one kernel and runs everything on it.
fn run_on(
    kernel: &Kernel,
    programs: &[Program],
    options: &Options,
    progress: &dyn Fn(&str),
) -> Result<Results> {
    let begin = Instant::now();
    let log = |number: usize| {
        options
            .state
            .join(format!("{}-{number}.log", kernel.release.name))
    };
    let (version, distribution) = (&kernel.version, kernel.release.distribution);
    progress(&format!(
        "Linux {version} ({distribution}); its consoles: {} and so on",
        log(1).display()
    ));
    let shares = programs::shares(programs, MACHINES);
    let ended: Vec<Result<Results>> = thread::scope(|scope| {
        let mut running = Vec::new();
        for (index, share) in shares.iter().enumerate() {
            let log = log(index + 1);
            running.push(scope.spawn(move || run_share(kernel, share, &log)));
        }
        let joined = running.into_iter().map(|machine| machine.join());
        joined
            .map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let mut results = Results::default();
    for machine in ended {
        match machine {
            Ok(share) => results.merge(share),
            // Its suites are missing.
            Err(error) => progress(&format!("error: {error:#}")),
        }
    }
    for program in programs {
        if let Verdict::Missing(why) = results.verdict(program.suite) {
            println!(
                "{}: {why}\ntest result: FAILED. 0 passed; 1 failed;",
                program.suite
            );
        }
    }
    progress(&format!(
        "Linux {version} took {:.0} s",
        begin.elapsed().as_secs_f32()
    ));
    Ok(results)
}

/// Boots one machine, and prints the output of each program once it has ended.
fn run_share(kernel: &Kernel, programs: &[Program], log: &Path) -> Result<Results> {
    let limit = programs
        .iter()
        .map(|program| program.limit)
        .sum::<Duration>()
        + boot::LIMIT;
    let mut results = Results::default();
    let mut open: Vec<&str> = programs.iter().map(|program| program.suite).collect();
    let print = |results: &Results, suite: &str, how: &str| {
        println!(
            "\n{suite} on Linux {}, {how}:\n{}",
            kernel.version,
            results.text(suite)
        );
    };
    let mut hear = |line: &str, at: Duration| {
        results.hear(line, at);
        open.retain(|suite| {
            let took = results.took(suite);
            took.inspect(|took| print(&results, suite, &format!("{:.0} s", took.as_secs_f32())))
                .is_none()
        });
    };
    let script = programs::script(programs);
    Machine {
        kernel,
        script: &script,
        limit,
        log,
    }
    .run(&mut hear)?;
    open.iter()
        .for_each(|suite| print(&results, suite, "without an end"));
    Ok(results)
}
