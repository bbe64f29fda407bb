//! Staged policies: kept beside what is enforced, without any part in it, for whoever asks what would happen if they were enforced.
//!
//! Their selectors and sets are mentioned like those of other policies and never live, so that they cost nothing but their room; what they
//! select is found out when somebody asks.

use std::borrow::Cow;

use crate::evaluate::Records;
use crate::graph::Graph;
use crate::model::{Record, RecordId};
use crate::policies::{self, Key, Policy};
use crate::store::Map;
use crate::texts::Marks;

/// What would become of the enforced policy of the name.
#[derive(Debug)]
pub(crate) enum Action {
    /// There would be this one.
    Set(Policy),
    /// There would be none.
    Delete,
}

/// All staged policies that would change something.
#[derive(Debug, Default)]
pub(crate) struct Staged(Map<Key, Action>);

impl Staged {
    /// Takes what is staged under the key, or that nothing is. Answers with what was.
    pub(crate) fn put(&mut self, key: Key, action: Option<Action>) -> Option<Action> {
        match action {
            Some(action) => self.0.insert(key, action),
            None => self.0.remove(&key),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Policies that would be there.
    pub(crate) fn policies(&self) -> impl Iterator<Item = &Policy> {
        self.0.values().filter_map(Action::policy)
    }

    /// Marks every text that is kept here.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for (_, namespace, name) in self.0.keys() {
            marks.all([*namespace, *name]);
        }
        self.policies().for_each(|policy| marks.mark(policy.binding.tier));
    }

    /// Whether the enforced policy would not be there as it is.
    fn replaces(&self, (kind, namespace, name): Key) -> bool {
        kind.staged().is_some_and(|kind| self.0.contains_key(&(kind, namespace, name)))
    }
}

impl Action {
    fn policy(&self) -> Option<&Policy> {
        match self {
            Self::Set(policy) => Some(policy),
            Self::Delete => None,
        }
    }
}

/// The records as they would be. Those of staged policies are under the keys of the staged objects.
#[derive(Clone, Copy, Debug)]
pub struct Pending<'a>(pub(crate) &'a Graph);

impl Records for Pending<'_> {
    fn record(&self, id: &RecordId) -> Option<Cow<'_, Record>> {
        match id {
            RecordId::Endpoint(_) | RecordId::HostEndpoint(_) => self.endpoint(id).map(Cow::Owned),
            RecordId::Policy(key) if key.kind.is_staged() => {
                let Graph { staged, sets, texts, .. } = self.0;
                let policy = staged.0.get(&self.0.policy_key(key)?)?.policy()?;
                Some(Cow::Owned(Record::Policy(policies::record(policy, sets, texts))))
            }
            RecordId::IpSet(set) => self.0.record(id).or_else(|| self.0.resting_set(set).map(Cow::Owned)),
            _ => self.0.record(id),
        }
    }
}

impl Pending<'_> {
    fn endpoint(&self, id: &RecordId) -> Option<Record> {
        let Graph { policies, staged, index, texts, .. } = self.0;
        let (item, endpoint) = self.0.endpoint(id)?;
        let kept = self.0.policies_of(item, endpoint).map(|policy| policies.get(policy));
        let kept = kept.filter(|policy| !staged.replaces(policy.key));
        let new = staged.policies().filter(|policy| policy.applies_to(endpoint.subject()));
        let new = new.filter(|policy| index.is_selected(policy.binding.subject, item, texts));
        Some(self.0.endpoint_under(endpoint, kept.chain(new).collect()))
    }
}
