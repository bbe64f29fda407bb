//! Watches the addresses of the node's interfaces.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::LinkAttribute;

use super::present;
use crate::Links;
use crate::links::is_workload;
use margay_netlink::Subscription;
use margay_netlink::route::{NetlinkError, RouteSocket};

/// Multicast groups as bits: links, IPv4 and IPv6 addresses (`linux/rtnetlink.h`, `RTMGRP_*`).
pub(super) const GROUPS: u32 = 0x1 | 0x10 | 0x100;

/// Watch of interfaces and their addresses in the network namespace of the thread that opened it,
/// without those of pods and without link-local addresses.
pub struct AddressWatch {
    subscription: Subscription,
    socket: RouteSocket,
}

impl AddressWatch {
    /// Subscribes to changes.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            subscription: Subscription::open(GROUPS)?,
            socket: RouteSocket::open()?,
        })
    }

    /// Reads the current state. Later changes end the next [`AddressWatch::wait`].
    pub fn read(&mut self) -> Result<Links, NetlinkError> {
        let links = present::list_links(&mut self.socket)?;
        let names: BTreeMap<u32, String> = links
            .into_iter()
            .map(|(name, link)| (link.index, name))
            .collect();
        let outer = names.values().filter(|name| !is_workload(name));
        let mut known: Links = outer.map(|name| (name.clone(), BTreeSet::new())).collect();
        for (index, net) in present::list_addresses(&mut self.socket)? {
            let addresses = names.get(&index).and_then(|name| known.get_mut(name));
            if let Some(addresses) = addresses.filter(|_| !is_of_link(net.addr())) {
                addresses.insert(net.addr());
            }
        }
        Ok(known)
    }

    /// Blocks until addresses may have changed.
    pub fn wait(&mut self) -> Result<(), NetlinkError> {
        self.subscription.wait(|payload| {
            matches!(
                payload,
                NetlinkPayload::InnerMessage(message) if concerns_node(message),
            )
        })
    }
}

/// Lists the addresses of all interfaces, those of loopback and link-local ones included.
pub fn list(socket: &mut RouteSocket) -> Result<BTreeSet<IpAddr>, NetlinkError> {
    let present = present::list_addresses(socket)?;
    Ok(present.into_iter().map(|(_, net)| net.addr()).collect())
}

/// Whether a notification concerns interfaces other than pods': a new pod must cost nothing here.
pub(super) fn concerns_node(message: &RouteNetlinkMessage) -> bool {
    match message {
        RouteNetlinkMessage::NewAddress(message) | RouteNetlinkMessage::DelAddress(message) => {
            message.attributes.iter().any(|attribute| {
                matches!(
                    attribute,
                    AddressAttribute::Address(address) if !is_of_link(*address),
                )
            })
        }
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => !link
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, LinkAttribute::IfName(name) if is_workload(name))),
        _ => false,
    }
}

fn is_of_link(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}
