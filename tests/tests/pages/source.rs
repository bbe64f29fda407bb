//! Tokens of shipped source files, so that comments and strings cannot be mistaken for code.

use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::MetadataCommand;
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// One source file.
pub struct Source {
    /// Name of its crate.
    pub package: String,
    /// Its path from the root of the checkout.
    pub path: String,
    tokens: TokenStream,
}

/// Returns every source file of every crate but the harness, without files of tests, ordered by
/// path.
pub fn shipped() -> Vec<Source> {
    let metadata = MetadataCommand::new()
        .no_deps()
        .exec()
        .expect("cargo metadata of the workspace");
    let root = metadata.workspace_root.as_std_path();
    let mut sources = Vec::new();
    for package in metadata
        .packages
        .iter()
        .filter(|package| package.name.as_str() != "margay-tests")
    {
        let folder = package
            .manifest_path
            .parent()
            .expect("a folder of the crate")
            .join("src");
        for path in files(folder.as_std_path()) {
            let text = fs::read_to_string(&path).expect("a source file");
            let tokens = text
                .parse()
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let path = path
                .strip_prefix(root)
                .expect("a path in the checkout")
                .display()
                .to_string();
            sources.push(Source {
                package: package.name.to_string(),
                path,
                tokens,
            });
        }
    }
    sources.sort_by(|left, right| left.path.cmp(&right.path));
    sources
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder of the tree") {
        let path = entry.expect("an entry").path();
        let stem = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default();
        if stem == "tests" || stem.ends_with("_tests") {
            continue;
        }
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
    found
}

impl Source {
    /// Calls `visit` with the tokens of every group of the file, outermost first, without items of
    /// tests.
    pub fn visit(&self, visit: &mut dyn FnMut(&[TokenTree])) {
        descend(self.tokens.clone(), visit);
    }
}

fn descend(stream: TokenStream, visit: &mut dyn FnMut(&[TokenTree])) {
    let level = without_tests(stream);
    visit(&level);
    for token in level {
        if let TokenTree::Group(group) = token {
            descend(group.stream(), visit);
        }
    }
}

fn without_tests(stream: TokenStream) -> Vec<TokenTree> {
    let mut kept: Vec<TokenTree> = Vec::new();
    let mut tokens = stream.into_iter();
    while let Some(token) = tokens.next() {
        let is_marked =
            matches!(kept.last(), Some(TokenTree::Punct(punct)) if punct.as_char() == '#');
        match &token {
            TokenTree::Group(group) if is_marked && group.stream().to_string() == "cfg (test)" => {
                kept.pop();
                tokens.by_ref().find(ends_item);
            }
            _ => kept.push(token),
        }
    }
    kept
}

fn ends_item(token: &TokenTree) -> bool {
    match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        TokenTree::Punct(punct) => punct.as_char() == ';',
        _ => false,
    }
}

/// Returns the arguments of each call of that name among the tokens.
pub fn calls<'a>(level: &'a [TokenTree], name: &'a str) -> impl Iterator<Item = Group> + 'a {
    named(level, name).filter_map(|behind| arguments(behind.first()))
}

/// Returns the arguments of each macro of that name among the tokens.
pub fn macros<'a>(level: &'a [TokenTree], name: &'a str) -> impl Iterator<Item = Group> + 'a {
    let is_mark =
        |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == '!');
    named(level, name)
        .filter(move |behind| behind.first().is_some_and(is_mark))
        .filter_map(|behind| arguments(behind.get(1)))
}

/// Returns what follows each occurrence of a name.
fn named<'a>(level: &'a [TokenTree], name: &'a str) -> impl Iterator<Item = &'a [TokenTree]> + 'a {
    let is_named =
        move |token: &TokenTree| matches!(token, TokenTree::Ident(ident) if ident == name);
    level
        .iter()
        .enumerate()
        .filter(move |(_, token)| is_named(token))
        .map(|(index, _)| &level[index + 1..])
}

fn arguments(token: Option<&TokenTree>) -> Option<Group> {
    match token {
        Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Parenthesis => {
            Some(group.clone())
        }
        _ => None,
    }
}

/// Parts the tokens of a list at its commas.
pub fn parts(group: &Group) -> Vec<Vec<TokenTree>> {
    let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
    let is_comma =
        |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ',');
    tokens
        .split(is_comma)
        .filter(|part| !part.is_empty())
        .map(<[TokenTree]>::to_vec)
        .collect()
}

/// Returns the value of a string literal that stands alone.
pub fn text(part: &[TokenTree]) -> Option<String> {
    let [TokenTree::Literal(literal)] = part else {
        return None;
    };
    let source = literal.to_string();
    if let Some(raw) = source.strip_prefix('r') {
        return Some(raw.trim_matches('#').trim_matches('"').to_owned());
    }
    let inner = source.strip_prefix('"')?.strip_suffix('"')?;
    let mut value = String::new();
    let mut characters = inner.chars().peekable();
    while let Some(character) = characters.next() {
        if character != '\\' {
            value.push(character);
            continue;
        }
        match characters.next()? {
            'n' => value.push('\n'),
            't' => value.push('\t'),
            // The line goes on behind the next one's indentation.
            '\n' => while characters.next_if(|next| next.is_whitespace()).is_some() {},
            other => value.push(other),
        }
    }
    Some(value)
}
