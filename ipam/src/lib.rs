//! IP address management: who owns an address.
//!
//! ```text
//!  CNI service --request--> addresses --> allocator --> owner --commit--> node_objects
//!               (namespaces: which pools)      (one task, caches blocks)       |
//!                                                                            store <-- API server
//!  operator --when it leads--> collector --leak_scan, check--------------------|
//! ```
//!
//! On a node: [`request`] (what is asked, and why there may be no address), [`addresses`]
//! (attributes as Calico keeps them), [`namespaces`] and [`pools`] (where an address may come
//! from), [`limits`] (settings and reservations), [`inputs`] (what is watched of these),
//! [`allocator`] (the way to the one task that owns the node's blocks, `owner`). That task assigns
//! from its blocks (`commit`), claims new ones (`claim`), borrows from other nodes' (`borrow`),
//! assigns addresses that pods name (`exact`) and releases blocks that it does not need
//! (`idle_blocks`), within `constraints`: reservations, overlaps, cooldown. It writes through
//! `node_objects`, in Calico's order.
//!
//! By hand: [`release`]. In the operator: [`leak_scan`] (pure: what is due) and [`collector`]
//! (carries it out). [`check`] reports what does not fit together, [`excess`] blocks beyond the
//! limit of a node.
//!
//! All of it works on the traits of [`store`], of which there is one for a cluster and, with the
//! feature `testing`, one in memory:
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::sync::Arc;
//!
//! use margay_api::endpoint::EndpointKey;
//! use margay_api::v3::IPPool;
//! use margay_api::v3::pool::IPPoolSpec;
//! use margay_ipam::allocator::Allocator;
//! use margay_ipam::inputs::Inputs;
//! use margay_ipam::pools::of_node;
//! use margay_ipam::request::AddressRequest;
//! use margay_ipam::store::memory::Memory;
//! use tokio::sync::watch;
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
//! # runtime.block_on(async {
//! let spec = IPPoolSpec { cidr: "10.0.0.0/24".to_owned(), ..IPPoolSpec::default() };
//! let pools = BTreeMap::from([("default".to_owned(), IPPool::new("default", spec))]);
//! let (_map, map) = watch::channel(Some(Arc::default()));
//! let (_pools, pools) = watch::channel(Some(Arc::new(of_node(&pools, &BTreeMap::new()))));
//! let (_limits, limits) = watch::channel(Some(Arc::default()));
//! let clock = || "2026-01-01T00:00:00Z".to_owned();
//! let storage = Memory::default();
//! let (_unnamed, no_namespace_names_pools) = watch::channel(true);
//! let inputs = Inputs { map, pools, limits, no_namespace_names_pools };
//! let allocator = Allocator::spawn("n1".to_owned(), Arc::new(storage.clone()), inputs, clock);
//!
//! let pod = EndpointKey::new("shop", "web-0");
//! let request = AddressRequest::of_pod("k8s-pod-network.0a1b".to_owned(), &pod);
//! let addresses = allocator.assign(request.clone()).await?;
//! assert_eq!(allocator.assign(request.clone()).await?, addresses, "the handle has them");
//! assert_eq!(storage.lock().blocks().len(), 1);
//!
//! allocator.release(request.handle().to_owned()).await?;
//! assert!(storage.lock().handles().is_empty());
//! # Ok::<_, margay_ipam::request::NoAddress>(())
//! # })
//! # .unwrap();
//! ```

pub mod addresses;
pub mod allocator;
mod borrow;
pub mod check;
mod claim;
pub mod collector;
mod commit;
mod constraints;
mod exact;
pub mod excess;
mod idle_blocks;
pub mod inputs;
pub mod leak_scan;
pub mod limits;
pub mod namespaces;
mod node_objects;
mod owner;
pub mod pools;
pub mod release;
pub mod request;
pub mod store;
#[cfg(test)]
mod tests;
