//! Blocking netlink sockets: requests, batches, lists and subscriptions.
//!
//! The kernel processes a request inside `send(2)`, so there is nothing to wait for and no reactor
//! is needed: a call takes microseconds. A socket belongs to the network namespace of the thread
//! that opened it, and stays there if the thread moves on.
//!
//! In reading order: [`socket`] (the file descriptor and its options), [`wire`] (headers and
//! attributes as bytes), [`route`] (rtnetlink requests, with the types of netlink-packet-route),
//! [`subscription`] (multicast notifications), [`namespace`] (running code in another network
//! namespace), [`tap`] (frames of a link).

mod filter;
pub mod namespace;
pub mod route;
pub mod socket;
pub mod subscription;
pub mod tap;
pub mod wire;

pub use socket::{Buffers, Membership, Protocol, Socket};
pub use subscription::Subscription;
