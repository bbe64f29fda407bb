//! Bytes to messages.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustbgpd_wire as wire;
use rustbgpd_wire::attribute::MpReachNlri;
use rustbgpd_wire::validate::{ErrorDisposition, validate_update_attributes};
use wire::{Afi, Capability, PathAttribute, Prefix, Safi};

use super::{HEADER, MAX_MESSAGE};
use crate::attributes::{
    Aggregator, AsPath, Attributes, Community, Family, LargeCommunity, NextHop, Origin, Segment,
    UnknownAttribute,
};
use crate::message::{
    Capabilities, GracefulRestart, Message, Open, RefreshKind, Role, RouteRefresh, Update,
};
use crate::notification::{self, Notification};

/// What of a session decides how its messages are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodecContext {
    /// AS numbers in AS_PATH have four octets: both sides sent capability 65.
    pub four_octet_as: bool,
    /// The peer is of our own autonomous system.
    pub is_internal: bool,
    /// Families of which routes are taken; those of others are ignored.
    pub ipv4: bool,
    /// As `ipv4`.
    pub ipv6: bool,
    /// IPv4 routes may have IPv6 next hops (RFC 8950).
    pub extended_next_hop: bool,
}

/// A message that ends the session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct DecodeError {
    /// What the peer is told.
    pub notification: Notification,
    /// What is wrong, for a log.
    pub detail: String,
}

impl From<wire::DecodeError> for DecodeError {
    fn from(error: wire::DecodeError) -> Self {
        let (code, subcode, data) = error.to_notification();
        let detail = error.to_string();
        Self {
            notification: Notification { code: code.as_u8(), subcode, data: data.to_vec() },
            detail,
        }
    }
}

/// Length of the message that begins these bytes; none while its header is not complete.
pub(super) fn message_length(bytes: &[u8]) -> Result<Option<usize>, DecodeError> {
    let length = wire::peek_message_length(bytes, MAX_MESSAGE as u16)?;
    Ok(length.map(usize::from))
}

/// Reads one whole message.
///
/// # Errors
///
/// What RFC 4271 section 6 ends the session for, as far as RFC 7606 leaves that.
pub fn decode(message: &[u8], context: &CodecContext) -> Result<Message, DecodeError> {
    const TYPE: usize = 18;
    const ROUTE_REFRESH: u8 = 5;
    if message.get(TYPE) == Some(&ROUTE_REFRESH) && message.len() != HEADER + 4 {
        let notification = Notification::with_data(notification::INVALID_REFRESH_LENGTH, message);
        let detail = format!("ROUTE-REFRESH of {} bytes, not {}", message.len(), HEADER + 4);
        return Err(DecodeError { notification, detail });
    }
    let mut bytes = Bytes::copy_from_slice(message);
    Ok(match wire::decode_message(&mut bytes, MAX_MESSAGE as u16)? {
        wire::Message::Open(open) => Message::Open(open_of(&open)),
        wire::Message::Update(update) => Message::Update(update_of(&update, context)?),
        wire::Message::Notification(each) => Message::Notification(Notification {
            code: each.code.as_u8(),
            subcode: each.subcode,
            data: each.data.to_vec(),
        }),
        wire::Message::Keepalive => Message::Keepalive,
        wire::Message::RouteRefresh(refresh) => Message::RouteRefresh(refresh_of(&refresh)),
        _ => return Err(wire::DecodeError::UnknownMessageType(message[TYPE]).into()),
    })
}

fn family_of(afi: Afi, safi: Safi) -> Option<Family> {
    match (afi, safi) {
        (Afi::Ipv4, Safi::Unicast) => Some(Family::Ipv4),
        (Afi::Ipv6, Safi::Unicast) => Some(Family::Ipv6),
        _ => None,
    }
}

fn refresh_of(refresh: &wire::RouteRefreshMessage) -> RouteRefresh {
    let family = refresh.afi().zip(refresh.safi()).and_then(|(afi, safi)| family_of(afi, safi));
    let kind = match refresh.subtype() {
        wire::RouteRefreshSubtype::Normal => RefreshKind::Request,
        wire::RouteRefreshSubtype::BoRR => RefreshKind::Begin,
        wire::RouteRefreshSubtype::EoRR => RefreshKind::End,
        _ => RefreshKind::Unknown,
    };
    RouteRefresh { family, kind }
}

fn open_of(open: &wire::OpenMessage) -> Open {
    let mut found = Capabilities::default();
    let mut has_families = false;
    for capability in &open.capabilities {
        has_families |= is_multiprotocol(capability);
        take_capability(&mut found, capability);
    }
    if !has_families {
        found.families.insert(Family::Ipv4);
    }
    Open {
        asn: open.four_byte_as(),
        hold_time: Duration::from_secs(open.hold_time.into()),
        router_id: open.bgp_identifier,
        capabilities: found,
    }
}

/// Also of a family that nobody here knows: a peer that names that alone wants no IPv4.
fn is_multiprotocol(capability: &Capability) -> bool {
    matches!(capability, Capability::MultiProtocol { .. } | Capability::Unknown { code: 1, .. })
}

fn take_capability(found: &mut Capabilities, capability: &Capability) {
    match capability {
        Capability::MultiProtocol { afi, safi } => found.families.extend(family_of(*afi, *safi)),
        Capability::FourOctetAs { .. } => found.four_octet_as = true,
        Capability::RouteRefresh => found.route_refresh = true,
        Capability::EnhancedRouteRefresh => found.enhanced_route_refresh = true,
        Capability::ExtendedNextHop(entries) => {
            found.extended_next_hop |= entries.iter().any(|each| {
                (each.nlri_afi, each.nlri_safi, each.next_hop_afi)
                    == (Afi::Ipv4, Safi::Unicast, Afi::Ipv6)
            });
        }
        Capability::GracefulRestart { restart_state, notification, restart_time, families } => {
            let families = families.iter().filter_map(|each| {
                Some((family_of(each.afi, each.safi)?, each.forwarding_preserved))
            });
            // Of several the last one counts (RFC 4724 section 3).
            found.graceful_restart = Some(GracefulRestart {
                is_restarting: *restart_state,
                notification: *notification,
                time: Duration::from_secs((*restart_time).into()),
                families: families.collect(),
            });
        }
        Capability::Role { role } => {
            let role = role_of(*role);
            found.has_conflicting_roles |= found.role.is_some() && found.role != role;
            found.role = role;
        }
        _ => {}
    }
}

fn role_of(role: wire::BgpRole) -> Option<Role> {
    Some(match role {
        wire::BgpRole::Provider => Role::Provider,
        wire::BgpRole::RouteServer => Role::RouteServer,
        wire::BgpRole::RouteServerClient => Role::RouteServerClient,
        wire::BgpRole::Customer => Role::Customer,
        wire::BgpRole::Peer => Role::Peer,
        _ => return None,
    })
}

fn update_of(update: &wire::UpdateMessage, context: &CodecContext) -> Result<Update, DecodeError> {
    let four = context.four_octet_as;
    let parsed = update.parse_revised(four, context.is_internal, false, &[])?;
    let body = &parsed.update;
    let mut found = Update::default();
    let mut is_withdrawn = false;
    for malformed in &parsed.malformed {
        if malformed.disposition == ErrorDisposition::SessionReset {
            return Err(malformed.error.clone().into());
        }
        is_withdrawn |= malformed.disposition == ErrorDisposition::TreatAsWithdraw;
        let consequence = malformed.disposition.as_str();
        found.errors.push(format!(
            "attribute {}: {} ({consequence})",
            malformed.type_code, malformed.error
        ));
    }
    let mut reach = None;
    for attribute in &body.attributes {
        match attribute {
            PathAttribute::MpReachNlri(each) => reach = Some(each),
            PathAttribute::MpUnreachNlri(each) => {
                if family_of(each.afi, each.safi).is_some() {
                    found.withdrawn.extend(each.withdrawn.iter().map(|each| net_of(&each.prefix)));
                }
            }
            _ => {}
        }
    }
    let ipv4 = |prefix: &wire::Ipv4Prefix| net_of(&Prefix::V4(*prefix));
    found.withdrawn.extend(body.withdrawn.iter().map(|each| ipv4(&each.prefix)));
    let nets: Vec<IpNet> = body.announced.iter().map(|each| ipv4(&each.prefix)).collect();
    let reach = reach.filter(|reach| family_of(reach.afi, reach.safi).is_some());
    let of_reach: Vec<IpNet> = reach
        .iter()
        .flat_map(|reach| reach.announced.iter().map(|each| net_of(&each.prefix)))
        .collect();
    let is_announcement = !nets.is_empty() || !of_reach.is_empty();
    if is_announcement && !is_withdrawn {
        let valid = validate_update_attributes(
            &body.attributes,
            true,
            !nets.is_empty(),
            !context.is_internal,
        );
        if let Err(error) = valid {
            if error.disposition == ErrorDisposition::SessionReset {
                let codes = (3, error.subcode);
                let notification = Notification::with_data(codes, &error.data);
                return Err(DecodeError { detail: notification.to_string(), notification });
            }
            is_withdrawn |= error.disposition == ErrorDisposition::TreatAsWithdraw;
            found.errors.push(Notification::new((3, error.subcode)).to_string());
        }
    }
    found.end_of_rib = end_of_rib_of(update, &body.attributes);
    if is_withdrawn {
        found.withdrawn.extend(nets.into_iter().chain(of_reach));
    } else if is_announcement {
        announce(&mut found, &body.attributes, nets, reach.map(|reach| (&**reach, of_reach)));
    }
    if !context.is_internal {
        for (attributes, _) in &mut found.announced {
            // They mean nothing from outside (RFC 4271 section 5.1.5, RFC 4456 section 8).
            attributes.local_pref = None;
            attributes.originator_id = None;
            attributes.cluster_list.clear();
        }
    }
    retain_families(&mut found, context);
    Ok(found)
}

/// Which family's End-of-RIB marker this is: an empty UPDATE, or one with an empty MP_UNREACH_NLRI
/// and nothing else (RFC 4724 section 2).
fn end_of_rib_of(update: &wire::UpdateMessage, attributes: &[PathAttribute]) -> Option<Family> {
    if !update.withdrawn_routes.is_empty() || !update.nlri.is_empty() {
        return None;
    }
    match attributes {
        [] if update.path_attributes.is_empty() => Some(Family::Ipv4),
        [PathAttribute::MpUnreachNlri(each)] if each.withdrawn.is_empty() => {
            family_of(each.afi, each.safi)
        }
        _ => None,
    }
}

fn announce(
    found: &mut Update,
    attributes: &[PathAttribute],
    nets: Vec<IpNet>,
    reach: Option<(&MpReachNlri, Vec<IpNet>)>,
) {
    let next_hop = attributes.iter().find_map(|attribute| match attribute {
        PathAttribute::NextHop(address) => Some(NextHop::from(IpAddr::V4(*address))),
        _ => None,
    });
    // The codec has made sure of NEXT_HOP where there is NLRI in the body.
    if let Some(next_hop) = next_hop.filter(|_| !nets.is_empty()) {
        found.announced.push((attributes_of(attributes, next_hop), nets));
    }
    if let Some((reach, nets)) = reach.filter(|(_, nets)| !nets.is_empty()) {
        let next_hop = NextHop { address: reach.next_hop, link_local: reach.link_local_next_hop };
        found.announced.push((attributes_of(attributes, next_hop), nets));
    }
}

fn retain_families(found: &mut Update, context: &CodecContext) {
    let is_wanted = |net: &IpNet| match net {
        IpNet::V4(_) => context.ipv4,
        IpNet::V6(_) => context.ipv6,
    };
    found.withdrawn.retain(is_wanted);
    for (attributes, nets) in &mut found.announced {
        let is_possible = |net: &IpNet| match (net, attributes.next_hop.address) {
            (IpNet::V4(_), IpAddr::V6(_)) => context.extended_next_hop,
            (IpNet::V6(_), IpAddr::V4(_)) => false,
            _ => true,
        };
        let refused: Vec<IpNet> = nets.iter().filter(|net| !is_possible(net)).copied().collect();
        if let Some(net) = refused.first() {
            let address = attributes.next_hop.address;
            found.errors.push(format!("{net} has next hop {address}, which was not agreed on"));
            found.withdrawn.extend(refused.iter().copied().filter(&is_wanted));
        }
        nets.retain(|net| is_wanted(net) && is_possible(net));
    }
    found.announced.retain(|(_, nets)| !nets.is_empty());
}

/// The prefix without its host bits, which senders may leave in (RFC 4271 section 4.3).
fn net_of(prefix: &Prefix) -> IpNet {
    match prefix {
        Prefix::V4(each) => Ipv4Net::new(each.addr, each.len).unwrap_or_default().trunc().into(),
        Prefix::V6(each) => Ipv6Net::new(each.addr, each.len).unwrap_or_default().trunc().into(),
    }
}

fn attributes_of(list: &[PathAttribute], next_hop: NextHop) -> Attributes {
    let mut found = Attributes::local(next_hop.address);
    found.next_hop = next_hop;
    for attribute in list {
        if let Some(values) = attribute.communities() {
            found.communities = values.iter().copied().map(Community).collect();
        } else if let Some(values) = attribute.large_communities() {
            let large = |each: &wire::attribute::LargeCommunity| {
                LargeCommunity([each.global_admin, each.local_data1, each.local_data2])
            };
            found.large_communities = values.iter().map(large).collect();
        } else if let Some(values) = attribute.extended_communities() {
            found.extended_communities = values.iter().map(|each| each.as_u64()).collect();
        } else if let Some(asn) = attribute.only_to_customer() {
            found.only_to_customer = Some(asn);
        } else {
            take_attribute(&mut found, attribute);
        }
    }
    found
}

fn take_attribute(found: &mut Attributes, attribute: &PathAttribute) {
    match attribute {
        PathAttribute::Origin(origin) => {
            found.origin = match origin {
                wire::attribute::Origin::Igp => Origin::Igp,
                wire::attribute::Origin::Egp => Origin::Egp,
                wire::attribute::Origin::Incomplete => Origin::Incomplete,
            }
        }
        PathAttribute::AsPath(path) => found.as_path = path_of(path),
        PathAttribute::Med(value) => found.med = Some(*value),
        PathAttribute::LocalPref(value) => found.local_pref = Some(*value),
        PathAttribute::AtomicAggregate => found.atomic_aggregate = true,
        PathAttribute::Aggregator(each) => {
            found.aggregator = Some(Aggregator { asn: each.asn, router_id: each.router_id });
        }
        PathAttribute::OriginatorId(id) => found.originator_id = Some(*id),
        PathAttribute::ClusterList(list) => found.cluster_list.clone_from(list),
        PathAttribute::Unknown(raw) => found.unknown.push(UnknownAttribute {
            flags: raw.flags,
            code: raw.type_code,
            value: raw.data.to_vec(),
        }),
        _ => {}
    }
}

fn path_of(path: &wire::attribute::AsPath) -> AsPath {
    let segment = |segment: &wire::attribute::AsPathSegment| match segment {
        wire::attribute::AsPathSegment::AsSequence(asns) => Segment::Sequence(asns.clone()),
        wire::attribute::AsPathSegment::AsSet(asns) => Segment::Set(asns.clone()),
    };
    AsPath(path.segments.iter().map(segment).collect())
}

/// Families that a context takes.
impl CodecContext {
    /// A context for these families.
    pub fn with_families(mut self, families: &BTreeSet<Family>) -> Self {
        self.ipv4 = families.contains(&Family::Ipv4);
        self.ipv6 = families.contains(&Family::Ipv6);
        self
    }
}
