//! Origin of a change, for latencies and traces.

use margay_runtime::telemetry::Traceparent;

/// Origin of a change.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cause {
    /// Time at which typha received the event, in nanoseconds since the epoch.
    pub seen_unix_ns: u64,
    /// Trace of the object's writer.
    pub trace: Option<Traceparent>,
    /// Version of the object, which is that of its kind after the event; 0: not known, as within a
    /// list.
    pub version: u64,
}
