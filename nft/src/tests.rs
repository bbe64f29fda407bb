//! Tests. Those against a real kernel run in network namespaces of their own and compare with the
//! `nft` program; they need root and fail without it.

mod diff;
mod drift;
mod kernel;
mod packets;
mod sample;
mod support;
mod text;
