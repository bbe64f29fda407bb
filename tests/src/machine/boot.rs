//! One boot of a kernel: a script runs as root in a machine without network, and the machine ends
//! with it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::initramfs;
use super::packages::Kernel;

/// Time limit for boot and shutdown, on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Kernel parameter that marks a machine of ours, which may be changed.
pub const PARAMETER: &str = "margay.machine";

/// End of the script: powers the machine off without a process that would have to do it.
const OFF: &str = "\necho o > /proc/sysrq-trigger\nsleep 60\n";

/// A machine that will run a script.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Kernel to boot.
    pub kernel: &'a Kernel,
    /// Script to run, by `sh`.
    pub script: &'a str,
    /// When it is ended from outside.
    pub limit: Duration,
    /// Path of its console's log.
    pub log: &'a Path,
}

impl Machine<'_> {
    /// Boots, and returns when the machine is off; `hear` receives every line of its console with
    /// the time since the boot began.
    pub fn run(&self, hear: &mut dyn FnMut(&str, Duration)) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let initramfs =
            initramfs::pack(self.kernel, &format!("{}{OFF}", self.script), folder.path())?;
        let mut log = File::create(self.log)
            .with_context(|| format!("cannot create {}", self.log.display()))?;
        let begin = Instant::now();
        let mut child = self
            .command(&initramfs)
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let console = BufReader::new(child.stdout.take().context("the console")?);
        for line in console.split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches('\r');
            writeln!(log, "{line}")?;
            hear(line, begin.elapsed());
        }
        let status = child.wait()?;
        // If `timeout` had to end it, suites are missing, which is reported.
        if !status.success() && status.code() != Some(124) {
            bail!("qemu-system-x86_64: {status}; see {}", self.log.display());
        }
        Ok(())
    }

    fn command(&self, initramfs: &Path) -> Command {
        let mut command = Command::new("timeout");
        command
            .arg("--foreground")
            .arg(self.limit.as_secs().to_string())
            .arg("qemu-system-x86_64");
        // Everything that emulation knows; no device but the console and the host's root. One
        // processor: two that wait for each other take twice the host's time for the same work.
        command.args([
            "-cpu", "max", "-smp", "1", "-m", "4096", "-net", "none", "-display", "none",
            "-monitor", "none",
        ]);
        command
            .args(["-no-reboot", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(initramfs);
        command.args([
            "-append",
            &format!("console=ttyS0 quiet loglevel=1 panic=-1 {PARAMETER}"),
        ]);
        let root = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap";
        command
            .args(["-virtfs", root])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }
}
