//! Services from their EndpointSlices: each slice has a part of the backends, `calc` needs all of
//! them.

use std::collections::{BTreeMap, BTreeSet};

use margay_api::meta::NamespacedName;
use margay_calc::update::{Backend, Update};

use crate::object::ObjectKey;

/// Backends of every Service, by slice.
#[derive(Debug, Default)]
pub struct Services(BTreeMap<NamespacedName, BTreeMap<ObjectKey, Vec<Backend>>>);

impl Services {
    /// Merges a changed slice into its Service and returns all backends of that, if they changed.
    /// Updates of other kinds are returned as they are.
    pub fn merge_slice(&mut self, slice: &ObjectKey, update: Update) -> Option<Update> {
        let (service, backends) = match update {
            Update::Service(service, backends) => (service, backends),
            other => return Some(other),
        };
        let former = self.union(&service);
        let parts = self.0.entry(service.clone()).or_default();
        match backends {
            Some(backends) => parts.insert(slice.clone(), backends),
            None => parts.remove(slice),
        };
        if parts.is_empty() {
            self.0.remove(&service);
        }
        let union = self.union(&service);
        (former != union).then_some(Update::Service(service, union))
    }

    fn union(&self, service: &NamespacedName) -> Option<Vec<Backend>> {
        let parts = self.0.get(service)?;
        let union: BTreeSet<&Backend> = parts.values().flatten().collect();
        Some(union.into_iter().cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_api::rule::Protocol;

    fn mk(ports: &[u16]) -> Option<Vec<Backend>> {
        let backend = |port: &u16| Backend {
            address: [10, 0, 0, 1].into(),
            protocol: Protocol::TCP,
            port: *port,
            ready_on: None,
        };
        Some(ports.iter().map(backend).collect())
    }

    #[test]
    fn slices_are_merged() {
        let mut services = Services::default();
        let service = NamespacedName::new("ns", "s");
        let steps = [
            ("a", mk(&[1, 2]), Some(mk(&[1, 2]))),
            ("b", mk(&[2, 3]), Some(mk(&[1, 2, 3]))),
            ("b", mk(&[2]), Some(mk(&[1, 2]))),
            ("a", None, Some(mk(&[2]))),
            ("a", None, None),
            ("c", mk(&[2]), None),
            ("b", None, None),
            ("c", mk(&[]), Some(mk(&[]))),
            ("c", None, Some(None)),
        ];
        for (slice, part, wanted) in steps {
            let update = Update::Service(service.clone(), part);
            let merged = services.merge_slice(&NamespacedName::new("ns", slice), update);
            let wanted = wanted.map(|whole| Update::Service(service.clone(), whole));
            assert_eq!(merged, wanted, "{slice}");
        }
    }
}
