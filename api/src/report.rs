//! Problem reports from typha to the operator: a text of bounded size for each replica of typha,
//! under its pod's name in one ConfigMap.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Name of the ConfigMap, in the namespace of typha.
pub const CONFIG_MAP: &str = "margay-problems";
/// Entries of a list that are included; the others are only counted.
const NAMED: usize = 16;
/// Limit of the subject of an entry in bytes: kind, namespace, name and node.
const SUBJECT: usize = 640;
/// Limit of the reason of an entry in bytes.
const REASON: usize = 384;

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Entry {
    /// The object (kind, namespace and name) or node that has the problem.
    pub subject: String,
    /// Field, value, rule and remedy.
    pub reason: String,
}

impl Entry {
    /// Creates an entry; texts beyond the limits are cut.
    pub fn new(subject: &str, reason: &str) -> Self {
        Self {
            subject: cut(subject, SUBJECT),
            reason: cut(reason, REASON),
        }
    }
}

/// A list of which only the first entries are included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// Number of all entries.
    pub total: usize,
    /// The first entries.
    pub first: BTreeSet<Entry>,
}

impl Listing {
    /// Creates a list of which only the first items are converted to entries.
    pub fn of<T>(found: impl IntoIterator<Item = T>, entry: impl Fn(T) -> Entry) -> Self {
        let mut found = found.into_iter();
        let first: BTreeSet<Entry> = found.by_ref().take(NAMED).map(entry).collect();
        Self {
            total: first.len() + found.count(),
            first,
        }
    }

    fn join(&mut self, other: Self, is_same: bool) {
        self.total = if is_same {
            self.total.max(other.total)
        } else {
            self.total + other.total
        };
        self.first.extend(other.first);
        self.total = self.total.max(self.first.len());
    }
}

/// Problems that one replica of typha reports, or all of them together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Objects that are invalid or in conflict with others. Every replica reports the same.
    pub objects: Listing,
    /// Records that nodes of this replica cannot enforce as written.
    pub records: Listing,
    /// Problems of nodes of this replica as a whole.
    pub nodes: Listing,
}

impl Report {
    /// Returns true when there are no problems.
    pub fn is_empty(&self) -> bool {
        self.objects.total + self.records.total + self.nodes.total == 0
    }

    /// Merges the reports of all replicas.
    pub fn joined(reports: impl IntoIterator<Item = Self>) -> Self {
        let mut joined = Self::default();
        for Self {
            objects,
            records,
            nodes,
        } in reports
        {
            joined.objects.join(objects, true);
            joined.records.join(records, false);
            joined.nodes.join(nodes, false);
        }
        joined
    }
}

/// Cuts the text to the limit and replaces control characters: it is displayed on one line.
pub fn cut(text: &str, limit: usize) -> String {
    const MORE: char = '…';
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    if text.len() <= limit {
        return text.chars().map(printable).collect();
    }
    let end = text.floor_char_boundary(limit - MORE.len_utf8());
    text[..end].chars().map(printable).chain([MORE]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_of_limited_size_whatever_it_is_about() {
        let long = "ä\n\"".repeat(10_000);
        let listing = || {
            Listing::of(0..5000, |number| {
                Entry::new(&format!("{number}{long}"), &long)
            })
        };
        let report = Report {
            objects: listing(),
            records: listing(),
            nodes: listing(),
        };
        let text = serde_json::to_string(&report).expect("JSON");
        assert!(text.len() < 64 << 10, "{}", text.len());
        assert_eq!(
            serde_json::from_str::<Report>(&text).expect("a report"),
            report
        );
        assert_eq!(
            (report.objects.total, report.objects.first.len()),
            (5000, NAMED)
        );
        assert!(
            report
                .nodes
                .first
                .iter()
                .all(|entry| entry.reason.ends_with('…') && !entry.reason.contains('\n'))
        );
    }

    #[test]
    fn replicas_see_the_same_objects_and_other_nodes() {
        let of = |subjects: &[&str]| Listing::of(subjects, |subject| Entry::new(subject, "r"));
        let one = Report {
            objects: of(&["a", "b"]),
            records: of(&["a on n1"]),
            nodes: of(&["n1"]),
        };
        let other = Report {
            objects: of(&["b", "c"]),
            records: of(&[]),
            nodes: of(&["n2", "n3"]),
        };
        let joined = Report::joined([one, other]);
        let names = |listing: &Listing| {
            listing
                .first
                .iter()
                .map(|entry| entry.subject.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            (joined.objects.total, names(&joined.objects)),
            (3, vec!["a".into(), "b".into(), "c".into()])
        );
        assert_eq!((joined.records.total, joined.nodes.total), (1, 3));
        assert!(!joined.is_empty() && Report::joined([]).is_empty());
    }
}
