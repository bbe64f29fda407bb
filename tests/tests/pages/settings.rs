//! Fields that act and fields that do not, and the variables of each process.

use std::fmt::Write as _;
use std::fs;

use clap::Args;

use crate::{cell, code, root};

const INTRODUCTION: &str = "\
<!-- Generated from api/src/fields and the processes' arguments by `make bless`. -->

# Settings

What becomes of every field that Calico knows. A field that acts is described with its
[kind](crds/index.md). One that does not is kept, and reported in TigeraStatus if its value is not
among those that state what happens anyway: as Degraded where somebody may rely on it (*unsafe*),
else beside `All objects available`.
";

/// Tables of fields: kind, and file in api/src/fields.
const KINDS: [(&str, &str); 6] = [
    ("Installation", "installation"),
    ("FelixConfiguration", "felix"),
    ("BGPConfiguration", "bgp"),
    ("IPPool", "pool"),
    ("IPAMConfiguration", "ipam"),
    ("KubeControllersConfiguration", "controllers"),
];

const VARIABLES: &str = "
## Variables of the processes

The operator sets those of typha and the agents. Each is a flag of the same meaning too. Beside them
`MARGAY_LOG_FORMAT` (`json` or `text`) and OpenTelemetry's `OTEL_*` are read by every process.
";

/// The page.
pub fn page() -> String {
    let mut page = INTRODUCTION.to_owned();
    for (kind, file) in KINDS {
        let path = root()
            .join("api/src/fields")
            .join(file)
            .with_extension("tsv");
        let text =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        fields(&mut page, kind, &text);
    }
    page += VARIABLES;
    variables::<margay_operator::Args>(&mut page, "operator");
    variables::<margay_typha::Args>(&mut page, "typha");
    variables::<margay_node::Args>(&mut page, "agent");
    page
}

fn fields(page: &mut String, kind: &str, text: &str) {
    let lines = text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty());
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split('\t').collect()).collect();
    assert!(
        !rows.is_empty(),
        "the table of {kind} is not found any more"
    );
    let (act, idle): (Vec<&Vec<&str>>, Vec<&Vec<&str>>) =
        rows.iter().partition(|row| row.get(1) == Some(&"acts"));
    let _ = write!(page, "\n## {kind}\n\nThese act:\n\n");
    for row in act {
        let _ = writeln!(page, "- {}", code(row[0]));
    }
    if idle.is_empty() {
        return;
    }
    let _ = write!(
        page,
        "\n| Does not act | Not reported for | What follows |\n|---|---|---|\n"
    );
    for row in idle {
        let column = |index: usize| row.get(index).copied().unwrap_or_default();
        let values: Vec<String> = column(2)
            .split(',')
            .filter(|value| !value.is_empty())
            .map(code)
            .collect();
        let mark = if column(1) == "unsafe" {
            "**unsafe**: "
        } else {
            ""
        };
        let _ = writeln!(
            page,
            "| {} | {} | {mark}{} |",
            code(row[0]),
            values.join(", "),
            cell(column(3))
        );
    }
}

fn variables<A: Args>(page: &mut String, process: &'static str) {
    let _ = write!(
        page,
        "\n### {process}\n\n| Variable | Default | Meaning |\n|---|---|---|\n"
    );
    for argument in A::augment_args(clap::Command::new(process)).get_arguments() {
        let Some(variable) = argument.get_env() else {
            continue;
        };
        let defaults = argument
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy());
        let defaults: Vec<String> = defaults
            .filter(|value| !value.is_empty())
            .map(|value| code(&value))
            .collect();
        let help = argument
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        let variable = code(&variable.to_string_lossy());
        let _ = writeln!(
            page,
            "| {variable} | {} | {} |",
            defaults.join(", "),
            cell(&help)
        );
    }
}
