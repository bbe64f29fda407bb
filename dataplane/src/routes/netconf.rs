//! Parses notifications of kernel parameters of links (`RTM_NEWNETCONF`, `linux/netconf.h`). The
//! kernel notifies only forwarding, reverse path filters and proxies; the periodic check finds
//! other parameters.

use margay_api::network::TunnelKind;
use margay_api::rule::IpVersion;
use margay_netlink::wire;

use super::parameters::{Notified, expected_value};
use crate::links::is_workload;

/// Message type `RTM_NEWNETCONF` of `linux/rtnetlink.h`.
pub const RTM_NEWNETCONF: u16 = 80;

const INDEX: u16 = 1;
const FORWARDING: u16 = 2;
const RP_FILTER: u16 = 3;
const PROXY_NEIGH: u16 = 5;
/// Index of all links (`NETCONFA_IFINDEX_ALL` in `linux/netconf.h`).
const ALL: i32 = -1;
/// Address families in the header (`AF_INET`, `AF_INET6`).
const FAMILIES: [(u8, IpVersion); 2] = [(2, IpVersion::V4), (10, IpVersion::V6)];
/// Size of the padded header (`struct netconfmsg`).
const HEADER: usize = 4;

/// Whether the message shows a wrong parameter of the node or of one of our links. A message with
/// several parameters belongs to a new link, whose creator sets it up.
pub fn is_wrong_parameter<'a>(body: &[u8], name: impl Fn(u32) -> Option<&'a str>) -> bool {
    let version = body
        .first()
        .and_then(|family| FAMILIES.into_iter().find(|(known, _)| known == family));
    let Some((_, version)) = version else {
        return false;
    };
    let (mut index, mut values) = (None, Vec::new());
    for (kind, value) in parse_numbers(body.get(HEADER..).unwrap_or_default()) {
        match kind {
            INDEX => index = Some(value),
            kind => values.push((kind, value)),
        }
    }
    let (Some(index), [(kind, value)]) = (index, values.as_slice()) else {
        return false;
    };
    let what = match *kind {
        FORWARDING => Notified::Forwarding,
        RP_FILTER => Notified::RpFilter,
        PROXY_NEIGH => Notified::ProxyNeigh,
        _ => return false,
    };
    if index == ALL {
        return what == Notified::Forwarding && *value == 0;
    }
    let Some(name) = u32::try_from(index).ok().and_then(name) else {
        return false;
    };
    let is_tunnel = TunnelKind::of_device(name).is_some_and(|kind| kind.version() == version);
    (is_tunnel || is_workload(name))
        && expected_value(version, !is_tunnel, what).is_some_and(|expected| expected != *value)
}

/// Parses attributes that hold one number each, as all of a message do.
fn parse_numbers(bytes: &[u8]) -> impl Iterator<Item = (u16, i32)> {
    let number = |value: &[u8]| Some(i32::from_ne_bytes(value.get(..4)?.try_into().ok()?));
    wire::attributes(bytes).map_while(move |(kind, value)| Some((kind, number(value)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_message(family: u8, numbers: &[(u16, i32)]) -> Vec<u8> {
        let mut bytes = vec![family, 0, 0, 0];
        for (kind, value) in numbers {
            bytes.extend(8u16.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn only_a_value_that_is_not_wanted_of_a_link_of_ours_counts() {
        let name = |index| {
            [(3, "eth0"), (4, "cali1"), (5, "vxlan.calico"), (6, "tunl0")]
                .into_iter()
                .find(|(of, _)| *of == index)
        };
        for (family, numbers, expected) in [
            (2, vec![(INDEX, ALL), (FORWARDING, 0)], true),
            (2, vec![(INDEX, ALL), (FORWARDING, 1)], false),
            (10, vec![(INDEX, ALL), (FORWARDING, 0)], true),
            (2, vec![(INDEX, ALL), (RP_FILTER, 2)], false),
            (2, vec![(INDEX, -2), (FORWARDING, 0)], false),
            (2, vec![(INDEX, 3), (FORWARDING, 0)], false),
            (2, vec![(INDEX, 4), (FORWARDING, 0)], true),
            (2, vec![(INDEX, 4), (RP_FILTER, 1)], false),
            (2, vec![(INDEX, 4), (RP_FILTER, 2)], true),
            (2, vec![(INDEX, 4), (PROXY_NEIGH, 0)], true),
            (10, vec![(INDEX, 4), (PROXY_NEIGH, 1)], false),
            (10, vec![(INDEX, 4), (PROXY_NEIGH, 0)], true),
            (2, vec![(INDEX, 5), (RP_FILTER, 1)], true),
            (10, vec![(INDEX, 5), (FORWARDING, 0)], false),
            (2, vec![(INDEX, 6), (RP_FILTER, 1)], true),
            (10, vec![(INDEX, 6), (FORWARDING, 0)], false),
            (2, vec![(INDEX, 9), (FORWARDING, 0)], false),
            (
                2,
                vec![
                    (INDEX, 4),
                    (FORWARDING, 0),
                    (RP_FILTER, 0),
                    (PROXY_NEIGH, 0),
                ],
                false,
            ),
            (7, vec![(INDEX, ALL), (FORWARDING, 0)], false),
            (2, vec![], false),
        ] {
            let found = is_wrong_parameter(&mk_message(family, &numbers), |index| {
                name(index).map(|(_, name)| name)
            });
            assert_eq!(found, expected, "{family} {numbers:?}");
        }
    }

    #[test]
    fn pieces_of_messages_mean_nothing() {
        let whole = mk_message(2, &[(INDEX, ALL), (FORWARDING, 0)]);
        for length in 0..whole.len() {
            assert!(
                !is_wrong_parameter(&whole[..length], |_| None),
                "{length} bytes"
            );
        }
    }
}
