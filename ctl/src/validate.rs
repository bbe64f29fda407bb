//! `validate`: which objects would not be enforced as written, and which fields have no effect.

use std::collections::BTreeSet;

use anyhow::Result;
use margay_api::fields::Ignored;
use serde::Serialize;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::manifest;
use crate::objects::Objects;
use crate::output::{Finding, Output};
use crate::report::{self, RefusedReport};
use crate::unused::Schemas;

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// File or folder of manifests; - is standard input.
    #[arg(short = 'f', long = "filename", value_name = "PATH", required = true)]
    pub files: Vec<String>,
    /// Namespace of objects without one.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// What is wrong with objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// Objects that policy depends on.
    pub objects: usize,
    /// Those that are not enforced as written.
    pub refused: Vec<RefusedReport>,
    /// What is set and has no effect, in a way that leaves somebody less protected than he thinks.
    pub misleading: Vec<String>,
    /// What else is set and has no effect.
    pub unused: Vec<String>,
    /// What contradicts other objects, or was assumed.
    pub notes: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let (schemas, mut ignored, mut objects) =
        (Schemas::default(), BTreeSet::new(), Objects::default());
    for path in &args.files {
        manifest::read(path, &mut |document| {
            if let Ok((_, value)) = &document {
                find_ignored(&schemas, value, &mut ignored);
            }
            objects.add_document(document, &args.namespace);
        })?;
    }
    let answer = answer(&objects, &ignored);
    let text = match args.output {
        Output::Tree => show(&answer),
        Output::Json => report::json(&answer)?,
    };
    Ok(Finding {
        text,
        holds: answer.refused.is_empty() && answer.misleading.is_empty(),
    })
}

/// Looks at an object, or at all of a list.
fn find_ignored(schemas: &Schemas, value: &Value, found: &mut BTreeSet<Ignored>) {
    let is_list = value["kind"]
        .as_str()
        .is_some_and(|kind| kind.ends_with("List"));
    match value["items"].as_array().filter(|_| is_list) {
        Some(items) => items
            .iter()
            .for_each(|item| schemas.find_ignored(item, found)),
        None => schemas.find_ignored(value, found),
    }
}

fn answer(objects: &Objects, ignored: &BTreeSet<Ignored>) -> Answer {
    let cluster = Cluster::of(objects);
    let (misleading, unused): (Vec<&Ignored>, Vec<&Ignored>) =
        ignored.iter().partition(|one| one.is_unsafe);
    let texts = |ignored: Vec<&Ignored>| ignored.iter().map(ToString::to_string).collect();
    Answer {
        objects: objects.known.len(),
        refused: report::refused(&cluster),
        misleading: texts(misleading),
        unused: texts(unused),
        notes: cluster.notes,
    }
}

fn show(answer: &Answer) -> String {
    let mut text = String::new();
    report::write_remarks(&answer.refused, &[], &mut text);
    answer
        .misleading
        .iter()
        .for_each(|field| text += &format!("misleading: {field}\n"));
    answer
        .unused
        .iter()
        .for_each(|field| text += &format!("unused: {field}\n"));
    report::write_remarks(&[], &answer.notes, &mut text);
    text + &format!(
        "{} objects, {} refused\n",
        answer.objects,
        answer.refused.len()
    )
}
