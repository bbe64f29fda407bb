//! Words that the glossary of ARCHITECTURE.md has replaced: they are in no name, comment, text or
//! page.

use std::fs;
use std::path::Path;

use cargo_metadata::MetadataCommand;
use regex::Regex;

/// Retired words, with better ones. They are matched in names too: `is_told`, `ToldNode`.
const WORDS: [(&str, &str); 20] = [
    (r"conversations?", "connection"),
    (r"dirt", "dirty set"),
    (r"doomed", "block to delete"),
    (r"graves?", "removed sets"),
    (r"heed(s|ed|ing)?", "apply, check, update"),
    (r"lifelines?", "failsafe ports, always allowed traffic"),
    (r"mend(s|ed|ing)?", "repair, fix"),
    (r"news", "changes, update, event"),
    (r"outlook", "view inputs"),
    (r"refamil(y|ies)", "update families"),
    (r"reinput", "update inputs"),
    (r"renode", "update node"),
    (r"repatch(es)?", "update attachments"),
    (r"retier", "update tier"),
    (r"rivals?", "stale attachments"),
    (r"said", "reported, declared, sent"),
    (r"surprises?", "external change"),
    (r"told", "sent, reported, notified"),
    (r"unsure", "needs resync"),
    (r"whims?", "injected fault"),
];

/// Retired names and phrases, as they are written, with better ones.
const NAMES: [(&str, &str); 12] = [
    (
        r"\b(struct|enum|trait|type) (Book|Word|News)\b",
        "PatchQueue, Patch, PendingChange",
    ),
    (
        r"\b(struct|enum|trait|type) (Judge|Suspect|Twins?)\b",
        "LeakScan, LeakCandidate, Duplicate",
    ),
    (
        r"\b(struct|enum|trait|type) (Round|Told)\b",
        "Reconcile, Sent",
    ),
    (
        r"\b(struct|enum|trait|type) (Terms|Texts)\b",
        "limits, Interner",
    ),
    (
        r"\bfn (settled?|unsee|see)\b",
        "a verb for what it does or waits for",
    ),
    (r"\bmargay_operator_rounds\b", "margay_operator_reconciles"),
    (
        r"\bmargay_typha_(hellos|realised_seconds|restated_buckets|stream_faults)\b",
        "CHANGELOG.md",
    ),
    (r"\bNotUsedAsWritten\b", "NotEnforcedAsWritten"),
    (r"\b([Nn]ewest word|[Tt]he word of)\b", "latest report"),
    (r"\b[Ww]ithout a word\b", "silently"),
    (r"\bis other than it was\b", "has changed"),
    (r"\b[Ww]hom it is about\b", "its selection"),
];

/// Files that are searched, by their ends.
const ENDS: [&str; 9] = [
    ".rs", ".md", ".proto", ".tsv", ".yaml", ".yml", ".toml", ".sh", "Makefile",
];

/// Excluded files: not ours, about former names, or this list.
const EXCEPT: [&str; 5] = [
    "findings/",
    "tests/data/calico-v1/",
    "deploy/crds-v1/",
    "CHANGELOG.md",
    "tests/tests/architecture/vocabulary.rs",
];

#[test]
fn retired_words_are_gone() {
    let root = MetadataCommand::new()
        .no_deps()
        .exec()
        .expect("cargo metadata of the workspace");
    let root = root.workspace_root.into_std_path_buf();
    let words = compile(WORDS.map(|(word, better)| (format!(r"\b({word})\b"), better)));
    let names = compile(NAMES.map(|(name, better)| (name.to_owned(), better)));
    let mut files = super::files(&root, &|_| true);
    files.extend(super::files(&root.join(".github"), &|_| true));
    let mut hits = Vec::new();
    for path in files {
        let name = path
            .strip_prefix(&root)
            .unwrap_or(&path)
            .display()
            .to_string();
        if ENDS.iter().any(|end| name.ends_with(end))
            && !EXCEPT.iter().any(|prefix| name.starts_with(prefix))
        {
            hits.extend(
                search(&path, &words, &names)
                    .into_iter()
                    .map(|hit| format!("{name}:{hit}")),
            );
        }
    }
    let shown = hits
        .iter()
        .take(100)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join("\n");
    assert!(
        hits.is_empty(),
        "{} retired words, see the glossary in ARCHITECTURE.md:\n{shown}",
        hits.len()
    );
}

/// ASCII only: a pattern needs no tables of Unicode then.
fn compile<const N: usize>(list: [(String, &'static str); N]) -> Vec<(Regex, &'static str)> {
    let compile = |(pattern, better): (String, &'static str)| {
        (
            Regex::new(&format!("(?-u){pattern}")).expect("a pattern of the list"),
            better,
        )
    };
    list.into_iter().map(compile).collect()
}

fn search(path: &Path, words: &[(Regex, &str)], names: &[(Regex, &str)]) -> Vec<String> {
    let text = fs::read_to_string(path).expect("a text file");
    let mut hits = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let separate = separated(line);
        let found = words
            .iter()
            .map(|entry| (entry, separate.as_str()))
            .chain(names.iter().map(|entry| (entry, line)));
        for ((pattern, better), line) in found {
            if let Some(found) = pattern.find(line) {
                hits.push(format!(
                    "{}: `{}`, better: {better}",
                    number + 1,
                    found.as_str()
                ));
            }
        }
    }
    hits
}

/// Separates the words of names, in lower case: `is_told` and `IsTold` become `is told`.
fn separated(line: &str) -> String {
    let mut words = String::with_capacity(line.len());
    let mut was_lower = false;
    for c in line.chars() {
        if c.is_ascii_uppercase() && was_lower {
            words.push(' ');
        }
        was_lower = c.is_ascii_lowercase();
        words.push(if c == '_' {
            ' '
        } else {
            c.to_ascii_lowercase()
        });
    }
    words
}

#[test]
fn words_of_names_are_separated() {
    assert_eq!(separated("fn is_told(ToldNode)"), "fn is told(told node)");
}
