//! The first file system of a machine: a static busybox, the modules that reach the host's root
//! over 9p, and an `init` that puts a file system in memory over it and goes on with the script
//! that it is given.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::packages::Kernel;
use crate::cluster::process;

/// What must be loaded before there is a root. Each brings what it needs; what a kernel has built
/// in is no module.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
/// Path of the script in the machine.
const SCRIPT: &str = "/run/script";

/// `init`, which finds the kernel's modules in `$modules`.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for module in /modules/*; do $b insmod $module || echo "cannot load $module"; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 host /host
$b mount -t tmpfs -o size=3g over /over
$b mkdir /over/upper /over/work
$b mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work root /new
$b mkdir -p /new/usr/lib/modules/$version
$b mount --bind /host$modules /new/usr/lib/modules/$version
for folder in tmp run; do $b mount -t tmpfs $folder /new/$folder; done
for folder in proc sys dev; do $b mount --move /$folder /new/$folder; done
$b mkdir -p /new/dev/pts /new/dev/shm /new/run/lock
$b mount -t devpts devpts /new/dev/pts; $b mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
$b ip link set lo up
$b cp /script /new/run/script
exec $b switch_root /new /bin/sh /run/script
"#;

/// Packs it into an archive in `folder`.
pub fn pack(kernel: &Kernel, script: &str, folder: &Path) -> Result<PathBuf> {
    let tree = folder.join("tree");
    for each in [
        "bin", "modules", "host", "over", "new", "proc", "sys", "dev",
    ] {
        std::fs::create_dir_all(tree.join(each))?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists());
    std::fs::copy(
        busybox.context("busybox is not installed")?,
        tree.join("bin/busybox"),
    )?;
    for (index, module) in needed(kernel)?.iter().enumerate() {
        std::fs::write(tree.join(format!("modules/{index:02}.ko")), plain(module)?)?;
    }
    let modules = kernel
        .root
        .join("lib/modules")
        .join(&kernel.version)
        .canonicalize()?;
    let variables = format!(
        "version={}\nmodules={}\n",
        kernel.version,
        modules.display()
    );
    let (shebang, rest) = INIT.split_once('\n').context("init has lines")?;
    std::fs::write(tree.join("init"), format!("{shebang}\n{variables}{rest}"))?;
    std::fs::write(tree.join("script"), script)?;
    debug_assert!(INIT.contains(SCRIPT));
    let archive = folder.join("initramfs");
    let pack = "chmod +x init && find . | busybox cpio -o -H newc";
    let output = Command::new("sh")
        .args(["-c", pack])
        .current_dir(&tree)
        .output()?;
    if !output.status.success() {
        bail!(
            "cannot pack {}: {}",
            tree.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    std::fs::write(&archive, output.stdout)?;
    Ok(archive)
}

/// The files of [`MODULES`] and of those that they need, in an order in which they can be loaded.
fn needed(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut known = BTreeSet::new();
    for module in MODULES {
        let mut modprobe = Command::new("modprobe");
        modprobe.arg("-d").arg(&kernel.root).args([
            "-S",
            &kernel.version,
            "--show-depends",
            module,
        ]);
        // A module that it does not find is built in; newer packages do not list those.
        for line in process::run(&mut modprobe).unwrap_or_default().lines() {
            let file = line
                .strip_prefix("insmod ")
                .map(|words| PathBuf::from(words.trim()));
            found.extend(file.filter(|file| known.insert(file.clone())));
        }
    }
    Ok(found)
}

/// A module as the kernel takes it: busybox cannot unpack every kind of compression.
fn plain(module: &Path) -> Result<Vec<u8>> {
    if module.extension().is_none_or(|extension| extension != "xz") {
        return std::fs::read(module).with_context(|| format!("cannot read {}", module.display()));
    }
    let output = Command::new("xz").arg("-dc").arg(module).output()?;
    if !output.status.success() {
        bail!(
            "cannot unpack {}: {}",
            module.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output.stdout)
}
