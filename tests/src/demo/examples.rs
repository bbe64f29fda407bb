//! The policies of deploy/examples, each with the matrix that it has to end in.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::{OBEY, ports};
use crate::cluster::Cluster;
use crate::install;
use crate::matrix::{self, Matrix, Outcome};
use crate::world::{PODS, World};

/// A manifest and its expected result.
#[derive(Debug, Clone)]
pub struct Example {
    /// Name of the file without its end.
    pub name: String,
    /// Description from its first comment.
    pub about: String,
    /// The file.
    pub manifest: PathBuf,
    /// Expected verdicts while it is applied.
    pub expected: Matrix,
}

/// Every example, in the order of their names.
pub fn all() -> Result<Vec<Example>> {
    let folder = install::checkout().join("deploy/examples");
    let entries =
        std::fs::read_dir(&folder).with_context(|| format!("no folder {}", folder.display()))?;
    let mut manifests: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml"))
        .collect();
    manifests.sort();
    ensure!(!manifests.is_empty(), "no example in {}", folder.display());
    manifests.into_iter().map(Example::read).collect()
}

impl Example {
    fn read(manifest: PathBuf) -> Result<Self> {
        let name = manifest
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let text = std::fs::read_to_string(&manifest)?;
        let comment = text.lines().take_while(|line| line.starts_with('#'));
        let about: Vec<&str> = comment
            .map(|line| line.trim_start_matches(['#', ' ']))
            .collect();
        let table = manifest.with_extension("expect");
        let expected =
            std::fs::read_to_string(&table).with_context(|| format!("no {}", table.display()))?;
        let expected =
            Matrix::parse(&expected).with_context(|| format!("in {}", table.display()))?;
        Ok(Self {
            name,
            about: about.join(" "),
            manifest,
            expected,
        })
    }

    /// Applies it and measures until packets obey; also when it was applied.
    pub fn apply(&self, cluster: &Cluster, world: &World) -> Result<(Outcome, Instant)> {
        let applied = Instant::now();
        cluster.kubectl(&["apply", "-f", &self.manifest.display().to_string()])?;
        Ok((
            matrix::wait_for_match(world, &self.expected, OBEY)?,
            applied,
        ))
    }

    /// Deletes it and measures until everything is open again.
    pub fn delete(&self, cluster: &Cluster, world: &World) -> Result<Outcome> {
        cluster.kubectl(&["delete", "-f", &self.manifest.display().to_string()])?;
        matrix::wait_for_match(world, &Matrix::open(&PODS, &ports()), OBEY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_describes_itself_and_denies_something() {
        for example in all().unwrap() {
            assert!(
                !example.about.is_empty(),
                "{}: begin with a comment",
                example.name
            );
            let silent = example.expected.count(crate::probe::Verdict::Silent);
            assert!(
                silent > 0,
                "{}: a dataplane that enforces nothing would pass",
                example.name
            );
        }
    }
}
