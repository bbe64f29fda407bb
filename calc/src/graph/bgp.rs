//! BGP in the graph: objects to [`crate::bgp::Speakers`], and what these need of the rest.

use std::collections::BTreeSet;
use std::net::IpAddr;

use margay_api::bgp::{BgpPeer, PeerTarget};

use crate::bgp::{Around, StoredPeer};
use crate::flush::Flush;
use crate::items::{Payload, Subject};
use crate::model::RecordId;

use super::Graph;

impl Graph {
    /// Turns BGP on, or off again. While it is off, which is the default, no node has a speaker,
    /// and backends of Services are not kept for announcements: turn it on before the first update.
    pub fn set_bgp(&mut self, is_on: bool) {
        self.speakers.set_on(is_on);
    }

    pub(crate) fn apply_bgp_peer(&mut self, name: String, peer: Option<BgpPeer>) {
        let peer = peer.map(|peer| {
            let workloads = match &peer.target {
                PeerTarget::LocalWorkloads(selector) => {
                    let selector =
                        self.selectors
                            .mention(selector, &mut self.index, &mut self.interner);
                    self.index.activate(selector, &self.interner);
                    self.selectors.users_mut(selector).peers += 1;
                    Some(selector)
                }
                PeerTarget::Address(_) | PeerTarget::Nodes(_) => None,
            };
            StoredPeer { peer, workloads }
        });
        let former = self.speakers.set_peer(name, peer);
        if let Some(selector) = former.and_then(|former| former.workloads) {
            self.selectors.users_mut(selector).peers -= 1;
            self.selectors.unmention(selector);
        }
    }

    /// Marks the node of an item that the selector matches, or did until now, if a BGPPeer has the
    /// selector.
    pub(crate) fn mark_local_peer(&mut self, selector: u32, item: u32) {
        if self.selectors.users(selector).peers == 0 {
            return;
        }
        if let Some(node) = self.items.get(item).and_then(Payload::node) {
            self.speakers.mark_workload(self.interner.get(node));
        }
    }

    /// Marks the node of an item that is about to change, or has changed, if BGPPeers select it.
    pub(crate) fn mark_local_peers(&mut self, item: u32) {
        if self.speakers.has_local_peers() {
            for selector in self.index.selectors_of(item).to_vec() {
                self.mark_local_peer(selector, item);
            }
        }
    }

    /// Flushes the speakers, before the global records, which show them to other nodes.
    pub(crate) fn flush_bgp(&mut self, flush: &mut Flush) {
        // Moved out for the call, which reads the rest of the graph.
        let mut speakers = std::mem::take(&mut self.speakers);
        let (change, seen) = speakers.flush(&Around {
            nodes: self.globals.accepted_nodes(),
            pools: self.globals.pools(),
            is_routed: &|range| self.globals.is_routed(range),
            workloads: &|node, selector| self.workloads_on(node, selector),
        });
        self.speakers = speakers;
        for (node, speaker) in seen {
            self.globals.set_speaker(node, speaker);
        }
        flush
            .records
            .extend(change.map(|change| (RecordId::Bgp, change)));
    }

    /// Digest of the record of a node's speaker, as of the last flush.
    pub(crate) fn bgp_digest(&self, node: &str) -> Option<u64> {
        self.speakers.get(node).map(|held| held.digest)
    }

    /// Addresses of pods of the node that a live selector matches.
    fn workloads_on(&self, node: &str, selector: u32) -> BTreeSet<IpAddr> {
        let Some(node) = self.interner.find(node) else {
            return BTreeSet::new();
        };
        let items = self.items.on_node(node).filter(|item| {
            self.index
                .selectors_of(*item)
                .binary_search(&selector)
                .is_ok()
        });
        let addresses = items.filter_map(|item| match self.items.get(item)? {
            Payload::Endpoint(endpoint) if endpoint.subject() == Subject::Workload => {
                Some(endpoint.addresses.iter().copied())
            }
            Payload::Endpoint(_) | Payload::NetworkSet(_) => None,
        });
        addresses.flatten().collect()
    }
}
