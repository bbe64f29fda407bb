//! Parses BGPConfiguration.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    MAX_RESTART_TIME, PRIORITIES, address, community, duration, number, one_of, range, ranged,
    secret,
};
use crate::bgp::{BgpSettings, CommunityValue, DEFAULT_NAME, settings_node};
use crate::problem::{Problems, Refusal};
use crate::v3::bgp::{BGPConfiguration, CidrBlock};

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
        listen_port: ranged(
            "spec.listenPort",
            spec.listen_port,
            1..=65535,
            &mut problems,
        ),
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
                PRIORITIES,
                &mut problems,
            ),
            ranged(
                "spec.ipv6NormalRoutePriority",
                spec.ipv6_normal_route_priority,
                PRIORITIES,
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
