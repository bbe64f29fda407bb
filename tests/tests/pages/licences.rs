//! deploy/licenses.txt, which is in the image: the licences of what is linked into its programs,
//! from the sources of the crates. `make bless` rewrites it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use cargo_metadata::MetadataCommand;

use crate::root;

/// Target of the image.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Prefixes of the names of licence files.
const FILES: [&str; 5] = ["COPYING", "COPYRIGHT", "LICENCE", "LICENSE", "NOTICE"];
const INTRODUCTION: &str = "\
Licences of what the programs of this image are made of

Margay is under the Apache License 2.0, whose text is in LICENSE beside this file. Its programs are
linked statically with the GNU C Library (LGPL-2.1-or-later), the Rust standard library
(MIT OR Apache-2.0) and the crates below, each with the licence that it declares. The texts follow.

";
const RULE: &str =
    "\n--------------------------------------------------------------------------------\n";

/// Returns name and version of every crate of others that is linked into the image's programs.
fn linked() -> BTreeSet<String> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args([
        "tree",
        "--locked",
        "--edges",
        "normal,no-proc-macro",
        "--prefix",
        "none",
    ]);
    command.args([
        "--package",
        "margay",
        "--package",
        "margay-cni",
        "--format",
        "{p}",
        "--target",
        TARGET,
    ]);
    let output = command.output().expect("cargo tree");
    assert!(
        output.status.success(),
        "cargo tree: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).expect("text of cargo tree");
    // Ours have their folder behind the version.
    let others = text
        .lines()
        .filter(|line| !line.contains("(/") && !line.is_empty());
    others
        .map(|line| line.trim_end_matches(" (*)").replace(" v", " "))
        .collect()
}

/// The file as it should be.
fn licences() -> String {
    let linked = linked();
    assert!(
        linked.len() > 100,
        "dependencies are not found any more: {linked:?}"
    );
    let options = ["--locked", "--filter-platform", TARGET]
        .map(str::to_owned)
        .to_vec();
    let metadata = MetadataCommand::new()
        .current_dir(root())
        .other_options(options)
        .exec()
        .expect("cargo metadata");
    let mut declared = BTreeMap::new();
    // Texts that differ in line breaks only are one: the first one is kept, with every crate that
    // has it.
    let mut texts: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
    for package in metadata.packages {
        let name = format!("{} {}", package.name, package.version);
        if !linked.contains(&name) {
            continue;
        }
        let folder = package
            .manifest_path
            .parent()
            .expect("a folder of the crate");
        for text in files(folder.as_std_path()) {
            let key = text.split_whitespace().collect::<Vec<_>>().join(" ");
            texts
                .entry(key)
                .or_insert_with(|| (text, BTreeSet::new()))
                .1
                .insert(name.clone());
        }
        declared.insert(name, package.license.unwrap_or_default());
    }
    assert!(
        linked.iter().eq(declared.keys()),
        "crates without metadata: {linked:?} {declared:?}"
    );
    let mut page = INTRODUCTION.to_owned();
    declared
        .iter()
        .for_each(|(name, licence)| page += &format!("  {name}: {licence}\n"));
    for (text, holders) in texts.into_values() {
        let holders: Vec<String> = holders.into_iter().collect();
        page += &format!("{RULE}{}\n\n{}\n", holders.join(", "), text.trim_end());
    }
    page
}

/// Texts of licences in the folder of a crate, in order of their files.
fn files(folder: &Path) -> Vec<String> {
    let entries =
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    let is_licence = |path: &Path| {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_uppercase();
        path.is_file() && FILES.iter().any(|begin| name.starts_with(begin))
    };
    let texts = paths
        .iter()
        .filter(|path| is_licence(path))
        .map(|path| fs::read(path).expect("a licence"));
    texts
        .map(|text| String::from_utf8_lossy(&text).replace('\r', ""))
        .filter(|text| !text.trim().is_empty())
        .collect()
}

#[test]
fn the_image_has_the_licences_of_what_is_linked() {
    let file = root().join("deploy/licenses.txt");
    let wanted = licences();
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&file, &wanted).expect("a writable file");
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == wanted,
        "deploy/licenses.txt is not that of the dependencies; run `make bless`"
    );
}
