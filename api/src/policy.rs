//! Policies and tiers in parsed form, whatever kind of object they were written as.

use std::cmp::Ordering;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::rule::{Action, Rule};
use crate::selector::Selector;

/// The kind of object that a policy was written as; part of its identity, as two kinds may share a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    /// projectcalico.org/v3 NetworkPolicy.
    NetworkPolicy,
    /// projectcalico.org/v3 GlobalNetworkPolicy.
    GlobalNetworkPolicy,
    /// networking.k8s.io/v1 NetworkPolicy.
    KubernetesNetworkPolicy,
    /// policy.networking.k8s.io ClusterNetworkPolicy.
    KubernetesClusterNetworkPolicy,
    /// projectcalico.org/v3 StagedNetworkPolicy.
    StagedNetworkPolicy,
    /// projectcalico.org/v3 StagedGlobalNetworkPolicy.
    StagedGlobalNetworkPolicy,
    /// projectcalico.org/v3 StagedKubernetesNetworkPolicy.
    StagedKubernetesNetworkPolicy,
}

impl PolicyKind {
    /// Staged policies are evaluated for reports and never enforced.
    pub fn is_staged(self) -> bool {
        matches!(
            self,
            Self::StagedNetworkPolicy | Self::StagedGlobalNetworkPolicy | Self::StagedKubernetesNetworkPolicy
        )
    }

    /// The kind whose policies a staged one is about; every other kind is about its own.
    pub fn enforced(self) -> Self {
        match self {
            Self::StagedNetworkPolicy => Self::NetworkPolicy,
            Self::StagedGlobalNetworkPolicy => Self::GlobalNetworkPolicy,
            Self::StagedKubernetesNetworkPolicy => Self::KubernetesNetworkPolicy,
            enforced => enforced,
        }
    }

    /// The kind of staged policies that are about policies of this kind, if there is one.
    pub fn staged(self) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.is_staged() && kind.enforced() == self)
    }

    /// The name that users and the wire know.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "NetworkPolicy",
            Self::GlobalNetworkPolicy => "GlobalNetworkPolicy",
            Self::KubernetesNetworkPolicy => "KubernetesNetworkPolicy",
            Self::KubernetesClusterNetworkPolicy => "KubernetesClusterNetworkPolicy",
            Self::StagedNetworkPolicy => "StagedNetworkPolicy",
            Self::StagedGlobalNetworkPolicy => "StagedGlobalNetworkPolicy",
            Self::StagedKubernetesNetworkPolicy => "StagedKubernetesNetworkPolicy",
        }
    }

    /// The name where room is scarce, as in log lines: Calico's.
    pub fn short_name(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "np",
            Self::GlobalNetworkPolicy => "gnp",
            Self::KubernetesNetworkPolicy => "knp",
            Self::KubernetesClusterNetworkPolicy => "kcnp",
            Self::StagedNetworkPolicy => "snp",
            Self::StagedGlobalNetworkPolicy => "sgnp",
            Self::StagedKubernetesNetworkPolicy => "sknp",
        }
    }

    /// Every kind, in order of declaration.
    pub const ALL: [Self; 7] = [
        Self::NetworkPolicy,
        Self::GlobalNetworkPolicy,
        Self::KubernetesNetworkPolicy,
        Self::KubernetesClusterNetworkPolicy,
        Self::StagedNetworkPolicy,
        Self::StagedGlobalNetworkPolicy,
        Self::StagedKubernetesNetworkPolicy,
    ];

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// Identity of a policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyKey {
    /// Kind of the object.
    pub kind: PolicyKind,
    /// Namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl PolicyKey {
    /// Identity of a policy of that kind by its object's metadata.
    pub fn of(kind: PolicyKind, metadata: &ObjectMeta) -> Self {
        Self {
            kind,
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
        }
    }
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind.as_str(), self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind.as_str(), self.name),
        }
    }
}

/// Position in a list of tiers or policies: a number, or last. Not-a-number cannot be written in the API.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Order(pub Option<f64>);

impl Eq for Order {}

impl PartialOrd for Order {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Order {
    fn cmp(&self, other: &Self) -> Ordering {
        let value = |order: &Self| order.0.unwrap_or(f64::INFINITY);
        value(self).total_cmp(&value(other))
    }
}

/// A group of policies that are evaluated together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    /// Position among the tiers.
    pub order: Order,
    /// What happens at the end of the tier to a packet that a policy of it applies to: `Deny` or `Pass`.
    pub default_action: Action,
}

/// Which packets of a host endpoint a policy is about. Policies of namespaces are about none, whatever is written here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Traffic {
    /// Those of the host itself.
    #[default]
    Normal,
    /// Those of the host itself and those that it forwards: `applyOnForward`.
    Forwarded,
    /// All that come in, before their destination is translated: `preDNAT`. Not about workloads.
    PreDnat,
    /// All that are not to be tracked: `doNotTrack`. Not about workloads.
    Untracked,
}

impl Traffic {
    /// Whether such a policy applies to workloads too.
    pub fn is_for_workloads(self) -> bool {
        matches!(self, Self::Normal | Self::Forwarded)
    }
}

/// A policy in parsed form: which endpoints it applies to, in which directions, and its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Name of its tier.
    pub tier: String,
    /// Position within the tier; ties are broken by name, namespace and kind.
    pub order: Order,
    /// Over effective labels: which endpoints it applies to.
    pub selector: Selector,
    /// Which packets of host endpoints it applies to.
    pub traffic: Traffic,
    /// Whether it applies to packets that come to the endpoint.
    pub applies_ingress: bool,
    /// Whether it applies to packets that leave the endpoint.
    pub applies_egress: bool,
    /// Rules for packets that come to the endpoint, in order.
    pub ingress: Vec<Rule>,
    /// Rules for packets that leave the endpoint, in order.
    pub egress: Vec<Rule>,
}

impl Policy {
    /// Whether it applies to packets in any direction.
    pub fn applies(&self) -> bool {
        self.applies_ingress || self.applies_egress
    }
}

/// What a staged policy is about: what would become of the enforced policy of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StagedPolicy {
    /// There would be this one, in its place if there is one now.
    Set(Policy),
    /// It would not be there.
    Delete,
    /// Nothing: whoever staged it has set it aside.
    Ignore,
}
