//! What users write: CRD types, the selector language, validation, IPAM block arithmetic, Kubernetes kinds to ours.

pub mod endpoint;
pub mod installation;
pub mod ipam;
pub mod meta;
pub mod network;
pub mod policy;
pub mod rule;
pub mod selector;
pub mod v3;
