//! Names of policies: until Calico v3.31 a policy of the default tier was stored with the prefix
//! `default.`.
//!
//! Both forms can be in one cluster, even of one policy: Calico's own migration writes the new
//! object before it deletes the old one.

use crate::policy::DEFAULT_TIER;

/// Returns the user's name of a policy from its stored name, the name in its metadata annotation
/// and the tier in its spec. The annotation counts only if it names the same policy: no policy may
/// pose as another one by an annotation.
pub fn user_name(stored: &str, kept: Option<&str>, tier: Option<&str>) -> String {
    let bare = prefixless(stored);
    match kept {
        Some(kept) if kept == stored || Some(kept) == bare => kept.to_owned(),
        _ => match bare {
            Some(bare) if matches!(tier.unwrap_or_default(), "" | DEFAULT_TIER) => bare.to_owned(),
            _ => stored.to_owned(),
        },
    }
}

/// Returns the other name that a policy may be stored under, from its name and its stored name.
pub fn other_stored_name(name: &str, stored: &str) -> String {
    if stored == name {
        format!("{DEFAULT_TIER}.{name}")
    } else {
        name.to_owned()
    }
}

/// Returns true for the form that takes precedence where both exist: the one without the prefix,
/// which Calico writes now.
pub fn takes_precedence(name: &str, stored: &str) -> bool {
    name == stored
}

fn prefixless(stored: &str) -> Option<&str> {
    stored
        .strip_prefix(DEFAULT_TIER)?
        .strip_prefix('.')
        .filter(|bare| !bare.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stored name, name in the annotation, tier, and the user's name. By release of the writer.
    #[test]
    fn names_of_every_release() {
        let table = [
            // Up to v3.28, and v3.29.4 to v3.31: prefixed, the user's name in the annotation of the
            // later ones.
            ("default.p", None, None, "p"),
            ("default.p", None, Some("default"), "p"),
            ("default.p", Some("p"), Some("default"), "p"),
            // v3.29.0 to v3.29.3 showed the prefix.
            ("default.p", Some("default.p"), Some("default"), "default.p"),
            // From v3.32 on.
            ("p", Some("p"), Some("default"), "p"),
            ("p", None, None, "p"),
            ("default.my.policy", None, None, "my.policy"),
            // Other tiers keep their names.
            ("sec.p", None, Some("sec"), "sec.p"),
            ("default.p", None, Some("sec"), "default.p"),
            ("knp.default.p", None, Some("default"), "knp.default.p"),
            ("default.", None, None, "default."),
            ("default", None, None, "default"),
            // An annotation that names another policy.
            ("p", Some("other"), None, "p"),
            ("default.p", Some("other"), None, "p"),
        ];
        for (stored, kept, tier, expected) in table {
            assert_eq!(
                user_name(stored, kept, tier),
                expected,
                "{stored} {kept:?} {tier:?}"
            );
        }
    }

    #[test]
    fn the_form_without_the_prefix_takes_precedence() {
        assert_eq!(other_stored_name("p", "default.p"), "p");
        assert_eq!(other_stored_name("p", "p"), "default.p");
        assert!(takes_precedence("p", "p") && !takes_precedence("p", "default.p"));
    }
}
