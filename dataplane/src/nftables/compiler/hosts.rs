//! Host endpoints of the node, and their base chains.

use std::collections::{BTreeMap, BTreeSet};

use margay_calc::model::{HostInterfaces, Record, RecordId};

use super::delta::TableDelta;
use super::{BoundClass, Classes, Compiler, Records};
use crate::Dirty;
use crate::Links;
use crate::nftables::host::{self, Assignments, Entries, Hooks, POINTS, Point};
use margay_nft::Transaction;

/// Host endpoints by name, and the node's interfaces.
#[derive(Debug, Default)]
pub(super) struct HostEndpoints {
    endpoints: BTreeMap<String, BoundHostEndpoint>,
    links: Links,
}

/// Host endpoint.
#[derive(Debug)]
struct BoundHostEndpoint {
    interfaces: HostInterfaces,
    /// Classes in the order of [`POINTS`].
    bound: [BoundClass; 7],
}

impl HostEndpoints {
    /// Classes of all host endpoints.
    pub(super) fn bound_classes(&self) -> impl Iterator<Item = &BoundClass> {
        self.endpoints.values().flat_map(|host| &host.bound)
    }

    /// Host endpoints without an interface, with the reason.
    pub(super) fn unassigned(&self) -> BTreeMap<String, String> {
        self.assignments()
            .unassigned
            .into_iter()
            .map(|(name, reason)| (name.to_owned(), reason))
            .collect()
    }

    fn assignments(&self) -> Assignments<'_> {
        host::assign_interfaces(
            self.endpoints
                .iter()
                .map(|(name, host)| (name, &host.interfaces)),
            &self.links,
        )
    }

    /// Hooks that need a chain: those with a policy, and those of the host's own packets, where
    /// profiles decide.
    fn active_points(&self) -> BTreeSet<Point> {
        let has_policy = |index: usize| {
            self.endpoints
                .values()
                .any(|host| !host.bound[index].class.tiers.is_empty())
        };
        let counts = |(index, point): &(usize, Point)| {
            matches!(point, Point::In | Point::Out) || has_policy(*index)
        };
        POINTS
            .into_iter()
            .enumerate()
            .filter(counts)
            .map(|(_, point)| point)
            .collect()
    }
}

impl Compiler {
    /// The node's interfaces and their addresses.
    pub fn links(&self) -> &Links {
        &self.hosts.links
    }

    /// Replaces the node's interfaces and addresses.
    pub fn set_links(&mut self, links: Links) -> Transaction {
        self.hosts.links = links;
        let mut delta = TableDelta::new();
        if self.inputs.set_links(&self.hosts.links) {
            self.update_base(&mut delta);
            self.update_dispatch(&mut delta);
        }
        self.update_host_hooks(&mut delta);
        delta.into_transaction()
    }

    /// Applies added, changed and removed host endpoints; returns whether there were any.
    pub(super) fn update_host_endpoints(
        &mut self,
        records: &Records,
        dirty: &Dirty,
        stale: &mut Classes,
    ) -> bool {
        let changed = dirty.records.iter().filter_map(|id| {
            if let RecordId::HostEndpoint(name) = id {
                Some(name)
            } else {
                None
            }
        });
        let mut any = false;
        for name in changed {
            any = true;
            let new = match records.get(&RecordId::HostEndpoint(name.clone())) {
                Some(Record::HostEndpoint(record)) => Some(BoundHostEndpoint {
                    interfaces: record.interfaces.clone(),
                    bound: POINTS.map(|point| self.bind_class(point.class(record))),
                }),
                _ => None,
            };
            let old = match new {
                Some(host) => self.hosts.endpoints.insert(name.clone(), host),
                None => self.hosts.endpoints.remove(name),
            };
            let new = self.hosts.endpoints.get(name);
            let bound = old.iter().chain(new).flat_map(|host| &host.bound);
            stale.extend(bound.map(|bound| bound.class.clone()));
        }
        any
    }

    /// Updates the base chains of host endpoints and their maps from interface to class.
    pub(super) fn update_host_hooks(&mut self, delta: &mut TableDelta) {
        let assignments = self.hosts.assignments();
        let entries = |host: &BoundHostEndpoint| -> Entries {
            POINTS
                .into_iter()
                .zip(host.bound.iter().map(|bound| bound.entry.clone()))
                .collect()
        };
        let entries: BTreeMap<&str, Entries> = self
            .hosts
            .endpoints
            .iter()
            .map(|(name, host)| (name.as_str(), entries(host)))
            .collect();
        let hooks = Hooks {
            inputs: &self.inputs,
            assignments: &assignments,
            entries: &entries,
            points: &self.hosts.active_points(),
        };
        let section = hooks.render();
        self.replace_section(
            section,
            |name, _| host::is_host(name.as_str()),
            |name| host::is_host(name.as_str()),
            delta,
        );
    }
}
