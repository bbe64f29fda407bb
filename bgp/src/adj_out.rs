//! What a peer has been sent, and what it is still to be sent.
//!
//! A change is a prefix in a set, so changes of one prefix merge while the peer does not take
//! bytes, and a slow peer costs one entry per prefix. What is sent is decided when there is room
//! for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use crate::attributes::{Attributes, Family};
use crate::codec::{self, CodecContext};
use crate::message::RefreshKind;

/// Prefixes that one step takes, at most: what is packed into messages together.
const STEP: usize = 4096;

/// Marker that follows the routes of a family, once they are out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marker {
    EndOfRib,
    EndOfRefresh,
}

/// Routes towards one peer.
#[derive(Debug, Default)]
pub(crate) struct AdjOut {
    sent: BTreeMap<IpNet, Arc<Attributes>>,
    pending: BTreeSet<IpNet>,
    /// Prefixes that go out again although they are as they were sent.
    again: BTreeSet<IpNet>,
    markers: BTreeMap<Family, Marker>,
    /// Families whose refresh begins, before any more routes.
    begins: BTreeSet<Family>,
    left_out: usize,
}

impl AdjOut {
    /// Notes that the announced path of a prefix has changed.
    pub(crate) fn touch(&mut self, net: IpNet) {
        self.pending.insert(net);
    }

    /// Begins with the whole table of a family; the marker comes behind it.
    pub(crate) fn begin(
        &mut self,
        family: Family,
        nets: impl Iterator<Item = IpNet>,
        has_marker: bool,
    ) {
        self.pending.extend(nets);
        if has_marker {
            self.markers.insert(family, Marker::EndOfRib);
        }
    }

    /// Sends a family again (RFC 2918), between markers if both sides know them (RFC 7313).
    pub(crate) fn refresh(&mut self, family: Family, is_enhanced: bool) {
        let of_family: Vec<IpNet> =
            self.sent.keys().filter(|net| Family::of(net) == family).copied().collect();
        self.pending.extend(&of_family);
        self.again.extend(&of_family);
        // The first table of a session has its own marker, and is a refresh as well.
        if is_enhanced && !self.markers.contains_key(&family) {
            self.begins.insert(family);
            self.markers.insert(family, Marker::EndOfRefresh);
        }
    }

    /// There is something to be sent.
    pub(crate) fn is_pending(&self) -> bool {
        !self.pending.is_empty() || !self.markers.is_empty()
    }

    /// How many prefixes the peer has been sent.
    pub(crate) fn sent(&self) -> usize {
        self.sent.len()
    }

    /// How many routes did not fit a message.
    pub(crate) fn left_out(&self) -> usize {
        self.left_out
    }

    /// What the peer has been sent.
    pub(crate) fn routes(&self) -> impl Iterator<Item = (&IpNet, &Arc<Attributes>)> {
        self.sent.iter()
    }

    /// Appends messages until there are `budget` bytes or nothing is left. A step is finished once
    /// it is begun, so there may be more: what 4096 prefixes take.
    pub(crate) fn write(
        &mut self,
        budget: usize,
        context: &CodecContext,
        export: &mut dyn FnMut(&IpNet) -> Option<Arc<Attributes>>,
        out: &mut Vec<u8>,
    ) {
        for family in std::mem::take(&mut self.begins) {
            out.extend(codec::refresh(family, RefreshKind::Begin));
        }
        while out.len() < budget && !self.pending.is_empty() {
            self.write_step(context, export, out);
        }
        let is_open = |family: Family| self.pending.iter().any(|net| Family::of(net) == family);
        for family in Family::ALL {
            if !self.markers.contains_key(&family) || is_open(family) {
                continue;
            }
            match self.markers.remove(&family) {
                Some(Marker::EndOfRib) => out.extend(codec::end_of_rib(family)),
                Some(Marker::EndOfRefresh) => out.extend(codec::refresh(family, RefreshKind::End)),
                None => {}
            }
        }
    }

    fn write_step(
        &mut self,
        context: &CodecContext,
        export: &mut dyn FnMut(&IpNet) -> Option<Arc<Attributes>>,
        out: &mut Vec<u8>,
    ) {
        let mut withdrawn: BTreeMap<Family, Vec<IpNet>> = BTreeMap::new();
        let mut announced: BTreeMap<(Family, Arc<Attributes>), Vec<IpNet>> = BTreeMap::new();
        for _ in 0..STEP {
            let Some(net) = self.pending.pop_first() else { break };
            let is_again = self.again.remove(&net);
            let family = Family::of(&net);
            match export(&net) {
                Some(attributes) => {
                    if is_again || self.sent.get(&net) != Some(&attributes) {
                        announced.entry((family, attributes)).or_default().push(net);
                    }
                }
                None => {
                    if self.sent.remove(&net).is_some() {
                        withdrawn.entry(family).or_default().push(net);
                    }
                }
            }
        }
        for nets in withdrawn.values() {
            codec::encode_update(None, nets, context, out);
        }
        for ((_, attributes), nets) in announced {
            let left = codec::encode_update(Some(&attributes), &nets, context, out);
            let (went, stayed) = nets.split_at(nets.len() - left);
            self.sent.extend(went.iter().map(|net| (*net, attributes.clone())));
            self.left_out += left;
            // What the peer has of them is not true any more.
            let old: Vec<IpNet> =
                stayed.iter().filter(|net| self.sent.remove(net).is_some()).copied().collect();
            codec::encode_update(None, &old, context, out);
        }
    }
}
