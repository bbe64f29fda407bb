//! Suites by kernels, as Markdown: README has it as it is printed.

use std::fmt::Write as _;

use super::programs::Program;
use super::results::{Results, Verdict};

/// A row for each suite and a column for each kernel, and below it the names of what failed.
pub fn render(programs: &[Program], kernels: &[(String, Results)]) -> String {
    let mut text = String::from("\n| Suite |");
    for (version, _) in kernels {
        let _ = write!(text, " {version} |");
    }
    text += &format!("\n|---|{}\n", "---|".repeat(kernels.len()));
    let mut notes = String::new();
    for program in programs {
        let _ = write!(text, "| {} |", program.suite);
        for (version, results) in kernels {
            let verdict = results.verdict(program.suite);
            let _ = write!(text, " {} |", cell(&verdict));
            match verdict {
                Verdict::Passed(_) => {}
                Verdict::Failed { failed, .. } => {
                    let _ = writeln!(
                        notes,
                        "{version} {}: failed: {}",
                        program.suite,
                        failed.join(", ")
                    );
                }
                Verdict::Missing(why) => {
                    let _ = writeln!(notes, "{version} {}: {why}", program.suite);
                }
            }
        }
        text.push('\n');
    }
    if notes.is_empty() {
        text
    } else {
        format!("{text}\n{notes}")
    }
}

fn cell(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Passed(passed) => passed.to_string(),
        Verdict::Failed { passed, failed } => {
            format!("{passed} of {}", *passed as usize + failed.len())
        }
        Verdict::Missing(_) => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::programs::tests::mk_program;
    use super::*;

    #[test]
    fn a_row_for_each_suite() {
        let program = |suite| mk_program(suite, 1);
        let mut results = Results::default();
        let console = "@begin a\n\
                       test x ... FAILED\n\
                       test result: FAILED. 2 passed; 1 failed;\n\
                       @end a 101\n\
                       @begin b\n\
                       test result: ok. 4 passed; 0 failed;\n\
                       @end b 0";
        console
            .lines()
            .for_each(|line| results.hear(line, Duration::ZERO));
        let text = render(
            &[program("a"), program("b"), program("c")],
            &[("6.1".to_owned(), results)],
        );
        let wanted = "\n\
                      | Suite | 6.1 |\n\
                      |---|---|\n\
                      | a | 2 of 3 |\n\
                      | b | 4 |\n\
                      | c | - |\n\
                      \n\
                      6.1 a: failed: x\n\
                      6.1 c: it was not begun; see the console\n";
        assert_eq!(text, wanted);
    }
}
