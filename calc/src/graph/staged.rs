//! Staged policies: stored beside the enforced ones without any effect, to answer what enforcing
//! them would change.
//!
//! They hold references to their selectors and sets like other policies but never make them live,
//! so they cost memory only; matches are computed on demand.

use std::borrow::Cow;

use crate::evaluate::Records;
use crate::interner::Marks;
use crate::model::{Record, RecordId};
use crate::policies::{self, PolicyId, StoredPolicy};
use crate::store::Map;

use super::Graph;

/// Effect of a staged object on the enforced policy of the same name.
#[derive(Debug)]
pub(crate) enum StagedChange {
    /// Creates or replaces it.
    Set(StoredPolicy),
    /// Deletes it.
    Delete,
}

/// All staged policies that would have an effect.
#[derive(Debug, Default)]
pub(crate) struct Staged(Map<PolicyId, StagedChange>);

impl Staged {
    /// Sets or removes the staged change under the key. Returns the previous one.
    pub(crate) fn put(
        &mut self,
        key: PolicyId,
        action: Option<StagedChange>,
    ) -> Option<StagedChange> {
        match action {
            Some(action) => self.0.insert(key, action),
            None => self.0.remove(&key),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Staged policies that would be created or would replace others.
    pub(crate) fn policies(&self) -> impl Iterator<Item = &StoredPolicy> {
        self.0.values().filter_map(StagedChange::policy)
    }

    /// Marks the symbols in use.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for (_, namespace, name) in self.0.keys() {
            marks.mark_all([*namespace, *name]);
        }
        self.policies()
            .for_each(|policy| marks.mark(policy.binding.tier));
    }

    /// Returns true if the enforced policy would be replaced or deleted.
    fn replaces(&self, (kind, namespace, name): PolicyId) -> bool {
        kind.staged()
            .is_some_and(|kind| self.0.contains_key(&(kind, namespace, name)))
    }
}

impl StagedChange {
    fn policy(&self) -> Option<&StoredPolicy> {
        match self {
            Self::Set(policy) => Some(policy),
            Self::Delete => None,
        }
    }
}

/// Records as if staged policies were enforced. Those of staged policies are found under the keys
/// of the staged objects.
#[derive(Clone, Copy, Debug)]
pub struct StagedView<'a>(pub(crate) &'a Graph);

impl Records for StagedView<'_> {
    fn record(&self, id: &RecordId) -> Option<Cow<'_, Record>> {
        match id {
            RecordId::Endpoint(_) | RecordId::HostEndpoint(_) => self.endpoint(id).map(Cow::Owned),
            RecordId::Policy(key) if key.kind.is_staged() => {
                let Graph {
                    staged,
                    sets,
                    interner,
                    ..
                } = self.0;
                let policy = staged.0.get(&self.0.policy_key(key)?)?.policy()?;
                Some(Cow::Owned(Record::Policy(policies::record(
                    policy, sets, interner,
                ))))
            }
            RecordId::IpSet(set) => self
                .0
                .record(id)
                .or_else(|| self.0.inactive_set(set).map(Cow::Owned)),
            _ => self.0.record(id),
        }
    }
}

impl StagedView<'_> {
    fn endpoint(&self, id: &RecordId) -> Option<Record> {
        let Graph {
            policies,
            staged,
            index,
            interner,
            ..
        } = self.0;
        let (item, endpoint) = self.0.endpoint(id)?;
        let kept = self
            .0
            .policies_of(item, endpoint)
            .map(|policy| policies.get(policy));
        let kept = kept.filter(|policy| !staged.replaces(policy.key));
        let new = staged
            .policies()
            .filter(|policy| policy.applies_to(endpoint.subject()));
        let new = new.filter(|policy| index.is_match(policy.binding.subject, item, interner));
        Some(self.0.build_endpoint(endpoint, kept.chain(new).collect()))
    }
}
