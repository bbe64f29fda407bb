//! Processes of a run and their orders: one line of JSON each way, over standard input and output.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;
use tokio::sync::mpsc;

use super::stats::Usage;

/// A process of this program that takes orders.
#[derive(Debug)]
pub struct BenchProcess {
    role: String,
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl BenchProcess {
    /// Starts this program with these arguments.
    pub fn start(args: &[String]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().context("start a process of this program")?;
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self {
            role: args.first().cloned().unwrap_or_default(),
            child,
            orders,
            answers,
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has used.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.pid()).with_context(|| format!("{} has ended", self.role))
    }

    /// Sends an order.
    pub fn order(&mut self, order: &Value) -> Result<()> {
        let orders = self.orders.as_mut().context("its input is closed")?;
        writeln!(orders, "{order}").with_context(|| format!("{} takes no orders", self.role))
    }

    /// Waits for its next answer.
    pub fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("{} has ended without an answer", self.role);
        }
        serde_json::from_str(&line).with_context(|| format!("{} answers {line:?}", self.role))
    }

    /// Sends an order and waits for its answer.
    pub fn ask(&mut self, order: &Value) -> Result<Value> {
        self.order(order)?;
        self.answer()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        Ok(nix::sys::signal::kill(pid, signal)?)
    }
}

impl Drop for BenchProcess {
    fn drop(&mut self) {
        self.orders = None;
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Orders of the process that started this one.
#[derive(Debug)]
pub struct Orders(mpsc::Receiver<String>);

impl Orders {
    /// From standard input, which a thread of its own reads.
    pub fn new() -> Self {
        let (lines, orders) = mpsc::channel(16);
        std::thread::spawn(move || {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                if lines.blocking_send(line).is_err() {
                    return;
                }
            }
        });
        Self(orders)
    }

    /// Waits for the next order; `None` when there will be none.
    pub async fn next(&mut self) -> Result<Option<Value>> {
        let line = self.0.recv().await;
        line.map(|line| serde_json::from_str(&line).with_context(|| format!("order {line:?}")))
            .transpose()
    }
}

impl Default for Orders {
    fn default() -> Self {
        Self::new()
    }
}

/// Answers the process that started this one.
pub fn reply(answer: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{answer}")?;
    Ok(out.flush()?)
}

/// Number in an order or answer.
pub fn number(value: &Value, name: &str) -> Result<f64> {
    value[name]
        .as_f64()
        .with_context(|| format!("no number {name:?} in {value}"))
}

/// Whole number in an order or answer.
pub fn count(value: &Value, name: &str) -> Result<u64> {
    value[name]
        .as_u64()
        .with_context(|| format!("no count {name:?} in {value}"))
}

/// Allows as many files as the machine does.
pub fn raise_limits() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}
