//! Renders members of a set of the view as elements of kernel sets.
//!
//! Single addresses go into hash sets, ranges into interval sets: a change of a hash set costs the
//! same at any size. Intervals must not overlap, so only the outermost ranges are stored; two
//! prefixes either nest or are disjoint, so no other case exists.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;

use ipnet::IpNet;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{IpSetRecord, Member, SetId, SetKind as MemberKind};

use super::names::{self, Holds};
use margay_nft::{Datum, Family, Field, FieldType, Key, Proto, Set, SetKind, SetName, Value};

/// Kernel sets of a set of the view. Rules depend on the shape, not on the members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    /// Hash sets for both families, and interval sets for the families that have ranges.
    Net {
        /// Whether there are IPv4 ranges.
        ranges4: bool,
        /// Whether there are IPv6 ranges.
        ranges6: bool,
    },
    /// A hash set of address, protocol and port per family.
    AddressPort,
}

/// Changed keys by kernel set, and whether each exists afterwards.
pub(super) type Elements = BTreeMap<SetName, BTreeMap<Key, bool>>;

/// Kernel set that a member belongs to, before its name is computed: that takes a hash, once per
/// kernel set and not per member.
type Place = (Holds, Family);

/// [`Elements`] before names are computed.
type Placed = BTreeMap<Place, BTreeMap<Key, bool>>;

impl Shape {
    /// Shape of a set with these members.
    pub(super) fn of(record: &IpSetRecord) -> Self {
        let ranges = |v4: bool| {
            record.members.iter().any(|member| {
                matches!(
                    member,
                    Member::Net(net) if net.addr().is_ipv4() == v4 && !is_single(net),
                )
            })
        };
        match record.kind {
            MemberKind::Net => Self::Net {
                ranges4: ranges(true),
                ranges6: ranges(false),
            },
            MemberKind::AddressPort => Self::AddressPort,
        }
    }

    /// Shape of a union of sets.
    pub(super) fn union<'a>(parts: impl Iterator<Item = &'a Self>) -> Self {
        parts.fold(
            Self::Net {
                ranges4: false,
                ranges6: false,
            },
            |all, part| Self::Net {
                ranges4: all.has_ranges(Family::Ipv4) || part.has_ranges(Family::Ipv4),
                ranges6: all.has_ranges(Family::Ipv6) || part.has_ranges(Family::Ipv6),
            },
        )
    }

    /// Whether there are ranges of this family.
    pub(super) fn has_ranges(self, family: Family) -> bool {
        match (self, family) {
            (Self::Net { ranges4, .. }, Family::Ipv4) => ranges4,
            (Self::Net { ranges6, .. }, Family::Ipv6) => ranges6,
            (Self::AddressPort, _) => false,
        }
    }

    /// Names and kinds of the kernel sets.
    pub(super) fn sets(self, id: &SetId) -> BTreeMap<SetName, SetKind> {
        self.places()
            .into_iter()
            .map(|(place, kind)| (kernel_set_name(id, place), kind))
            .collect()
    }

    fn places(self) -> BTreeMap<Place, SetKind> {
        let mut places = BTreeMap::new();
        for family in Family::ALL {
            let address = family.address_type();
            match self {
                Self::Net { .. } => {
                    places.insert((Holds::Addresses, family), SetKind::of(address));
                    if self.has_ranges(family) {
                        places.insert(
                            (Holds::Ranges, family),
                            SetKind::of(address).with_intervals(),
                        );
                    }
                }
                Self::AddressPort => {
                    let kind = SetKind::of(vec![address, FieldType::Proto, FieldType::Port]);
                    places.insert((Holds::Ports, family), kind);
                }
            }
        }
        places
    }
}

/// Renders the kernel sets of a set with all elements.
pub(super) fn render(id: &SetId, record: &IpSetRecord) -> BTreeMap<SetName, Set> {
    let mut sets: BTreeMap<Place, Set> = Shape::of(record)
        .places()
        .into_iter()
        .map(|(place, kind)| (place, Set::new(kind)))
        .collect();
    for member in &record.members {
        if is_covered(member, &record.members) {
            continue;
        }
        if let Some(set) = sets.get_mut(&place_of(member)) {
            set.elements.insert(element_key(member), Value::Member);
        }
    }
    sets.into_iter()
        .map(|(place, set)| (kernel_set_name(id, place), set))
        .collect()
}

/// Renders the change of the kernel sets when a set changed by `delta` and now has these members.
/// The shape must be the same before and after.
pub(super) fn change_elements(
    id: &SetId,
    members: &BTreeSet<Member>,
    delta: &MemberDelta,
) -> Elements {
    let mut elements = Placed::new();
    let plain = |member: &&Member| !matches!(member, Member::Net(net) if !is_single(net));
    for (side, wanted) in [(&delta.removed, false), (&delta.added, true)] {
        for member in side.iter().filter(plain) {
            mark_element(&mut elements, member, wanted);
        }
    }
    if delta
        .added
        .iter()
        .chain(&delta.removed)
        .any(|member| !plain(&member))
    {
        change_ranges(members, delta, &mut elements);
    }
    elements
        .into_iter()
        .map(|(place, keys)| (kernel_set_name(id, place), keys))
        .collect()
}

/// Adds ranges that were added, removed, covered by a wider one or uncovered.
fn change_ranges(members: &BTreeSet<Member>, delta: &MemberDelta, elements: &mut Placed) {
    let mut before = members.clone();
    for member in &delta.added {
        before.remove(member);
    }
    before.extend(delta.removed.iter().cloned());
    let outermost = |all: &BTreeSet<Member>, touched: &Member| -> BTreeSet<Member> {
        let Member::Net(net) = touched else {
            return BTreeSet::new();
        };
        let first = Member::Net(*net);
        let last = Member::Net(last_key(net));
        let inside = all.range((Bound::Included(first), Bound::Included(last)));
        let inside = inside.filter(|member| {
            matches!(
                member,
                Member::Net(inner) if net.contains(inner) && !is_single(inner),
            )
        });
        inside
            .filter(|member| !is_covered(member, all))
            .cloned()
            .collect()
    };
    let touched = delta.added.iter().chain(&delta.removed);
    for member in touched.filter(|member| matches!(member, Member::Net(net) if !is_single(net))) {
        let (old, new) = (outermost(&before, member), outermost(members, member));
        for gone in old.difference(&new) {
            mark_element(elements, gone, false);
        }
        for come in new.difference(&old) {
            mark_element(elements, come, true);
        }
    }
}

fn mark_element(elements: &mut Placed, member: &Member, wanted: bool) {
    elements
        .entry(place_of(member))
        .or_default()
        .insert(element_key(member), wanted);
}

/// Whether the member is a range inside another range of the set.
fn is_covered(member: &Member, members: &BTreeSet<Member>) -> bool {
    let Member::Net(net) = member else {
        return false;
    };
    if is_single(net) {
        return false;
    }
    (0..net.prefix_len()).any(|length| {
        let outer = IpNet::new(net.addr(), length)
            .expect("shorter than a valid length")
            .trunc();
        members.contains(&Member::Net(outer))
    })
}

/// Last key that a range inside this one can have, in the order of members.
fn last_key(net: &IpNet) -> IpNet {
    IpNet::new(net.broadcast(), net.max_prefix_len()).expect("the longest length is valid")
}

fn is_single(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

fn place_of(member: &Member) -> Place {
    match member {
        Member::Net(net) if is_single(net) => (Holds::Addresses, family(net.addr())),
        Member::Net(net) => (Holds::Ranges, family(net.addr())),
        Member::AddressPort(address, ..) => (Holds::Ports, family(*address)),
    }
}

fn kernel_set_name(id: &SetId, (holds, family): Place) -> SetName {
    names::ip_set(id, holds, family)
}

fn element_key(member: &Member) -> Key {
    match member {
        Member::Net(net) => Key::from(*net),
        Member::AddressPort(address, protocol, port) => Key::from([
            Field::from(Datum::from(*address)),
            Field::from(Proto(protocol.0)),
            Field::from(Datum::Port(*port)),
        ]),
    }
}

/// Family of an address.
pub(super) const fn family(address: IpAddr) -> Family {
    match address {
        IpAddr::V4(_) => Family::Ipv4,
        IpAddr::V6(_) => Family::Ipv6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mk_members(nets: &[(u32, u8)]) -> BTreeSet<Member> {
        let net = |(bits, length): &(u32, u8)| {
            IpNet::new(IpAddr::from(bits.to_be_bytes()), *length)
                .expect("at most 32")
                .trunc()
        };
        nets.iter().map(|spec| Member::Net(net(spec))).collect()
    }

    fn record(members: BTreeSet<Member>) -> IpSetRecord {
        IpSetRecord {
            kind: MemberKind::Net,
            members,
        }
    }

    proptest! {
        /// A change applied to the old elements yields the elements rendered from the new members.
        #[test]
        fn a_change_of_members_leads_from_one_rendering_to_the_next(
            old in prop::collection::vec(
                (any::<u32>().prop_map(|bits| bits & 0x0fff_0000 | 0x0a00_0000), 6_u8..=32),
                0..12,
            ),
            new in prop::collection::vec(
                (any::<u32>().prop_map(|bits| bits & 0x0fff_0000 | 0x0a00_0000), 6_u8..=32),
                0..12,
            ),
        ) {
            let id = SetId("s:a".to_owned());
            // One range stays, which keeps the shape the same.
            let fixed = Member::Net("192.0.2.0/24".parse().expect("a range"));
            let (mut old, mut new) = (mk_members(&old), mk_members(&new));
            old.insert(fixed.clone());
            new.insert(fixed);
            let delta = MemberDelta {
                added: new.difference(&old).cloned().collect(),
                removed: old.difference(&new).cloned().collect(),
            };
            let mut kernel = render(&id, &record(old));
            for (name, keys) in change_elements(&id, &new, &delta) {
                let set = kernel.get_mut(&name).expect("the shape is the same");
                for (key, wanted) in keys {
                    if wanted {
                        prop_assert!(
                            set.elements.insert(key, Value::Member).is_none(),
                            "added twice",
                        );
                    } else {
                        prop_assert!(
                            set.elements.remove(&key).is_some(),
                            "removed without being there",
                        );
                    }
                }
            }
            prop_assert_eq!(kernel, render(&id, &record(new)));
        }
    }
}
