//! Calico's objects, as `calicoctl` shows and changes them: in the users' form, whichever way the
//! cluster stores them.

pub mod datastore;
pub mod get;
pub mod ipam;
pub mod kind;
pub mod split;
pub mod table;
mod usage;
pub mod version;
pub mod write;
