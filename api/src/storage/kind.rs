//! The kinds of Calico's data and what they are called in each storage.

use kube::core::{ApiResource, GroupVersionKind};

use super::Mode;

/// How a kind's metadata is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// In the annotation, without the name.
    Plain,
    /// In the annotation with the name, because the stored name can have a prefix.
    Policy,
    /// As it is: programs only write it, users have no form of their own.
    Ipam,
}

/// One kind.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// Name of the kind as users know it.
    pub kind: &'static str,
    /// Name of the collection as users know it.
    pub plural: &'static str,
    /// Name of the kind in the older storage.
    pub stored_kind: &'static str,
    /// Name of the collection in the older storage.
    pub stored_plural: &'static str,
    /// Whether its objects live in namespaces.
    pub namespaced: bool,
    /// Whether clusters have it since Calico v3.16 (of 2020), whose manifest installs fifteen kinds; the others came later.
    pub classic: bool,
    /// How its metadata is stored.
    pub class: Class,
}

const fn kind(kind: &'static str, plural: &'static str, class: Class) -> Kind {
    Kind { kind, plural, stored_kind: kind, stored_plural: plural, namespaced: false, classic: true, class }
}

const fn namespaced(of: Kind) -> Kind {
    Kind { namespaced: true, ..of }
}

const fn later(of: Kind) -> Kind {
    Kind { classic: false, ..of }
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
    Kind { stored_kind: "IPAMConfig", stored_plural: "ipamconfigs", ..kind("IPAMConfiguration", "ipamconfigurations", Class::Plain) },
    kind("IPAMHandle", "ipamhandles", Class::Ipam),
    kind("IPPool", "ippools", Class::Plain),
    later(kind("IPReservation", "ipreservations", Class::Plain)),
    kind("KubeControllersConfiguration", "kubecontrollersconfigurations", Class::Plain),
    namespaced(kind("NetworkPolicy", "networkpolicies", Class::Policy)),
    namespaced(kind("NetworkSet", "networksets", Class::Plain)),
    later(kind("StagedGlobalNetworkPolicy", "stagedglobalnetworkpolicies", Class::Policy)),
    later(namespaced(kind("StagedKubernetesNetworkPolicy", "stagedkubernetesnetworkpolicies", Class::Plain))),
    later(namespaced(kind("StagedNetworkPolicy", "stagednetworkpolicies", Class::Policy))),
    later(kind("Tier", "tiers", Class::Plain)),
];

impl Kind {
    /// The kind that users know by that name.
    pub fn of(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|kind| kind.kind == name)
    }

    /// The kind whose collection users know by that name.
    pub fn of_plural(plural: &str) -> Option<&'static Self> {
        ALL.iter().find(|kind| kind.plural == plural)
    }

    /// The kind that is served at a path of the users' form, such as `/apis/projectcalico.org/v3/ippools`.
    pub fn of_path(path: &str) -> Option<&'static Self> {
        Self::of_plural(path.strip_prefix("/apis/")?.strip_prefix(&*Mode::V3.api_version())?.strip_prefix('/')?)
    }

    /// Name of the collection in that storage.
    pub fn plural_in(&self, mode: Mode) -> &'static str {
        match mode {
            Mode::V1 => self.stored_plural,
            Mode::V3 => self.plural,
        }
    }

    /// Name of the kind in that storage.
    pub fn kind_in(&self, mode: Mode) -> &'static str {
        match mode {
            Mode::V1 => self.stored_kind,
            Mode::V3 => self.kind,
        }
    }

    /// Where the API serves all objects of the kind.
    pub fn path(&self, mode: Mode) -> String {
        format!("/apis/{}/{}", mode.api_version(), self.plural_in(mode))
    }

    /// The kind as a client of the API names it.
    pub fn resource(&self, mode: Mode) -> ApiResource {
        let names = GroupVersionKind::gvk(mode.group(), mode.version(), self.kind_in(mode));
        ApiResource::from_gvk_with_plural(&names, self.plural_in(mode))
    }
}
