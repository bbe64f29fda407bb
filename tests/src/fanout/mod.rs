//! `make bench-typha`: cost and latency of typha's fan-out, with server, source and nodes as
//! separate processes.
//!
//! The source writes watch events as JSON lines to a local socket of the server, which decodes and
//! ingests them as a watch of the API does and hands them to the owner task. Included in the
//! server's figures are therefore decoding, cache, graph, encoding, TLS and all system calls; not
//! included are the HTTP client of the API and other kinds than those of [`model`].
//!
//! Every node has its own certificate, sends hello, and acknowledges what it receives as an agent
//! does. Latency is the time from the moment at which the source is scheduled to write an event to
//! the moment at which a node has decoded the frame with it, so a source or server that falls
//! behind shows in it.

pub mod cases;
pub mod clients;
pub mod clock;
pub mod control;
pub mod figures;
pub mod hostile;
pub mod identity;
pub mod model;
pub mod rebroadcast;
pub mod server;
pub mod source;
pub mod stats;
pub mod stream;
pub mod wire;
