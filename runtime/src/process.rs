//! Metrics of the process itself, under the names that Prometheus' client libraries give them.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// Clock ticks per second of the times in `/proc/PID/stat`, on every architecture of Linux that we
/// build for (proc(5), sysconf(_SC_CLK_TCK)).
const TICKS: f64 = 100.0;
/// Unit of the sizes in `/proc/self/statm`, in bytes.
const PAGE: u64 = 4096;

/// Registers the metrics.
pub fn register(registry: &mut Registry) {
    let started = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    registry.register_collector(Box::new(ProcessMetrics {
        started: started.as_secs_f64(),
    }));
}

/// Reads `/proc/self` at each scrape. What cannot be read is left out.
#[derive(Debug)]
struct ProcessMetrics {
    /// Time of the start, in seconds since the epoch.
    started: f64,
}

impl Collector for ProcessMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: Option<f64>| {
            let Some(value) = value else { return Ok(()) };
            let gauge = ConstGauge::new(value);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)
        };
        gauge(
            "process_start_time_seconds",
            "Start of the process, in seconds since the epoch",
            Some(self.started),
        )?;
        gauge(
            "process_resident_memory_bytes",
            "Resident memory of the process",
            pages(1),
        )?;
        gauge(
            "process_virtual_memory_bytes",
            "Virtual memory of the process",
            pages(0),
        )?;
        gauge(
            "process_open_fds",
            "Open file descriptors of the process",
            fs::read_dir("/proc/self/fd")
                .ok()
                .map(|files| files.count() as f64),
        )?;
        gauge(
            "process_max_fds",
            "Maximal number of open file descriptors",
            max_files(),
        )?;
        let Some(seconds) = cpu_seconds() else {
            return Ok(());
        };
        let counter = ConstCounter::new(seconds);
        let name = "process_cpu_seconds";
        let help = "User and system CPU time of the process";
        let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
        counter.encode(metric)
    }
}

/// A field of `/proc/self/statm`, in bytes.
fn pages(field: usize) -> Option<f64> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(field)?.trim().parse().ok()?;
    Some((pages * PAGE) as f64)
}

fn max_files() -> Option<f64> {
    let text = fs::read_to_string("/proc/self/limits").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn cpu_seconds() -> Option<f64> {
    let text = fs::read_to_string("/proc/self/stat").ok()?;
    // After the name in parentheses, which may contain anything: user and system time are the 12th
    // and 13th field.
    let (_, fields) = text.rsplit_once(") ")?;
    let times = fields.split(' ').skip(11).take(2);
    let ticks: Option<Vec<u64>> = times.map(|time| time.parse().ok()).collect();
    Some(ticks?.iter().sum::<u64>() as f64 / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_read_and_plausible() {
        let mut registry = Registry::default();
        register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("a text");
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse().ok())
                .unwrap_or_else(|| panic!("{name} in {text}"))
        };
        let resident = value("process_resident_memory_bytes ");
        assert!(resident > 1e6 && resident < value("process_virtual_memory_bytes "));
        assert!(value("process_open_fds ") < value("process_max_fds "));
        assert!(value("process_cpu_seconds_total ") >= 0.0);
        assert!(value("process_start_time_seconds ") > 1e9);
    }
}
