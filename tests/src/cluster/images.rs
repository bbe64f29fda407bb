//! Images that every node has: the sandbox, a shell, and the program that tests run in pods.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::process;
use crate::image::{Entry, Image};

/// The sandbox of every pod: a program that waits, and reaps the pod's processes.
pub const PAUSE: &str = "margay.test/pause:1";
/// A shell with the usual small commands.
pub const BUSYBOX: &str = "margay.test/busybox:1";
/// Servers and clients for every kind of test, as `/agnhost`.
pub const AGNHOST: &str = "margay.test/agnhost:1";

/// Puts the standard images and `extra` archives into `folder`, from which the nodes import them.
pub fn provide(
    folder: &Path,
    cache: &Path,
    tool: &Path,
    kube_bin: &Path,
    extra: &[PathBuf],
) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let pause = tool.with_file_name("margay-pause");
    let standard = [
        (
            "pause.tar",
            cached(
                cache,
                PAUSE,
                &pause,
                &[format!("{}=pause", pause.display())],
                "/pause",
            )?,
        ),
        ("busybox.tar", busybox(cache)?),
        ("agnhost.tar", agnhost(cache, &kube_bin.join("agnhost"))?),
    ];
    for (name, archive) in standard {
        link(&archive, &folder.join(name))?;
    }
    for (index, archive) in extra.iter().enumerate() {
        link(archive, &folder.join(format!("extra-{index}.tar")))?;
    }
    Ok(())
}

/// The archive of busybox, which must need no library.
fn busybox(cache: &Path) -> Result<PathBuf> {
    let program = Path::new("/bin/busybox");
    let applets = process::run(Command::new(program).arg("--list"))
        .context("busybox (package busybox-static)")?;
    let links = applets
        .lines()
        .filter(|name| *name != "busybox")
        .map(|name| format!("@/bin/busybox=bin/{name}"));
    let entries: Vec<String> = std::iter::once("/bin/busybox=bin/busybox".to_owned())
        .chain(links)
        .collect();
    cached(cache, BUSYBOX, program, &entries, "/bin/sh")
}

fn agnhost(cache: &Path, program: &Path) -> Result<PathBuf> {
    cached(
        cache,
        AGNHOST,
        program,
        &[format!("{}=agnhost", program.display())],
        "/agnhost",
    )
}

/// Writes an image unless it was written before from the same program.
fn cached(
    cache: &Path,
    name: &str,
    program: &Path,
    entries: &[String],
    entrypoint: &str,
) -> Result<PathBuf> {
    let about =
        std::fs::metadata(program).with_context(|| format!("{} is missing", program.display()))?;
    let plain = name.replace(['/', ':'], "-");
    let archive = cache.join(format!(
        "{plain}-{}-{}-{}.tar",
        about.size(),
        about.mtime(),
        about.mtime_nsec()
    ));
    if !archive.exists() {
        let entries = entries
            .iter()
            .map(|entry| entry.parse())
            .collect::<Result<Vec<Entry>>>()?;
        let image = Image {
            name: name.to_owned(),
            entries,
            entrypoint: vec![entrypoint.to_owned()],
        };
        image.write(&archive)?;
    }
    Ok(archive)
}

/// Shows `from` as `to` without copying where the file system allows it.
fn link(from: &Path, to: &Path) -> Result<()> {
    ensure!(
        from.exists(),
        "image archive {} does not exist",
        from.display()
    );
    if std::fs::hard_link(from, to).is_err() {
        std::fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}
