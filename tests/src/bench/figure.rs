//! A figure with its anchor and its budget, and the report of all figures.
//!
//! What is measured, against what, and how good it has to be is data: [`LINES`]. A measurement only
//! names its line.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};

use super::lines::LINES;

/// Definition of a figure.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    /// Name that measurements use.
    pub key: &'static str,
    /// Description for people.
    pub what: &'static str,
    /// Unit of all its numbers.
    pub unit: &'static str,
    /// Anchor: the value of somebody else, and who it is.
    pub anchor: Option<(f64, &'static str)>,
    /// Budget: the largest acceptable value.
    pub budget: Option<f64>,
}

/// One measured figure.
#[derive(Debug, Clone)]
struct Taken {
    line: &'static Line,
    value: f64,
    detail: String,
}

/// Figures in the order of measurement. A repeated measurement replaces the earlier one.
#[derive(Debug, Default)]
pub struct Sheet {
    taken: Vec<Taken>,
}

impl Line {
    /// The line of this name.
    pub fn of(key: &str) -> Result<&'static Self> {
        LINES
            .iter()
            .find(|line| line.key == key)
            .with_context(|| format!("no figure is named {key}"))
    }

    /// Returns whether the budget, if there is one, is kept.
    fn holds(&self, value: f64) -> bool {
        self.budget.is_none_or(|limit| value <= limit)
    }

    /// Value over anchor.
    fn ratio(&self, value: f64) -> Option<f64> {
        self.anchor
            .filter(|(anchor, _)| *anchor > 0.0)
            .map(|(anchor, _)| value / anchor)
    }
}

impl Sheet {
    /// Records a figure and prints it. `detail` is what else is worth knowing, such as the other
    /// quantiles.
    pub fn put(&mut self, key: &str, value: f64, detail: impl Into<String>) -> Result<()> {
        let taken = Taken {
            line: Line::of(key)?,
            value,
            detail: detail.into(),
        };
        println!("{}", taken.row());
        self.taken.retain(|other| other.line.key != key);
        self.taken.push(taken);
        Ok(())
    }

    /// Everything as a table of Markdown.
    pub fn markdown(&self) -> String {
        let mut text =
            "| Figure | Margay | Anchor | Ratio | Budget | |\n|---|---|---|---|---|---|\n"
                .to_owned();
        for taken in &self.taken {
            let [value, anchor, ratio, budget, verdict] = taken.cells();
            let detail = if taken.detail.is_empty() {
                String::new()
            } else {
                format!(" ({})", taken.detail)
            };
            let _ = writeln!(
                text,
                "| {} | **{value}**{detail} | {anchor} | {ratio} | {budget} | {verdict} |",
                taken.line.what
            );
        }
        text
    }

    /// Everything as one JSON object, by name.
    pub fn json(&self) -> serde_json::Value {
        let values: BTreeMap<&str, serde_json::Value> = self
            .taken
            .iter()
            .map(|taken| {
                let about = serde_json::json!({
                    "value": taken.value,
                    "unit": taken.line.unit,
                    "detail": taken.detail,
                });
                (taken.line.key, about)
            })
            .collect();
        serde_json::json!(values)
    }

    /// Missed budgets, for people.
    pub fn missed(&self) -> Vec<String> {
        let missed = self
            .taken
            .iter()
            .filter(|taken| !taken.line.holds(taken.value));
        missed
            .map(|taken| format!("{}: {}", taken.line.what, taken.cells()[0]))
            .collect()
    }
}

impl Taken {
    /// Value, anchor, ratio, budget and whether it is kept.
    fn cells(&self) -> [String; 5] {
        let Line {
            unit,
            anchor,
            budget,
            ..
        } = *self.line;
        let with_unit = |value: f64| format!("{} {unit}", number(value)).trim_end().to_owned();
        let verdict = match budget {
            Some(_) if self.line.holds(self.value) => "met",
            Some(_) => "MISSED",
            None => "",
        };
        [
            with_unit(self.value),
            anchor
                .map(|(value, whose)| format!("{}, {whose}", with_unit(value)))
                .unwrap_or_default(),
            self.line
                .ratio(self.value)
                .map(|ratio| format!("{ratio:.3}x"))
                .unwrap_or_default(),
            budget
                .map(|limit| format!("<= {}", number(limit)))
                .unwrap_or_default(),
            verdict.to_owned(),
        ]
    }

    fn row(&self) -> String {
        let [value, anchor, ratio, budget, verdict] = self.cells();
        let detail = if self.detail.is_empty() {
            String::new()
        } else {
            format!("   [{}]", self.detail)
        };
        format!(
            "{:74} {value:>12}  {ratio:>9} of {anchor:34} {budget:>9} {verdict}{detail}",
            self.line.what
        )
    }
}

/// A number with its significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        size if size == 0.0 || size >= 100.0 || (size.fract() == 0.0) => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_lines_are_unique() {
        let mut keys: Vec<&str> = LINES.iter().map(|line| line.key).collect();
        keys.sort_unstable();
        let count = keys.len();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }

    #[test]
    fn a_missed_budget_is_reported() {
        let mut sheet = Sheet::default();
        sheet.put("cni.add.p50", 1000.0, "").unwrap();
        assert!(sheet.markdown().contains("MISSED"), "{}", sheet.markdown());
        sheet.put("cni.add.p50", 1.0, "taken again").unwrap();
        assert!(!sheet.markdown().contains("MISSED") && sheet.markdown().contains("taken again"));
        assert!(sheet.missed().is_empty());
        assert!(sheet.put("nothing", 0.0, "").is_err());
    }
}
