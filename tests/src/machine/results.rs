//! Parses the output of test programs.

use std::collections::BTreeMap;
use std::time::Duration;

/// Line of the script before a suite, followed by its name.
pub const BEGIN: &str = "@begin ";
/// Line after a suite, followed by its name and the program's status.
pub const END: &str = "@end ";
/// Exit status of `timeout` when it ended a program.
const TIMED_OUT: &str = "124";

/// Result of a suite on a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// So many cases, and none failed.
    Passed(u32),
    /// Some cases failed.
    Failed {
        /// Number of passed cases.
        passed: u32,
        /// Names of failed cases.
        failed: Vec<String>,
    },
    /// No result, for this reason.
    Missing(String),
}

impl Verdict {
    /// Returns whether it ran and nothing failed.
    pub fn is_passed(&self) -> bool {
        matches!(self, Self::Passed(_))
    }
}

/// The suites of a kernel.
#[derive(Debug, Default)]
pub struct Results {
    suites: BTreeMap<String, Sum>,
    current: Option<String>,
    /// When the last line came.
    heard: Duration,
}

#[derive(Debug, Default)]
struct Sum {
    begin: Duration,
    took: Duration,
    text: String,
    failed: Vec<String>,
    /// Passed and failed cases, from the program's own sum.
    counts: Option<(u32, u32)>,
    status: Option<String>,
}

impl Results {
    /// Takes a line of the console, which came so long after the boot began.
    pub fn hear(&mut self, line: &str, at: Duration) {
        let took = at.saturating_sub(std::mem::replace(&mut self.heard, at));
        if let Some(name) = line.strip_prefix(BEGIN) {
            self.current = Some(name.to_owned());
            self.suites.insert(
                name.to_owned(),
                Sum {
                    begin: at,
                    ..Sum::default()
                },
            );
        } else if let Some((name, status)) = line
            .strip_prefix(END)
            .and_then(|words| words.rsplit_once(' '))
        {
            self.current = None;
            let sum = self.suites.entry(name.to_owned()).or_default();
            (sum.status, sum.took) = (Some(status.to_owned()), at.saturating_sub(sum.begin));
        } else if let Some(sum) = self
            .current
            .as_ref()
            .and_then(|name| self.suites.get_mut(name))
        {
            sum.hear(line, took);
        }
    }

    /// Adds those of another machine.
    pub fn merge(&mut self, other: Self) {
        self.suites.extend(other.suites);
    }

    /// Output of a suite, each case with its duration.
    pub fn text(&self, suite: &str) -> &str {
        self.suites.get(suite).map_or("", |sum| sum.text.as_str())
    }

    /// Duration of a suite; none: it has not ended.
    pub fn took(&self, suite: &str) -> Option<Duration> {
        self.suites
            .get(suite)
            .filter(|sum| sum.status.is_some())
            .map(|sum| sum.took)
    }

    /// Returns the result of a suite.
    pub fn verdict(&self, suite: &str) -> Verdict {
        let Some(sum) = self.suites.get(suite) else {
            return Verdict::Missing("it was not begun; see the console".to_owned());
        };
        sum.verdict()
    }
}

impl Sum {
    fn hear(&mut self, line: &str, took: Duration) {
        self.text += line;
        if let Some(test) = line.strip_prefix("test ")
            && let Some((name, verdict)) = test.split_once(" ... ")
        {
            // The harness of tests shows nothing of the kind.
            self.text += &format!(" ({:.1} s)", took.as_secs_f32());
            if verdict.starts_with("FAILED") {
                self.failed.push(name.to_owned());
            }
        }
        self.text.push('\n');
        if let Some(sum) = line.strip_prefix("test result: ") {
            self.counts = count(sum, "passed").zip(count(sum, "failed"));
        }
    }

    fn verdict(&self) -> Verdict {
        match (self.counts, self.status.as_deref()) {
            (Some((0, 0)), _) => {
                Verdict::Missing("it has no case of the names that were asked for".to_owned())
            }
            (Some((passed, 0)), Some("0")) => Verdict::Passed(passed),
            (Some((passed, _)), Some(_)) => Verdict::Failed {
                passed,
                failed: self.failed.clone(),
            },
            (_, Some(TIMED_OUT)) => Verdict::Missing("it did not end in time".to_owned()),
            (_, Some(status)) => {
                Verdict::Missing(format!("it ended with status {status} and without a sum"))
            }
            (_, None) => Verdict::Missing("the machine ended before it".to_owned()),
        }
    }
}

/// The number before a word: `13 passed; 0 failed; ...`.
fn count(sum: &str, word: &str) -> Option<u32> {
    let words: Vec<&str> = sum.split([' ', ';']).collect();
    let place = words.iter().position(|each| *each == word)?;
    words.get(place.checked_sub(1)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "\
noise of the boot
test result: ok. 9 passed; 0 failed; 0 ignored
@begin good
test one ... ok
test two ... ok

test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s
@end good 0
@begin bad
test one ... ok
test its::two ... FAILED (0.3 s)
test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s
@end bad 101
@begin dead
test one ... ok
@end dead 134
@begin slow
@end slow 124
@begin empty
test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 5 filtered out; finished in 0.00s
@end empty 0
@begin liar
test result: ok. 1 passed; 0 failed; 0 ignored
@end liar 1
@begin cut
test one ... ok
";

    #[test]
    fn what_failed_or_did_not_run_is_no_success() {
        let mut results = Results::default();
        CONSOLE
            .lines()
            .for_each(|line| results.hear(line, Duration::ZERO));
        let missing = |why: &str| Verdict::Missing(why.to_owned());
        let wanted = [
            ("good", Verdict::Passed(2)),
            (
                "bad",
                Verdict::Failed {
                    passed: 1,
                    failed: vec!["its::two".to_owned()],
                },
            ),
            (
                "dead",
                missing("it ended with status 134 and without a sum"),
            ),
            ("slow", missing("it did not end in time")),
            (
                "empty",
                missing("it has no case of the names that were asked for"),
            ),
            (
                "liar",
                Verdict::Failed {
                    passed: 1,
                    failed: vec![],
                },
            ),
            ("cut", missing("the machine ended before it")),
            ("never", missing("it was not begun; see the console")),
        ];
        for (suite, verdict) in wanted {
            assert_eq!(results.verdict(suite), verdict, "{suite}");
        }
    }

    #[test]
    fn a_case_has_the_time_since_the_line_before_it() {
        let mut results = Results::default();
        let lines = [
            "boot",
            "@begin a",
            "test one ... ok",
            "test two ... FAILED",
            "@end a 101",
        ];
        for (line, at) in lines.into_iter().zip([1000, 4000, 4500, 6000, 6100]) {
            results.hear(line, Duration::from_millis(at));
        }
        assert_eq!(
            results.text("a"),
            "test one ... ok (0.5 s)\ntest two ... FAILED (1.5 s)\n"
        );
        assert_eq!(results.took("a").map(|took| took.as_millis()), Some(2100));
        assert_eq!((results.text("b"), results.took("b")), ("", None));
    }
}
