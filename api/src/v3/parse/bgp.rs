//! Parses BGP's kinds.

mod filter;
mod peer;
mod settings;

pub use filter::filter;
pub use peer::peer;
pub use settings::settings;

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::SecretKeySelector;

use super::controllers;
use crate::bgp::{ASN_REMEDY, CommunityValue, SecretKey, is_asn, parse_asn};
use crate::problem::Problems;
use crate::v3::bgp::{AsNumber, BgpPassword};

/// Longest restart time (RFC 4724 section 3).
const MAX_RESTART_TIME: Duration = Duration::from_secs(4095);
/// Metrics of routes that Calico takes.
const PRIORITIES: RangeInclusive<i32> = 1..=2_147_483_646;

/// Index of a value among those that a field may have.
fn one_of(
    field: &str,
    value: &Option<String>,
    names: &[&str],
    problems: &mut Problems,
) -> Option<usize> {
    let text = value.as_deref()?;
    let found = names.iter().position(|each| *each == text);
    if found.is_none() {
        problems.add(
            field,
            text,
            "not a value of this field",
            format!("use {}", names.join(" or ")),
        );
    }
    found
}

fn community(field: &str, text: &str, problems: &mut Problems) -> Option<CommunityValue> {
    let parsed = text.parse().ok();
    if parsed.is_none() {
        problems.add(
            field,
            text,
            "not a community",
            "write aa:nn or aa:nn:mm, such as 64512:100",
        );
    }
    parsed
}

fn range(field: &str, text: &str, problems: &mut Problems) -> Option<IpNet> {
    let parsed = text.parse::<IpNet>().ok();
    if parsed.is_none() {
        problems.add(field, text, "not a range", "write it like 10.244.0.0/16");
    }
    parsed.map(|net| net.trunc())
}

fn address(field: &str, text: &str, problems: &mut Problems) -> Option<IpAddr> {
    let parsed = text.parse().ok();
    if parsed.is_none() {
        problems.add(
            field,
            text,
            "not an address",
            "write it like 192.0.2.1 or fd00::1",
        );
    }
    parsed
}

fn number(field: &str, value: Option<&AsNumber>, problems: &mut Problems) -> Option<u32> {
    let value = value?;
    let (text, parsed) = match value {
        AsNumber::Number(number) => {
            let (number_text, number) = (number.to_string(), u32::try_from(*number).ok());
            (number_text, number.filter(|number| is_asn(*number)))
        }
        AsNumber::Text(text) => (text.clone(), parse_asn(text)),
    };
    if parsed.is_none() {
        problems.add(field, text, "not an AS number", ASN_REMEDY);
    }
    parsed
}

fn numbers(field: &str, values: &[i64], problems: &mut Problems) -> Vec<u32> {
    let mut found = Vec::new();
    for (index, value) in values.iter().enumerate() {
        match u32::try_from(*value).ok().filter(|number| is_asn(*number)) {
            Some(number) => found.push(number),
            None => {
                let field = format!("{field}[{index}]");
                problems.add(field, value, "not an AS number", "use 1 to 4294967294");
            }
        }
    }
    found
}

fn ranged<T: TryFrom<i32>>(
    field: &str,
    value: Option<i32>,
    range: RangeInclusive<i32>,
    problems: &mut Problems,
) -> Option<T> {
    let value = value?;
    let parsed = T::try_from(value).ok().filter(|_| range.contains(&value));
    if parsed.is_none() {
        let remedy = format!("use {} to {}", range.start(), range.end());
        problems.add(field, value, "out of range", remedy);
    }
    parsed
}

fn secret(
    field: &str,
    password: Option<&BgpPassword>,
    problems: &mut Problems,
) -> Option<SecretKey> {
    let password = password?;
    match &password.secret_key_ref {
        Some(SecretKeySelector { name, key, .. }) if !name.is_empty() && !key.is_empty() => {
            Some(SecretKey {
                name: name.clone(),
                key: key.clone(),
            })
        }
        _ => {
            problems.add(
                field,
                "",
                "without secretKeyRef",
                "name a Secret and its key",
            );
            None
        }
    }
}

/// A duration as Go writes it, of whole seconds, from one second on.
fn duration(
    field: &str,
    text: &Option<String>,
    most: Duration,
    problems: &mut Problems,
) -> Option<Duration> {
    let text = text.as_deref()?;
    let is_possible = |time: &Duration| {
        (Duration::from_secs(1)..=most).contains(time) && time.subsec_nanos() == 0
    };
    let parsed = controllers::duration(text).filter(is_possible);
    if parsed.is_none() {
        let remedy = format!("write it like 120s or 2m, from 1s to {}s", most.as_secs());
        problems.add(field, text, "not a duration of this field", remedy);
    }
    parsed
}
