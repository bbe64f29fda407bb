//! Which pools addresses may be taken from: of those that overlap one only, or an address could be given twice. Pure. What is found out is written into the
//! pools' status as Calico's controller writes it, condition `Allocatable`, which agents obey; and overlaps are told in TigeraStatus.
//!
//! Which of two that overlap comes first: the one that is allocatable already, then one that is being deleted (its blocks are in use until they are
//! given back), then one that was kept out, then a new one; of these the older one, then by name. A disabled pool is in nobody's way.

use std::collections::BTreeSet;

use ipnet::IpNet;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::drain::left;
use crate::inputs::PoolFacts;
use crate::manifest::Object;

/// Type of the condition.
const ALLOCATABLE: &str = "Allocatable";

/// What is to be written and told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdicts {
    /// Pools with the status that they should have, where it differs.
    pub statuses: Vec<Object>,
    /// Pools that are kept out because of another one.
    pub overlaps: Vec<String>,
    /// Pools that are kept out, or would be if they were not disabled.
    pub shadowed: BTreeSet<String>,
}

/// One pool's verdict: whether it is allocatable, Calico's reason, and the message.
struct Verdict {
    status: &'static str,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn not(reason: &'static str, message: impl Into<String>) -> Self {
        Self { status: "False", reason, message: message.into() }
    }
}

/// Judges all pools. One whose range cannot be read has no say and gets no status: it serves nobody. `blocks` are all blocks, where a pool that is being
/// deleted has them followed.
pub fn judge(pools: &[PoolFacts], blocks: Option<&BTreeSet<IpNet>>, now: Timestamp) -> Verdicts {
    let mut ordered: Vec<(&PoolFacts, IpNet)> =
        pools.iter().filter_map(|pool| Some((pool, pool.cidr().parse::<IpNet>().ok()?.trunc()))).collect();
    ordered.sort_by_key(|(pool, _)| (rank(pool), &pool.created, &pool.name));
    let mut verdicts = Verdicts::default();
    let mut holders: Vec<(&PoolFacts, IpNet)> = Vec::new();
    for (pool, range) in &ordered {
        let holder = holders.iter().find(|(_, other)| other.contains(range) || range.contains(other));
        let verdict = verdict(pool, holder.map(|(other, _)| *other), blocks);
        if verdict.reason == "CIDROverlap" {
            verdicts.overlaps.push(format!("IPPool {}: {}", pool.name, verdict.message));
        } else if verdict.reason != "Disabled" {
            holders.push((pool, *range));
        }
        verdicts.statuses.extend(status(pool, &verdict, now));
    }
    let holds = |pool: &PoolFacts| holders.iter().any(|(holder, _)| holder.name == pool.name);
    let meets = |range: &IpNet| holders.iter().any(|(_, other)| other.contains(range) || range.contains(other));
    let shadowed = ordered.iter().filter(|(pool, range)| !holds(pool) && meets(range));
    verdicts.shadowed = shadowed.map(|(pool, _)| pool.name.clone()).collect();
    verdicts
}

/// Place in the order in which ranges are given to pools.
fn rank(pool: &PoolFacts) -> u8 {
    match (condition(pool).and_then(|found| found["status"].as_str()), pool.terminating) {
        (_, true) => 1,
        (Some("True"), false) => 0,
        (Some("False"), false) => 2,
        _ => 3,
    }
}

fn condition(pool: &PoolFacts) -> Option<&Value> {
    pool.conditions.iter().find(|condition| condition["type"] == ALLOCATABLE)
}

fn verdict(pool: &PoolFacts, holder: Option<&PoolFacts>, blocks: Option<&BTreeSet<IpNet>>) -> Verdict {
    if pool.spec["disabled"] == true {
        return Verdict::not("Disabled", "spec.disabled is true");
    }
    if pool.terminating {
        let left =
            blocks.map_or_else(|| "its blocks".to_owned(), |blocks| format!("its {} IPAMBlocks", left(pool, blocks)));
        let message = format!(
            "the pool is being deleted, and stays until nobody uses {left}; start the pods that do anew to end it"
        );
        return Verdict::not("Terminating", message);
    }
    match holder {
        Some(other) => Verdict::not(
            "CIDROverlap",
            format!(
                "its range {} overlaps that of IPPool {} ({}), so no address is taken from it; delete one of the two, or make this one with another range",
                pool.cidr(),
                other.name,
                other.cidr()
            ),
        ),
        None => Verdict { status: "True", reason: "OK", message: "addresses may be taken from it".to_owned() },
    }
}

/// The status that the pool should have, unless it has it. Conditions of others stay; the time moves with the status only.
fn status(pool: &PoolFacts, verdict: &Verdict, now: Timestamp) -> Option<Object> {
    let before = condition(pool);
    let said = |field: &str| before.and_then(|found| found[field].as_str()).unwrap_or_default();
    if (said("status"), said("reason"), said("message")) == (verdict.status, verdict.reason, verdict.message.as_str()) {
        return None;
    }
    let since = Some(said("lastTransitionTime")).filter(|time| said("status") == verdict.status && !time.is_empty());
    let since = since.map_or_else(|| crate::status::rfc3339(now), str::to_owned);
    let own = json!({
        "type": ALLOCATABLE,
        "status": verdict.status,
        "reason": verdict.reason,
        "message": verdict.message,
        "lastTransitionTime": since,
    });
    let others = pool.conditions.iter().filter(|condition| condition["type"] != ALLOCATABLE).cloned();
    let conditions: Vec<Value> = others.chain([own]).collect();
    Some(Object::new("IPPool", json!({ "metadata": { "name": pool.name }, "status": { "conditions": conditions } })))
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
        let reason = if status == "True" { "OK" } else { "CIDROverlap" };
        let condition = json!({"type": ALLOCATABLE, "status": status, "reason": reason, "message": "", "lastTransitionTime": "2026-01-02T00:00:00Z"});
        PoolFacts { conditions: vec![condition], ..pool }
    }

    fn now() -> Timestamp {
        "2026-11-23T10:00:00.75Z".parse().unwrap()
    }

    /// What each pool is, in the order of names.
    fn shown(pools: &[PoolFacts]) -> String {
        let mut reasons: Vec<String> = judge(pools, None, now())
            .statuses
            .iter()
            .map(|object| {
                let condition = object.body["status"]["conditions"].as_array().unwrap().last().unwrap().clone();
                format!("{} {}", object.key.name, condition["reason"].as_str().unwrap())
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
        let leaving = |pool: PoolFacts| PoolFacts { terminating: true, ..pool };
        let table = [
            ("alone", vec![pool("a", "10.0.0.0/16", "00"), pool("b", "10.1.0.0/16", "00")], "a OK, b OK"),
            (
                "the older one",
                vec![pool("a", "10.0.0.0/24", "02"), pool("b", "10.0.0.0/16", "01")],
                "a CIDROverlap, b OK",
            ),
            ("by name", vec![pool("b", "10.0.0.0/24", "00"), pool("a", "10.0.0.0/16", "00")], "a OK, b CIDROverlap"),
            (
                "the one that is in use",
                vec![with(pool("a", "10.0.0.0/16", "09"), "True"), pool("b", "10.0.0.0/24", "01")],
                "a OK, b CIDROverlap",
            ),
            (
                "a disabled one is in nobody's way",
                vec![disabled(pool("a", "10.0.0.0/16", "00")), pool("b", "10.0.0.0/24", "01")],
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
            ("then it is free", vec![with(pool("b", "10.0.0.0/24", "01"), "False")], "b OK"),
            (
                "kept out before new",
                vec![pool("a", "10.0.0.0/16", "00"), with(pool("b", "10.0.0.0/24", "01"), "False")],
                "a CIDROverlap, b OK",
            ),
            ("versions do not meet", vec![pool("a", "10.0.0.0/8", "00"), pool("b", "::/0", "00")], "a OK, b OK"),
            ("what cannot be read", vec![pool("a", "10.0.0.0/8", "00"), pool("b", "10", "00")], "a OK"),
        ];
        for (what, pools, wanted) in table {
            assert_eq!(shown(&pools), wanted, "{what}");
        }
    }

    #[test]
    fn an_overlap_is_told_with_both_pools_and_what_to_do() {
        let found = judge(&[pool("a", "10.0.0.0/16", "00"), pool("b", "10.0.3.0/24", "01")], None, now());
        let wanted = "IPPool b: its range 10.0.3.0/24 overlaps that of IPPool a (10.0.0.0/16), so no address is taken from it; delete one of the two, or \
                      make this one with another range";
        assert_eq!(found.overlaps, [wanted]);
    }

    #[test]
    fn pools_whose_ranges_others_have_are_shadowed() {
        let disabled = |mut pool: PoolFacts| {
            pool.spec["disabled"] = json!(true);
            pool
        };
        let pools = [
            with(pool("a", "10.0.0.0/16", "00"), "True"),
            pool("b", "10.0.0.0/24", "01"),
            disabled(with(pool("c", "10.0.1.0/24", "02"), "False")),
            disabled(pool("d", "10.1.0.0/24", "03")),
            PoolFacts { terminating: true, ..pool("e", "10.0.2.0/24", "04") },
        ];
        assert_eq!(judge(&pools, None, now()).shadowed, ["b", "c"].map(str::to_owned).into());
        let blocks = ["10.0.2.0/26", "10.0.3.0/26"].map(|text| text.parse().unwrap()).into();
        let found = judge(&pools[4..], Some(&blocks), now());
        let message = found.statuses[0].body["status"]["conditions"][0]["message"].as_str().unwrap();
        assert!(message.contains("until nobody uses its 1 IPAMBlocks"), "{message}");
    }

    #[test]
    fn a_status_is_written_when_it_differs_and_keeps_what_others_say() {
        let mut known = with(pool("a", "10.0.0.0/16", "00"), "True");
        known.conditions.insert(0, json!({"type": "Other", "status": "True"}));
        let first = judge(&[known.clone()], None, now());
        let conditions = first.statuses[0].body["status"]["conditions"].clone();
        assert_eq!(conditions[0]["type"], "Other");
        assert_eq!(conditions[1]["lastTransitionTime"], "2026-01-02T00:00:00Z", "the status is the same");
        known.conditions = serde_json::from_value(conditions).unwrap();
        assert_eq!(judge(&[known], None, now()), Verdicts::default());
        let fresh = judge(&[pool("a", "10.0.0.0/16", "00")], None, now());
        assert_eq!(fresh.statuses[0].body["status"]["conditions"][0]["lastTransitionTime"], "2026-11-23T10:00:00Z");
    }
}
