//! Parses BGPFilter.

use super::{PRIORITIES, community, numbers, one_of, range, ranged};
use crate::bgp::{
    BgpFilter, FilterAction, FilterRule, Filters, InvalidFilterRule, MatchOperator, PeerType,
    PrefixMatch, RouteOperation,
};
use crate::problem::{Problems, Refusal};
use crate::v3::bgp::{BGPFilter, BgpFilterRule};

/// Parses a filter. A refused one keeps its former value; without one, no route passes it.
pub fn filter(filter: &BGPFilter) -> Result<BgpFilter, Refusal<BgpFilter>> {
    let spec = &filter.spec;
    let mut problems = Problems::default();
    let mut list = |name: &str, rules: &Option<Vec<BgpFilterRule>>, is_ipv4: bool| {
        let rules = rules.iter().flatten().enumerate();
        rules
            .filter_map(|(index, each)| {
                rule(
                    &format!("spec.{name}[{index}]"),
                    each,
                    is_ipv4,
                    &mut problems,
                )
            })
            .collect::<Vec<_>>()
    };
    let import = Filters {
        ipv4: list("importV4", &spec.import_v4, true),
        ipv6: list("importV6", &spec.import_v6, false),
    };
    let export = Filters {
        ipv4: list("exportV4", &spec.export_v4, true),
        ipv6: list("exportV6", &spec.export_v6, false),
    };
    problems
        .finish(BgpFilter { import, export }, |_| Some(BgpFilter::closed()))
        .map_err(|refusal| refusal.or_former(true))
}

fn rule(
    field: &str,
    rule: &BgpFilterRule,
    is_ipv4: bool,
    problems: &mut Problems,
) -> Option<FilterRule> {
    let before = problems.len();
    let at = |name: &str| format!("{field}.{name}");
    let prefix = prefix(field, rule, is_ipv4, problems);
    let source = one_of(&at("source"), &rule.source, &["RemotePeers"], problems);
    let peer_type = one_of(
        &at("peerType"),
        &rule.peer_type,
        &["eBGP", "iBGP"],
        problems,
    );
    let action = one_of(
        &at("action"),
        &Some(rule.action.clone()),
        &["Accept", "Reject"],
        problems,
    );
    let values = rule.communities.as_ref().map(|each| each.values.as_slice());
    if values.is_some_and(|values| values.len() != 1) {
        let found = values.unwrap_or_default().join(", ");
        problems.add(
            at("communities.values"),
            found,
            "not exactly one",
            "make a rule for each of them",
        );
    }
    let community = values
        .and_then(|values| community(&at("communities.values[0]"), values.first()?, problems));
    let path = rule.as_path_prefix.as_deref().unwrap_or_default();
    let changes = operations(field, rule, problems);
    if action == Some(1) && rule.operations.is_some() {
        problems.add(
            at("operations"),
            "Reject",
            "only with Accept",
            "leave them out",
        );
    }
    let parsed = FilterRule {
        prefix,
        from_peers: source.is_some(),
        interface: rule.interface.clone().filter(|name| !name.is_empty()),
        peer_type: peer_type.map(|index| [PeerType::External, PeerType::Internal][index]),
        community,
        as_path_prefix: numbers(&at("asPathPrefix"), path, problems),
        priority: ranged(&at("priority"), rule.priority, PRIORITIES, problems),
        action: if action == Some(0) {
            FilterAction::Accept(changes)
        } else {
            FilterAction::Reject
        },
    };
    if let Err(error) = parsed.validate() {
        add_invalid(field, error, problems);
    }
    (problems.len() == before).then_some(parsed)
}

fn operations(field: &str, rule: &BgpFilterRule, problems: &mut Problems) -> Vec<RouteOperation> {
    let list = rule
        .operations
        .as_deref()
        .unwrap_or_default()
        .iter()
        .enumerate();
    let mut changes = Vec::new();
    for (index, operation) in list {
        let field = format!("{field}.operations[{index}]");
        let add = operation.add_community.as_ref().map(|each| {
            let field = format!("{field}.addCommunity.value");
            community(&field, &each.value, problems).map(RouteOperation::AddCommunity)
        });
        let prepend = operation.prepend_as_path.as_ref().map(|each| {
            Some(RouteOperation::PrependAsPath(numbers(
                &format!("{field}.prependASPath"),
                &each.prefix,
                problems,
            )))
        });
        let set = operation.set_priority.as_ref().map(|each| {
            ranged(
                &format!("{field}.setPriority"),
                Some(each.value),
                PRIORITIES,
                problems,
            )
            .map(RouteOperation::SetPriority)
        });
        let all = [add, prepend, set];
        if all.iter().flatten().count() != 1 {
            problems.add(
                field,
                "",
                "not exactly one operation",
                "make an entry for each of them",
            );
        }
        changes.extend(all.into_iter().flatten().flatten());
    }
    changes
}

fn add_invalid(field: &str, error: InvalidFilterRule, problems: &mut Problems) {
    let InvalidFilterRule {
        field: name,
        value,
        rule,
        remedy,
    } = error;
    problems.add(format!("{field}.{name}"), value, rule, remedy);
}

fn prefix(
    field: &str,
    rule: &BgpFilterRule,
    is_ipv4: bool,
    problems: &mut Problems,
) -> Option<PrefixMatch> {
    let (cidr, operator) = match (rule.cidr.as_deref(), rule.match_operator.as_deref()) {
        (None, None) => {
            if rule.prefix_length.is_some() {
                problems.add(
                    format!("{field}.prefixLength"),
                    "",
                    "needs cidr",
                    "use 0.0.0.0/0 or ::/0 for any",
                );
            }
            return None;
        }
        (Some(cidr), Some(operator)) => (cidr, operator),
        (cidr, operator) => {
            let found = cidr.or(operator).unwrap_or_default();
            problems.add(
                format!("{field}.cidr"),
                found,
                "cidr and matchOperator go together",
                "set both or neither",
            );
            return None;
        }
    };
    let operator = match operator {
        "Equal" => MatchOperator::Equal,
        "NotEqual" => MatchOperator::NotEqual,
        "In" => MatchOperator::In,
        "NotIn" => MatchOperator::NotIn,
        other => {
            let remedy = "use Equal, NotEqual, In or NotIn";
            problems.add(
                format!("{field}.matchOperator"),
                other,
                "not an operator",
                remedy,
            );
            return None;
        }
    };
    let field_cidr = format!("{field}.cidr");
    let net = range(&field_cidr, cidr, problems)?;
    if net.addr().is_ipv4() != is_ipv4 {
        problems.add(
            field_cidr,
            cidr,
            "not of the family of its list",
            "move the rule to the other family's list",
        );
        return None;
    }
    let lengths = rule.prefix_length.clone().unwrap_or_default();
    let min = ranged(
        &format!("{field}.prefixLength.min"),
        lengths.min,
        0..=128,
        problems,
    );
    let max = ranged(
        &format!("{field}.prefixLength.max"),
        lengths.max,
        0..=128,
        problems,
    );
    PrefixMatch::new(net, operator, min, max)
        .map_err(|error| add_invalid(field, error, problems))
        .ok()
}
