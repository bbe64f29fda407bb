//! Labels that only the system sets.

use std::collections::BTreeMap;

use crate::meta::{Labels, without_reserved};
use crate::problem::Problems;

/// Labels as written without those that say what an object is, each of which is reported unless it says no more than it may.
pub(super) fn without(
    problems: &mut Problems,
    field: &str,
    written: &BTreeMap<String, String>,
    allowed: &[(&str, &str)],
) -> Labels {
    let labels = without_reserved(written);
    for (label, value) in written {
        if !labels.contains_key(label) && !allowed.contains(&(label, value)) {
            problems.add(
                format!("{field}[{label}]"),
                value,
                "this label says what an object is and is set by the system alone",
                "remove the label",
            );
        }
    }
    labels
}
