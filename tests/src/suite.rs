//! A test program that runs its cases in the order in which they are written, on one cluster, and
//! reports in the format of cargo's own.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

/// Cases that ran.
#[derive(Debug)]
pub struct Suite {
    filters: Vec<String>,
    list: bool,
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
    begin: Instant,
}

impl Suite {
    /// A suite with the arguments of `cargo test`: filters select cases by a part of their names,
    /// `--list` only lists them.
    pub fn from_arguments() -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        Self {
            list: arguments.iter().any(|argument| argument == "--list"),
            filters: arguments
                .into_iter()
                .filter(|argument| !argument.starts_with('-'))
                .collect(),
            passed: 0,
            failed: Vec::new(),
            skipped: 0,
            begin: Instant::now(),
        }
    }

    /// Returns whether nothing is to be run: what the cases are is known only when they run.
    pub fn only_lists(&self) -> bool {
        self.list
    }

    /// Runs a case.
    pub fn case(&mut self, name: &str, work: impl FnOnce() -> Result<()>) -> bool {
        if !self.chosen(name) {
            self.skipped += 1;
            return true;
        }
        let begin = Instant::now();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let result = result.unwrap_or_else(|_| Err(anyhow::anyhow!("it panicked")));
        let took = begin.elapsed().as_secs_f32();
        match result {
            Ok(()) => {
                println!("test {name} ... ok ({took:.1} s)");
                self.passed += 1;
                true
            }
            Err(error) => {
                println!("test {name} ... FAILED ({took:.1} s)\n{error:#}\n");
                self.failed.push(name.to_owned());
                false
            }
        }
    }

    /// Prints the sum.
    pub fn finish(self) -> ExitCode {
        let result = if self.failed.is_empty() {
            "ok"
        } else {
            "FAILED"
        };
        for name in &self.failed {
            println!("failed: {name}");
        }
        println!(
            "\n\
             test result: {result}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; \
             finished in {:.2}s\n",
            self.passed,
            self.failed.len(),
            self.skipped,
            self.begin.elapsed().as_secs_f32()
        );
        if self.failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    fn chosen(&self, name: &str) -> bool {
        self.filters.is_empty()
            || self
                .filters
                .iter()
                .any(|filter| name.contains(filter.as_str()))
    }
}
