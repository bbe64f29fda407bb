//! Process 1 of a node. It makes the node's view of the machine, starts the node's services and
//! keeps them running.
//!
//! A node has its own `/`: a folder of the state folder, with a layer of its own over the machine's
//! `/usr`. So nothing that runs on a node reaches the machine's files, and all mounts end with this
//! process.

use std::fs::File;
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::node::Spec;
use super::process::{self, POLL};

const SOCKET: &str = "/run/containerd/containerd.sock";

/// Delay before an ended service is restarted, as in an init system.
const RESTART: Duration = Duration::from_secs(1);

/// A program that runs as long as the node.
struct Service {
    arguments: Vec<String>,
    log: File,
    pid: Option<Pid>,
}

/// Becomes process 1 of the node that the file at `spec` describes; returns only when that fails.
pub fn run(spec: &Path) -> Result<()> {
    ensure!(
        std::process::id() == 1,
        "`node` is what `up` starts as process 1 of a node; it is of no use otherwise"
    );
    let spec: Spec = serde_json::from_slice(&std::fs::read(spec)?)?;
    let name = spec.host.name.as_str();
    process::enter_netns(&spec.netns)?;
    spec.group.enter()?;
    nix::sched::unshare(
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC,
    )?;
    let log = |service: &str| {
        File::options()
            .create(true)
            .append(true)
            .open(spec.logs.join(format!("{name}-{service}.log")))
    };
    let kubernetes = "/etc/kubernetes";
    let mut containerd = Service::new(
        format!("containerd -c {kubernetes}/containerd.toml"),
        log("containerd")?,
    );
    let proxy = Service::new(
        format!(
            // A network namespace may not set the machine's connection limit.
            "kube-proxy --kubeconfig={kubernetes}/proxy.kubeconfig --proxy-mode={} \
             --conntrack-max-per-core=0 --hostname-override={name}",
            spec.proxy.flag()
        ),
        log("kube-proxy")?,
    );
    let kubelet = Service::new(
        format!(
            "kubelet --kubeconfig={kubernetes}/kubelet.kubeconfig \
             --config={kubernetes}/kubelet.yaml --node-ip={} --hostname-override={name}",
            spec.host.addresses()
        ),
        log("kubelet")?,
    );
    own_root(&spec)?;
    nix::unistd::sethostname(name)?;

    containerd.start()?;
    until(|| UnixStream::connect(SOCKET).is_ok());
    import_images()?;
    // A kubelet that finds no API server backs off for seconds.
    until(|| TcpStream::connect_timeout(&spec.api, RESTART).is_ok());
    let mut services = [containerd, proxy, kubelet];
    for service in &mut services[1..] {
        service.start()?;
    }
    keep(&mut services)
}

impl Service {
    fn new(command: String, log: File) -> Self {
        Self {
            arguments: command.split_whitespace().map(str::to_owned).collect(),
            log,
            pid: None,
        }
    }

    fn start(&mut self) -> Result<()> {
        let (program, rest) = self
            .arguments
            .split_first()
            .context("a service without a program")?;
        let mut command = Command::new(Path::new("/margay/bin").join(program));
        command.args(rest).env(
            "PATH",
            "/margay/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
        );
        command
            .stdin(Stdio::null())
            .stdout(self.log.try_clone()?)
            .stderr(self.log.try_clone()?);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        self.pid = Some(Pid::from_raw(child.id() as i32));
        Ok(())
    }
}

/// Reaps the node's processes, for ever, and restarts services that have ended.
fn keep(services: &mut [Service]) -> Result<()> {
    loop {
        let ended = match waitpid(None, None)? {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _) => pid,
            _ => continue,
        };
        if let Some(service) = services
            .iter_mut()
            .find(|service| service.pid == Some(ended))
        {
            eprintln!("{} ended; starting it again", service.arguments[0]);
            std::thread::sleep(RESTART);
            service.start()?;
        }
    }
}

fn import_images() -> Result<()> {
    let mut archives: Vec<_> = std::fs::read_dir("/margay/images")?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    archives.sort();
    for archive in archives {
        let mut ctr = Command::new("/margay/bin/ctr");
        process::run(ctr.args(["-n", "k8s.io", "images", "import"]).arg(&archive))?;
    }
    Ok(())
}

/// Waits without a limit: whoever started the node watches the clock.
fn until(mut ready: impl FnMut() -> bool) {
    while !ready() {
        std::thread::sleep(POLL);
    }
}

/// Builds the node's `/` and moves into it.
fn own_root(spec: &Spec) -> Result<()> {
    let root = spec.root.as_path();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("cannot make mounts private")?;
    bind(root, root)?;
    own_usr(root)?;
    for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        show(&Path::new("/").join(name), &root.join(name))?;
    }
    bind(Path::new("/dev"), &root.join("dev"))?;
    fresh("proc", &root.join("proc"), None)?;
    // A sysfs of its own shows the node's network devices, and none of the machine's.
    fresh("sysfs", &root.join("sys"), None)?;
    spec.group.mount(&root.join("sys/fs/cgroup"))?;
    fresh("tmpfs", &root.join("run"), Some("mode=755"))?;
    fresh("tmpfs", &root.join("tmp"), Some("mode=1777"))?;
    for folder in ["run/lock", "run/netns", "run/containerd"] {
        std::fs::create_dir_all(root.join(folder))?;
    }
    read_only(&spec.kube_bin, &root.join("margay/bin"))?;
    read_only(&spec.images, &root.join("margay/images"))?;
    std::env::set_current_dir(root)?;
    nix::unistd::pivot_root(".", ".").context("cannot change the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("cannot leave the machine's root")?;
    std::env::set_current_dir("/")?;
    // Pods may ask that their mounts reach the node.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none)
        .context("cannot make mounts shared")
}

/// Shows the machine's `/usr` as the node's own: what is written there is seen on this node alone.
fn own_usr(root: &Path) -> Result<()> {
    let beside = root.with_file_name("usr");
    let (upper, work, usr) = (beside.join("upper"), beside.join("work"), root.join("usr"));
    for folder in [&upper, &work, &usr] {
        std::fs::create_dir_all(folder)?;
    }
    let options = format!(
        "lowerdir=/usr,upperdir={},workdir={}",
        upper.display(),
        work.display()
    );
    fresh("overlay", &usr, Some(&options))?;
    // Pods ask to see this folder, which a machine whose kernel is built in one piece lacks.
    std::fs::create_dir_all(usr.join("lib/modules")).context("cannot make /usr/lib/modules")
}

/// Shows a folder of the machine, which may be a link into another one, read-only.
fn show(from: &Path, to: &Path) -> Result<()> {
    let Ok(kind) = from.symlink_metadata() else {
        return Ok(());
    };
    if kind.is_symlink() {
        if to.symlink_metadata().is_err() {
            symlink(std::fs::read_link(from)?, to)?;
        }
        return Ok(());
    }
    std::fs::create_dir_all(to)?;
    read_only(from, to)
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(
        Some(from),
        to,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .with_context(|| format!("cannot show {} at {}", from.display(), to.display()))
}

fn read_only(from: &Path, to: &Path) -> Result<()> {
    bind(from, to)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, to, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("cannot make {} read-only", to.display()))
}

fn fresh(kind: &str, to: &Path, options: Option<&str>) -> Result<()> {
    mount(Some(kind), to, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("cannot mount {kind} at {}", to.display()))
}
