//! Verdicts of host endpoints straight from the objects.

use std::net::IpAddr;

use crate::naive::{Naive, applies};
use margay_api::policy::{Policy, Traffic};
use margay_api::rule::Action;
use margay_api::settings::{Failsafe, FelixSettings};
use margay_calc::evaluate::{Direction, HostStage, Packet};

impl Naive<'_> {
    /// Verdict on a packet at a stage of a host endpoint; `Pass` if it continues to the next one.
    pub fn host_verdict(
        &self,
        name: &str,
        stage: HostStage,
        direction: Direction,
        packet: &Packet,
    ) -> Action {
        let (host, settings) = match self.0.hosts.get(name).filter(|host| !host.node.is_empty()) {
            Some(host) => (Some(host), self.0.settings(&host.node)),
            None => (None, self.0.settings("")),
        };
        let is_early = matches!(stage, HostStage::Untracked | HostStage::PreDnat);
        if stage != HostStage::Forward && is_spared(&settings, stage, direction, packet) {
            return if is_early {
                Action::Pass
            } else {
                Action::Allow
            };
        }
        let Some(host) = host else {
            return Action::Deny;
        };
        let is_about = |policy: &Policy| match policy.traffic {
            Traffic::Normal => stage == HostStage::Normal,
            Traffic::Forwarded => stage == HostStage::Normal || stage == HostStage::Forward,
            Traffic::PreDnat => stage == HostStage::PreDnat,
            Traffic::Untracked => stage == HostStage::Untracked,
        };
        let policies = self.0.applied_to_host(host).into_iter();
        let policies =
            policies.filter(|(_, policy)| is_about(policy) && applies(policy, direction));
        let decided = self.by_tiers(policies.collect(), direction, packet, !is_early);
        decided.unwrap_or_else(|| match stage {
            HostStage::Normal => self.0.by_profiles(&host.profiles),
            HostStage::Forward => Action::Allow,
            HostStage::Untracked | HostStage::PreDnat => Action::Pass,
        })
    }
}

/// Returns true if the packet uses a failsafe port.
fn is_spared(
    settings: &FelixSettings,
    stage: HostStage,
    direction: Direction,
    packet: &Packet,
) -> bool {
    let spared = |list: &[Failsafe], port: u16, other: IpAddr| {
        let mut of_protocol = list
            .iter()
            .filter(|failsafe| failsafe.protocol == packet.protocol);
        of_protocol.any(|failsafe| {
            failsafe.port == port && failsafe.net.iter().all(|net| net.contains(&other))
        })
    };
    let (to, from) = (packet.destination_port, packet.source_port);
    let is_untracked = stage == HostStage::Untracked;
    match direction {
        Direction::Ingress => {
            spared(&settings.failsafe_inbound, to, packet.source)
                || is_untracked && spared(&settings.failsafe_outbound, from, packet.source)
        }
        Direction::Egress => {
            spared(&settings.failsafe_outbound, to, packet.destination)
                || is_untracked && spared(&settings.failsafe_inbound, from, packet.destination)
        }
    }
}
