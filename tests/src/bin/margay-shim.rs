//! Stands in for a CNI plugin: runs NAME.real in its own place, with its own arguments, input and
//! environment, and appends a line to calls.log beside it: command, namespace/pod, microseconds,
//! CPU microseconds, largest memory in KiB, exit code.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

fn main() -> Result<ExitCode> {
    let own = std::env::current_exe()?;
    let real = own.with_extension("real");
    let env = |name: &str| std::env::var(name).unwrap_or_default();
    let begin = Instant::now();
    let mut child = Command::new(&real)
        .args(std::env::args_os().skip(1))
        .spawn()
        .with_context(|| real.display().to_string())?;
    let status = child.wait()?;
    let took = begin.elapsed();
    // Its only child.
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let cpu = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    let code = status.code().unwrap_or(255);
    let arguments = env("CNI_ARGS");
    let argument = |key: &str| {
        arguments
            .split(';')
            .find_map(|pair| pair.strip_prefix(key))
            .unwrap_or("-")
    };
    let (namespace, pod) = (argument("K8S_POD_NAMESPACE="), argument("K8S_POD_NAME="));
    let log = own.parent().unwrap_or(Path::new("/")).join("calls.log");
    let line = format!(
        "{} {namespace}/{pod} {} {cpu} {} {code}\n",
        env("CNI_COMMAND"),
        took.as_micros(),
        usage.max_rss()
    );
    File::options()
        .create(true)
        .append(true)
        .open(log)?
        .write_all(line.as_bytes())?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(255)))
}
