//! The way from objects to what a node holds, with a node that is simulated: [`held`] is how it treats a frame.

mod convergence;
mod held;
mod peers;
mod server;
