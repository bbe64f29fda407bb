//! How large the rules of a policy may be. It is counted before peers and ports are multiplied, so that what is refused costs no more than reading it.
//!
//! The limits are far above what people write by hand and below what one policy may cost everybody else: typha's memory, a node's share of its
//! stream, the kernel's time. They hold for a policy of any kind, both directions together.

use crate::problem::Problems;
use crate::rule::{EntityMatch, Port, Rule};

/// Rules, and ranges and ports in them: each rule counts one, with each range and each port that it lists. A rule of Kubernetes' kinds counts once for
/// each of its peers and protocols; ranges without exceptions are one peer.
pub const MAX_ENTRIES: usize = 65_536;
/// Selectors, Services and named ports that rules refer to. A named port of a rule that leads out counts once for each peer, as it is that peer's own.
pub const MAX_REFERENCES: usize = 16_384;

/// What the rules of one policy have come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Budget {
    used: Size,
}

/// The size of rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Size {
    entries: usize,
    references: usize,
}

/// Whose port a named port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Declared {
    /// The policy's own endpoints'.
    ByOwn,
    /// Each peer's.
    ByPeers,
}

impl Budget {
    /// Takes a rule that stands for all pairs of a peer and a list of ports. False, with the reason noted, if that is too much: then it takes nothing.
    pub(crate) fn takes_pairs<'a>(
        &mut self,
        problems: &mut Problems,
        at: &str,
        peers: &[EntityMatch],
        lists: impl IntoIterator<Item = &'a [Port]>,
        declared: Declared,
    ) -> bool {
        let (mut count, mut ports, mut names) = (0, 0, 0);
        for list in lists {
            count += 1;
            ports += list.len();
            names += named(list);
        }
        let ranges: usize = peers.iter().map(|peer| peer.nets.len() + peer.not_nets.len()).sum();
        let names = if declared == Declared::ByPeers { names * peers.len() } else { names };
        let size = Size {
            entries: peers.len() * (count + ports) + ranges * count,
            references: peers.iter().map(references).sum::<usize>() + names,
        };
        self.takes(problems, at, size)
    }

    /// Takes a rule as it is written. False, with the reason noted, if that is too much.
    pub(crate) fn takes_rule(&mut self, problems: &mut Problems, at: &str, rule: &Rule) -> bool {
        let mut size = Size { entries: 1, references: 0 };
        for side in [&rule.source, &rule.destination] {
            size.entries += side.nets.len() + side.not_nets.len() + side.ports.len() + side.not_ports.len();
            size.references += references(side) + named(&side.ports) + named(&side.not_ports);
        }
        self.takes(problems, at, size)
    }

    /// Whether a rule of at least so many peers and ports can fit at all: asked before they are read. False with the reason noted.
    pub(crate) fn has_room(&self, problems: &mut Problems, at: &str, peers: usize, ports: usize) -> bool {
        let size = Size { entries: peers.saturating_mul(ports), references: 0 };
        Self { used: self.used }.takes(problems, at, size)
    }

    fn takes(&mut self, problems: &mut Problems, at: &str, size: Size) -> bool {
        let entries = self.used.entries.saturating_add(size.entries);
        let references = self.used.references.saturating_add(size.references);
        if entries > MAX_ENTRIES {
            problems.add(
                at,
                format!("{entries} rules, ranges and ports up to here"),
                format!("more than the {MAX_ENTRIES} of a policy, where a rule counts for each of its peers"),
                "write several policies, give pods a common label and select them by one peer, or name ports as ranges",
            );
            return false;
        }
        if references > MAX_REFERENCES {
            problems.add(
                at,
                format!("{references} selectors, Services and named ports up to here"),
                format!(
                    "more than the {MAX_REFERENCES} of a policy, where a named port of a peer counts for each of them"
                ),
                "write several policies, give pods a common label and select them by one peer, or name ports by number",
            );
            return false;
        }
        self.used = Size { entries, references };
        true
    }
}

fn named(ports: &[Port]) -> usize {
    ports.iter().filter(|port| matches!(port, Port::Named(_))).count()
}

fn references(side: &EntityMatch) -> usize {
    let EntityMatch { selector, not_selector, nodes, service, .. } = side;
    let selectors = [selector, not_selector, nodes].into_iter().flatten().count();
    selectors + usize::from(service.is_some())
}
