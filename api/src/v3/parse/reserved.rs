//! Labels that only the system may set.

use std::collections::BTreeMap;

use crate::meta::{Labels, without_reserved};
use crate::problem::Problems;

/// Removes labels that identify an object from those that a user wrote; each is reported unless it
/// has an allowed value.
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
                "this label identifies the object and is set by the system only",
                "remove the label",
            );
        }
    }
    labels
}
