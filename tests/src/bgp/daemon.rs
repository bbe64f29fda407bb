//! BIRD, FRR and GoBGP of the distribution as peers.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::cluster::process::{self, wait_for};
use crate::namespace::Namespace;

/// Programs of the daemons with their packages.
pub const PACKAGES: [(&str, &str); 3] = [("bird", "bird2"), ("vtysh", "frr"), ("gobgpd", "gobgpd")];

const BGPD: &str = "/usr/lib/frr/bgpd";
const LIMIT: Duration = Duration::from_secs(30);

/// Which daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// BIRD 2.
    Bird,
    /// FRR's bgpd, alone: without zebra, so that it touches no kernel.
    Frr,
    /// GoBGP.
    Gobgp,
}

/// A daemon that runs in a namespace until it is dropped.
pub struct Daemon {
    kind: Kind,
    child: Child,
    folder: TempDir,
    /// The version that it says it has.
    pub version: String,
}

impl Daemon {
    /// Starts a daemon with a configuration, and waits until it answers.
    pub fn start(kind: Kind, namespace: &Namespace, config: &str) -> Result<Self> {
        Self::start_again(kind, namespace, config, false)
    }

    fn start_again(
        kind: Kind,
        namespace: &Namespace,
        config: &str,
        is_again: bool,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("margay-bgp-").tempdir()?;
        // FRR gives its rights up before it reads its files.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let path = |name: &str| folder.path().join(name);
        fs::write(path("config"), config)?;
        let mut command = match kind {
            Kind::Bird => {
                let mut command = Command::new("bird");
                command
                    .arg("-f")
                    .arg("-c")
                    .arg(path("config"))
                    .arg("-s")
                    .arg(path("control"));
                command.arg("-P").arg(path("pid"));
                // It does not know by itself that it has run before.
                command.args(is_again.then_some("-R"));
                command
            }
            Kind::Frr => {
                fs::create_dir(path("run"))?;
                process::run(Command::new("chown").arg("frr:frr").arg(path("run")))?;
                let mut command = Command::new(BGPD);
                command
                    .args(["-n", "-Z", "-u", "frr", "-g", "frr", "-f"])
                    .arg(path("config"));
                command
                    .arg("-i")
                    .arg(path("run").join("pid"))
                    .arg("--vty_socket")
                    .arg(path("run"));
                command
            }
            Kind::Gobgp => {
                let mut command = Command::new("gobgpd");
                command
                    .args(["--api-hosts", "127.0.0.1:50051", "-f"])
                    .arg(path("config"));
                command
            }
        };
        let log = fs::File::create(path("log"))?;
        let program = command.get_program().to_owned();
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = namespace.run(|| command.spawn());
        let child = child.with_context(|| format!("cannot start {}", program.display()))?;
        let mut daemon = Self {
            kind,
            child,
            folder,
            version: String::new(),
        };
        let what = || format!("{program:?} to answer: {}", daemon.log());
        wait_for(LIMIT, what, || daemon.ask(namespace, "version").is_ok())?;
        daemon.version = daemon.ask(namespace, "version")?;
        Ok(daemon)
    }

    /// Its own log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// What it says to a question in words that all have: `version`, `neighbors`, `ipv4`, `ipv6`;
    /// any other words are its own.
    pub fn ask(&self, namespace: &Namespace, question: &str) -> Result<String> {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let words = self.words(question);
        let (program, arguments) = match self.kind {
            Kind::Bird => (
                "birdc",
                [vec!["-s".to_owned(), path("control")], words].concat(),
            ),
            Kind::Frr => {
                let first = ["--vty_socket".to_owned(), path("run"), "-c".to_owned()];
                ("vtysh", [&first[..], &[words.join(" ")]].concat())
            }
            Kind::Gobgp => ("gobgp", words),
        };
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        namespace.command(program, &arguments, "")
    }

    fn words(&self, question: &str) -> Vec<String> {
        let words = match (self.kind, question) {
            (Kind::Bird, "version") => "show status",
            (Kind::Bird, "neighbors") => "show protocols all",
            (Kind::Bird, "ipv4") => "show route table master4 all",
            (Kind::Bird, "ipv6") => "show route table master6 all",
            (Kind::Frr, "version") => "show version",
            (Kind::Frr, "neighbors") => "show bgp neighbors json",
            (Kind::Frr, "ipv4") => "show bgp ipv4 unicast json",
            (Kind::Frr, "ipv6") => "show bgp ipv6 unicast json",
            (Kind::Gobgp, "version") => "global",
            (Kind::Gobgp, "neighbors") => "neighbor",
            (Kind::Gobgp, "ipv4") => "global rib -a ipv4",
            (Kind::Gobgp, "ipv6") => "global rib -a ipv6",
            (_, own) => own,
        };
        words.split_whitespace().map(str::to_owned).collect()
    }

    /// Waits until its answer to a question is as wanted.
    pub fn wait_for(
        &self,
        namespace: &Namespace,
        question: &str,
        ready: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let answer = || {
            self.ask(namespace, question)
                .unwrap_or_else(|error| format!("{error:#}"))
        };
        let what = || {
            format!(
                "{:?} on {question}:\n{}\n{}",
                self.kind,
                answer(),
                self.log()
            )
        };
        wait_for(LIMIT, what, || ready(&answer()))
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts it again after [`Self::kill`].
    pub fn restart(mut self, namespace: &Namespace) -> Result<Self> {
        ensure!(self.child.try_wait()?.is_some(), "it still runs");
        let config = fs::read_to_string(self.folder.path().join("config"))?;
        Self::start_again(self.kind, namespace, &config, true)
    }

    /// Where its files are.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.kill();
    }
}
