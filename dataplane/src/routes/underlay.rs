//! Watches the MTU of the link with the node's address, on which the MTU of pods depends.

use std::net::IpAddr;
use std::thread;

use netlink_packet_core::NetlinkPayload;
use tokio::sync::watch;

use super::addresses::{self, GROUPS};
use super::driver::Driver;
use margay_netlink::Subscription;
use margay_netlink::route::NetlinkError;

/// Starts a thread in the calling thread's network namespace; it ends with the first change after
/// the receiver is dropped. While no link has the address, the last value stays.
pub fn watch(own: IpAddr) -> Result<watch::Receiver<u32>, NetlinkError> {
    let (mut subscription, mut driver) = (Subscription::open(GROUPS)?, Driver::open()?);
    let (sender, receiver) = watch::channel(driver.underlay_mtu(own)?);
    let mut look = move || -> Result<(), NetlinkError> {
        while !sender.is_closed() {
            subscription.wait(|payload| {
                matches!(
                    payload,
                    NetlinkPayload::InnerMessage(message) if addresses::concerns_node(message),
                )
            })?;
            let found = driver.find_underlay_mtu(own)?;
            sender.send_if_modified(|known| {
                found.is_some_and(|mtu| std::mem::replace(known, mtu) != mtu)
            });
        }
        Ok(())
    };
    thread::Builder::new()
        .name("underlay".to_owned())
        .spawn(move || {
            if let Err(error) = look() {
                tracing::error!(
                    %error,
                    "the MTU monitor failed: the MTU of pods no longer follows the node's link; \
                     restart the agent",
                );
            }
        })?;
    Ok(receiver)
}
