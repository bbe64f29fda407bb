//! The NetworkPolicy cases of Kubernetes' own end-to-end suite, unmodified, against Margay on the
//! real cluster.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::cluster::{self, Cluster, process};
use crate::image::{Entry, Image};
use crate::install;

/// The cases.
const FOCUS: &str = r"\[sig-network\] Netpol";
/// Cases that open SCTP sockets in pods, which the kernel may lack; what they ask is asked with raw
/// sockets by the tables of verdicts.
const SKIP: &str = "SCTPConnectivity";

/// Where, and under which name.
#[derive(Debug)]
pub struct Options {
    /// Folder of everything the cluster writes.
    pub state: PathBuf,
    /// Prefix of the cluster's namespaces.
    pub name: String,
    /// Folder of the JUnit report.
    pub report: PathBuf,
}

/// Runs the suite; true if every case passed. Its output goes to standard output.
pub fn run(options: &Options, progress: &dyn Fn(&str)) -> Result<bool> {
    let folder = options
        .state
        .with_file_name(format!("{}-images", options.name));
    let wanted = cluster::Options {
        name: options.name.clone(),
        state: options.state.clone(),
        images: vec![install::image(&folder)?],
        suite: true,
        ..cluster::Options::default()
    };
    let cluster = Cluster::up(&wanted, progress)?;
    install::install(&cluster, &install::Options::default(), progress)?;
    let suite = cluster.kube_bin().join("e2e.test");
    for name in servers(&suite)? {
        progress(&format!("agnhost as {name}"));
        cluster.load(&agnhost(&cluster, &name, &folder)?)?;
    }
    std::fs::create_dir_all(&options.report)?;
    let report = options.report.canonicalize()?;
    let begin = Instant::now();
    let status = Command::new(&suite)
        .args([
            "--provider=skeleton",
            "--ginkgo.no-color",
            "--ginkgo.timeout=40m",
        ])
        .arg(format!("--kubeconfig={}", cluster.kubeconfig().display()))
        .arg(format!("--ginkgo.focus={FOCUS}"))
        .arg(format!("--ginkgo.skip={SKIP}"))
        .arg(format!("--report-dir={}", report.display()))
        .current_dir(cluster.folder())
        .status()
        .with_context(|| format!("cannot run {}", suite.display()))?;
    progress(&format!(
        "the suite took {:.0} s; its report is in {}",
        begin.elapsed().as_secs_f32(),
        report.display()
    ));
    cluster.down()?;
    Ok(status.success())
}

/// Names under which the suite wants its server.
fn servers(suite: &Path) -> Result<Vec<String>> {
    let names = process::run(Command::new(suite).arg("--list-images"))?;
    let is_agnhost = |name: &&str| {
        name.rsplit('/')
            .next()
            .is_some_and(|last| last.starts_with("agnhost:"))
    };
    let found: Vec<String> = names
        .lines()
        .map(str::trim)
        .filter(is_agnhost)
        .map(str::to_owned)
        .collect();
    anyhow::ensure!(
        !found.is_empty(),
        "{} lists no image of agnhost",
        suite.display()
    );
    Ok(found)
}

/// The archive of the server under one of its names.
fn agnhost(cluster: &Cluster, name: &str, folder: &Path) -> Result<PathBuf> {
    let entry = Entry::File {
        source: cluster.kube_bin().join("agnhost"),
        dest: "agnhost".into(),
    };
    let image = Image {
        name: name.to_owned(),
        entries: vec![entry],
        entrypoint: vec!["/agnhost".to_owned()],
    };
    let archive = folder.join("agnhost.tar");
    image.write(&archive)?;
    Ok(archive)
}
