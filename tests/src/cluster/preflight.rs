//! Requirements on the machine. Missing packages are installed, with a message; a missing feature
//! is an error that names it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::binaries::cache;
use super::process;

/// A program and the Debian package that has it.
const PACKAGES: [(&str, &str); 8] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("conntrack", "conntrack"),
    ("iptables", "iptables"),
    ("runc", "runc"),
    ("busybox", "busybox-static"),
    ("ethtool", "ethtool"),
    ("nsenter", "util-linux"),
];

/// Kernel features that are tried in a network namespace made for it: what it is for, and a
/// command.
const FEATURES: [(&str, &str); 4] = [
    (
        "veth pairs (CONFIG_VETH)",
        "ip link add probe0 type veth peer name probe1",
    ),
    ("bridges (CONFIG_BRIDGE)", "ip link add probe2 type bridge"),
    (
        "VXLAN (CONFIG_VXLAN)",
        "ip link add probe3 type vxlan id 1 dstport 4789 local 127.0.0.1",
    ),
    (
        "nftables with connection tracking (CONFIG_NF_TABLES, CONFIG_NFT_CT)",
        "nft add table inet probe { chain c { ct state new accept ; } ; }",
    ),
];

/// What a cluster of three nodes writes into its state folder in a test, images included, with room
/// for two beside it.
const ROOM: u64 = 2 << 30;

/// Makes sure that a cluster whose files are in `state` can run here. `progress` receives lines for
/// people.
pub fn check(state: &Path, progress: &dyn Fn(&str)) -> Result<()> {
    prepare(progress)?;
    has_room(state, ROOM)?;
    let state = state.to_owned();
    // A thread that has left the machine's namespaces ends with what it made there.
    std::thread::spawn(move || probe(&state))
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Installs the programs that namespaces and clusters are made with, as far as they are missing.
/// Needs root, as all that uses them does.
pub fn prepare(progress: &dyn Fn(&str)) -> Result<()> {
    prepare_also(&PACKAGES, progress)
}

/// Installs programs, each with its package, as far as they are missing.
pub fn prepare_also(
    programs: &[(&'static str, &'static str)],
    progress: &dyn Fn(&str),
) -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    ensure!(
        root,
        "this needs root: nodes and pods are namespaces with mounts and devices of their own"
    );
    if missing(programs).is_empty() {
        return Ok(());
    }
    // The package manager serves one at a time and refuses the second: harnesses that start
    // together take turns.
    let cache = cache()?;
    std::fs::create_dir_all(&cache)
        .with_context(|| format!("cannot create {}", cache.display()))?;
    let turn = File::create(cache.join("packages.lock"))?;
    turn.lock()
        .context("cannot wait for another harness that installs packages")?;
    install(&missing(programs), progress)
}

/// Packages whose programs are not there.
fn missing(programs: &[(&'static str, &'static str)]) -> Vec<&'static str> {
    let lacking = |program: &&(&str, &str)| match find(program.0) {
        Some(path) => program.0 == "busybox" && !is_static(&path),
        None => true,
    };
    programs
        .iter()
        .filter(lacking)
        .map(|(_, package)| *package)
        .collect()
}

fn install(packages: &[&str], progress: &dyn Fn(&str)) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if find("apt-get").is_none() {
        bail!(
            "install {} first: this machine has no apt-get",
            packages.join(", ")
        );
    }
    progress(&format!(
        "installing from the distribution: {}",
        packages.join(" ")
    ));
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        process::run(
            command
                .args(["-q", "-y"])
                .args(arguments)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    apt(&["update"])?;
    let install = ["install", "--no-install-recommends"];
    apt(&[&install, packages].concat())?;
    Ok(())
}

/// Fails where fewer than `bytes` are free: a node whose disk is full ends silently, because there
/// is no room for its log.
fn has_room(folder: &Path, bytes: u64) -> Result<()> {
    let found = nix::sys::statvfs::statvfs(folder)
        .with_context(|| format!("cannot ask for room in {}", folder.display()))?;
    let free = found.blocks_available() * found.fragment_size();
    let mebibytes = |bytes: u64| bytes >> 20;
    ensure!(
        free >= bytes,
        "{} MiB are free in {}, and a cluster needs {}: free some, or put --state on another disk",
        mebibytes(free),
        folder.display(),
        mebibytes(bytes)
    );
    Ok(())
}

fn probe(state: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("cannot make network and mount namespaces; in a container, run it privileged")?;
    for (feature, command) in FEATURES {
        let mut words = command.split_whitespace();
        let program = words.next().context("a command")?;
        process::run(Command::new(program).args(words)).with_context(|| {
            format!("this kernel lacks {feature}; load the module or use another kernel")
        })?;
    }
    overlay(state)
}

/// The container runtime keeps its layers in `state`, which must carry an overlay.
fn overlay(state: &Path) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let folder = tempfile::Builder::new()
        .prefix(".probe-")
        .tempdir_in(state)?;
    let path = |name: &str| folder.path().join(name);
    let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(path);
    for each in [&lower, &upper, &work, &merged] {
        std::fs::create_dir(each)?;
    }
    let show = |path: &PathBuf| path.display().to_string();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        show(&lower),
        show(&upper),
        show(&work)
    );
    mount(
        Some("overlay"),
        &merged,
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    )
    .with_context(|| {
        format!(
            "no overlay can be mounted in {}: put --state on an ext4, xfs or tmpfs",
            state.display()
        )
    })?;
    umount2(&merged, MntFlags::MNT_DETACH)?;
    Ok(())
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin:/bin";
    path.split(':')
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.exists())
}

/// A program that needs no library names no loader near its beginning.
fn is_static(program: &Path) -> bool {
    use std::io::Read as _;
    let mut head = Vec::new();
    let read = std::fs::File::open(program).and_then(|file| file.take(4096).read_to_end(&mut head));
    read.is_ok() && !head.windows(8).any(|window| window == b"ld-linux")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_too_full_is_refused_with_both_figures() {
        let folder = tempfile::tempdir().unwrap();
        has_room(folder.path(), 1).unwrap();
        let error = has_room(folder.path(), u64::MAX).unwrap_err().to_string();
        assert!(
            error.contains("MiB are free in") && error.contains("17592186044415"),
            "{error}"
        );
    }
}
