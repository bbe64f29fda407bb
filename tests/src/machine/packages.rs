//! Kernels as Debian ships them, fetched by apt with a configuration and lists of its own, so that
//! the machine's own sources stay as they are. The mirror is the one that the machine uses.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cluster::{binaries, process};

/// A kernel that is tried.
#[derive(Debug, PartialEq, Eq)]
pub struct Release {
    /// Name on the command line.
    pub name: &'static str,
    /// The suite of Debian whose newest kernel it is.
    pub suite: &'static str,
    /// Display name of the suite.
    pub distribution: &'static str,
}

/// From old to new.
pub const RELEASES: [Release; 4] = [
    Release {
        name: "5.10",
        suite: "bullseye",
        distribution: "Debian 11",
    },
    Release {
        name: "6.1",
        suite: "bookworm",
        distribution: "Debian 12",
    },
    Release {
        name: "6.12",
        suite: "trixie",
        distribution: "Debian 13",
    },
    Release {
        name: "testing",
        suite: "testing",
        distribution: "Debian testing",
    },
];

/// Keys that sign Debian's suites.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The package that depends on the newest kernel of a suite.
const NEWEST: &str = "linux-image-amd64";
/// Names of packages that a kernel is made of, of which each needs some of the others.
const PARTS: [&str; 4] = [
    "linux-image-",
    "linux-base-",
    "linux-binary-",
    "linux-modules-",
];

/// An unpacked kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Its release.
    pub release: &'static Release,
    /// Its `uname -r`.
    pub version: String,
    /// The image that boots.
    pub image: PathBuf,
    /// The folder that has `lib/modules`.
    pub root: PathBuf,
}

/// The newest kernel of a suite; with `refresh` it is asked for again, else what is cached serves.
pub fn fetch(release: &'static Release, refresh: bool, progress: &dyn Fn(&str)) -> Result<Kernel> {
    let folder = binaries::cache()?.join("kernels").join(release.name);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let turn = File::create(folder.join("lock"))?;
    turn.lock()
        .context("cannot wait for another harness that fetches this kernel")?;
    let root = folder.join("root");
    if refresh || !root.exists() {
        progress(&format!(
            "fetching the kernel of {} (once)",
            release.distribution
        ));
        // An interrupted download must not look like a kernel.
        let new = folder.join("new");
        for stale in [&new, &root] {
            if stale.exists() {
                std::fs::remove_dir_all(stale)?;
            }
        }
        unpack(release, &folder, &new)?;
        std::fs::rename(&new, &root)?;
    }
    found(release, root)
}

/// The kernel that is unpacked in a folder.
fn found(release: &'static Release, root: PathBuf) -> Result<Kernel> {
    let modules = root.join("lib/modules");
    let entry = std::fs::read_dir(&modules)
        .ok()
        .and_then(|mut entries| entries.next()?.ok());
    let entry =
        entry.with_context(|| format!("{} has no kernel; remove its folder", modules.display()))?;
    let version = entry.file_name().to_string_lossy().into_owned();
    let places = [
        root.join(format!("boot/vmlinuz-{version}")),
        entry.path().join("vmlinuz"),
    ];
    let image = places.into_iter().find(|path| path.exists());
    let image =
        image.with_context(|| format!("{} has no vmlinuz for {version}", root.display()))?;
    Ok(Kernel {
        release,
        version,
        image,
        root,
    })
}

fn unpack(release: &Release, folder: &Path, root: &Path) -> Result<()> {
    let apt = Apt::new(release.suite, folder)?;
    apt.run("apt-get", &["update"])?;
    let names = apt.parts()?;
    let packages = folder.join("packages");
    std::fs::create_dir_all(&packages)?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    process::run(
        apt.command("apt-get", &[&["download"][..], &names].concat())
            .current_dir(&packages),
    )?;
    for entry in std::fs::read_dir(&packages)? {
        process::run(Command::new("dpkg").arg("-x").arg(entry?.path()).arg(root))?;
    }
    std::fs::remove_dir_all(&packages)?;
    // Newer packages have only /usr/lib, where depmod and modprobe look in another tree only
    // through a link.
    if !root.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", root.join("lib"))?;
    }
    let entry = std::fs::read_dir(root.join("lib/modules"))?
        .next()
        .context("the packages have no modules")??;
    process::run(
        Command::new("depmod")
            .arg("-b")
            .arg(root)
            .arg(entry.file_name()),
    )?;
    Ok(())
}

/// apt with sources, lists and caches of its own.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(suite: &str, folder: &Path) -> Result<Self> {
        let apt = folder.join("apt");
        for each in ["lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(apt.join(each))?;
        }
        let sources = apt.join("sources.list");
        std::fs::write(
            &sources,
            format!(
                "deb [arch=amd64 signed-by={KEYRING}] {} {suite} main\n",
                mirror()?
            ),
        )?;
        let option =
            |name: &str, value: &Path| ["-o".to_owned(), format!("{name}={}", value.display())];
        let options = [
            option("Dir::Etc::sourcelist", &sources),
            option("Dir::Etc::sourceparts", Path::new("-")),
            option("Dir::State::lists", &apt.join("lists")),
            option("Dir::Cache", &apt.join("cache")),
            // Packages installed here do not matter.
            option("Dir::State::status", Path::new("/dev/null")),
            option("Acquire::Languages", Path::new("none")),
            option("Acquire::Check-Valid-Until", Path::new("false")),
        ];
        Ok(Self {
            options: options.concat(),
        })
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).arg("-q").args(arguments);
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        process::run(&mut self.command(program, arguments))
    }

    /// The packages of the newest kernel.
    fn parts(&self) -> Result<Vec<String>> {
        let mut parts: Vec<String> = Vec::new();
        let mut open = vec![NEWEST.to_owned()];
        while let Some(name) = open.pop() {
            let depends = self.run("apt-cache", &["depends", "--important", &name])?;
            for part in kernel_parts(&depends) {
                if !parts.contains(&part) {
                    parts.push(part.clone());
                    open.push(part);
                }
            }
        }
        ensure!(!parts.is_empty(), "{NEWEST} depends on no kernel");
        Ok(parts)
    }
}

/// The packages among dependencies that a kernel is made of.
fn kernel_parts(depends: &str) -> Vec<String> {
    let names = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    names
        .filter(|name| PARTS.iter().any(|part| name.starts_with(part)))
        .map(str::to_owned)
        .collect()
}

/// Returns this machine's mirror of Debian.
fn mirror() -> Result<String> {
    const REMEDY: &str =
        "kernels are fetched from the mirror of a Debian machine's own apt sources";
    let release = std::fs::read_to_string("/etc/os-release").context(REMEDY)?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context(REMEDY)?;
    let format = "$(REPO_URI) $(RELEASE) $(COMPONENT)";
    let targets = process::run(Command::new("apt-get").args([
        "indextargets",
        "Created-By: Packages",
        "--format",
        format,
    ]))?;
    let repository = debian(&targets, codename);
    repository.with_context(|| {
        format!(
            "{REMEDY}, which have no suite {codename} with main; it is asked for by apt-get update"
        )
    })
}

/// The repository among `apt-get indextargets` that has the component main of a suite.
fn debian(targets: &str, codename: &str) -> Option<String> {
    let mut targets = targets
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let found = targets.find(|words| words.get(1..) == Some(&[codename, "main"]))?;
    Some(found[0].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_what_its_packages_depend_on() {
        let depends = "linux-image-7.2.12\n  PreDepends: linux-base\n |Depends: initramfs-tools\n  \
                       Depends: linux-base-7.2.12\n  Depends: linux-binary-7.2.12\n  Depends: \
                       linux-modules-7.2.12\n  Breaks: linux-image-1\n";
        assert_eq!(
            kernel_parts(depends),
            [
                "linux-base-7.2.12",
                "linux-binary-7.2.12",
                "linux-modules-7.2.12"
            ]
        );
    }

    #[test]
    fn the_mirror_is_that_of_the_suite_itself() {
        let targets = "http://mirror/security/ one-security main\n\
                       http://mirror/debian/ one contrib\n\
                       http://mirror/debian/ one main";
        assert_eq!(
            debian(targets, "one").as_deref(),
            Some("http://mirror/debian/")
        );
        assert_eq!(debian(targets, "two"), None);
    }
}
