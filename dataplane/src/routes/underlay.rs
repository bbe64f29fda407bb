//! The MTU of the link that has the node's own address, as that changes: what pods' links may carry depends on it.

use std::net::IpAddr;
use std::thread;

use netlink_packet_core::NetlinkPayload;
use tokio::sync::watch;

use super::addresses::{self, GROUPS};
use super::driver::Driver;
use margay_netlink::Subscription;
use margay_netlink::route::NetlinkError;

/// Follows it from a thread in the network namespace of the calling thread; the thread ends with the first change that nobody waits for. While no link has
/// the address, what was found last stays.
pub fn watch(own: IpAddr) -> Result<watch::Receiver<u32>, NetlinkError> {
    let (mut subscription, mut driver) = (Subscription::open(GROUPS)?, Driver::open()?);
    let (told, seen) = watch::channel(driver.underlay_mtu(own)?);
    let mut look = move || -> Result<(), NetlinkError> {
        while !told.is_closed() {
            subscription.wait(
                |payload| matches!(payload, NetlinkPayload::InnerMessage(message) if addresses::matters(message)),
            )?;
            let found = driver.found_underlay_mtu(own)?;
            told.send_if_modified(|known| found.is_some_and(|mtu| std::mem::replace(known, mtu) != mtu));
        }
        Ok(())
    };
    thread::Builder::new().name("underlay".to_owned()).spawn(move || {
        if let Err(error) = look() {
            tracing::error!(%error, "the MTU of new pods does not follow the node's link any more; restart the agent");
        }
    })?;
    Ok(seen)
}
