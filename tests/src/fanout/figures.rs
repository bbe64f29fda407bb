//! Figures beside Calico's Typha, the baseline, Margay's former figures and targets.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

/// One line of the table; figures are in the line's unit, and smaller is better.
#[derive(Debug, Clone, Copy)]
pub struct FanoutLine {
    /// Name by which a measurement knows it.
    pub key: &'static str,
    /// What it says.
    pub what: &'static str,
    /// Unit.
    pub unit: &'static str,
    /// Calico's Typha on a machine of the same kind (plain TCP unless `what` says TLS), on another
    /// day.
    pub typha: Option<f64>,
    /// Margay at commit f195c3c, measured by another harness with the same model.
    pub before: Option<f64>,
    /// At most.
    pub target: Option<f64>,
}

const fn line(
    key: &'static str,
    what: &'static str,
    unit: &'static str,
    [typha, before, target]: [Option<f64>; 3],
) -> FanoutLine {
    FanoutLine {
        key,
        what,
        unit,
        typha,
        before,
        target,
    }
}

/// All lines.
#[rustfmt::skip]
pub const LINES: &[FanoutLine] = &[
    line("load.cpu", "load of 100k pods: CPU", "s", [Some(2.8), Some(2.2), Some(1.5)]),
    line("load.rss", "load of 100k pods: RSS", "MB", [Some(262.0), Some(322.0), Some(140.0)]),
    line(
        "selector.cpu",
        "a selector of all added at 100k endpoints: CPU",
        "ms",
        [Some(24.0), Some(39.0), Some(10.0)],
    ),
    line("selector.seen", "  until a node has decoded it", "ms", [None, None, None]),
    line(
        "all.400x1000.cpu",
        "all to all, 400 x 1000/s, 100k pods: CPU per event and node",
        "us",
        [Some(3.9), Some(2.6), Some(1.0)],
    ),
    line("all.400x1000.p50", "  p50", "ms", [Some(3686.0), Some(12.0), None]),
    line("all.400x1000.p99", "  p99", "ms", [Some(6945.0), Some(32.0), Some(30.0)]),
    line(
        "all.400x100.cpu",
        "all to all, 400 x 100/s, 100k pods (TLS): CPU per event and node",
        "us",
        [Some(16.0), Some(24.0), Some(6.0)],
    ),
    line("all.400x100.p50", "  p50", "ms", [Some(18.0), Some(8.0), None]),
    line("all.400x100.p99", "  p99", "ms", [Some(123.0), Some(24.0), Some(30.0)]),
    line(
        "all.1000x100.cpu",
        "all to all, 1000 x 100/s, 10k pods: CPU per event and node",
        "us",
        [Some(8.8), Some(10.5), Some(3.0)],
    ),
    line("all.1000x100.p50", "  p50", "ms", [Some(43.0), Some(38.0), None]),
    line("all.1000x100.p99", "  p99", "ms", [Some(603.0), Some(95.0), Some(50.0)]),
    line(
        "all.64x100.cpu",
        "all to all, 64 x 100/s, 10k pods: CPU per event and node",
        "us",
        [None, None, None],
    ),
    line("all.64x100.p50", "  p50", "ms", [None, None, None]),
    line("all.64x100.p99", "  p99", "ms", [None, None, None]),
    line(
        "views.400x1000.cpu",
        "views, 400 x 1000/s, 100k pods: CPU per event (12 nodes hear)",
        "us",
        [Some(1560.0), Some(528.0), Some(100.0)],
    ),
    line("views.400x1000.p50", "  p50", "ms", [None, Some(3.0), None]),
    line("views.400x1000.p99", "  p99", "ms", [None, Some(9.0), Some(15.0)]),
    line(
        "views.1000x100.cpu",
        "views, 1000 x 100/s, 100k pods: CPU per event (12 nodes hear)",
        "us",
        [None, Some(1150.0), Some(300.0)],
    ),
    line("views.1000x100.p50", "  p50", "ms", [None, Some(1.1), None]),
    line("views.1000x100.p99", "  p99", "ms", [None, Some(4.4), Some(10.0)]),
    line(
        "views.64x100.cpu",
        "views, 64 x 100/s, 10k pods: CPU per event (12 nodes hear)",
        "us",
        [None, None, None],
    ),
    line("views.64x100.p50", "  p50", "ms", [None, None, None]),
    line("views.64x100.p99", "  p99", "ms", [None, None, None]),
    line("all.rss", "RSS per node, all to all", "MB", [Some(0.17), Some(0.53), Some(0.05)]),
    line("views.rss", "RSS per node, views", "MB", [None, Some(0.03), Some(0.03)]),
    line(
        "snapshot.s",
        "snapshot of 100k pods to 400 nodes: until all are in sync",
        "s",
        [Some(2.9), Some(1.1), Some(0.6)],
    ),
    line("snapshot.cpu", "  CPU", "s", [Some(1.75), Some(1.2), Some(0.6)]),
    line("snapshot.bytes", "  per node", "kB", [Some(6900.0), None, None]),
    line(
        "kill.s",
        "server killed, 1000 nodes come back to another: until all are in sync",
        "s",
        [None, None, Some(2.0)],
    ),
    line("kill.bytes", "  bytes to each", "B", [None, None, Some(2048.0)]),
    line("kill.cpu", "  CPU of the other server", "s", [None, None, None]),
    line(
        "roll.s",
        "two servers replaced one after another: until all are in sync",
        "s",
        [None, None, None],
    ),
    line("roll.bytes", "  bytes to each at the last move", "B", [None, None, Some(2048.0)]),
    line(
        "hostile.stalled.p99",
        "20 nodes that stop reading: p99 of others over that without",
        "x",
        [None, None, Some(1.2)],
    ),
    line("hostile.stalled.rss", "  memory for each", "MB", [None, None, None]),
    line(
        "hostile.zero-window.p99",
        "20 nodes with a window of zero: p99 of others over that without",
        "x",
        [None, None, Some(1.2)],
    ),
    line("hostile.zero-window.rss", "  memory for each", "MB", [None, None, None]),
    line(
        "hostile.slowloris.p99",
        "200 nodes that send a byte at a time: p99 of others over that without",
        "x",
        [None, None, Some(1.2)],
    ),
    line("hostile.slowloris.rss", "  memory for each", "MB", [None, None, None]),
    line(
        "hostile.half-open.p99",
        "1000 connections without a handshake: p99 of others over that without",
        "x",
        [None, None, Some(1.2)],
    ),
    line("hostile.half-open.rss", "  memory for each", "MB", [None, None, None]),
    line(
        "hostile.malformed.p99",
        "50 nodes that send garbage: p99 of others over that without",
        "x",
        [None, None, Some(1.2)],
    ),
    line("hostile.malformed.rss", "  memory for each", "MB", [None, None, None]),
];

/// Who a figure is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Series {
    /// Margay.
    Margay,
    /// The baseline of this harness.
    Rebroadcast,
}

/// Figures of a run, each perhaps taken several times.
#[derive(Debug, Default)]
pub struct FanoutSheet(BTreeMap<(&'static str, Series), Vec<f64>>);

impl FanoutSheet {
    /// Adds a figure. A key without a line is an error of the program.
    pub fn put(&mut self, series: Series, key: &str, value: f64) -> anyhow::Result<()> {
        let line = LINES.iter().find(|line| line.key == key);
        let line = line.ok_or_else(|| anyhow::anyhow!("no line is named {key}"))?;
        self.0.entry((line.key, series)).or_default().push(value);
        Ok(())
    }

    fn median(&self, key: &str, series: Series) -> Option<f64> {
        let (_, values) = self
            .0
            .iter()
            .find(|((of, which), _)| *of == key && *which == series)?;
        let mut values = values.clone();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    /// The table in Markdown; a figure that was taken several times is the median.
    pub fn markdown(&self) -> String {
        let mut text =
            "| Work | Typha | Rebroadcast | Margay f195c3c | Margay now | now / Typha | Target | \
             |\n\
             |---|---|---|---|---|---|---|---|\n"
                .to_owned();
        for line in LINES {
            let (now, baseline) = (
                self.median(line.key, Series::Margay),
                self.median(line.key, Series::Rebroadcast),
            );
            if now.is_none() && baseline.is_none() {
                continue;
            }
            let cell = |value: Option<f64>| {
                value
                    .map(|value| format!("{} {}", digits(value), line.unit))
                    .unwrap_or_default()
            };
            let ratio = now
                .zip(line.typha)
                .map(|(now, typha)| format!("{:.2}", now / typha))
                .unwrap_or_default();
            let target = line
                .target
                .map(|target| format!("<= {}", digits(target)))
                .unwrap_or_default();
            let verdict = match now.zip(line.target) {
                Some((now, target)) if now <= target => "met",
                Some(_) => "MISSED",
                None => "",
            };
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | **{}** | {ratio} | {target} | {verdict} |",
                line.what,
                cell(line.typha),
                cell(baseline),
                cell(line.before),
                cell(now)
            );
        }
        text
    }

    /// All figures with every value that was taken.
    pub fn json(&self) -> Value {
        let of = |line: &FanoutLine| {
            let values = |series| self.0.get(&(line.key, series)).cloned().unwrap_or_default();
            json!({
                "key": line.key, "what": line.what, "unit": line.unit, "typha": line.typha,
                "before": line.before,
                "target": line.target, "margay": values(Series::Margay), "rebroadcast": values(
                    Series::Rebroadcast,
                ),
            })
        };
        LINES.iter().map(of).collect()
    }
}

/// A number with as many digits as say something.
fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_names_of_their_own_and_misses_are_reported() {
        let mut keys: Vec<&str> = LINES.iter().map(|line| line.key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), LINES.len());
        let mut sheet = FanoutSheet::default();
        for value in [2.0, 0.5, 7.0] {
            sheet
                .put(Series::Margay, "load.cpu", value)
                .expect("a line");
        }
        assert!(
            sheet
                .markdown()
                .contains("**2.00 s** | 0.71 | <= 1.50 | MISSED"),
            "{}",
            sheet.markdown()
        );
        assert!(sheet.put(Series::Margay, "nothing", 1.0).is_err());
    }
}
