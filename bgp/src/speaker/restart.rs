//! Graceful restart: ours (RFC 4724 section 4.1) and our peers' (section 4.2).
//!
//! After our own restart nothing is selected and nothing announced until every peer that can keep
//! routes has sent its own, for at most [`crate::config::SpeakerConfig::selection_deferral`].
//! [`super::SpeakerAction::Synced`] says that what the kernel still has from before can go.
//!
//! What daemons do made two rules. A peer without capability 64 is not waited for once it is
//! established, as it need not send End-of-RIB. One that says that it is restarting itself is
//! waited for all the same, although the RFC excludes it: FRR says so at its first start as well.
//! Two that wait for each other are kept apart by that: routes are announced as soon as only such
//! peers are missing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Peer, Speaker, SpeakerAction};
use crate::attributes::Family;
use crate::config::PeerId;
use crate::session::{Moment, Negotiated, SessionState};

/// The time after our restart until peers' routes are complete.
#[derive(Debug)]
pub(super) struct Deferral {
    pub(super) until: Duration,
    synced: BTreeSet<Family>,
}

impl Deferral {
    pub(super) fn new(until: Duration) -> Self {
        Self { until, synced: BTreeSet::new() }
    }
}

/// What a peer still has to send of a family.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wait {
    /// Nothing.
    Done,
    /// Its End-of-RIB, but it waits for ours as well.
    Restarting,
    /// Its End-of-RIB, or its session.
    Open,
}

fn wait_for(peer: &Peer, family: Family) -> Wait {
    if !peer.config.families.contains(&family) || peer.complete.contains(&family) {
        return Wait::Done;
    }
    let agreed = peer.session.established().and_then(|each| each.negotiated.as_ref());
    let Some(agreed) = agreed else { return Wait::Open };
    match &agreed.graceful_restart {
        None => Wait::Done,
        Some(_) if !agreed.families.contains(&family) => Wait::Done,
        Some(restart) if restart.is_restarting => Wait::Restarting,
        Some(_) => Wait::Open,
    }
}

impl Speaker {
    /// Nothing is announced yet, as our own table is not complete.
    pub(super) fn is_silent(&self) -> bool {
        let is_open =
            |peer: &Peer| Family::ALL.iter().any(|family| wait_for(peer, *family) == Wait::Open);
        self.deferral.is_some() && self.peers.values().any(is_open)
    }

    /// The families of which routes may be selected.
    pub(super) fn ready_families(&self) -> BTreeSet<Family> {
        let is_ready = |family: &Family| match &self.deferral {
            Some(deferral) => deferral.synced.contains(family) || !self.is_silent(),
            None => true,
        };
        Family::ALL.into_iter().filter(is_ready).collect()
    }

    /// Ends the deferral of families that are complete.
    pub(super) fn check_deferral(&mut self) {
        if self.deferral.is_none() || self.peers.is_empty() {
            return;
        }
        let is_complete =
            |family: &Family| self.peers.values().all(|peer| wait_for(peer, *family) == Wait::Done);
        let complete: Vec<Family> = Family::ALL.into_iter().filter(is_complete).collect();
        self.end_deferral(&complete);
    }

    /// Selects these families from now on, and says so once their routes are out.
    pub(super) fn end_deferral(&mut self, families: &[Family]) {
        let Some(deferral) = &mut self.deferral else { return };
        let new: Vec<Family> =
            families.iter().filter(|family| deferral.synced.insert(**family)).copied().collect();
        let is_over = deferral.synced.len() == Family::ALL.len();
        if new.is_empty() {
            return;
        }
        self.flush_routes();
        self.actions.extend(new.into_iter().map(SpeakerAction::Synced));
        if is_over {
            self.deferral = None;
            // Sessions that begin from now on are none of a restart.
            for peer in self.peers.values_mut() {
                if let Some(restart) = &mut peer.open.capabilities.graceful_restart {
                    restart.is_restarting = false;
                }
            }
        }
    }

    pub(super) fn session_up(&mut self, peer: PeerId, agreed: &Negotiated, moment: Moment) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let (address, is_internal) =
            (state.config.address.ip(), state.open.asn == state.config.asn);
        let sender =
            crate::rib::decision::Sender { is_internal, router_id: agreed.router_id, address };
        self.rib.set_sender(peer, sender);
        state.complete.clear();
        state.refreshing.clear();
        state.out = Default::default();
        // A session that only breaks leaves what the kernel has.
        if let Some(restart) = &mut state.open.capabilities.graceful_restart {
            restart.families.values_mut().for_each(|is_preserved| *is_preserved = true);
        }
        // Kept routes go at once where the peer has not preserved its forwarding, or says nothing
        // of the family any more (RFC 4724 section 4.2).
        let preserved: BTreeMap<Family, bool> =
            agreed.graceful_restart.as_ref().map(|each| each.families.clone()).unwrap_or_default();
        let is_lost = |family: &Family| {
            !preserved.get(family).copied().unwrap_or(false) || !agreed.families.contains(family)
        };
        let lost: Vec<Family> = state.stale.keys().copied().filter(is_lost).collect();
        let until = moment.now + state.config.max_stale_time;
        for family in &lost {
            state.stale.remove(family);
        }
        for at in state.stale.values_mut() {
            *at = until;
        }
        for family in lost {
            self.rib.remove_routes(peer, family, true);
        }
        let has_marker = agreed.graceful_restart.is_some();
        for family in &agreed.families {
            let Some(state) = self.peers.get_mut(&peer) else { return };
            state.out.begin(*family, self.rib.announced(*family), has_marker);
        }
    }

    pub(super) fn session_down(
        &mut self,
        peer: PeerId,
        kept: &BTreeSet<Family>,
        restart_time: Duration,
        moment: Moment,
    ) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let time = restart_time.min(state.config.max_stale_time);
        state.out = Default::default();
        state.complete.clear();
        state.refreshing.clear();
        for family in Family::ALL {
            // What was stale already, of a restart before this one, is not kept twice.
            if state.stale.remove(&family).is_some() {
                self.rib.remove_routes(peer, family, true);
            }
            if kept.contains(&family) {
                self.rib.mark_stale(peer, family);
                state.stale.insert(family, moment.now + time);
            } else {
                self.rib.remove_routes(peer, family, false);
            }
        }
    }

    /// Removes what has been kept for too long.
    pub(super) fn expire_stale(&mut self, peer: PeerId, moment: Moment) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let is_due = |(family, at): (&Family, &Duration)| (*at <= moment.now).then_some(*family);
        let due: Vec<Family> = state.stale.iter().filter_map(is_due).collect();
        for family in due {
            state.stale.remove(&family);
            let removed = self.rib.remove_routes(peer, family, true);
            if removed > 0 && state.session.state() != SessionState::Established {
                let text =
                    format!("{removed} {family} routes gone: the peer did not come back in time");
                self.actions.push(SpeakerAction::Problem { peer, text });
            }
        }
    }

    /// The peer has sent all of a family.
    pub(super) fn take_end_of_rib(&mut self, peer: PeerId, family: Family) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        state.complete.insert(family);
        if state.stale.remove(&family).is_some() {
            self.rib.remove_routes(peer, family, true);
        }
    }
}
