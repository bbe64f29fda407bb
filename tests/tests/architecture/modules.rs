//! Modules of a crate: which may use which.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::{FLOORS, metadata, rust_files};

/// Crates whose modules use each other in one direction.
const ONE_WAY: [&str; 12] = [
    "api",
    "bgp",
    "calc",
    "ctl",
    "dataplane",
    "ipam",
    "netlink",
    "nft",
    "operator",
    "proto",
    "runtime",
    "typha",
];

/// Modules that use each other both ways, because they are one recursive type.
const RECURSIVE: [(&str, &[&str]); 1] = [("nft/src", &["rule", "ruleset", "set"])];

#[test]
fn modules_use_only_their_own_and_lower_floors() {
    let root = metadata().workspace_root.into_std_path_buf();
    for (folder, floors) in FLOORS {
        let (modules, uses) = siblings(&root, folder);
        let of = |module: &str| floors.iter().position(|floor| floor.contains(&module));
        let listed: BTreeSet<&str> = floors
            .iter()
            .flat_map(|floor| floor.iter().copied())
            .collect();
        assert_eq!(
            modules.iter().map(String::as_str).collect::<BTreeSet<_>>(),
            listed,
            "modules of {folder}"
        );
        let upward: Vec<String> = uses
            .iter()
            .filter(|((user, used), _)| of(user) < of(used))
            .map(|((user, used), path)| format!("{user} uses {used}: {path}"))
            .collect();
        assert!(
            upward.is_empty(),
            "modules of {folder} use higher floors: {upward:#?}"
        );
    }
}

#[test]
fn modules_use_each_other_in_one_direction() {
    let root = metadata().workspace_root.into_std_path_buf();
    for crate_ in ONE_WAY {
        let sources = root.join(crate_).join("src");
        let folders: BTreeSet<PathBuf> = rust_files(&sources)
            .into_iter()
            .filter_map(|file| Some(file.parent()?.to_owned()))
            .collect();
        for folder in folders {
            let folder = folder
                .strip_prefix(&root)
                .expect("below the root")
                .to_str()
                .expect("a name in UTF-8");
            let recursive = RECURSIVE
                .iter()
                .find(|(place, _)| *place == folder)
                .map_or(&[][..], |(_, together)| *together);
            let is_within = |module: &String| recursive.contains(&module.as_str());
            let (mut rest, mut uses) = siblings(&root, folder);
            uses.retain(|(user, used), _| !(is_within(user) && is_within(used)));
            // What uses nothing of the rest is in no circle, and neither is what uses only such
            // modules.
            loop {
                let is_free = |module: &String| {
                    !uses
                        .keys()
                        .any(|(user, used)| user == module && rest.contains(used))
                };
                let (free, kept): (BTreeSet<String>, BTreeSet<String>) =
                    rest.iter().cloned().partition(is_free);
                rest = kept;
                if free.is_empty() {
                    break;
                }
            }
            uses.retain(|(user, used), _| rest.contains(user) && rest.contains(used));
            assert!(
                uses.is_empty(),
                "modules of {folder} use each other in circles, or lead to some: {uses:#?}"
            );
        }
    }
}

/// The modules in a folder, and which of them uses which, with a path by which it does.
fn siblings(root: &Path, folder: &str) -> (BTreeSet<String>, BTreeMap<(String, String), String>) {
    let (crate_, below) = folder.split_once("/src").expect("a folder of sources");
    let sources = root.join(crate_).join("src");
    let parent: Vec<&str> = below.split('/').filter(|name| !name.is_empty()).collect();
    let files: BTreeMap<Vec<String>, PathBuf> = rust_files(&sources)
        .into_iter()
        .map(|file| {
            (
                module_of(file.strip_prefix(&sources).expect("below the sources")),
                file,
            )
        })
        .filter(|(module, _)| {
            !module
                .iter()
                .any(|name| name == "tests" || name.ends_with("_tests"))
        })
        .collect();
    let child = |module: &[String]| match module.split_at_checked(parent.len()) {
        Some((before, [child, ..])) if before == parent => Some(child.clone()),
        _ => None,
    };
    let modules = files.keys().filter_map(|module| child(module)).collect();
    let mut uses = BTreeMap::new();
    for (module, file) in &files {
        let Some(user) = child(module) else { continue };
        let text = fs::read_to_string(file).expect("a source file");
        for path in paths(&text) {
            let Some(mut target) = resolve(module, &path) else {
                continue;
            };
            while !target.is_empty() && !files.contains_key(&target) {
                target.pop();
            }
            if let Some(used) = child(&target).filter(|used| *used != user) {
                uses.entry((user.clone(), used))
                    .or_insert(format!("{path} in {}", file.display()));
            }
        }
    }
    (modules, uses)
}

/// The module that a file below the sources is.
fn module_of(file: &Path) -> Vec<String> {
    let file = file.with_extension("");
    let names = file.iter().map(|name| name.to_string_lossy().into_owned());
    names
        .filter(|name| !["lib", "main", "mod"].contains(&name.as_str()))
        .collect()
}

/// Every path of a source that begins with `crate` or `super`, but for those of its tests and
/// comments.
fn paths(text: &str) -> BTreeSet<String> {
    let lines = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    let code = lines.collect::<Vec<_>>().join("\n");
    let opens = |at: &usize| {
        code[at + 1..]
            .lines()
            .nth(1)
            .is_some_and(|line| line.ends_with('{'))
    };
    let tests = code
        .match_indices("\n#[cfg(test)]\nmod ")
        .map(|(at, _)| at)
        .find(opens);
    let code = &code[..tests.unwrap_or(code.len())];
    let is_path = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let starts = ["crate::", "super::"]
        .into_iter()
        .flat_map(|start| code.match_indices(start));
    let starts = starts
        .filter(|(at, _)| !code[..*at].ends_with(is_path))
        .map(|(at, _)| &code[at..]);
    let mut paths = BTreeSet::new();
    for rest in starts {
        let (path, after) = rest.split_at(rest.find(|c: char| !is_path(c)).unwrap_or(rest.len()));
        if let Some(group) = after.strip_prefix('{') {
            expand_group(path, group, &mut paths);
        } else {
            paths.insert(path.to_owned());
        }
    }
    paths
}

/// The paths of a group in a `use`, which begins behind its brace; returns what comes behind its
/// end.
fn expand_group<'a>(prefix: &str, group: &'a str, paths: &mut BTreeSet<String>) -> &'a str {
    let mut rest = group;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
        if rest.is_empty() {
            return rest;
        }
        if let Some(behind) = rest.strip_prefix('}') {
            return behind;
        }
        let (item, after) = rest.split_at(rest.find([',', '{', '}']).unwrap_or(rest.len()));
        let path = format!(
            "{prefix}{}",
            item.split(" as ").next().unwrap_or_default().trim()
        );
        rest = match after.strip_prefix('{') {
            Some(inner) => expand_group(&path, inner, paths),
            None => {
                paths.insert(path);
                after
            }
        };
    }
}

/// The path from the crate's root; none if it leads out of it.
fn resolve(module: &[String], path: &str) -> Option<Vec<String>> {
    let names: Vec<&str> = path.split("::").filter(|name| !name.is_empty()).collect();
    let ups = names.iter().take_while(|name| **name == "super").count();
    let base = if ups == 0 {
        &[][..]
    } else {
        &module[..module.len().checked_sub(ups)?]
    };
    Some(
        base.iter()
            .cloned()
            .chain(names.into_iter().skip(ups.max(1)).map(str::to_owned))
            .collect(),
    )
}

#[test]
fn paths_of_a_source_are_found() {
    let text = "use super::{\n    a::{self, b},\n    c as d, // super::not\n\
                };\n\
                use crate::e;\n\
                fn f() { super::super::g::h(my_crate::i) }\n\
                #[cfg(test)]\n\
                mod tests {\n    use crate::j;\n\
                }\n";
    let module = ["x", "y"].map(str::to_owned);
    let found: Vec<String> = paths(text)
        .iter()
        .filter_map(|path| Some(resolve(&module, path)?.join("/")))
        .collect();
    assert_eq!(found, ["e", "x/a/b", "x/a/self", "x/c", "g/h"]);
}
