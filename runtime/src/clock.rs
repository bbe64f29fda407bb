//! Wall clock in the form in which it is sent.

use std::time::{SystemTime, UNIX_EPOCH};

/// Returns the nanoseconds since the epoch; 0 before it.
pub fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}
