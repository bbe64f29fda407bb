//! View of one node: the records that it must hold.

use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::digest::{self, Buckets};
use crate::evaluate::Records;
use crate::items::{Payload, Subject};
use crate::model::{Record, RecordId, SetId};
use crate::policies;

use super::Graph;

/// Records that one node must hold, as of the last flush.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) node: &'a str,
}

impl<'a> View<'a> {
    /// Ids, ascending: a record comes after those that it refers to.
    pub fn ids(&self) -> impl Iterator<Item = Cow<'a, RecordId>> + use<'a> {
        let settings = self
            .record(&RecordId::Settings)
            .map(|_| Cow::Owned(RecordId::Settings));
        let own = self.own().into_iter().map(|(id, _)| Cow::Owned(id));
        settings
            .into_iter()
            .chain(self.graph.globals.ids().map(Cow::Borrowed))
            .chain(own)
    }

    /// Value of a record of the view.
    pub fn record(&self, id: &RecordId) -> Option<Cow<'a, Record>> {
        self.graph.record_for(self.node, id)
    }

    /// Digest of a record of the view.
    pub fn digest(&self, id: &RecordId) -> Option<u64> {
        match id {
            RecordId::Settings => self
                .graph
                .globals
                .settings(self.node)
                .map(|(_, digest)| digest),
            RecordId::Bgp => self.graph.bgp_digest(self.node),
            _ => self.graph.digest(id),
        }
    }

    /// Digests of the view's buckets.
    pub fn buckets(&self) -> Buckets {
        let mut buckets = self.graph.globals.buckets();
        if let Some(digest) = self.digest(&RecordId::Settings) {
            digest::add(&mut buckets, &RecordId::Settings, digest);
        }
        for (id, digest) in self.own() {
            digest::add(&mut buckets, &id, digest);
        }
        buckets
    }

    /// Host endpoints of the view, with their digests.
    pub fn host_endpoints(&self) -> impl Iterator<Item = (RecordId, u64)> + use<'a> {
        let graph = self.graph;
        let items = graph
            .interner
            .find(self.node)
            .into_iter()
            .flat_map(move |node| graph.items.on_node(node));
        items.filter_map(move |item| match graph.items.get(item)? {
            Payload::Endpoint(endpoint) if endpoint.subject() == Subject::Host => Some((
                endpoint.name.id(&graph.interner),
                graph.items.sent(endpoint.name)?.1,
            )),
            _ => None,
        })
    }

    /// Bucket of a record.
    pub fn bucket(&self, id: &RecordId) -> u32 {
        digest::bucket(id)
    }

    /// Sets, policies, endpoints and the speaker of the node with their digests, ascending.
    fn own(&self) -> Vec<(RecordId, u64)> {
        let graph = self.graph;
        let (mut sets, mut policies, mut own) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        for item in graph
            .interner
            .find(self.node)
            .into_iter()
            .flat_map(|node| graph.items.on_node(node))
        {
            if let Some(Payload::Endpoint(endpoint)) = graph.items.get(item) {
                policies.extend(graph.policies_of(item, endpoint));
                let sent = graph.items.sent(endpoint.name);
                own.extend(sent.map(|(_, digest)| (endpoint.name.id(&graph.interner), digest)));
            }
        }
        for policy in policies
            .into_iter()
            .map(|policy| graph.policies.get(policy))
        {
            sets.extend(policy.sets.iter().copied());
            if let Some(sent) = graph.policies.sent(policy.key) {
                own.push((
                    RecordId::Policy(policies::key(policy.key, &graph.interner)),
                    sent.digest,
                ));
            }
        }
        for set in sets.into_iter().map(|set| graph.sets.id(set)) {
            if let Some(digest) = graph.sets.digest(set, &graph.interner) {
                own.push((
                    RecordId::IpSet(SetId(graph.interner.get(set).to_owned())),
                    digest,
                ));
            }
        }
        let speaker = graph.bgp_digest(self.node);
        own.extend(speaker.map(|digest| (RecordId::Bgp, digest)));
        own.sort_unstable();
        own
    }
}

impl<'a> IntoIterator for View<'a> {
    type Item = Cow<'a, RecordId>;
    type IntoIter = Box<dyn Iterator<Item = Cow<'a, RecordId>> + 'a>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.ids())
    }
}

impl Records for View<'_> {
    fn record(&self, id: &RecordId) -> Option<Cow<'_, Record>> {
        View::record(self, id)
    }
}
