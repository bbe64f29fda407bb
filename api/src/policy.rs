//! Policies and tiers in parsed form, whatever kind of object they come from.

use std::cmp::Ordering;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::rule::{Action, Rule};
use crate::selector::Selector;

/// Name of the tier of policies that do not specify one.
pub const DEFAULT_TIER: &str = "default";

/// Kind of the object that a policy was read from; part of its identity, as two kinds may share a
/// name.
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
    /// Returns true for staged kinds, which are evaluated for reports and never enforced.
    pub fn is_staged(self) -> bool {
        matches!(
            self,
            Self::StagedNetworkPolicy
                | Self::StagedGlobalNetworkPolicy
                | Self::StagedKubernetesNetworkPolicy
        )
    }

    /// Kind of the policies that a staged kind previews; every other kind is returned unchanged.
    pub fn enforced(self) -> Self {
        match self {
            Self::StagedNetworkPolicy => Self::NetworkPolicy,
            Self::StagedGlobalNetworkPolicy => Self::GlobalNetworkPolicy,
            Self::StagedKubernetesNetworkPolicy => Self::KubernetesNetworkPolicy,
            enforced => enforced,
        }
    }

    /// Staged kind that previews policies of this kind, if there is one.
    pub fn staged(self) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.is_staged() && kind.enforced() == self)
    }

    /// Name in the API and on the wire.
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

    /// Short name for log lines, from Calico.
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

    /// Returns the kind of that name.
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

/// Position among tiers or policies: a number, or last. The API cannot express a NaN.
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
    /// Action at the end of the tier on packets that a policy of it applies to: `Deny` or `Pass`.
    pub default_action: Action,
}

/// Packets of a host endpoint that a policy applies to. Policies of namespaced kinds apply to no
/// host endpoints, whatever is written here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Traffic {
    /// Packets from and to the host itself.
    #[default]
    Normal,
    /// Packets of the host itself and forwarded ones: `applyOnForward`.
    Forwarded,
    /// All incoming packets, before DNAT: `preDNAT`. Does not apply to workloads.
    PreDnat,
    /// Packets without connection tracking: `doNotTrack`. Does not apply to workloads.
    Untracked,
}

impl Traffic {
    /// Returns true when such a policy applies to workloads too.
    pub fn is_for_workloads(self) -> bool {
        matches!(self, Self::Normal | Self::Forwarded)
    }
}

/// A policy in parsed form: the endpoints and directions that it applies to, and its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Name of its tier.
    pub tier: String,
    /// Position within the tier; ties are broken by name, namespace and kind.
    pub order: Order,
    /// Endpoints that it applies to, over effective labels.
    pub selector: Selector,
    /// Packets of host endpoints that it applies to.
    pub traffic: Traffic,
    /// True when it applies to packets to the endpoint.
    pub applies_ingress: bool,
    /// True when it applies to packets from the endpoint.
    pub applies_egress: bool,
    /// Rules for packets to the endpoint, in order.
    pub ingress: Vec<Rule>,
    /// Rules for packets from the endpoint, in order.
    pub egress: Vec<Rule>,
}

impl Policy {
    /// Returns true when it applies in at least one direction.
    pub fn applies(&self) -> bool {
        self.applies_ingress || self.applies_egress
    }
}

/// Change that a staged policy previews for the enforced policy of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StagedPolicy {
    /// The enforced policy would be created or replaced.
    Set(Policy),
    /// The enforced policy would be deleted.
    Delete,
    /// No change: the staged policy has been set aside.
    Ignore,
}
