//! The programs of Kubernetes, etcd and containerd, built from their Go modules.
//!
//! The modules are pinned in `tests/kubernetes`. What is built goes to a cache outside the tree, in
//! a folder named by the modules and the flags, so that a change of either makes a new folder and
//! nothing is built twice.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

/// Variable that names a folder of ready programs; nothing is built then.
pub const READY: &str = "KUBE_BIN";

const MODULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/kubernetes");

/// A program and how it is built.
struct Program {
    /// Name of the file.
    name: &'static str,
    /// Folder of the module that pins it.
    module: &'static str,
    /// The Go package.
    package: &'static str,
    how: How,
}

#[derive(PartialEq)]
enum How {
    /// Built with its version, without which it refuses to work with others.
    Versioned,
    Plain,
    Tags(&'static str),
    /// `go test -c`, with a version.
    Test,
}

const fn command(
    name: &'static str,
    module: &'static str,
    package: &'static str,
    how: How,
) -> Program {
    Program {
        name,
        module,
        package,
        how,
    }
}

/// Drivers of containerd that need libraries of the machine and serve no purpose here.
const NO_DRIVERS: How = How::Tags("no_btrfs,no_devmapper,no_zfs");

/// The API server comes first: it shares most with the others and pays for them.
const PROGRAMS: [Program; 11] = [
    command(
        "kube-apiserver",
        "kubernetes",
        "k8s.io/kubernetes/cmd/kube-apiserver",
        How::Versioned,
    ),
    command(
        "kubelet",
        "kubernetes",
        "k8s.io/kubernetes/cmd/kubelet",
        How::Versioned,
    ),
    command(
        "kube-controller-manager",
        "kubernetes",
        "k8s.io/kubernetes/cmd/kube-controller-manager",
        How::Versioned,
    ),
    command(
        "kube-scheduler",
        "kubernetes",
        "k8s.io/kubernetes/cmd/kube-scheduler",
        How::Versioned,
    ),
    command(
        "kube-proxy",
        "kubernetes",
        "k8s.io/kubernetes/cmd/kube-proxy",
        How::Versioned,
    ),
    command(
        "kubectl",
        "kubernetes",
        "k8s.io/kubernetes/cmd/kubectl",
        How::Versioned,
    ),
    command(
        "agnhost",
        "kubernetes",
        "k8s.io/kubernetes/test/images/agnhost",
        How::Plain,
    ),
    command("etcd", "etcd", "go.etcd.io/etcd/server/v3", How::Plain),
    command(
        "containerd",
        "containerd",
        "github.com/containerd/containerd/v2/cmd/containerd",
        NO_DRIVERS,
    ),
    command(
        "containerd-shim-runc-v2",
        "containerd",
        "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
        NO_DRIVERS,
    ),
    command(
        "ctr",
        "containerd",
        "github.com/containerd/containerd/v2/cmd/ctr",
        NO_DRIVERS,
    ),
];

/// The conformance suite; built only when asked for, because it takes as long as everything else
/// together.
const SUITE: Program = command(
    "e2e.test",
    "kubernetes",
    "k8s.io/kubernetes/test/e2e",
    How::Test,
);

/// Helm, which renders the chart and is no part of a cluster.
const HELM: Program = command("helm", "helm", "helm.sh/helm/v3/cmd/helm", How::Plain);

/// Returns Helm, after building it if it is missing.
pub fn helm(progress: &dyn Fn(&str)) -> Result<PathBuf> {
    let folder = folder_of(&[HELM.module], &[&HELM], "helm")?;
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let lock = File::create(folder.with_file_name("lock"))?;
    lock.lock().context("cannot wait for another build")?;
    let program = folder.join(HELM.name);
    if !program.exists() {
        check_go()?;
        progress(&format!("building Helm into {} (once)", folder.display()));
        build(&HELM, &folder)?;
    }
    Ok(program)
}

/// Returns the folder that holds every program, after building what is missing. `progress` receives
/// lines for people.
pub fn ensure_built(suite: bool, progress: &dyn Fn(&str)) -> Result<PathBuf> {
    let wanted: Vec<&Program> = PROGRAMS.iter().chain(suite.then_some(&SUITE)).collect();
    if let Some(folder) = std::env::var_os(READY).filter(|value| !value.is_empty()) {
        let folder = std::fs::canonicalize(&folder)
            .with_context(|| format!("{READY}={}", folder.display()))?;
        let missing: Vec<&str> = wanted
            .iter()
            .map(|p| p.name)
            .filter(|name| !folder.join(name).exists())
            .collect();
        ensure!(
            missing.is_empty(),
            "{READY}={} lacks {}",
            folder.display(),
            missing.join(", ")
        );
        return Ok(folder);
    }
    let folder = folder()?;
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    // Harnesses that start together take turns: the first one builds for all.
    let turn = File::create(folder.with_file_name("lock"))?;
    if turn.try_lock().is_err() {
        progress("waiting for another build");
        turn.lock().context("cannot wait for another build")?;
    }
    let missing: Vec<&Program> = wanted
        .into_iter()
        .filter(|program| !folder.join(program.name).exists())
        .collect();
    if missing.is_empty() {
        return Ok(folder);
    }
    check_go()?;
    progress(&format!(
        "building {} programs into {} (once; minutes from nothing)",
        missing.len(),
        folder.display()
    ));
    for (index, program) in missing.iter().enumerate() {
        let begin = Instant::now();
        progress(&format!(
            "[{}/{}] {} ...",
            index + 1,
            missing.len(),
            program.name
        ));
        build(program, &folder)?;
        progress(&format!(
            "[{}/{}] {} in {:.0} s",
            index + 1,
            missing.len(),
            program.name,
            begin.elapsed().as_secs_f32()
        ));
    }
    Ok(folder)
}

fn build(program: &Program, folder: &Path) -> Result<()> {
    // An interrupted build must not look like a program.
    let made = folder.join(format!(".{}.new", program.name));
    let mut go = Command::new("go");
    go.current_dir(Path::new(MODULES).join(program.module))
        .env("CGO_ENABLED", "0")
        .env("GOWORK", "off");
    if program.how == How::Test {
        go.args(["test", "-c"]);
    } else {
        go.arg("build");
    }
    go.args(flags(program)?)
        .arg("-o")
        .arg(&made)
        .arg(program.package);
    let status = go.status().context("cannot run go")?;
    if !status.success() {
        let _ = std::fs::remove_file(&made);
        bail!(
            "go could not build {} ({status}); its output is above",
            program.package
        );
    }
    std::fs::rename(&made, folder.join(program.name))?;
    Ok(())
}

/// Arguments that decide what is built. The same for all where possible, so that packages are
/// compiled once.
fn flags(program: &Program) -> Result<Vec<String>> {
    let mut flags = vec!["-trimpath".to_owned(), "-ldflags".to_owned()];
    match program.how {
        How::Versioned | How::Test => {
            let version = kubernetes_version()?;
            let mut numbers = version.trim_start_matches('v').split('.');
            let (major, minor) = (
                numbers.next().unwrap_or_default(),
                numbers.next().unwrap_or_default(),
            );
            let set = "-X k8s.io/component-base/version";
            flags.push(format!(
                "-s -w {set}.gitVersion={version} {set}.gitMajor={major} {set}.gitMinor={minor}"
            ));
        }
        How::Plain => flags.push("-s -w".into()),
        How::Tags(tags) => flags.extend(["-s -w".into(), "-tags".into(), tags.into()]),
    }
    Ok(flags)
}

/// The release of Kubernetes that the module pins, with its leading `v`.
pub fn kubernetes_version() -> Result<String> {
    let text = std::fs::read_to_string(Path::new(MODULES).join("kubernetes/go.mod"))?;
    let line = text
        .lines()
        .find_map(|line| line.split_once("k8s.io/kubernetes "))
        .map(|(_, version)| version.trim());
    Ok(line
        .context("kubernetes/go.mod requires no k8s.io/kubernetes")?
        .to_owned())
}

/// The harness's cache, shared by all clusters of this user.
pub fn cache() -> Result<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    Ok(base
        .context("neither XDG_CACHE_HOME nor HOME is set, so there is no cache folder")?
        .join("margay"))
}

fn folder() -> Result<PathBuf> {
    let programs: Vec<&Program> = PROGRAMS.iter().chain([&SUITE]).collect();
    folder_of(&["kubernetes", "etcd", "containerd"], &programs, "kube")
}

/// Folder of programs, by what decides their content.
fn folder_of(modules: &[&str], programs: &[&Program], prefix: &str) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    for module in modules {
        for file in ["go.mod", "go.sum"] {
            let path = Path::new(MODULES).join(module).join(file);
            hash.update(
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?,
            );
        }
    }
    for program in programs {
        hash.update(format!(
            "{} {} {:?}\n",
            program.name,
            program.package,
            flags(program)?
        ));
    }
    let short = HEXLOWER.encode(&hash.finalize()[..6]);
    Ok(cache()?.join(format!("{prefix}-{short}")).join("bin"))
}

fn check_go() -> Result<()> {
    let remedy =
        format!("install Go 1.26 or newer, or name a folder of ready programs with {READY}=");
    let output = Command::new("go")
        .args(["env", "GOVERSION"])
        .output()
        .with_context(|| remedy.clone())?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let minor = version
        .strip_prefix("go1.")
        .and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    ensure!(
        minor.is_some_and(|minor| minor >= 26),
        "Go is {version}: {remedy}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(file: &str) -> String {
        std::fs::read_to_string(Path::new(MODULES).join(file)).unwrap()
    }

    #[test]
    fn staging_modules_are_of_the_pinned_release() {
        let release = kubernetes_version().unwrap().replace("v1.", "v0.");
        let text = read("kubernetes/go.mod");
        let replaced: Vec<&str> = text.lines().filter(|line| line.contains(" => ")).collect();
        assert!(replaced.len() > 25, "{replaced:?}");
        for line in replaced {
            assert!(line.ends_with(&release), "{line} is not of {release}");
        }
    }

    #[test]
    fn every_program_is_pinned_by_its_module() {
        for program in PROGRAMS.iter().chain([&SUITE, &HELM]) {
            let tools = read(&format!("{}/tools.go", program.module));
            let import = format!("_ \"{}\"", program.package);
            assert!(tools.contains(&import), "{} lacks {import}", program.module);
        }
    }

    #[test]
    fn versioned_programs_get_their_version() {
        let flags = flags(&PROGRAMS[0]).unwrap().join(" ");
        let version = kubernetes_version().unwrap();
        assert!(
            flags.contains(&format!("version.gitVersion={version}")),
            "{flags}"
        );
        assert!(flags.contains("version.gitMajor=1 "), "{flags}");
    }
}
