//! Conversion of Kubernetes' own kinds to the parsed forms.

pub mod cnp;
pub mod labels;
pub mod netpol;
pub mod node;
pub mod pod;
pub mod service;

pub use labels::{namespace, service_account};
