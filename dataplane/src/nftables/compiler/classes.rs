//! Classes of endpoints, and their chains.

use std::collections::BTreeMap;
use std::sync::Arc;

use margay_calc::model::{Record, RecordId, SetId};

use super::delta::TableDelta;
use super::{
    BoundClass, ClassState, Classes, Compiler, KnownEndpoint, Records, TablePart, UNION_PART,
    view_set,
};
use crate::Dirty;
use crate::nftables::class::{self, Class, Plan, Policies};
use crate::nftables::elements::Shape;
use crate::nftables::merge::{self, Parts, Role};
use crate::nftables::origin::TracedChain;
use crate::nftables::rule::Context;
use crate::nftables::stage::Direction;
use margay_nft::Family;

impl Compiler {
    /// Applies added, changed and removed endpoints; returns whether any class or UID changed.
    pub(super) fn update_endpoints(
        &mut self,
        records: &Records,
        dirty: &Dirty,
        stale: &mut Classes,
    ) -> bool {
        let changed = dirty.records.iter().filter_map(|id| {
            if let RecordId::Endpoint(key) = id {
                Some(key)
            } else {
                None
            }
        });
        let mut any = false;
        for key in changed {
            let new = match records.get(&RecordId::Endpoint(key.clone())) {
                Some(Record::Endpoint(record)) => {
                    let bound = [Direction::Ingress, Direction::Egress]
                        .map(|direction| self.bind_class(Class::of(record, direction)));
                    Some(KnownEndpoint {
                        uid: record.uid.clone(),
                        bound,
                    })
                }
                _ => None,
            };
            let classes =
                |known: &KnownEndpoint| known.bound.each_ref().map(|bound| bound.class.clone());
            let wanted = new.as_ref().map(classes);
            let old = self.endpoints.get(key);
            if wanted == old.map(classes)
                && new.as_ref().map(|new| &new.uid) == old.map(|old| &old.uid)
            {
                continue;
            }
            any = true;
            let old = match new {
                Some(bound) => self.endpoints.insert(key.clone(), bound),
                None => self.endpoints.remove(key),
            };
            stale.extend(
                wanted
                    .into_iter()
                    .chain(old.as_ref().map(classes))
                    .flatten(),
            );
        }
        any
    }

    /// Returns the shared class with its entry points.
    pub(super) fn bind_class(&mut self, class: Class) -> BoundClass {
        let class = self.shared_class(&class).unwrap_or_else(|| Arc::new(class));
        self.classes.entry(class.clone()).or_default();
        let entry = Family::ALL.map(|family| class.entry(family));
        BoundClass { class, entry }
    }

    /// Compiles classes again, and removes those without endpoints.
    pub(super) fn compile_classes(
        &mut self,
        records: &Records,
        stale: &Classes,
        delta: &mut TableDelta,
    ) {
        let bound: Vec<&BoundClass> = self
            .endpoints
            .values()
            .flat_map(|known| &known.bound)
            .chain(self.hosts.bound_classes())
            .collect();
        let is_used =
            |class: &&Arc<Class>| bound.iter().any(|bound| Arc::ptr_eq(&bound.class, class));
        let (kept, gone): (Vec<&Arc<Class>>, Vec<&Arc<Class>>) = stale.iter().partition(is_used);
        for class in gone {
            self.refused.remove(&TablePart::Class(Class::clone(class)));
            let state = self.classes.remove(class).unwrap_or_default();
            state
                .chains
                .into_keys()
                .for_each(|name| self.put_chain(name, None, delta));
        }
        for class in kept {
            self.compile_class(class, records, delta);
        }
    }

    fn compile_class(&mut self, class: &Arc<Class>, records: &Records, delta: &mut TableDelta) {
        let role = |id: &SetId| match (self.shapes.get(id), view_set(records, id)) {
            (Some(Shape::Net { ranges4, ranges6 }), Some(record))
                if record.members.len() <= UNION_PART =>
            {
                if *ranges4 || *ranges6 {
                    Role::Part
                } else {
                    Role::Exact
                }
            }
            (Some(_), _) => Role::Alone,
            (None, _) => Role::Missing,
        };
        let plan = class.plan(&records, &role);
        let shape = |id: &SetId| match plan.unions.get(id) {
            Some(_) if self.refused.contains_key(&TablePart::Set(id.clone())) => None,
            Some(Parts::Addresses(sets)) => Some(Shape::union(
                sets.iter().filter_map(|set| self.shapes.get(set)),
            )),
            Some(Parts::Ports(_)) => Some(Shape::AddressPort),
            None => self.shapes.get(id).copied(),
        };
        let logging = self.inputs.logging();
        let mut chains = BTreeMap::new();
        let is_refused = !self.refused.is_empty()
            && self
                .refused
                .contains_key(&TablePart::Class(Class::clone(class)));
        for family in class.families(&self.families) {
            if is_refused {
                chains.extend(class.closed(*family));
                continue;
            }
            let context = Context {
                family: *family,
                shape: &shape,
                logging: &logging,
                stage: class.stage,
            };
            chains.extend(class.compile(&plan, &context));
        }
        let policies = class.policies().filter_map(|key| records.policy(key));
        let sets = policies.flat_map(class::sets_of).cloned().collect();
        let Plan {
            tiers,
            unions,
            broken,
        } = plan;
        let origins = tiers
            .into_iter()
            .flatten()
            .map(|traced| traced.origins.into())
            .collect();
        let mut state = ClassState {
            chains: BTreeMap::new(),
            origins,
            broken,
            sets,
            unions,
        };
        let before = self
            .classes
            .get_mut(class)
            .map(|state| std::mem::take(&mut state.chains))
            .unwrap_or_default();
        for name in before.into_keys().filter(|name| !chains.contains_key(name)) {
            self.put_chain(name, None, delta);
        }
        for (name, TracedChain { chain, items }) in chains {
            state.chains.insert(name.clone(), items.into());
            self.put_chain(name, Some(chain), delta);
        }
        self.classes.insert(class.clone(), state);
    }

    /// Classes whose policies name the set, or that use the union.
    pub(super) fn classes_using(&self, id: &SetId) -> Vec<Arc<Class>> {
        let uses = |state: &ClassState| {
            if merge::is_union(id) {
                state.unions.contains_key(id)
            } else {
                state.sets.contains(id)
            }
        };
        self.classes
            .iter()
            .filter(|(_, state)| uses(state))
            .map(|(class, _)| class.clone())
            .collect()
    }

    /// The shared key of a class, if it is in use.
    pub(super) fn shared_class(&self, class: &Class) -> Option<Arc<Class>> {
        self.classes
            .get_key_value(class)
            .map(|(class, _)| class.clone())
    }
}
