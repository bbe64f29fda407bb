//! Process lifecycle: telemetry, admin port, readiness, liveness, shutdown, TLS reload, backoff.
//!
//! Every daemon starts the same way, in this order:
//!
//! 0. [`executor::start`], for threads;
//! 1. [`telemetry::init`], so that later failures are logged;
//! 2. [`shutdown::Shutdown::on_signals`], so that a signal during start is honoured;
//! 3. [`ready::Readiness`] with one gate per thing that must be up;
//! 4. [`admin::serve`], so that kubelet can ask while the rest comes up;
//! 5. [`tls::Tls::load`], then the daemon's own parts.
//!
//! Nothing here knows a policy, a pod or a node.

pub mod admin;
pub mod alive;
pub mod backoff;
pub mod clock;
pub mod executor;
pub mod grpc;
pub mod process;
pub mod ready;
pub mod shutdown;
pub mod tasks;
pub mod telemetry;
pub mod tls;
