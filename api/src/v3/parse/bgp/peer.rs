//! Parses BGPPeer.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::{MAX_RESTART_TIME, address, duration, number, one_of, ranged, secret};
use crate::bgp::{BgpNextHopMode, BgpPeer, NodePeers, PeerTarget};
use crate::problem::{Problems, Refusal};
use crate::v3::bgp::{BGPPeer, BGPPeerSpec};

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
            0..=255,
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
        ttl_security: ranged(
            "spec.ttlSecurity",
            spec.ttl_security,
            1..=255,
            &mut problems,
        ),
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

fn target(spec: &BGPPeerSpec, problems: &mut Problems) -> Option<PeerTarget> {
    let is_set = |text: &&Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    let all = [
        &spec.peer_ip,
        &spec.peer_selector,
        &spec.local_workload_selector,
    ];
    if all.iter().filter(|text| is_set(text)).count() != 1 {
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
