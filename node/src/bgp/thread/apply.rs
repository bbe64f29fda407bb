//! Brings the speaker to what is wanted.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use margay_bgp::attributes::NextHop;
use margay_bgp::config::{PeerId, SpeakerConfig};
use margay_bgp::rib::{KernelRoute, LocalRoute};
use margay_bgp::session::Moment;

use super::notes::SessionNote;
use super::routes::names_interfaces;
use super::{SpeakerOwner, mk_speaker};
use crate::bgp::config::WantedPeer;

impl SpeakerOwner {
    /// Makes the speaker what is wanted.
    pub(super) async fn apply(&mut self) {
        let wanted = self.wanted.clone();
        if wanted.speaker != self.config {
            self.replace_speaker(&wanted.speaker).await;
        }
        let protected = wanted.peers.values().filter_map(|peer| {
            let password = peer.config.transport.password.clone()?;
            Some((peer.config.address.ip(), password))
        });
        self.listeners
            .set(&wanted.listen, protected.collect())
            .await;
        let changed = self
            .hops
            .set_rules(&wanted.gateways, &wanted.ignored_interfaces);
        self.update_hops(&changed);
        self.set_gateways(&wanted.gateways);
        let moment = self.moment();
        self.speaker
            .set_export_policy(wanted.policy.clone(), moment);
        self.apply_local(&wanted.local);
        self.apply_peers(&wanted.peers);
    }

    /// Another speaker takes the place of this one. Sessions end silently and the kernel keeps its
    /// routes, as at a restart of the process.
    async fn replace_speaker(&mut self, config: &SpeakerConfig) {
        let moment = self.moment();
        match mk_speaker(config, true, moment.now) {
            Ok(speaker) => {
                tracing::info!(
                    asn = config.asn,
                    router_id = %config.router_id,
                    "BGP begins anew, as the node's own settings have changed"
                );
                self.speaker.shut_down(true, "", moment);
                self.run_actions();
                // The next speaker numbers connections from the start again.
                self.connections.reset().await;
                while self.inbox.try_recv().is_ok() {}
                self.speaker = speaker;
                self.config.clone_from(config);
                self.ids.clear();
                self.sessions.clear();
                self.begin(true);
            }
            Err(error) => tracing::error!(%error, "BGP stays as it is"),
        }
    }

    fn apply_local(&mut self, wanted: &BTreeMap<IpNet, LocalRoute>) {
        let moment = self.moment();
        let known = self.speaker.local_routes().map(|route| route.net);
        let gone: Vec<IpNet> = known.filter(|net| !wanted.contains_key(net)).collect();
        for net in gone {
            self.speaker.withdraw(&net, moment);
        }
        for route in wanted.values() {
            self.speaker.announce(route.clone(), moment);
        }
    }

    fn apply_peers(&mut self, wanted: &BTreeMap<SocketAddr, WantedPeer>) {
        let moment = self.moment();
        let gone = self
            .sessions
            .iter()
            .filter(|(address, _)| !wanted.contains_key(address));
        let gone: Vec<(SocketAddr, PeerId)> =
            gone.map(|(address, note)| (*address, note.peer)).collect();
        for (address, peer) in gone {
            self.speaker.remove_peer(peer, moment);
            self.sessions.remove(&address);
            self.run_actions();
            self.ids.remove(&peer);
        }
        for (address, peer) in wanted {
            self.apply_peer(*address, peer, moment);
        }
    }

    fn apply_peer(&mut self, address: SocketAddr, wanted: &WantedPeer, moment: Moment) {
        let note = self.sessions.entry(address).or_insert_with(|| {
            self.next_id += 1;
            SessionNote::new(PeerId(self.next_id))
        });
        note.name.clone_from(&wanted.name);
        note.has_password = wanted.config.transport.password.is_some();
        self.ids.insert(note.peer, address);
        if names_interfaces(&wanted.config.import) {
            // Known before the first route is.
            self.hops.learn(address.ip());
        }
        if let Err(error) = self
            .speaker
            .set_peer(note.peer, wanted.config.clone(), moment)
        {
            tracing::warn!(peer = wanted.name, %address, %error, "a BGP peer cannot be configured");
            note.last_end = Some(error.to_string());
        }
    }

    /// Routes to peers that have a gateway of their own.
    pub(super) fn set_gateways(&mut self, wanted: &BTreeMap<IpAddr, IpAddr>) {
        for address in wanted.keys() {
            self.hops.learn(*address);
            let route = Arc::new(KernelRoute {
                next_hops: vec![NextHop::from(*address)],
                priority: match address {
                    IpAddr::V4(_) => self.config.ipv4_priority,
                    IpAddr::V6(_) => self.config.ipv6_priority,
                },
            });
            let learned = self.hops.translate(&route);
            self.changes.insert(IpNet::from(*address), learned);
        }
        let is_gone = |net: &IpNet| !wanted.contains_key(&net.addr());
        let gone: Vec<IpNet> = self.gateways.iter().copied().filter(is_gone).collect();
        for net in gone {
            let known = self
                .speaker
                .kernel_routes()
                .find(|(found, _)| *found == net);
            let known = known.map(|(_, route)| route.clone());
            let learned = known.and_then(|route| self.hops.translate(&route));
            self.changes.insert(net, learned);
        }
        self.gateways = wanted.keys().map(|address| IpNet::from(*address)).collect();
    }
}
