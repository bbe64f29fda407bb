//! The book in docs/: pages that are generated from the code are current, every reason has its
//! line, links lead somewhere. `make bless` rewrites the generated pages.

mod book;
mod crds;
mod licences;
mod logs;
mod metrics;
mod monitoring;
mod reasons;
mod settings;
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The folder of the checkout.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Generated pages by their path in docs/src/reference.
fn pages() -> BTreeMap<String, String> {
    let mut pages = crds::pages();
    pages.insert("logs.md".to_owned(), logs::page());
    pages.insert("metrics.md".to_owned(), metrics::page());
    pages.insert("settings.md".to_owned(), settings::page());
    pages
}

#[test]
fn generated_pages_are_current() {
    let folder = root().join("docs/src/reference");
    let pages = pages();
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::create_dir_all(folder.join("crds")).expect("a writable folder");
        for (name, text) in &pages {
            fs::write(folder.join(name), text).expect("a writable page");
        }
    }
    let found = |name: &String| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let stale: Vec<&String> = pages
        .iter()
        .filter(|(name, text)| found(name) != **text)
        .map(|(name, _)| name)
        .collect();
    assert!(
        stale.is_empty(),
        "pages of docs/src/reference differ from the code, run `make bless`: {stale:?}"
    );
    let kinds = fs::read_dir(folder.join("crds")).expect("the folder of kinds");
    let present: BTreeSet<String> = kinds
        .map(|entry| {
            format!(
                "crds/{}",
                entry.expect("an entry").file_name().to_string_lossy()
            )
        })
        .collect();
    let wanted: BTreeSet<String> = pages
        .into_keys()
        .filter(|name| name.starts_with("crds/"))
        .collect();
    assert_eq!(present, wanted, "pages of kinds that do not exist, or lack");
}

/// Text for a cell of a table: on one line, without bars, and without anything that a renderer
/// takes for a tag.
fn cell(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.replace('|', "\\|").replace('<', "&lt;")
}

/// Text in the type of code, in a cell.
fn code(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    format!("`{}`", line.replace('|', "\\|").replace('`', "'"))
}
