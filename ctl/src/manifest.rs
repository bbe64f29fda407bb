//! Manifests: objects out of files, folders and standard input, in YAML or JSON.

use std::fmt;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Maximal size of a file, in bytes: it is read as a whole.
const MAX_FILE: u64 = 512 << 20;
/// Maximal depth of folders, against links that lead back.
const MAX_DEPTH: usize = 32;
/// Endings of the names of files that a folder is read for.
const ENDINGS: [&str; 3] = ["yaml", "yml", "json"];
/// The path that means standard input.
const STDIN: &str = "-";

/// Where an object was read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// Path of the file as it was given or found.
    pub file: String,
    /// Line on which its document begins, from 1; 0 if it is not out of a file.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.file),
            line => write!(f, "{}:{line}", self.file),
        }
    }
}

/// A document that is not valid YAML or JSON.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unreadable {
    /// Where it begins.
    pub origin: Origin,
    /// Reason.
    pub reason: String,
}

/// Result of reading one document.
pub type Document = Result<(Origin, Value), Unreadable>;

/// Reads every document of a file, of a folder (in order of names, folders within it included) or,
/// for `-`, of standard input. `take` gets one at a time, so that no more than a file is in memory.
pub fn read(path: &str, take: &mut dyn FnMut(Document)) -> Result<()> {
    if path == STDIN {
        let mut text = String::new();
        std::io::stdin()
            .take(MAX_FILE)
            .read_to_string(&mut text)
            .context("standard input: not text in UTF-8")?;
        split("standard input", &text, take);
        return Ok(());
    }
    read_path(Path::new(path), 0, take)
}

fn read_path(path: &Path, depth: usize, take: &mut dyn FnMut(Document)) -> Result<()> {
    let shown = path.display();
    let metadata = fs::metadata(path).with_context(|| format!("{shown}: cannot be read"))?;
    if !metadata.is_dir() {
        ensure!(
            metadata.len() <= MAX_FILE,
            "{shown}: larger than {MAX_FILE} bytes; split it"
        );
        let text = fs::read_to_string(path)
            .with_context(|| format!("{shown}: cannot be read as text in UTF-8"))?;
        split(&shown.to_string(), &text, take);
        return Ok(());
    }
    if depth >= MAX_DEPTH {
        bail!("{shown}: folders are nested more than {MAX_DEPTH} deep; does a link lead back?");
    }
    for path in entries(path).with_context(|| format!("{shown}: cannot be listed"))? {
        read_path(&path, depth + 1, take)?;
    }
    Ok(())
}

/// Files with manifests and folders of a folder, by name; hidden ones are left out.
fn entries(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let is_manifest = path
            .extension()
            .and_then(|ending| ending.to_str())
            .is_some_and(|e| ENDINGS.contains(&e));
        if !is_hidden && (is_manifest || path.is_dir()) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Parses the documents of a text. One that is not valid does not affect the others, so the text is
/// split first: a line that begins with `---` separates documents, whatever surrounds it (YAML
/// 1.2.2, section 9.1.2).
pub fn split(file: &str, text: &str, take: &mut dyn FnMut(Document)) {
    if text.trim_start().starts_with(['{', '[']) {
        take(parse_json(file, text));
        return;
    }
    let mut start = Start { offset: 0, line: 1 };
    let mut offset = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
        {
            parse_yaml(file, start.line, &text[start.offset..offset], take);
            start = Start {
                offset: offset + "---".len(),
                line: index + 1,
            };
        }
        offset += line.len();
    }
    parse_yaml(file, start.line, &text[start.offset..], take);
}

/// Beginning of a document.
struct Start {
    offset: usize,
    line: usize,
}

fn parse_json(file: &str, text: &str) -> Document {
    let origin = Origin {
        file: file.to_owned(),
        line: 1,
    };
    match serde_json::from_str(text) {
        Ok(value) => Ok((origin, value)),
        Err(error) => Err(Unreadable {
            origin,
            reason: format!("not JSON: {error}"),
        }),
    }
}

fn parse_yaml(file: &str, line: usize, text: &str, take: &mut dyn FnMut(Document)) {
    let is_content = |line: &str| !line.trim_start().starts_with('#') && !line.trim().is_empty();
    let Some(blank) = text.lines().position(is_content) else {
        return;
    };
    let origin = Origin {
        file: file.to_owned(),
        line: line + blank,
    };
    let options = serde_saphyr::options! {
        // The size of the file is the limit; that of the nodes is below what a list of all pods
        // has.
        budget: None,
        with_snippet: false,
    };
    take(
        match serde_saphyr::from_str_with_options::<Value>(text, options) {
            Ok(Value::Null) => return,
            Ok(value) => Ok((origin, value)),
            Err(error) => Err(Unreadable {
                origin,
                reason: format!("not YAML (lines of the document): {error}"),
            }),
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Vec<(usize, Result<Value, String>)> {
        let mut found = Vec::new();
        split("f", text, &mut |document| {
            found.push(match document {
                Ok((origin, value)) => (origin.line, Ok(value)),
                Err(bad) => (bad.origin.line, Err(bad.reason)),
            });
        });
        found
    }

    #[test]
    fn documents_are_separated_and_found_again() {
        let text = "# only a comment\n---\nkind: A\n--- # second\n\n# text\nkind: B\n\
                    text: |\n  a\n  ---\n  b\n---\n---\n- x\n";
        let found = read_text(text);
        let lines: Vec<usize> = found.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [3, 7, 14]);
        assert_eq!(found[1].1.as_ref().expect("valid")["text"], "a\n---\nb\n");
    }

    #[test]
    fn a_bad_document_hurts_only_itself() {
        let found = read_text("kind: A\n---\nkind: [B\n---\nkind: C\n");
        let names: Vec<Option<&str>> = found
            .iter()
            .map(|(_, value)| value.as_ref().ok().and_then(|value| value["kind"].as_str()))
            .collect();
        assert_eq!(names, [Some("A"), None, Some("C")]);
        assert_eq!(found[1].0, 3);
    }

    #[test]
    fn json_is_read_as_such() {
        assert_eq!(
            read_text("\n{\"kind\": \"A\"}")[0]
                .1
                .as_ref()
                .expect("valid")["kind"],
            "A"
        );
        assert!(
            read_text("{\"kind\": ")
                .remove(0)
                .1
                .expect_err("not JSON")
                .contains("not JSON")
        );
    }

    #[test]
    fn folders_are_read_in_order_of_names() {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in [
            ("b.yml", "kind: B"),
            ("a/x.json", "{\"kind\": \"A\"}"),
            ("c.txt", "kind: C"),
            (".d.yaml", "kind: D"),
        ] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("created");
            fs::write(path, text).expect("written");
        }
        let mut kinds = Vec::new();
        read(&folder.path().display().to_string(), &mut |document| {
            kinds.push(
                document.expect("valid").1["kind"]
                    .as_str()
                    .expect("text")
                    .to_owned(),
            );
        })
        .expect("readable");
        assert_eq!(kinds, ["A", "B"]);
        let missing = read("/nonexistent/x.yaml", &mut |_| ()).expect_err("no such file");
        assert!(
            missing.to_string().starts_with("/nonexistent/x.yaml"),
            "{missing}"
        );
    }
}
