//! Parses BGP's kinds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::SecretKeySelector;

use super::controllers;
use crate::bgp::{
    ASN_REMEDY, BgpFilter, BgpNextHopMode, BgpPeer, BgpSettings, CommunityValue, DEFAULT_NAME,
    FilterAction, FilterRule, Filters, InvalidFilterRule, MatchOperator, NodePeers, PeerTarget,
    PeerType, PrefixMatch, RouteOperation, SecretKey, is_asn, parse_asn, settings_node,
};
use crate::problem::{Problems, Refusal};
use crate::v3::bgp::{
    AsNumber, BGPConfiguration, BGPFilter, BGPPeer, BGPPeerSpec, BgpFilterRule, BgpPassword,
    CidrBlock,
};

/// Longest restart time (RFC 4724 section 3).
const MAX_RESTART_TIME: Duration = Duration::from_secs(4095);
/// Longest hold time (RFC 4271 section 4.2), which keepalives are a part of.
const MAX_KEEPALIVE: Duration = Duration::from_secs(65535);

/// Parses a peer. A refused one has no session; one that was valid before keeps its former value.
pub fn peer(peer: &BGPPeer) -> Result<BgpPeer, Refusal<BgpPeer>> {
    let spec = &peer.spec;
    let mut problems = Problems::default();
    let target = target(spec, &mut problems);
    let nodes = nodes(spec, &mut problems);
    let next_hop_mode = next_hop_mode(spec, &mut problems);
    let reachable_by = reachable_by(spec, target.as_ref(), &mut problems);
    let asn = number("spec.asNumber", spec.as_number.as_ref(), &mut problems);
    match (&target, asn) {
        (Some(PeerTarget::Nodes(_)), Some(asn)) => {
            problems.add(
                "spec.asNumber",
                asn,
                "not with peerSelector",
                "nodes have their own: leave it out",
            );
        }
        (Some(PeerTarget::LocalWorkloads(_)), None) => {
            problems.add(
                "spec.asNumber",
                "",
                "needed with localWorkloadSelector",
                "name the workloads' number",
            );
        }
        _ => {}
    }
    let is_first =
        |field: &str, value: &Option<String>, names: [&str; 2], problems: &mut Problems| {
            one_of(field, value, &names, problems).unwrap_or(0) == 0
        };
    let parsed = BgpPeer {
        nodes,
        asn,
        local_asn: number(
            "spec.localASNumber",
            spec.local_as_number.as_ref(),
            &mut problems,
        ),
        allowed_local_asn: ranged(
            "spec.numAllowedLocalASNumbers",
            spec.num_allowed_local_as_numbers,
            0,
            &mut problems,
        )
        .unwrap_or(0),
        filters: spec.filters.clone().unwrap_or_default(),
        next_hop_mode,
        password: secret("spec.password", spec.password.as_ref(), &mut problems),
        uses_node_address: is_first(
            "spec.sourceAddress",
            &spec.source_address,
            ["UseNodeIP", "None"],
            &mut problems,
        ),
        restart_time: duration(
            "spec.maxRestartTime",
            &spec.max_restart_time,
            MAX_RESTART_TIME,
            &mut problems,
        ),
        keepalive: duration(
            "spec.keepaliveTime",
            &spec.keepalive_time,
            MAX_KEEPALIVE,
            &mut problems,
        ),
        ttl_security: ranged("spec.ttlSecurity", spec.ttl_security, 1, &mut problems),
        reachable_by,
        is_reversed: is_first(
            "spec.reversePeering",
            &spec.reverse_peering,
            ["Auto", "Manual"],
            &mut problems,
        ),
        target: match target {
            Some(target) => target,
            None => return Err(Refusal::without_replacement(problems).or_former(true)),
        },
    };
    problems
        .finish(parsed, |_| None)
        .map_err(|refusal| refusal.or_former(true))
}

fn reachable_by(
    spec: &BGPPeerSpec,
    target: Option<&PeerTarget>,
    problems: &mut Problems,
) -> Option<IpAddr> {
    let text = spec.reachable_by.as_deref()?;
    let Some(PeerTarget::Address(peer)) = target else {
        problems.add("spec.reachableBy", text, "only with peerIP", "leave it out");
        return None;
    };
    let gateway = address("spec.reachableBy", text, problems)?;
    if gateway.is_ipv4() != peer.is_ipv4() {
        problems.add(
            "spec.reachableBy",
            text,
            "not of the family of peerIP",
            "name a gateway of its family",
        );
    }
    Some(gateway)
}

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

fn target(spec: &BGPPeerSpec, problems: &mut Problems) -> Option<PeerTarget> {
    let is_set = |text: &&Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    let all = [
        &spec.peer_ip,
        &spec.peer_selector,
        &spec.local_workload_selector,
    ];
    if all.iter().filter(|text| is_set(*text)).count() != 1 {
        let rule = "peerIP, peerSelector and localWorkloadSelector: exactly one is needed";
        let value = all
            .into_iter()
            .flatten()
            .cloned()
            .collect::<Vec<_>>()
            .join(", ");
        problems.add("spec.peerIP", value, rule, "say who the peer is in one way");
        return None;
    }
    if is_set(&&spec.peer_ip) {
        let text = spec.peer_ip.as_deref().unwrap_or_default();
        let bare = text
            .parse::<IpAddr>()
            .map(|address| SocketAddr::new(address, 0));
        let found = bare.ok().or_else(|| {
            text.parse::<SocketAddr>()
                .ok()
                .filter(|address| address.port() > 0)
        });
        if found.is_none() {
            let remedy = "write 192.0.2.1, 192.0.2.1:1179, fd00::1 or [fd00::1]:1179";
            problems.add(
                "spec.peerIP",
                text,
                "neither an address nor one with a port",
                remedy,
            );
        }
        return found.map(PeerTarget::Address);
    }
    if is_set(&&spec.peer_selector) {
        let text = spec.peer_selector.as_deref().unwrap_or_default();
        return problems
            .selector("spec.peerSelector", text)
            .map(PeerTarget::Nodes);
    }
    let text = spec.local_workload_selector.as_deref().unwrap_or_default();
    problems
        .selector("spec.localWorkloadSelector", text)
        .map(PeerTarget::LocalWorkloads)
}

fn nodes(spec: &BGPPeerSpec, problems: &mut Problems) -> NodePeers {
    let node = spec.node.as_deref().filter(|name| !name.is_empty());
    let selector = spec
        .node_selector
        .as_deref()
        .filter(|text| !text.is_empty());
    match (node, selector) {
        (Some(node), Some(_)) => {
            problems.add(
                "spec.nodeSelector",
                node,
                "not with node",
                "use one of them",
            );
            NodePeers::Node(node.to_owned())
        }
        (Some(node), None) => NodePeers::Node(node.to_owned()),
        (None, Some(text)) => problems
            .selector("spec.nodeSelector", text)
            .map_or(NodePeers::All, NodePeers::Selected),
        (None, None) => NodePeers::All,
    }
}

fn next_hop_mode(spec: &BGPPeerSpec, problems: &mut Problems) -> BgpNextHopMode {
    let keeps = spec.keep_original_next_hop.unwrap_or(false);
    match spec.next_hop_mode.as_deref() {
        None if keeps => BgpNextHopMode::Keep,
        None => BgpNextHopMode::Auto,
        Some(mode) => {
            if keeps {
                let rule = "not with keepOriginalNextHop";
                problems.add("spec.nextHopMode", mode, rule, "use nextHopMode alone");
            }
            match mode {
                "Auto" => BgpNextHopMode::Auto,
                "Self" => BgpNextHopMode::Own,
                "Keep" => BgpNextHopMode::Keep,
                other => {
                    problems.add(
                        "spec.nextHopMode",
                        other,
                        "not a mode",
                        "use Auto, Self or Keep",
                    );
                    BgpNextHopMode::Auto
                }
            }
        }
    }
}

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
        priority: ranged(&at("priority"), rule.priority, 1, problems),
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
                1u32,
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
        0,
        problems,
    );
    let max = ranged(
        &format!("{field}.prefixLength.max"),
        lengths.max,
        0,
        problems,
    );
    PrefixMatch::new(net, operator, min, max)
        .map_err(|error| add_invalid(field, error, problems))
        .ok()
}

/// Parses the settings of one object.
pub fn settings(configuration: &BGPConfiguration) -> Result<BgpSettings, Refusal<BgpSettings>> {
    let spec = &configuration.spec;
    let mut problems = Problems::default();
    let ranges = |field: &str, list: &Option<Vec<CidrBlock>>, problems: &mut Problems| {
        let list = list.iter().flatten().enumerate();
        list.filter_map(|(index, each)| {
            range(&format!("spec.{field}[{index}].cidr"), &each.cidr, problems)
        })
        .collect()
    };
    scope(configuration, &mut problems);
    let mesh = spec.node_to_node_mesh_enabled;
    if mesh == Some(false) {
        let set = [
            ("spec.nodeMeshPassword", spec.node_mesh_password.is_some()),
            (
                "spec.nodeMeshMaxRestartTime",
                spec.node_mesh_max_restart_time.is_some(),
            ),
        ];
        for (field, _) in set.iter().filter(|(_, is_set)| *is_set) {
            problems.add(
                *field,
                "",
                "only with the mesh on",
                "leave it out, or set nodeToNodeMeshEnabled",
            );
        }
    }
    let is_second =
        |field: &str, value: &Option<String>, names: [&str; 2], problems: &mut Problems| {
            one_of(field, value, &names, problems).map(|index| index == 1)
        };
    let bind_mode = ["None", "NodeIP"];
    let (aggregation, modes) = (
        &spec.service_load_balancer_aggregation,
        ["Disabled", "Enabled"],
    );
    let parsed = BgpSettings {
        mesh,
        asn: number("spec.asNumber", spec.as_number.as_ref(), &mut problems),
        listen_port: ranged("spec.listenPort", spec.listen_port, 1, &mut problems),
        binds_node_address: is_second("spec.bindMode", &spec.bind_mode, bind_mode, &mut problems),
        ignored_interfaces: spec.ignored_interfaces.iter().flatten().cloned().collect(),
        cluster_ips: ranges(
            "serviceClusterIPs",
            &spec.service_cluster_ips,
            &mut problems,
        ),
        external_ips: ranges(
            "serviceExternalIPs",
            &spec.service_external_ips,
            &mut problems,
        ),
        load_balancer_ips: ranges(
            "serviceLoadBalancerIPs",
            &spec.service_load_balancer_ips,
            &mut problems,
        ),
        aggregates_load_balancers: is_second(
            "spec.serviceLoadBalancerAggregation",
            aggregation,
            modes,
            &mut problems,
        ),
        communities: advertisements(configuration, &mut problems),
        mesh_password: secret(
            "spec.nodeMeshPassword",
            spec.node_mesh_password.as_ref(),
            &mut problems,
        ),
        mesh_restart_time: duration(
            "spec.nodeMeshMaxRestartTime",
            &spec.node_mesh_max_restart_time,
            MAX_RESTART_TIME,
            &mut problems,
        ),
        local_workload_addresses: [
            local_address(4, &spec.local_workload_peering_ipv4, &mut problems),
            local_address(6, &spec.local_workload_peering_ipv6, &mut problems),
        ],
        priorities: [
            ranged(
                "spec.ipv4NormalRoutePriority",
                spec.ipv4_normal_route_priority,
                1,
                &mut problems,
            ),
            ranged(
                "spec.ipv6NormalRoutePriority",
                spec.ipv6_normal_route_priority,
                1,
                &mut problems,
            ),
        ],
    };
    // Without its password the mesh has no sessions, rather than sessions without one.
    let lacks_password = spec.node_mesh_password.is_some() && parsed.mesh_password.is_none();
    let closed = |parsed: BgpSettings| BgpSettings {
        mesh: if lacks_password {
            Some(false)
        } else {
            parsed.mesh
        },
        ..parsed
    };
    problems
        .finish(parsed, |parsed| Some(closed(parsed)))
        .map_err(|refusal| refusal.or_former(true))
}

/// Checks the name of the settings, and that those of one node have none of the mesh's, which all
/// nodes have in common.
fn scope(configuration: &BGPConfiguration, problems: &mut Problems) {
    let spec = &configuration.spec;
    let name = configuration.metadata.name.as_deref().unwrap_or_default();
    if name == DEFAULT_NAME {
        return;
    }
    if settings_node(name).is_none() {
        let remedy = "name it default, or node.NAME for the settings of a node";
        problems.add("metadata.name", name, "not the name of settings", remedy);
    }
    let mesh = [
        (
            "spec.nodeToNodeMeshEnabled",
            spec.node_to_node_mesh_enabled.is_some(),
        ),
        ("spec.nodeMeshPassword", spec.node_mesh_password.is_some()),
        (
            "spec.nodeMeshMaxRestartTime",
            spec.node_mesh_max_restart_time.is_some(),
        ),
    ];
    for (field, _) in mesh.iter().filter(|(_, is_set)| *is_set) {
        problems.add(*field, name, "only in default", "set it there");
    }
}

fn local_address(version: u8, text: &Option<String>, problems: &mut Problems) -> Option<IpAddr> {
    let text = text.as_deref()?;
    let field = format!("spec.localWorkloadPeeringIPV{version}");
    let found = address(&field, text, problems)?;
    if found.is_ipv4() != (version == 4) {
        problems.add(field, text, "not of this family", "use the other field");
    }
    Some(found)
}

fn advertisements(
    configuration: &BGPConfiguration,
    problems: &mut Problems,
) -> BTreeMap<IpNet, BTreeSet<CommunityValue>> {
    let spec = &configuration.spec;
    if spec.communities.is_some() && spec.prefix_advertisements.is_none() {
        let rule = "names of communities without prefixAdvertisements";
        problems.add("spec.communities", "", rule, "say which prefixes have them");
    }
    let mut named = BTreeMap::new();
    for (index, each) in spec.communities.iter().flatten().enumerate() {
        let value = community(
            &format!("spec.communities[{index}].value"),
            &each.value,
            problems,
        );
        named.extend(value.map(|value| (each.name.as_str(), value)));
    }
    let mut found: BTreeMap<IpNet, BTreeSet<CommunityValue>> = BTreeMap::new();
    for (index, each) in spec.prefix_advertisements.iter().flatten().enumerate() {
        let field = format!("spec.prefixAdvertisements[{index}]");
        let net = range(&format!("{field}.cidr"), &each.cidr, problems);
        for (at, text) in each.communities.iter().enumerate() {
            let value = named
                .get(text.as_str())
                .copied()
                .or_else(|| community(&format!("{field}.communities[{at}]"), text, problems));
            if let (Some(net), Some(value)) = (net, value) {
                found.entry(net).or_default().insert(value);
            }
        }
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

/// A number of the type's range, from the least on.
fn ranged<T: TryFrom<i32> + PartialOrd>(
    field: &str,
    value: Option<i32>,
    least: T,
    problems: &mut Problems,
) -> Option<T> {
    let value = value?;
    let parsed = T::try_from(value).ok().filter(|number| *number >= least);
    if parsed.is_none() {
        problems.add(
            field,
            value,
            "out of its range",
            "see the field's description",
        );
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
