//! Services as stored.

use crate::update::Backend;

/// Backends of a Service and the live sets that contain them.
#[derive(Debug, Default)]
pub(crate) struct ServiceEntry {
    pub(crate) backends: Vec<Backend>,
    pub(crate) sets: Vec<u32>,
}
