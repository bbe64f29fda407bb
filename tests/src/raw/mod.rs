//! Packets as bytes, and a socket that sends and receives them at a link: for what no ordinary
//! socket would send.

pub mod link;
pub mod packet;

pub use link::Tap;
pub use packet::{Fragment, Packet, Transport};
