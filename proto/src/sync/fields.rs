//! Parts of messages that many fields have in common, decoded with the name of the field for
//! errors.

use std::str::FromStr;

use super::Error;

/// Maximal length of refused text in an error, in bytes.
const MAX_SHOWN: usize = 64;

pub(super) const ADDRESS: &str = "an IP address";
pub(super) const RANGE: &str = "an IP range ADDRESS/LENGTH";

pub(super) fn require<T>(field: &'static str, value: Option<T>) -> Result<T, Error> {
    value.ok_or(Error::Missing { field })
}

pub(super) fn non_empty(field: &'static str, value: String) -> Result<String, Error> {
    if value.is_empty() {
        return Err(Error::Missing { field });
    }
    Ok(value)
}

pub(super) fn parse<T: FromStr>(
    field: &'static str,
    value: &str,
    rule: &'static str,
) -> Result<T, Error> {
    value.parse().map_err(|_| Error::Text {
        field,
        value: truncate(value),
        rule,
    })
}

pub(super) fn parse_list<T: FromStr>(
    field: &'static str,
    values: &[String],
    rule: &'static str,
) -> Result<Vec<T>, Error> {
    values
        .iter()
        .map(|value| parse(field, value, rule))
        .collect()
}

pub(super) fn truncate(value: &str) -> String {
    value.chars().take(MAX_SHOWN).collect()
}

pub(super) fn decode_byte(field: &'static str, value: u32) -> Result<u8, Error> {
    u8::try_from(value).map_err(|_| out_of_range(field, value, "0..=255"))
}

pub(super) fn decode_port(field: &'static str, value: u32) -> Result<u16, Error> {
    u16::try_from(value).map_err(|_| out_of_range(field, value, "0..=65535"))
}

pub(super) fn out_of_range(field: &'static str, value: u32, rule: &'static str) -> Error {
    Error::Number {
        field,
        value: value.into(),
        rule,
    }
}

pub(super) fn unknown_kind(field: &'static str) -> Error {
    Error::Missing { field }
}
