//! Tunnel devices of a node as values: what each is to be, and how one becomes another.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use margay_api::network::{Mac, NodeInfo, TunnelKind};
use margay_api::rule::IpVersion;
use margay_api::settings::FelixSettings;
use margay_calc::model::{Record, RecordId, globals};

/// A tunnel device of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TunnelDevice {
    /// VXLAN.
    Vxlan(VxlanDevice),
    /// IP in IP.
    Ipip(IpipDevice),
}

/// A VXLAN device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanDevice {
    /// Tunnel address of this node.
    pub address: IpAddr,
    /// MAC address of the device.
    pub mac: Mac,
    /// Outer source address: the node's address of the same IP version.
    pub local: IpAddr,
    /// Network identifier.
    pub vni: u32,
    /// Outer UDP port.
    pub port: u16,
    /// MTU; 0: that of the underlay less the overhead.
    pub mtu: u32,
    /// Index of the link of the outer packets; `None`: not resolved.
    pub underlay: Option<u32>,
    /// Whether it is up; always true in a wanted plan.
    pub up: bool,
    /// Whether TX checksum offload may be on. A wanted device with `true` accepts a present one
    /// without offload.
    pub offloads: bool,
}

/// The IPIP device. It has neither ends nor a link: each route names the other node, and the
/// kernel's routes lead there. The kernel creates a device of this name itself, which nobody can
/// delete and which others may use, so ours is known by its alias ([`IPIP_ALIAS`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpipDevice {
    /// Tunnel address of this node; in a present plan unspecified if it is not the only one.
    pub address: Ipv4Addr,
    /// Address of this node: its link carries the outer packets. Not in the kernel.
    pub local: Option<Ipv4Addr>,
    /// MTU; 0: that of the underlay less the overhead.
    pub mtu: u32,
    /// Whether it is up; always true in a wanted plan.
    pub up: bool,
}

/// Alias (`IFLA_IFALIAS`) of an IPIP device that we have set up.
pub const IPIP_ALIAS: &str = "margay";

impl TunnelDevice {
    /// Tunnel address of this node.
    pub fn address(&self) -> IpAddr {
        match self {
            Self::Vxlan(device) => device.address,
            Self::Ipip(device) => device.address.into(),
        }
    }

    /// Address of this node, whose link carries the outer packets.
    pub fn local(&self) -> Option<IpAddr> {
        match self {
            Self::Vxlan(device) => Some(device.local),
            Self::Ipip(device) => device.local.map(IpAddr::V4),
        }
    }

    /// MTU of the device.
    pub const fn mtu(&self) -> u32 {
        match self {
            Self::Vxlan(device) => device.mtu,
            Self::Ipip(device) => device.mtu,
        }
    }

    /// Completes the device with the link of the outer packets, if there is one, and with its MTU.
    pub(super) const fn resolve(&mut self, link: Option<u32>, mtu: u32) {
        match self {
            Self::Vxlan(device) => (device.underlay, device.mtu) = (link, mtu),
            Self::Ipip(device) => (device.local, device.mtu) = (None, mtu),
        }
    }

    /// Whether the device can be changed to `wanted` in place.
    pub fn can_become(&self, wanted: &Self) -> bool {
        match (self, wanted) {
            (Self::Vxlan(present), Self::Vxlan(wanted)) => present.can_become(wanted),
            (Self::Ipip(_), Self::Ipip(_)) => true,
            _ => false,
        }
    }

    /// Whether the device is as wanted, given that it can become so.
    pub fn is_as(&self, wanted: &Self) -> bool {
        match (self, wanted) {
            (Self::Vxlan(present), Self::Vxlan(wanted)) => {
                let adjustable = |device: &VxlanDevice| (device.address, device.mtu, device.up);
                adjustable(present) == adjustable(wanted) && (!present.offloads || wanted.offloads)
            }
            (present, wanted) => present == wanted,
        }
    }
}

impl VxlanDevice {
    /// Whether the device can be changed to `wanted` in place: identifier, port and outer address
    /// cannot.
    fn can_become(&self, wanted: &Self) -> bool {
        let is_same = |own: &Self| (own.mac, own.local, own.vni, own.port);
        let has_address = self.address == wanted.address || self.address.is_unspecified();
        let is_on_link = self.underlay.is_none()
            || wanted.underlay.is_none()
            || self.underlay == wanted.underlay;
        is_same(self) == is_same(wanted) && has_address && is_on_link
    }
}

/// Whether any pool uses the tunnel, at least across subnets.
pub fn has_tunnel(records: &BTreeMap<RecordId, Record>, kind: TunnelKind) -> bool {
    globals(records).any(|(id, record)| match (id, record) {
        (RecordId::Pool(range), Record::Pool(pool)) => {
            pool.encapsulation.tunnel(IpVersion::of(range.addr())) == Some(kind)
        }
        _ => false,
    })
}

/// MTU that the settings specify for a tunnel; 0: none.
pub fn configured_mtu(records: &BTreeMap<RecordId, Record>, kind: TunnelKind) -> u32 {
    let Some(Record::Settings(settings)) = records.get(&RecordId::Settings) else {
        return 0;
    };
    match kind {
        TunnelKind::Vxlan(IpVersion::V4) => settings.vxlan_mtu,
        TunnelKind::Vxlan(IpVersion::V6) => settings.vxlan_mtu_v6,
        TunnelKind::Ipip => settings.ipip_mtu,
    }
}

/// The tunnel device of a node, if a pool needs it and the node has an address for it.
pub(super) fn plan_device(
    me: &NodeInfo,
    records: &BTreeMap<RecordId, Record>,
    kind: TunnelKind,
) -> Option<TunnelDevice> {
    if !has_tunnel(records, kind) {
        return None;
    }
    let mtu = configured_mtu(records, kind);
    match kind {
        TunnelKind::Vxlan(version) => {
            let (address, mac, local) = vxlan_end(me, version)?;
            let defaults = FelixSettings::default();
            let settings = match records.get(&RecordId::Settings) {
                Some(Record::Settings(settings)) => settings,
                _ => &defaults,
            };
            Some(TunnelDevice::Vxlan(VxlanDevice {
                address,
                mac,
                local,
                vni: settings.vxlan_vni,
                port: settings.vxlan_port,
                mtu,
                underlay: None,
                up: true,
                offloads: !settings.checksum_offload_broken,
            }))
        }
        TunnelKind::Ipip => Some(TunnelDevice::Ipip(IpipDevice {
            address: me.ipip?,
            local: Some(me.ipv4?.addr()),
            mtu,
            up: true,
        })),
    }
}

/// Tunnel address, MAC address and node address of a node's VXLAN endpoint.
pub(super) fn vxlan_end(node: &NodeInfo, version: IpVersion) -> Option<(IpAddr, Mac, IpAddr)> {
    match version {
        IpVersion::V4 => {
            let (vtep, own) = (node.vtep?, node.ipv4?);
            Some((vtep.address.into(), vtep.mac, own.addr().into()))
        }
        IpVersion::V6 => {
            let (vtep, own) = (node.vtep6?, node.ipv6?);
            Some((vtep.address.into(), vtep.mac, own.addr().into()))
        }
    }
}
