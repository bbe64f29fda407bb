//! Origin of a change, for latencies and traces.

use margay_runtime::telemetry::Traceparent;

/// Origin of a change.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cause {
    /// Time at which typha received the event, in nanoseconds since the epoch.
    pub seen_unix_ns: u64,
    /// Resource version up to which the kind had been received, object included; 0 if unknown.
    pub version: u64,
    /// Trace of the object's writer.
    pub trace: Option<Traceparent>,
}
