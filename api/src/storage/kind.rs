//! Kinds of Calico's data and their names in each storage.

use kube::core::{ApiResource, GroupVersionKind};

use super::Mode;

/// Form in which a kind's metadata is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// In the annotation, without the name.
    Plain,
    /// In the annotation with the name, because the stored name can have a prefix.
    Policy,
    /// Unchanged: only programs write these kinds, and there is no user form.
    Ipam,
}

/// A kind of Calico's data.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// Kind in `projectcalico.org/v3`.
    pub kind: &'static str,
    /// Plural in `projectcalico.org/v3`.
    pub plural: &'static str,
    /// Kind in `crd.projectcalico.org/v1`.
    pub stored_kind: &'static str,
    /// Plural in `crd.projectcalico.org/v1`.
    pub stored_plural: &'static str,
    /// True for namespaced kinds.
    pub namespaced: bool,
    /// True for the fifteen kinds that clusters have had since Calico v3.16 (2020); the others came
    /// later.
    pub classic: bool,
    /// Form in which its metadata is stored.
    pub class: Class,
}

const fn kind(kind: &'static str, plural: &'static str, class: Class) -> Kind {
    Kind {
        kind,
        plural,
        stored_kind: kind,
        stored_plural: plural,
        namespaced: false,
        classic: true,
        class,
    }
}

const fn namespaced(of: Kind) -> Kind {
    Kind {
        namespaced: true,
        ..of
    }
}

const fn later(of: Kind) -> Kind {
    Kind {
        classic: false,
        ..of
    }
}

/// Every kind of Calico v3.32's open source manifest.
#[rustfmt::skip]
pub static ALL: &[Kind] = &[
    kind("BGPConfiguration", "bgpconfigurations", Class::Plain),
    later(kind("BGPFilter", "bgpfilters", Class::Plain)),
    kind("BGPPeer", "bgppeers", Class::Plain),
    kind("BlockAffinity", "blockaffinities", Class::Ipam),
    later(kind("CalicoNodeStatus", "caliconodestatuses", Class::Plain)),
    kind("ClusterInformation", "clusterinformations", Class::Plain),
    kind("FelixConfiguration", "felixconfigurations", Class::Plain),
    kind("GlobalNetworkPolicy", "globalnetworkpolicies", Class::Policy),
    kind("GlobalNetworkSet", "globalnetworksets", Class::Plain),
    kind("HostEndpoint", "hostendpoints", Class::Plain),
    kind("IPAMBlock", "ipamblocks", Class::Ipam),
    Kind {
        stored_kind: "IPAMConfig",
        stored_plural: "ipamconfigs",
        ..kind("IPAMConfiguration", "ipamconfigurations", Class::Plain)
    },
    kind("IPAMHandle", "ipamhandles", Class::Ipam),
    kind("IPPool", "ippools", Class::Plain),
    later(kind("IPReservation", "ipreservations", Class::Plain)),
    kind("KubeControllersConfiguration", "kubecontrollersconfigurations", Class::Plain),
    namespaced(kind("NetworkPolicy", "networkpolicies", Class::Policy)),
    namespaced(kind("NetworkSet", "networksets", Class::Plain)),
    later(kind("StagedGlobalNetworkPolicy", "stagedglobalnetworkpolicies", Class::Policy)),
    later(namespaced(kind(
        "StagedKubernetesNetworkPolicy",
        "stagedkubernetesnetworkpolicies",
        Class::Plain,
    ))),
    later(namespaced(kind("StagedNetworkPolicy", "stagednetworkpolicies", Class::Policy))),
    later(kind("Tier", "tiers", Class::Plain)),
];

impl Kind {
    /// Returns the kind of that name in `projectcalico.org/v3`.
    pub fn of(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|kind| kind.kind == name)
    }

    /// Returns the kind of that plural in `projectcalico.org/v3`.
    pub fn of_plural(plural: &str) -> Option<&'static Self> {
        ALL.iter().find(|kind| kind.plural == plural)
    }

    /// Returns the kind served at a path such as `/apis/projectcalico.org/v3/ippools`.
    pub fn of_path(path: &str) -> Option<&'static Self> {
        Self::of_plural(
            path.strip_prefix("/apis/")?
                .strip_prefix(&*Mode::V3.api_version())?
                .strip_prefix('/')?,
        )
    }

    /// Returns its plural in that storage.
    pub fn plural_in(&self, mode: Mode) -> &'static str {
        match mode {
            Mode::V1 => self.stored_plural,
            Mode::V3 => self.plural,
        }
    }

    /// Returns its kind in that storage.
    pub fn kind_in(&self, mode: Mode) -> &'static str {
        match mode {
            Mode::V1 => self.stored_kind,
            Mode::V3 => self.kind,
        }
    }

    /// Returns the API path of all objects of the kind.
    pub fn path(&self, mode: Mode) -> String {
        format!("/apis/{}/{}", mode.api_version(), self.plural_in(mode))
    }

    /// Returns the resource for an API client.
    pub fn resource(&self, mode: Mode) -> ApiResource {
        let names = GroupVersionKind::gvk(mode.group(), mode.version(), self.kind_in(mode));
        ApiResource::from_gvk_with_plural(&names, self.plural_in(mode))
    }
}
