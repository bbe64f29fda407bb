//! Use of CPU and memory of a process, from procfs, and quantiles.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

/// What a process has used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// CPU time of all its threads, in seconds.
    pub cpu_s: f64,
    /// Resident memory, in bytes.
    pub rss: u64,
    /// Largest resident memory so far, in bytes.
    pub peak: u64,
}

impl Usage {
    /// Of a process, now.
    pub fn of(pid: u32) -> Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .with_context(|| format!("no {name}"))?;
            let digits = line.trim_matches(|c: char| !c.is_ascii_digit());
            Ok::<_, anyhow::Error>(digits.parse::<u64>()? * 1024)
        };
        Ok(Self {
            cpu_s: cpu(pid)?.as_secs_f64(),
            rss: field("VmRSS:")?,
            peak: field("VmHWM:")?,
        })
    }
}

/// CPU time of all threads, also of those that have ended.
fn cpu(pid: u32) -> Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))?;
    Ok(Duration::from(clock.now()?))
}

/// The quantile of values, which are sorted by this; 0 of none.
pub fn quantile(values: &mut [u64], share: f64) -> u64 {
    values.sort_unstable();
    let place = (values.len() as f64 * share) as usize;
    values
        .get(place.min(values.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_of_this_process_grows() {
        let before = Usage::of(std::process::id()).expect("procfs");
        let mut filled = vec![1_u8; 32 << 20];
        filled
            .iter_mut()
            .for_each(|byte| *byte = byte.wrapping_mul(3));
        let after = Usage::of(std::process::id()).expect("procfs");
        assert!(filled.iter().all(|byte| *byte == 3));
        assert!(
            after.rss > before.rss + (16 << 20)
                && after.cpu_s > before.cpu_s
                && after.peak >= after.rss
        );
    }

    #[test]
    fn quantiles_are_of_sorted_values() {
        let mut values: Vec<u64> = (0..100).rev().collect();
        assert_eq!(
            (quantile(&mut values, 0.5), quantile(&mut values, 0.99)),
            (50, 99)
        );
        assert_eq!(quantile(&mut [], 0.5), 0);
    }
}
