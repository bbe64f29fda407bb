//! The steps of bringing a cluster up, and the waiting between them.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node as NodeObject, ServiceAccount};
use kube::Api;

use super::layout::{API_PORT, Host, Layout};
use super::process::{self, POLL, Place, Process};
use super::state::State;
use super::{Cluster, control, node};

/// Time limit of one step, on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

impl Cluster {
    pub(super) fn start_control(&mut self, role: &str) -> Result<()> {
        let State {
            layout,
            kube_bin,
            audit,
            ..
        } = &self.state;
        let command = control::command(role, layout, kube_bin, &self.folder, *audit);
        let netns = layout.netns_path("cp");
        let place = Place {
            role,
            netns: Some(&netns),
            init: false,
            state: &self.folder,
            stdin: None,
        };
        let process = Process::start(command, place)?;
        self.state.remember(process);
        self.save()
    }

    pub(super) fn start_forward(&mut self, listener: TcpListener) -> Result<()> {
        let mut command = Command::new(&self.state.tool);
        command
            .arg("forward")
            .arg(self.state.layout.netns_path("cp"))
            .arg(self.api().to_string());
        let stdin = Some(Stdio::from(OwnedFd::from(listener)));
        let place = Place {
            role: "forward",
            netns: None,
            init: false,
            state: &self.folder,
            stdin,
        };
        let process = Process::start(command, place)?;
        self.state.remember(process);
        self.save()
    }

    pub(super) fn start_node(&mut self, host: &Host) -> Result<()> {
        let process = node::start(&self.folder, &self.state, host)?;
        self.state.remember(process);
        self.save()
    }

    fn api(&self) -> SocketAddr {
        SocketAddr::from((self.state.layout.control_plane().address, API_PORT))
    }

    pub(super) fn wait_for_api(&self) -> Result<()> {
        let (api, netns) = (self.api(), self.state.layout.netns_path("cp"));
        process::in_netns(&netns, || {
            self.wait("the API server to listen", || {
                TcpStream::connect_timeout(&api, PATIENCE).is_ok()
            })
        })
    }

    /// Waits until every node is registered and pods are accepted, for which the controllers must
    /// have made the default service account.
    pub(super) fn wait_for_nodes(&self) -> Result<()> {
        let wanted = self.state.layout.nodes.len();
        block_on(async {
            let client = self.client().await?;
            let nodes: Api<NodeObject> = Api::all(client.clone());
            let accounts: Api<ServiceAccount> = Api::namespaced(client, "default");
            let begin = Instant::now();
            loop {
                let registered = nodes.list(&Default::default()).await;
                let account = accounts.get_opt("default").await;
                if registered.is_ok_and(|list| list.items.len() >= wanted)
                    && matches!(account, Ok(Some(_)))
                {
                    return Ok(());
                }
                self.check("the nodes to register", begin)?;
                tokio::time::sleep(POLL).await;
            }
        })
    }

    fn wait(&self, what: &str, ready: impl Fn() -> bool) -> Result<()> {
        let begin = Instant::now();
        while !ready() {
            self.check(what, begin)?;
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Fails when waiting is in vain: something has ended, or time is up.
    fn check(&self, what: &str, begin: Instant) -> Result<()> {
        if let Some(dead) = self.state.processes.iter().find(|process| !process.alive()) {
            let log = process::log_path(&self.folder, &dead.role);
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let last = lines[lines.len().saturating_sub(10)..].join("\n");
            bail!(
                "{} ended while waiting for {what}; the end of {}:\n{last}",
                dead.role,
                log.display()
            );
        }
        ensure!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        Ok(())
    }
}

/// Makes room for a new cluster: refuses when one runs, removes what a broken one left.
pub(super) fn clear(folder: &Path, layout: &Layout) -> Result<()> {
    if let Some(state) = State::load(folder)? {
        let runs = match &state.starting {
            Some(harness) => harness.alive(),
            None => state.processes.iter().any(Process::alive),
        };
        ensure!(
            !runs,
            "a cluster runs in {}; take it down first",
            folder.display()
        );
        Cluster {
            folder: folder.to_owned(),
            state,
            owned: false,
        }
        .take_down()?;
    }
    let netns = layout.netns_path("cp");
    ensure!(
        !netns.exists(),
        "{} exists: another cluster is named `{}`; take that one down or choose another name",
        netns.display(),
        layout.name
    );
    empty(folder, &[])
}

/// Removes everything in `folder` but what is named.
pub(super) fn empty(folder: &Path, except: &[&str]) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let below = format!(" {}/", folder.display());
    ensure!(
        !mounts.contains(&below),
        "something is mounted in {}; unmount it first",
        folder.display()
    );
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if except.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        let removed = if path.is_dir() && !path.is_symlink() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Runs a future to its end, whether or not the caller is itself inside a runtime.
fn block_on<T: Send>(work: impl Future<Output = Result<T>> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(work)
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
