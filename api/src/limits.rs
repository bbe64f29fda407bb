//! Limits of the size of a policy. Sizes are computed before peers and ports are multiplied, so
//! that a refusal costs no more than reading the object.
//!
//! The limits are far above what people write by hand and below what would harm others: typha's
//! memory, a node's share of its stream, the kernel's time. They hold for a policy of any kind, for
//! both directions together.

use crate::problem::Problems;
use crate::rule::{EntityMatch, Port, Rule};

/// Maximum number of rules, ranges and ports of a policy: each rule counts one, as does each range
/// and port in it. A rule of a Kubernetes kind counts once for each of its peers and protocols;
/// ranges without exceptions are one peer.
pub const MAX_ENTRIES: usize = 65_536;
/// Maximum number of selectors, Services and named ports of a policy. A named port of an egress
/// rule counts once for each peer, as each peer resolves it differently.
pub const MAX_REFERENCES: usize = 16_384;

/// Size of the rules of one policy so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Budget {
    used: Size,
}

/// Size of rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Size {
    entries: usize,
    references: usize,
}

/// Endpoints whose named port a rule refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortOwner {
    /// The endpoints that the policy applies to.
    Endpoint,
    /// The peers.
    Peer,
}

impl Budget {
    /// Charges a rule that stands for all pairs of a peer and a list of ports. False, with the
    /// problem recorded, if that exceeds a limit: then nothing is charged.
    pub(crate) fn charge_pairs<'a>(
        &mut self,
        problems: &mut Problems,
        at: &str,
        peers: &[EntityMatch],
        lists: impl IntoIterator<Item = &'a [Port]>,
        declared: PortOwner,
    ) -> bool {
        let (mut count, mut ports, mut names) = (0, 0, 0);
        for list in lists {
            count += 1;
            ports += list.len();
            names += named(list);
        }
        let ranges: usize = peers
            .iter()
            .map(|peer| peer.nets.len() + peer.not_nets.len())
            .sum();
        let names = if declared == PortOwner::Peer {
            names * peers.len()
        } else {
            names
        };
        let size = Size {
            entries: peers.len() * (count + ports) + ranges * count,
            references: peers.iter().map(references).sum::<usize>() + names,
        };
        self.charge(problems, at, size)
    }

    /// Charges a single rule. False, with the problem recorded, if that exceeds a limit.
    pub(crate) fn charge_rule(&mut self, problems: &mut Problems, at: &str, rule: &Rule) -> bool {
        let mut size = Size {
            entries: 1,
            references: 0,
        };
        for side in [&rule.source, &rule.destination] {
            size.entries +=
                side.nets.len() + side.not_nets.len() + side.ports.len() + side.not_ports.len();
            size.references += references(side) + named(&side.ports) + named(&side.not_ports);
        }
        self.charge(problems, at, size)
    }

    /// Checks that a rule of at least so many peers and ports can fit, before they are read. False,
    /// with the problem recorded, if it cannot.
    pub(crate) fn has_room(
        &self,
        problems: &mut Problems,
        at: &str,
        peers: usize,
        ports: usize,
    ) -> bool {
        let size = Size {
            entries: peers.saturating_mul(ports),
            references: 0,
        };
        Self { used: self.used }.charge(problems, at, size)
    }

    fn charge(&mut self, problems: &mut Problems, at: &str, size: Size) -> bool {
        let entries = self.used.entries.saturating_add(size.entries);
        let references = self.used.references.saturating_add(size.references);
        if entries > MAX_ENTRIES {
            problems.add(
                at,
                format!("{entries} rules, ranges and ports up to here"),
                format!(
                    "more than the {MAX_ENTRIES} that a policy may have; a rule counts once for \
                     each of its peers"
                ),
                "write several policies, give pods a common label and select them by one peer, or \
                 name ports as ranges",
            );
            return false;
        }
        if references > MAX_REFERENCES {
            problems.add(
                at,
                format!("{references} selectors, Services and named ports up to here"),
                format!(
                    "more than the {MAX_REFERENCES} that a policy may have; a named port counts \
                     once for each peer"
                ),
                "write several policies, give pods a common label and select them by one peer, or \
                 name ports by number",
            );
            return false;
        }
        self.used = Size {
            entries,
            references,
        };
        true
    }
}

fn named(ports: &[Port]) -> usize {
    ports
        .iter()
        .filter(|port| matches!(port, Port::Named(_)))
        .count()
}

fn references(side: &EntityMatch) -> usize {
    let EntityMatch {
        selector,
        not_selector,
        nodes,
        service,
        ..
    } = side;
    let selectors = [selector, not_selector, nodes]
        .into_iter()
        .flatten()
        .count();
    selectors + usize::from(service.is_some())
}
