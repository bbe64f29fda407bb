//! Calico's own kinds, `projectcalico.org/v3`, as users and storage have them.

pub mod ipam;
