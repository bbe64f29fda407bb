//! Tests of the engine. Those that need a kernel run in network namespaces of their own and need root; without it
//! they fail.

mod diff;
mod drift;
mod kernel;
mod packets;
mod sample;
mod support;
mod text;
