//! Where a packet meets policy: the direction and the stage that chains are compiled for.

use margay_nft::{MarkSet, Statement, Verdict};

/// Mark bit: accepted for good by a host endpoint's policy.
pub(super) const ACCEPTED: u32 = 0x0001_0000;

/// Which packets of an endpoint are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Packets that come to it.
    Ingress,
    /// Packets that leave it.
    Egress,
}

/// What a class stands before, which is what its `Allow` means and where packets go that it does
/// not decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Packets of a pod.
    Workload,
    /// Packets of the host, or that it forwards.
    Host,
    /// Packets whose destination is not translated yet. `Allow` spares them the host's own
    /// policies, and what is undecided goes on.
    PreDnat,
    /// Packets whose connection is not known yet. As [`Stage::PreDnat`], and `Allow` keeps them
    /// from being tracked.
    Untracked,
}

impl Stage {
    /// Whether undecided packets go on to other stages.
    pub(super) const fn goes_on(self) -> bool {
        matches!(self, Self::PreDnat | Self::Untracked)
    }

    /// What is done with a packet that a rule allows.
    pub(super) fn grant(self) -> Vec<Statement> {
        let mark = Statement::MarkSet(MarkSet {
            mask: ACCEPTED,
            value: ACCEPTED,
        });
        let before = match self {
            Self::Workload | Self::Host => Vec::new(),
            Self::PreDnat => vec![mark],
            Self::Untracked => vec![mark, Statement::Notrack],
        };
        before
            .into_iter()
            .chain([Statement::Verdict(Verdict::Accept)])
            .collect()
    }
}
