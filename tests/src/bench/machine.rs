//! Load of the machine during a measurement, and the cost of a process.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Clock ticks of the machine since it started.
#[derive(Debug, Clone, Copy)]
pub struct Ticks {
    busy: u64,
    idle: u64,
    stolen: u64,
}

impl Ticks {
    /// Now.
    pub fn now() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().context("/proc/stat is empty")?;
        let fields: Vec<u64> = line
            .split_whitespace()
            .skip(1)
            .filter_map(|field| field.parse().ok())
            .collect();
        let at = |index: usize| fields.get(index).copied().unwrap_or_default();
        Ok(Self {
            busy: at(0) + at(1) + at(2) + at(5) + at(6),
            idle: at(3) + at(4),
            stolen: at(7),
        })
    }

    /// Share of the time since then in which the machine was busy, and in which its host gave it no
    /// CPU.
    pub fn since(self, then: Self) -> (f64, f64) {
        let (busy, idle, stolen) = (
            self.busy - then.busy,
            self.idle - then.idle,
            self.stolen - then.stolen,
        );
        let all = (busy + idle + stolen).max(1) as f64;
        (busy as f64 / all, stolen as f64 / all)
    }
}

/// Load average of the last minute, and the share of time that was stolen since `then`.
pub fn state(then: Ticks) -> Result<String> {
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let (busy, stolen) = Ticks::now()?.since(then);
    let load = load.split_whitespace().next().unwrap_or("?");
    Ok(format!(
        "load {load}, cores busy {:.0} %, stolen {:.1} %",
        busy * 100.0,
        stolen * 100.0
    ))
}

/// Waits until the machine was less than 40 % busy for three seconds in a row, because new pods
/// leave work behind. False if the time was up first.
pub fn calm(limit: Duration) -> Result<bool> {
    const SECOND: Duration = Duration::from_secs(1);
    let begin = Instant::now();
    let mut quiet = 0;
    while quiet < 3 {
        if begin.elapsed() > limit {
            return Ok(false);
        }
        let before = Ticks::now()?;
        std::thread::sleep(SECOND);
        let (busy, stolen) = Ticks::now()?.since(before);
        quiet = if busy + stolen < 0.4 { quiet + 1 } else { 0 };
    }
    Ok(true)
}

/// CPU that processes have used so far, with the children that they have waited for.
pub fn cpu(pids: &[i32]) -> Result<Duration> {
    let tick = Duration::from_secs(1) / u32::try_from(ticks_per_second()?)?;
    let mut used = 0;
    for pid in pids {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, fields) = stat
            .rsplit_once(')')
            .context("/proc/PID/stat without a name")?;
        used += fields
            .split_whitespace()
            .skip(11)
            .take(4)
            .filter_map(|field| field.parse::<u32>().ok())
            .sum::<u32>();
    }
    Ok(tick * used)
}

fn ticks_per_second() -> Result<i64> {
    use nix::unistd::{SysconfVar, sysconf};
    sysconf(SysconfVar::CLK_TCK)?.context("the machine does not report the length of a clock tick")
}

/// Resident memory of a process in MiB.
pub fn resident(pid: i32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("VmRSS of a process")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

/// Resident memory of a process in MiB that is its own and not a page of a file.
pub fn anonymous(pid: i32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .context("RssAnon of a process")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}
