//! UIDs: the user's must differ from the stored one, or the garbage collector would take the two
//! objects for the same.

use super::StorageError;

/// Bytes of a UID that stay unchanged: they hold version and variant of the UUID (RFC 9562).
const KEPT: [usize; 2] = [6, 8];
/// Positions of dashes in a UID.
const DASHES: [usize; 4] = [8, 13, 18, 23];

/// Converts a UID to the other form: the bits of each byte are reversed, except in those with
/// version and variant. Its own inverse. `field` is the path of the UID, for the error.
pub fn flip(uid: &str, field: &str) -> Result<String, StorageError> {
    let error = || StorageError::Uid {
        field: field.to_owned(),
        value: uid.chars().take(64).collect(),
    };
    let bytes = parse(uid).ok_or_else(error)?;
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.into_iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        let byte = if KEPT.contains(&index) {
            byte
        } else {
            byte.reverse_bits()
        };
        text.push_str(&format!("{byte:02x}"));
    }
    Ok(text)
}

fn parse(uid: &str) -> Option<[u8; 16]> {
    let text = uid.as_bytes();
    if text.len() != 36 || DASHES.iter().any(|at| text[*at] != b'-') {
        return None;
    }
    let mut digits = text
        .iter()
        .filter(|byte| **byte != b'-')
        .map(|byte| char::from(*byte).to_digit(16));
    let mut bytes = [0; 16];
    for byte in &mut bytes {
        let (high, low) = (digits.next()??, digits.next()??);
        *byte = (high << 4 | low) as u8;
    }
    digits.next().is_none().then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_are_reversed_but_for_version_and_variant() {
        let flipped = flip("01020304-0506-4708-890a-0b0c0d0e0f10", "metadata.uid").expect("a UID");
        assert_eq!(flipped, "8040c020-a060-4710-8950-d030b070f008");
    }

    #[test]
    fn a_value_that_is_not_a_uid_is_named() {
        for text in [
            "",
            "abc",
            "01020304-0506-4708-890a-0b0c0d0e0f1",
            "0102030400506047080890a00b0c0d0e0f10",
            "é1020304-0506-4708-890a-0b0c0d0e0f1",
        ] {
            let error = flip(text, "metadata.uid").expect_err(text).to_string();
            assert!(
                error.starts_with("metadata.uid: ") && error.contains("not a UID"),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn twice_is_once(
            uid in "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
            any in ".{0,40}",
        ) {
            prop_assert_eq!(flip(&flip(&uid, "uid").unwrap(), "uid").unwrap(), uid);
            let _never_panics = flip(&any, "uid");
        }
    }
}
