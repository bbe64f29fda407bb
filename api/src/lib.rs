//! User-facing objects: CRD types, the selector language, validation, Calico's older storage, IPAM
//! block arithmetic, and conversion of Kubernetes kinds to parsed forms.

pub mod bgp;
pub mod crds;
pub mod endpoint;
pub mod fields;
pub mod host_port;
pub mod hosts;
pub mod installation;
pub mod ipam;
pub mod k8s;
pub mod limits;
pub mod meta;
pub mod network;
pub mod policy;
pub mod problem;
pub mod report;
pub mod rule;
pub mod selector;
pub mod settings;
pub mod storage;
pub mod v3;
