//! Creates, changes and removes tunnel devices: the driver's operations on them.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use margay_api::network::TunnelKind;
use nix::errno::Errno;

use super::driver::Driver;
use super::tunnel::{IPIP_ALIAS, IpipDevice, TunnelDevice, VxlanDevice};
use super::{ethtool, message, parameters, present};
use margay_netlink::route::{NetlinkError, RequestMode};

const IPIP: &str = TunnelKind::Ipip.device_name();

impl Driver {
    /// Creates a tunnel device, brings it up and sets its address.
    pub(super) fn create_tunnel(
        &mut self,
        kind: TunnelKind,
        device: &TunnelDevice,
    ) -> Result<(), NetlinkError> {
        match device {
            TunnelDevice::Vxlan(device) => self.create_vxlan(kind.device_name(), device)?,
            TunnelDevice::Ipip(_) => self.adopt_ipip()?,
        }
        parameters::set_tunnel_parameters(kind)?;
        self.adjust_tunnel(kind.device_name(), device)
    }

    /// Sets what can change while the device is in use.
    pub(super) fn adjust_tunnel(
        &mut self,
        name: &str,
        device: &TunnelDevice,
    ) -> Result<(), NetlinkError> {
        let index = self.link_index(name)?;
        self.socket.exec(
            message::set_mtu(index, device.mtu()),
            RequestMode::Change,
            || format!("MTU of {name}"),
        )?;
        match device {
            TunnelDevice::Vxlan(device) => self.bring_up_vxlan(name, index, device)?,
            TunnelDevice::Ipip(device) => self.bring_up_ipip(index, device)?,
        }
        // After bringing it up: an IPv6 address set on a link that is down is lost when the link
        // comes up.
        self.socket.exec(
            message::new_host_address(index, device.address()),
            RequestMode::Replace,
            || format!("address of {name}"),
        )
    }

    fn create_vxlan(&mut self, name: &str, device: &VxlanDevice) -> Result<(), NetlinkError> {
        let underlay = device.underlay.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!(
                    "no link has the node's address {}; correct NODE_IP",
                    device.local
                ),
            )
        })?;
        self.socket.exec(
            message::new_vxlan(device, underlay),
            RequestMode::Create,
            || format!("create {name}"),
        )?;
        self.links = present::list_links(&mut self.socket)?;
        Ok(())
    }

    fn bring_up_vxlan(
        &mut self,
        name: &str,
        index: u32,
        device: &VxlanDevice,
    ) -> Result<(), NetlinkError> {
        if !device.offloads {
            ethtool::turn_checksum_offload_off(name)?;
        }
        match self.bring_up(name, index) {
            Err(NetlinkError::Refused {
                errno: Errno::EADDRINUSE,
                ..
            }) => Err(io::Error::new(io::ErrorKind::AddrInUse, port_in_use(name, device)).into()),
            result => result,
        }
    }

    /// Creates the IPIP device or takes the one that is there, which Calico may have left, and
    /// marks it as ours.
    fn adopt_ipip(&mut self) -> Result<(), NetlinkError> {
        let created = self
            .socket
            .exec(message::new_ipip(), RequestMode::Create, || {
                format!("create {IPIP}")
            });
        match created {
            Err(NetlinkError::Refused {
                errno: Errno::EEXIST,
                ..
            }) => {}
            Err(NetlinkError::Refused {
                errno: errno @ Errno::EOPNOTSUPP,
                ..
            }) => return Err(io::Error::new(io::ErrorKind::Unsupported, no_ipip(errno)).into()),
            result => result?,
        }
        self.links = present::list_links(&mut self.socket)?;
        let index = self.link_index(IPIP)?;
        self.set_ipip_alias(index, IPIP_ALIAS)
    }

    /// Addresses of others on the device, such as one that Calico has left, would become sources of
    /// the node's own packets.
    fn bring_up_ipip(&mut self, index: u32, device: &IpipDevice) -> Result<(), NetlinkError> {
        self.remove_ipip_addresses(index, Some(device.address))?;
        self.bring_up(IPIP, index)
    }

    /// Removes the IPIP device, or leaves the kernel's own, which cannot be removed, as it was
    /// before: down, without addresses and alias.
    pub(super) fn release_ipip(&mut self) -> Result<(), NetlinkError> {
        let index = match self.link_index(IPIP) {
            Err(error) if error.is_missing() => return Ok(()),
            index => index?,
        };
        self.remove_ipip_addresses(index, None)?;
        self.socket
            .exec(message::set_down(index), RequestMode::Change, || {
                format!("bring {IPIP} down")
            })?;
        self.set_ipip_alias(index, "")?;
        self.exec_removal(message::delete_link(IPIP), || format!("delete {IPIP}"))
    }

    fn remove_ipip_addresses(
        &mut self,
        index: u32,
        except: Option<Ipv4Addr>,
    ) -> Result<(), NetlinkError> {
        for (link, net) in present::list_addresses(&mut self.socket)? {
            let is_kept = net.addr().is_ipv6() || Some(net.addr()) == except.map(IpAddr::V4);
            if link == index && !is_kept {
                let request = message::delete_address(index, net);
                self.exec_removal(request, || format!("delete address {net} of {IPIP}"))?;
            }
        }
        Ok(())
    }

    fn set_ipip_alias(&mut self, index: u32, alias: &str) -> Result<(), NetlinkError> {
        self.socket.exec(
            message::set_alias(index, alias),
            RequestMode::Change,
            || format!("alias of {IPIP}"),
        )
    }

    fn bring_up(&mut self, name: &str, index: u32) -> Result<(), NetlinkError> {
        self.socket
            .exec(message::set_up(index), RequestMode::Change, || {
                format!("bring {name} up")
            })
    }
}

fn port_in_use(name: &str, device: &VxlanDevice) -> String {
    format!(
        "{name} cannot be brought up: another VXLAN device of this node uses UDP port {}; remove \
         that device, or set another vxlanPort in FelixConfiguration",
        device.port
    )
}

fn no_ipip(errno: Errno) -> String {
    format!(
        "{IPIP} cannot be created ({errno}): this kernel lacks IP in IP, and pods of other nodes \
         cannot be reached in pools with ipipMode; load the module ipip on the node, use a kernel \
         with CONFIG_NET_IPIP, or set vxlanMode on the pools instead"
    )
}
