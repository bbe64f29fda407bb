//! Wire formats: .proto files, generated code, and conversion between wire and model.
//!
//! Without the feature `sync` there is only the exchange between the CNI plugin and the agent,
//! which needs no gRPC, and what both must agree on.

pub mod cni;
pub mod conf;
#[cfg(feature = "sync")]
pub mod sync;

/// Generated code of the read-only debug services.
#[cfg(feature = "sync")]
pub use generated::debug::v1 as debug;

// Nested like the proto packages, because generated code refers to other packages by relative path.
#[cfg(feature = "sync")]
#[allow(missing_docs, clippy::all)]
mod generated {
    pub(crate) mod sync {
        pub mod v1 {
            tonic::include_proto!("margay.sync.v1");
        }
    }
    pub(crate) mod debug {
        pub mod v1 {
            tonic::include_proto!("margay.debug.v1");
        }
    }
}

/// Descriptors of every .proto file compiled in, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
