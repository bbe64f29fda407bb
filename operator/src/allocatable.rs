//! Determines which pools addresses may be assigned from: of overlapping pools only one, or an
//! address could be assigned twice. Pure. The result is the condition `Allocatable` in the pools'
//! status, as Calico's controller writes it and agents obey it; overlaps are also reported in
//! TigeraStatus.
//!
//! Precedence of overlapping pools: one that is allocatable already, then one that is being deleted
//! (its blocks are in use until they are released), then one that was not allocatable, then a new
//! one; among equals the older one, then by name. A disabled pool does not block others.

use std::collections::BTreeSet;

use ipnet::IpNet;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::inputs::PoolFacts;
use crate::manifest::Object;
use crate::pool_finalizer::count_blocks;

/// Type of the condition (Calico).
const ALLOCATABLE: &str = "Allocatable";

/// Conditions to write and overlaps to report.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Pools with the status that they should have, if it differs.
    pub statuses: Vec<Object>,
    /// Pools that are not allocatable because of another one.
    pub overlaps: Vec<String>,
    /// Pools that are not allocatable because of another one, or would not be if enabled.
    pub shadowed: BTreeSet<String>,
}

/// Condition of one pool: status, Calico's reason, and message.
struct PoolCondition {
    status: &'static str,
    reason: &'static str,
    message: String,
}

impl PoolCondition {
    fn not(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: "False",
            reason,
            message: message.into(),
        }
    }
}

/// Evaluates all pools. A pool whose range cannot be parsed is ignored and gets no status. `blocks`
/// are the ranges of all blocks, while a pool is being deleted.
pub fn evaluate(
    pools: &[PoolFacts],
    blocks: Option<&BTreeSet<IpNet>>,
    now: Timestamp,
) -> Evaluation {
    let mut ordered: Vec<(&PoolFacts, IpNet)> = pools
        .iter()
        .filter_map(|pool| Some((pool, pool.cidr().parse::<IpNet>().ok()?.trunc())))
        .collect();
    ordered.sort_by_key(|(pool, _)| (rank(pool), &pool.created, &pool.name));
    let mut evaluation = Evaluation::default();
    let mut holders: Vec<(&PoolFacts, IpNet)> = Vec::new();
    for (pool, range) in &ordered {
        let holder = holders
            .iter()
            .find(|(_, other)| other.contains(range) || range.contains(other));
        let condition = evaluate_pool(pool, holder.map(|(other, _)| *other), blocks);
        if condition.reason == "CIDROverlap" {
            evaluation
                .overlaps
                .push(format!("IPPool {}: {}", pool.name, condition.message));
        } else if condition.reason != "Disabled" {
            holders.push((pool, *range));
        }
        evaluation.statuses.extend(status(pool, &condition, now));
    }
    let holds = |pool: &PoolFacts| holders.iter().any(|(holder, _)| holder.name == pool.name);
    let overlaps = |range: &IpNet| {
        holders
            .iter()
            .any(|(_, other)| other.contains(range) || range.contains(other))
    };
    let shadowed = ordered
        .iter()
        .filter(|(pool, range)| !holds(pool) && overlaps(range));
    evaluation.shadowed = shadowed.map(|(pool, _)| pool.name.clone()).collect();
    evaluation
}

/// Returns the precedence of a pool; lower is first.
fn rank(pool: &PoolFacts) -> u8 {
    match (
        condition(pool).and_then(|found| found["status"].as_str()),
        pool.terminating,
    ) {
        (_, true) => 1,
        (Some("True"), false) => 0,
        (Some("False"), false) => 2,
        _ => 3,
    }
}

fn condition(pool: &PoolFacts) -> Option<&Value> {
    pool.conditions
        .iter()
        .find(|condition| condition["type"] == ALLOCATABLE)
}

fn evaluate_pool(
    pool: &PoolFacts,
    holder: Option<&PoolFacts>,
    blocks: Option<&BTreeSet<IpNet>>,
) -> PoolCondition {
    if pool.spec["disabled"] == true {
        return PoolCondition::not("Disabled", "spec.disabled is true");
    }
    if pool.terminating {
        let in_use = blocks.map_or_else(
            || "its IPAMBlocks are".to_owned(),
            |blocks| format!("its IPAMBlocks ({}) are", count_blocks(pool, blocks)),
        );
        let message = format!(
            "the pool is being deleted, and stays until {in_use} unused; recreate the pods with \
             its addresses to complete the deletion"
        );
        return PoolCondition::not("Terminating", message);
    }
    match holder {
        Some(other) => PoolCondition::not(
            "CIDROverlap",
            format!(
                "its range {} overlaps that of IPPool {} ({}), so no addresses are assigned from \
                 it; delete one of the two, or recreate this one with another range",
                pool.cidr(),
                other.name,
                other.cidr()
            ),
        ),
        None => PoolCondition {
            status: "True",
            reason: "OK",
            message: "addresses may be assigned from it".to_owned(),
        },
    }
}

/// Returns the status that the pool should have, unless it has it. Other conditions stay; the
/// transition time changes only with the status.
fn status(pool: &PoolFacts, wanted: &PoolCondition, now: Timestamp) -> Option<Object> {
    let before = condition(pool);
    let present = |field: &str| {
        before
            .and_then(|found| found[field].as_str())
            .unwrap_or_default()
    };
    if (present("status"), present("reason"), present("message"))
        == (wanted.status, wanted.reason, wanted.message.as_str())
    {
        return None;
    }
    let since = Some(present("lastTransitionTime"))
        .filter(|time| present("status") == wanted.status && !time.is_empty());
    let since = since.map_or_else(|| crate::status::rfc3339(now), str::to_owned);
    let own = json!({
        "type": ALLOCATABLE,
        "status": wanted.status,
        "reason": wanted.reason,
        "message": wanted.message,
        "lastTransitionTime": since,
    });
    let others = pool
        .conditions
        .iter()
        .filter(|condition| condition["type"] != ALLOCATABLE)
        .cloned();
    let conditions: Vec<Value> = others.chain([own]).collect();
    Some(Object::new(
        "IPPool",
        json!({ "metadata": { "name": pool.name }, "status": { "conditions": conditions } }),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(name: &str, cidr: &str, created: &str) -> PoolFacts {
        PoolFacts {
            name: name.to_owned(),
            spec: json!({ "cidr": cidr }),
            created: format!("2026-01-01T00:00:{created}Z"),
            ..PoolFacts::default()
        }
    }

    fn with(pool: PoolFacts, status: &str) -> PoolFacts {
        let reason = if status == "True" {
            "OK"
        } else {
            "CIDROverlap"
        };
        let condition = json!({
            "type": ALLOCATABLE,
            "status": status,
            "reason": reason,
            "message": "",
            "lastTransitionTime": "2026-01-02T00:00:00Z",
        });
        PoolFacts {
            conditions: vec![condition],
            ..pool
        }
    }

    fn now() -> Timestamp {
        "2026-11-23T10:00:00.75Z".parse().unwrap()
    }

    /// Returns the reason of each pool, in the order of names.
    fn shown(pools: &[PoolFacts]) -> String {
        let mut reasons: Vec<String> = evaluate(pools, None, now())
            .statuses
            .iter()
            .map(|object| {
                let condition = object.body["status"]["conditions"]
                    .as_array()
                    .unwrap()
                    .last()
                    .unwrap()
                    .clone();
                format!(
                    "{} {}",
                    object.key.name,
                    condition["reason"].as_str().unwrap()
                )
            })
            .collect();
        reasons.sort();
        reasons.join(", ")
    }

    #[test]
    fn of_pools_that_overlap_one_is_allocatable() {
        let disabled = |mut pool: PoolFacts| {
            pool.spec["disabled"] = json!(true);
            pool
        };
        let leaving = |pool: PoolFacts| PoolFacts {
            terminating: true,
            ..pool
        };
        let table = [
            (
                "alone",
                vec![
                    pool("a", "10.0.0.0/16", "00"),
                    pool("b", "10.1.0.0/16", "00"),
                ],
                "a OK, b OK",
            ),
            (
                "the older one",
                vec![
                    pool("a", "10.0.0.0/24", "02"),
                    pool("b", "10.0.0.0/16", "01"),
                ],
                "a CIDROverlap, b OK",
            ),
            (
                "by name",
                vec![
                    pool("b", "10.0.0.0/24", "00"),
                    pool("a", "10.0.0.0/16", "00"),
                ],
                "a OK, b CIDROverlap",
            ),
            (
                "the one that is in use",
                vec![
                    with(pool("a", "10.0.0.0/16", "09"), "True"),
                    pool("b", "10.0.0.0/24", "01"),
                ],
                "a OK, b CIDROverlap",
            ),
            (
                "a disabled one does not block others",
                vec![
                    disabled(pool("a", "10.0.0.0/16", "00")),
                    pool("b", "10.0.0.0/24", "01"),
                ],
                "a Disabled, b OK",
            ),
            (
                "one that is being deleted is, until it is gone",
                vec![
                    leaving(with(pool("a", "10.0.0.0/16", "00"), "True")),
                    with(pool("b", "10.0.0.0/24", "01"), "False"),
                ],
                "a Terminating, b CIDROverlap",
            ),
            (
                "then it is free",
                vec![with(pool("b", "10.0.0.0/24", "01"), "False")],
                "b OK",
            ),
            (
                "not allocatable before new",
                vec![
                    pool("a", "10.0.0.0/16", "00"),
                    with(pool("b", "10.0.0.0/24", "01"), "False"),
                ],
                "a CIDROverlap, b OK",
            ),
            (
                "IP versions do not overlap",
                vec![pool("a", "10.0.0.0/8", "00"), pool("b", "::/0", "00")],
                "a OK, b OK",
            ),
            (
                "what cannot be read",
                vec![pool("a", "10.0.0.0/8", "00"), pool("b", "10", "00")],
                "a OK",
            ),
        ];
        for (what, pools, wanted) in table {
            assert_eq!(shown(&pools), wanted, "{what}");
        }
    }

    #[test]
    fn an_overlap_is_reported_with_both_pools_and_a_remedy() {
        let found = evaluate(
            &[
                pool("a", "10.0.0.0/16", "00"),
                pool("b", "10.0.3.0/24", "01"),
            ],
            None,
            now(),
        );
        let wanted = "IPPool b: its range 10.0.3.0/24 overlaps that of IPPool a (10.0.0.0/16), so \
                      no addresses are assigned from it; delete one of the two, or recreate this \
                      one with another range";
        assert_eq!(found.overlaps, [wanted]);
    }

    #[test]
    fn pools_whose_ranges_other_pools_serve_are_shadowed() {
        let disabled = |mut pool: PoolFacts| {
            pool.spec["disabled"] = json!(true);
            pool
        };
        let pools = [
            with(pool("a", "10.0.0.0/16", "00"), "True"),
            pool("b", "10.0.0.0/24", "01"),
            disabled(with(pool("c", "10.0.1.0/24", "02"), "False")),
            disabled(pool("d", "10.1.0.0/24", "03")),
            PoolFacts {
                terminating: true,
                ..pool("e", "10.0.2.0/24", "04")
            },
        ];
        assert_eq!(
            evaluate(&pools, None, now()).shadowed,
            ["b", "c"].map(str::to_owned).into()
        );
        let blocks = ["10.0.2.0/26", "10.0.3.0/26"]
            .map(|text| text.parse().unwrap())
            .into();
        let found = evaluate(&pools[4..], Some(&blocks), now());
        let message = found.statuses[0].body["status"]["conditions"][0]["message"]
            .as_str()
            .unwrap();
        assert!(
            message.contains("until its IPAMBlocks (1) are unused"),
            "{message}"
        );
    }

    #[test]
    fn a_status_is_written_when_it_differs_and_keeps_other_conditions() {
        let mut known = with(pool("a", "10.0.0.0/16", "00"), "True");
        known
            .conditions
            .insert(0, json!({"type": "Other", "status": "True"}));
        let first = evaluate(&[known.clone()], None, now());
        let conditions = first.statuses[0].body["status"]["conditions"].clone();
        assert_eq!(conditions[0]["type"], "Other");
        assert_eq!(
            conditions[1]["lastTransitionTime"], "2026-01-02T00:00:00Z",
            "the status is the same"
        );
        known.conditions = serde_json::from_value(conditions).unwrap();
        assert_eq!(evaluate(&[known], None, now()), Evaluation::default());
        let fresh = evaluate(&[pool("a", "10.0.0.0/16", "00")], None, now());
        assert_eq!(
            fresh.statuses[0].body["status"]["conditions"][0]["lastTransitionTime"],
            "2026-11-23T10:00:00Z"
        );
    }
}
