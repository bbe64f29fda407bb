//! Messages to bytes.

use std::net::IpAddr;

use bytes::Bytes;
use ipnet::IpNet;
use rustbgpd_wire as wire;
use wire::constants::AS_TRANS;
use wire::update::Ipv4UnicastMode;
use wire::{
    Afi, Capability, ExtendedNextHopFamily, GracefulRestartFamily, Ipv4Prefix, MpReachNlri,
    MpUnreachNlri, NlriEntry, PathAttribute, Prefix, RawAttribute, RouteRefreshSubtype, Safi,
    UpdateMessage,
};

use super::{CodecContext, HEADER, MAX_MESSAGE};
use crate::attributes::{AsPath, Attributes, Family, Origin, Segment};
use crate::message::{Capabilities, Open, RefreshKind, Role};
use crate::notification::Notification;

/// Message without content.
const KEEPALIVE: [u8; HEADER] =
    [255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 19, 4];

/// Flag of an unknown attribute that passed a speaker who does not know it.
const PARTIAL: u8 = 0x20;

/// A message that fits any session whatever it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plain<'a> {
    /// OPEN.
    Open(&'a Open),
    /// KEEPALIVE.
    Keepalive,
    /// NOTIFICATION.
    Notification(&'a Notification),
}

impl<'a> From<&'a Open> for Plain<'a> {
    fn from(open: &'a Open) -> Self {
        Self::Open(open)
    }
}

impl<'a> From<&'a Notification> for Plain<'a> {
    fn from(notification: &'a Notification) -> Self {
        Self::Notification(notification)
    }
}

/// Bytes of an OPEN, KEEPALIVE or NOTIFICATION.
pub fn encode<'a>(message: impl Into<Plain<'a>>) -> Vec<u8> {
    match message.into() {
        Plain::Keepalive => KEEPALIVE.to_vec(),
        Plain::Open(open) => bytes_of(&wire::Message::Open(open_of(open))),
        Plain::Notification(each) => {
            // Data is the peer's message at most, and a part of it does as well.
            let room = MAX_MESSAGE - HEADER - 2;
            let data = Bytes::copy_from_slice(&each.data[..each.data.len().min(room)]);
            let code = wire::NotificationCode::from_u8(each.code);
            let message = wire::NotificationMessage::new(code, each.subcode, data);
            bytes_of(&wire::Message::Notification(message))
        }
    }
}

/// Bytes of a ROUTE-REFRESH.
pub fn refresh(family: Family, kind: RefreshKind) -> Vec<u8> {
    let subtype = match kind {
        RefreshKind::Request | RefreshKind::Unknown => RouteRefreshSubtype::Normal,
        RefreshKind::Begin => RouteRefreshSubtype::BoRR,
        RefreshKind::End => RouteRefreshSubtype::EoRR,
    };
    let message = wire::RouteRefreshMessage::new_with_subtype(afi(family), Safi::Unicast, subtype);
    bytes_of(&wire::Message::RouteRefresh(message))
}

/// Bytes of the End-of-RIB marker of a family (RFC 4724 section 2).
pub fn end_of_rib(family: Family) -> Vec<u8> {
    let attributes = match family {
        Family::Ipv4 => Vec::new(),
        Family::Ipv6 => vec![unreach(family, Vec::new())],
    };
    update_bytes(&[], &[], &attributes, true).unwrap_or_default()
}

/// Every message here is far below 4096 bytes.
fn bytes_of(message: &wire::Message) -> Vec<u8> {
    wire::encode_message(message).map(|bytes| bytes.to_vec()).unwrap_or_default()
}

fn afi(family: Family) -> Afi {
    match family {
        Family::Ipv4 => Afi::Ipv4,
        Family::Ipv6 => Afi::Ipv6,
    }
}

fn open_of(open: &Open) -> wire::OpenMessage {
    wire::OpenMessage {
        version: wire::constants::BGP_VERSION,
        my_as: u16::try_from(open.asn).unwrap_or(AS_TRANS),
        hold_time: u16::try_from(open.hold_time.as_secs()).unwrap_or(u16::MAX),
        bgp_identifier: open.router_id,
        capabilities: capabilities_of(&open.capabilities, open.asn),
    }
}

fn capabilities_of(capabilities: &Capabilities, asn: u32) -> Vec<Capability> {
    let mut list: Vec<Capability> = Vec::new();
    for family in &capabilities.families {
        list.push(Capability::MultiProtocol { afi: afi(*family), safi: Safi::Unicast });
    }
    if capabilities.route_refresh {
        list.push(Capability::RouteRefresh);
    }
    if capabilities.extended_next_hop {
        list.push(Capability::ExtendedNextHop(vec![ExtendedNextHopFamily {
            nlri_afi: Afi::Ipv4,
            nlri_safi: Safi::Unicast,
            next_hop_afi: Afi::Ipv6,
        }]));
    }
    if let Some(role) = capabilities.role {
        list.push(Capability::Role { role: role_of(role) });
    }
    if let Some(restart) = &capabilities.graceful_restart {
        let families = restart.families.iter().map(|(family, preserved)| GracefulRestartFamily {
            afi: afi(*family),
            safi: Safi::Unicast,
            forwarding_preserved: *preserved,
        });
        list.push(Capability::GracefulRestart {
            restart_state: restart.is_restarting,
            notification: restart.notification,
            restart_time: u16::try_from(restart.time.as_secs()).map_or(4095, |time| time.min(4095)),
            families: families.collect(),
        });
    }
    if capabilities.four_octet_as {
        list.push(Capability::FourOctetAs { asn });
    }
    if capabilities.enhanced_route_refresh {
        list.push(Capability::EnhancedRouteRefresh);
    }
    list
}

fn role_of(role: Role) -> wire::BgpRole {
    match role {
        Role::Provider => wire::BgpRole::Provider,
        Role::RouteServer => wire::BgpRole::RouteServer,
        Role::RouteServerClient => wire::BgpRole::RouteServerClient,
        Role::Customer => wire::BgpRole::Customer,
        Role::Peer => wire::BgpRole::Peer,
    }
}

/// Appends UPDATEs that announce prefixes of one family with these attributes, or withdraw them,
/// each as full as 4096 bytes allow.
///
/// Returns how many prefixes were left out because the attributes alone fill a message.
pub fn encode_update(
    attributes: Option<&Attributes>,
    nets: &[IpNet],
    context: &CodecContext,
    out: &mut Vec<u8>,
) -> usize {
    let Some(first) = nets.first() else { return 0 };
    let family = Family::of(first);
    let shared = attributes.map_or_else(Vec::new, |attributes| list_of(attributes, family));
    let next_hop = attributes.map(|attributes| attributes.next_hop.address);
    let is_body = family == Family::Ipv4 && next_hop.is_none_or(|address| address.is_ipv4());
    let build = |nets: &[IpNet]| {
        let four = context.four_octet_as;
        match (attributes, is_body) {
            (Some(_), true) => update_bytes(nets, &[], &shared, four),
            (None, true) => update_bytes(&[], nets, &[], four),
            (Some(attributes), false) => {
                let mut list = shared.clone();
                list.push(reach(family, attributes, entries(nets)));
                update_bytes(&[], &[], &list, four)
            }
            (None, false) => update_bytes(&[], &[], &[unreach(family, entries(nets))], four),
        }
    };
    // What a message holds beside prefixes: one without any, and the length of an attribute, which
    // takes two octets once there are many.
    let fixed = build(&[]).map_or(MAX_MESSAGE, |message| message.len() + 8);
    let mut rest = nets;
    while !rest.is_empty() {
        let mut room = MAX_MESSAGE.saturating_sub(fixed);
        let fits = rest.iter().take_while(|net| {
            let size = 1 + usize::from(net.prefix_len()).div_ceil(8);
            let fits = size <= room;
            room = room.saturating_sub(size);
            fits
        });
        let (now, later) = rest.split_at(fits.count());
        let Some(message) = build(now).filter(|_| !now.is_empty()) else { return rest.len() };
        out.extend(message);
        rest = later;
    }
    0
}

fn update_bytes(
    announced: &[IpNet],
    withdrawn: &[IpNet],
    attributes: &[PathAttribute],
    four_octet_as: bool,
) -> Option<Vec<u8>> {
    let body = |nets: &[IpNet]| -> Vec<wire::nlri::Ipv4NlriEntry> {
        let entry = |net: &IpNet| match net {
            IpNet::V4(net) => Some(wire::nlri::Ipv4NlriEntry {
                path_id: 0,
                prefix: Ipv4Prefix::new(net.addr(), net.prefix_len()),
            }),
            IpNet::V6(_) => None,
        };
        nets.iter().filter_map(entry).collect()
    };
    let mode = Ipv4UnicastMode::Body;
    let (announced, withdrawn) = (body(announced), body(withdrawn));
    let update =
        UpdateMessage::try_build(&announced, &withdrawn, attributes, four_octet_as, false, mode)
            .ok()?;
    let mut bytes = Vec::with_capacity(update.encoded_len());
    update.encode(&mut bytes).ok()?;
    Some(bytes)
}

fn entries(nets: &[IpNet]) -> Vec<NlriEntry> {
    let entry = |net: &IpNet| {
        let prefix = match net {
            IpNet::V4(net) => Prefix::V4(Ipv4Prefix::new(net.addr(), net.prefix_len())),
            IpNet::V6(net) => Prefix::V6(wire::nlri::Ipv6Prefix::new(net.addr(), net.prefix_len())),
        };
        NlriEntry { path_id: 0, prefix }
    };
    nets.iter().map(entry).collect()
}

fn reach(family: Family, attributes: &Attributes, announced: Vec<NlriEntry>) -> PathAttribute {
    PathAttribute::MpReachNlri(Box::new(MpReachNlri {
        afi: afi(family),
        safi: Safi::Unicast,
        next_hop: attributes.next_hop.address,
        link_local_next_hop: attributes.next_hop.link_local,
        announced,
        flowspec_announced: Vec::new(),
        evpn_announced: Vec::new(),
        bgpls_announced: Vec::new(),
        vpn_announced: Vec::new(),
        labeled_announced: Vec::new(),
        rtc_announced: Vec::new(),
    }))
}

fn unreach(family: Family, withdrawn: Vec<NlriEntry>) -> PathAttribute {
    PathAttribute::MpUnreachNlri(Box::new(MpUnreachNlri {
        afi: afi(family),
        safi: Safi::Unicast,
        withdrawn,
        flowspec_withdrawn: Vec::new(),
        evpn_withdrawn: Vec::new(),
        bgpls_withdrawn: Vec::new(),
        vpn_withdrawn: Vec::new(),
        labeled_withdrawn: Vec::new(),
        rtc_withdrawn: Vec::new(),
    }))
}

/// The attributes in the order of their types, without MP_REACH_NLRI.
fn list_of(attributes: &Attributes, family: Family) -> Vec<PathAttribute> {
    let mut list = vec![
        PathAttribute::Origin(match attributes.origin {
            Origin::Igp => wire::Origin::Igp,
            Origin::Egp => wire::Origin::Egp,
            Origin::Incomplete => wire::Origin::Incomplete,
        }),
        PathAttribute::AsPath(path_of(&attributes.as_path)),
    ];
    if let (Family::Ipv4, IpAddr::V4(address)) = (family, attributes.next_hop.address) {
        list.push(PathAttribute::NextHop(address));
    }
    list.extend(attributes.med.map(PathAttribute::Med));
    list.extend(attributes.local_pref.map(PathAttribute::LocalPref));
    if attributes.atomic_aggregate {
        list.push(PathAttribute::AtomicAggregate);
    }
    list.extend(attributes.aggregator.map(|each| {
        let (asn, router_id) = (each.asn, each.router_id);
        PathAttribute::Aggregator(wire::Aggregator { asn, router_id, partial: false })
    }));
    if !attributes.communities.is_empty() {
        let values = attributes.communities.iter().map(|each| each.0);
        list.push(PathAttribute::Communities(values.collect()));
    }
    list.extend(attributes.originator_id.map(PathAttribute::OriginatorId));
    if !attributes.cluster_list.is_empty() {
        list.push(PathAttribute::ClusterList(attributes.cluster_list.clone()));
    }
    if !attributes.extended_communities.is_empty() {
        let values = attributes.extended_communities.iter().copied();
        list.push(PathAttribute::ExtendedCommunities(
            values.map(wire::ExtendedCommunity::new).collect(),
        ));
    }
    if !attributes.large_communities.is_empty() {
        let large = attributes.large_communities.iter();
        let large = large.map(|each| wire::LargeCommunity::new(each.0[0], each.0[1], each.0[2]));
        list.push(PathAttribute::LargeCommunities(large.collect()));
    }
    list.extend(attributes.only_to_customer.map(PathAttribute::OnlyToCustomer));
    list.extend(attributes.unknown.iter().map(|each| {
        let data = Bytes::copy_from_slice(&each.value);
        PathAttribute::Unknown(RawAttribute {
            flags: each.flags | PARTIAL,
            type_code: each.code,
            data,
        })
    }));
    list
}

fn path_of(path: &AsPath) -> wire::AsPath {
    let segment = |segment: &Segment| match segment {
        Segment::Sequence(asns) => wire::AsPathSegment::AsSequence(asns.clone()),
        Segment::Set(asns) => wire::AsPathSegment::AsSet(asns.clone()),
    };
    wire::AsPath { segments: path.0.iter().map(segment).collect() }
}
