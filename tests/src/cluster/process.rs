//! Starting, recognising and ending processes and the namespaces they live in.
//!
//! Every process that belongs to a cluster carries [`MARKER`] in its environment. A pid alone may
//! have been given to somebody else since; a pid together with its start time, or with the marker,
//! cannot.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Environment variable that names the state folder of the cluster a process belongs to.
pub const MARKER: &str = "MARGAY_CLUSTER";

/// Interval at which a condition outside this process is polled.
pub const POLL: Duration = Duration::from_millis(20);

/// A process of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its role: `etcd`, `n1`, ...; also the name of its log.
    pub role: String,
    /// Its pid, as the machine sees it.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
}

/// Environment in which a process is started.
#[derive(Debug)]
pub struct Place<'a> {
    /// Name of the process, and of its log.
    pub role: &'a str,
    /// Network namespace; the caller's when absent.
    pub netns: Option<&'a Path>,
    /// True if it becomes process 1 of a new pid namespace: all others there end with it.
    pub init: bool,
    /// The state folder, which holds the logs and marks the process.
    pub state: &'a Path,
    /// Its standard input; empty when absent.
    pub stdin: Option<Stdio>,
}

impl Process {
    /// Starts `command` at `place`, in a process group of its own, so that it outlives the
    /// terminal.
    pub fn start(mut command: Command, place: Place<'_>) -> Result<Self> {
        let log = log_path(place.state, place.role);
        let out = File::options().create(true).append(true).open(&log);
        let out = out.with_context(|| format!("cannot open {}", log.display()))?;
        command
            .env(MARKER, place.state)
            .stdin(place.stdin.unwrap_or_else(Stdio::null))
            .stdout(out.try_clone()?)
            .stderr(out)
            .process_group(0);
        let started = in_thread(|| {
            if let Some(netns) = place.netns {
                enter_netns(netns)?;
            }
            if place.init {
                nix::sched::unshare(CloneFlags::CLONE_NEWPID)
                    .context("cannot make a pid namespace")?;
            }
            command
                .spawn()
                .with_context(|| format!("cannot start {:?}", command.get_program()))
        });
        let pid = started?.id() as i32;
        let started = start_time(pid)
            .with_context(|| format!("{} ended at once; see {}", place.role, log.display()))?;
        Ok(Self {
            role: place.role.to_owned(),
            pid,
            started,
        })
    }

    /// The calling process.
    pub fn current() -> Result<Self> {
        let pid = std::process::id() as i32;
        let started = start_time(pid).context("this process is not in /proc; mount it")?;
        Ok(Self {
            role: "harness".into(),
            pid,
            started,
        })
    }

    /// Returns whether it still runs; a zombie does not.
    pub fn alive(&self) -> bool {
        // A child of this process stays a zombie until it is waited for; for any other this fails
        // harmlessly.
        let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
        start_time(self.pid) == Some(self.started)
    }

    /// Kills it at once. It may have ended already.
    pub fn kill(&self) {
        if self.alive() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }

    /// Waits until it has ended.
    pub fn gone(&self, limit: Duration) -> Result<()> {
        wait_for(
            limit,
            || format!("{} (pid {}) to end", self.role, self.pid),
            || !self.alive(),
        )
    }
}

/// The log of the process `role`.
pub fn log_path(state: &Path, role: &str) -> PathBuf {
    state.join("logs").join(format!("{role}.log"))
}

/// Processes that carry the marker of `state`, whoever remembers them. Those inside pods do not
/// carry it.
pub fn marked(state: &Path) -> Vec<Process> {
    let wanted = format!("{MARKER}={}", state.display());
    let own = std::process::id() as i32;
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == wanted.as_bytes())
        })
        .filter_map(|pid| {
            Some(Process {
                role: "left over".into(),
                pid,
                started: start_time(pid)?,
            })
        })
        .collect()
}

/// Runs `work` in a thread inside the network namespace at `netns`.
pub fn in_netns<T: Send>(netns: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    in_thread(|| {
        enter_netns(netns)?;
        work()
    })
}

/// Runs `work` in a thread of its own: namespaces entered there do not affect the caller.
fn in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Moves the calling thread into a network namespace.
pub fn enter_netns(netns: &Path) -> Result<()> {
    let file =
        File::open(netns).with_context(|| format!("no network namespace {}", netns.display()))?;
    nix::sched::setns(file, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter {}", netns.display()))
}

/// Runs a command to its end and returns what it printed; an error includes its output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits until `ready` holds, looking again every [`POLL`].
pub fn wait_for(
    limit: Duration,
    what: impl Fn() -> String,
    mut ready: impl FnMut() -> bool,
) -> Result<()> {
    let begin = Instant::now();
    while !ready() {
        ensure!(begin.elapsed() < limit, "waited {limit:?} for {}", what());
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Start time of a process that runs, in clock ticks since boot (proc(5), fields 3 and 22 of stat).
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X");
    // The first thread may be dead before the others, which still hold the sockets.
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    (!dead || threads() > 1).then(|| fields.nth(18)?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_sleeper(state: &Path) -> Process {
        std::fs::create_dir_all(state.join("logs")).unwrap();
        let mut command = Command::new("sleep");
        command.arg("600");
        Process::start(
            command,
            Place {
                role: "sleeper",
                netns: None,
                init: false,
                state,
                stdin: None,
            },
        )
        .unwrap()
    }

    #[test]
    fn a_process_is_found_by_its_marker_and_ended() {
        let state = tempfile::tempdir().unwrap();
        let sleeper = mk_sleeper(state.path());
        assert!(sleeper.alive());
        wait_for(
            Duration::from_secs(5),
            || "the marker".into(),
            || marked(state.path()).len() == 1,
        )
        .unwrap();
        assert_eq!(marked(state.path())[0].pid, sleeper.pid);
        sleeper.kill();
        sleeper.gone(Duration::from_secs(5)).unwrap();
        assert_eq!(marked(state.path()), []);
    }

    #[test]
    fn a_pid_that_was_given_to_another_is_left_alone() {
        let state = tempfile::tempdir().unwrap();
        let sleeper = mk_sleeper(state.path());
        let stranger = Process {
            started: sleeper.started + 1,
            ..sleeper.clone()
        };
        assert!(!stranger.alive());
        stranger.kill();
        assert!(sleeper.alive());
        sleeper.kill();
        sleeper.gone(Duration::from_secs(5)).unwrap();
    }
}
