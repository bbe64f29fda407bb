//! Verdicts by pod and pod: expected, measured, and both side by side.
//!
//! The text form, of files and of print, is one table per port:
//!
//! ```text
//! tcp 80
//!        x/a x/b y/a
//! x/a      -   .   X
//! x/b      .   -   X
//! y/a      .   .   -
//! ```
//!
//! Rows ask, columns are asked. `.` answers, `X` is silent, `R` refuses, `!` could not be asked,
//! `-` is not asked.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::probe::{Place, Protocol, Target, Verdict, ask_all};
use crate::world::World;

/// Number of further measurements of a matching table before it is accepted.
const HOLD: usize = 3;

/// A port of every pod.
pub type Port = (Protocol, u16);
/// One question: port, source, target.
pub type Cell = (Port, String, String);

/// Verdicts by port, asking pod and asked pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Matrix {
    /// Cells; a missing one is not asked.
    pub cells: BTreeMap<Cell, Verdict>,
}

/// Result of a measurement.
#[derive(Debug)]
pub struct Outcome {
    /// The last verdicts.
    pub measured: Matrix,
    /// When a measurement that matched was begun, and held; none if the time was up first.
    pub matched: Option<Instant>,
}

impl Matrix {
    /// The matrix in which every pod answers every other one on these ports.
    pub fn open(pods: &[&str], ports: &[Port]) -> Self {
        let mut cells = BTreeMap::new();
        for port in ports {
            for from in pods {
                for to in pods.iter().filter(|to| *to != from) {
                    cells.insert(
                        (*port, (*from).to_owned(), (*to).to_owned()),
                        Verdict::Answered,
                    );
                }
            }
        }
        Self { cells }
    }

    /// Reads the text form; `#` begins a comment.
    pub fn parse(text: &str) -> Result<Self> {
        let mut cells = BTreeMap::new();
        let mut port: Option<Port> = None;
        let mut columns: Vec<&str> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            let Some(first) = words.first() else { continue };
            let row = || -> Result<()> {
                if let Ok(protocol) = first.parse::<Protocol>() {
                    let number = words.get(1).context("a port number after the protocol")?;
                    port = Some((protocol, number.parse()?));
                    columns.clear();
                } else if columns.is_empty() {
                    columns = words.clone();
                } else {
                    let port = port.context("a line like `tcp 80` before the table")?;
                    ensure!(
                        words.len() == columns.len() + 1,
                        "{} columns and {} verdicts",
                        columns.len(),
                        words.len() - 1
                    );
                    for (to, sign) in columns.iter().zip(&words[1..]) {
                        if let Some(verdict) = verdict(sign)? {
                            cells.insert((port, (*first).to_owned(), (*to).to_owned()), verdict);
                        }
                    }
                }
                Ok(())
            };
            let mut row = row;
            row().with_context(|| format!("line {}: {line}", number + 1))?;
        }
        ensure!(!cells.is_empty(), "no table");
        Ok(Self { cells })
    }

    /// The table of one port.
    pub fn of_port(&self, port: Port) -> Self {
        let cells = self.cells.iter().filter(|(cell, _)| cell.0 == port);
        Self {
            cells: cells
                .map(|(cell, verdict)| (cell.clone(), *verdict))
                .collect(),
        }
    }

    /// Number of questions with that verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.cells
            .values()
            .filter(|found| **found == verdict)
            .count()
    }

    /// The cells whose verdict differs in `other`.
    pub fn differing(&self, other: &Self) -> Vec<Cell> {
        let differs =
            |(cell, verdict): &(&Cell, &Verdict)| other.cells.get(*cell) != Some(*verdict);
        self.cells
            .iter()
            .filter(differs)
            .map(|(cell, _)| cell.clone())
            .collect()
    }

    /// The text form; cells that differ from `expected` carry a `*`.
    pub fn print(&self, expected: Option<&Self>) -> String {
        self.tables(expected).join("\n")
    }

    /// Prints measured and expected side by side.
    pub fn beside(&self, expected: &Self) -> String {
        let mut text = String::new();
        for (wanted, found) in expected
            .tables(None)
            .iter()
            .zip(self.tables(Some(expected)))
        {
            let width = wanted.lines().map(str::len).max().unwrap_or_default() + 6;
            let mut head = (" expected", " measured");
            for (left, right) in wanted.lines().zip(found.lines()) {
                let _ = writeln!(
                    text,
                    "{:width$}{}{}",
                    format!("{left}{}", head.0),
                    right,
                    head.1
                );
                head = ("", "");
            }
        }
        text
    }

    fn tables(&self, expected: Option<&Self>) -> Vec<String> {
        let mut ports: Vec<Port> = self.cells.keys().map(|cell| cell.0).collect();
        ports.dedup();
        ports
            .into_iter()
            .map(|port| self.table(port, expected))
            .collect()
    }

    fn table(&self, port: Port, expected: Option<&Self>) -> String {
        let mut names: Vec<&str> = self
            .cells
            .keys()
            .filter(|cell| cell.0 == port)
            .flat_map(|(_, from, to)| [from.as_str(), to.as_str()])
            .collect();
        names.sort_unstable();
        names.dedup();
        let mut text = format!("{} {}\n{:5}", port.0, port.1, "");
        for to in &names {
            let _ = write!(text, "{to:>4}");
        }
        for from in &names {
            let _ = write!(text, "\n{from:5}");
            for to in &names {
                let cell = (port, (*from).to_owned(), (*to).to_owned());
                let found = self.cells.get(&cell);
                let wrong = expected.is_some_and(|expected| expected.cells.get(&cell) != found);
                let _ = write!(
                    text,
                    "{:>4}",
                    format!("{}{}", if wrong { "*" } else { "" }, sign(found))
                );
            }
        }
        text + "\n"
    }
}

/// Asks all that `expected` has, again where it differs, until the whole table matches and has
/// held, or the time is up.
pub fn wait_for_match(world: &World, expected: &Matrix, limit: Duration) -> Result<Outcome> {
    let end = Instant::now() + limit;
    let all: Vec<Cell> = expected.cells.keys().cloned().collect();
    let mut measured = Matrix::default();
    let (mut asked, mut held, mut first) = (all.clone(), 0, None);
    loop {
        let begun = Instant::now();
        measure(world, &asked, &mut measured)?;
        let wrong = expected.differing(&measured);
        if wrong.is_empty() {
            held += 1;
            let matched = *first.get_or_insert(begun);
            if held > HOLD {
                return Ok(Outcome {
                    measured,
                    matched: Some(matched),
                });
            }
        } else {
            (held, first) = (0, None);
            if begun >= end {
                return Ok(Outcome {
                    measured,
                    matched: None,
                });
            }
        }
        asked = if wrong.is_empty() { all.clone() } else { wrong };
    }
}

/// Asks these questions, all at once.
pub fn measure(world: &World, cells: &[Cell], into: &mut Matrix) -> Result<()> {
    let mut by_asker: BTreeMap<&str, Vec<&Cell>> = BTreeMap::new();
    for cell in cells {
        by_asker.entry(&cell.1).or_default().push(cell);
    }
    let mut questions: Vec<(&Place, Vec<Target>)> = Vec::new();
    for (from, cells) in &by_asker {
        let target = |cell: &&Cell| Ok(Target::new(cell.0.0, world.address(&cell.2)?, cell.0.1));
        questions.push((
            &world.pod(from)?.place,
            cells.iter().map(target).collect::<Result<_>>()?,
        ));
    }
    for (cells, verdicts) in by_asker.values().zip(ask_all(&questions)?) {
        into.cells
            .extend(cells.iter().map(|cell| (*cell).clone()).zip(verdicts));
    }
    Ok(())
}

fn sign(verdict: Option<&Verdict>) -> char {
    match verdict {
        None => '-',
        Some(Verdict::Answered) => '.',
        Some(Verdict::Silent) => 'X',
        Some(Verdict::Refused) => 'R',
        Some(Verdict::Broken) => '!',
    }
}

fn verdict(sign: &str) -> Result<Option<Verdict>> {
    Ok(match sign {
        "-" => None,
        "." => Some(Verdict::Answered),
        "X" => Some(Verdict::Silent),
        "R" => Some(Verdict::Refused),
        _ => bail!("`{sign}` is none of . X R -"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "tcp 80\n      x/a x/b\nx/a     -   .\nx/b     X   -\n";

    #[test]
    fn what_is_printed_can_be_read() {
        let matrix = Matrix::parse(TEXT).unwrap();
        assert_eq!(matrix.cells.len(), 2);
        assert_eq!(Matrix::parse(&matrix.print(None)).unwrap(), matrix);
        assert_eq!(
            (
                matrix.count(Verdict::Answered),
                matrix.count(Verdict::Silent)
            ),
            (1, 1)
        );
    }

    #[test]
    fn a_difference_is_marked() {
        let expected = Matrix::open(&["x/a", "x/b"], &[(Protocol::Tcp, 80)]);
        let measured = Matrix::parse(TEXT).unwrap();
        assert_eq!(expected.differing(&measured).len(), 1);
        let text = measured.beside(&expected);
        assert!(
            text.contains("*X") && text.matches('*').count() == 1,
            "{text}"
        );
    }

    #[test]
    fn a_bad_table_is_refused_with_its_line() {
        for (text, message) in [
            ("tcp 80\nx/a x/b\nx/a - . .", "line 3"),
            ("tcp 80\nx/a\nx/a ?", "`?`"),
            ("", "no table"),
        ] {
            let error = format!("{:#}", Matrix::parse(text).unwrap_err());
            assert!(error.contains(message), "{error}");
        }
    }
}
