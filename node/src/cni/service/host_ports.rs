//! Host ports of a pod: who has them, and the connections that were there before them.

use std::net::{IpAddr, Ipv6Addr};

use margay_api::host_port::HostPort;
use margay_api::rule::Protocol;
use margay_dataplane::routes::addresses;
use margay_dataplane::routes::conntrack::{LocalPort, TableError};
use margay_ipam::request::Addresses;
use margay_netlink::route::RouteSocket;
use margay_proto::cni::code;

use super::response::kernel_error;
use super::{Service, run_blocking};
use crate::cni::attachment::{Attachment, Attachments};
use crate::cni::ports::{Announcer, Enforcer};
use crate::cni::request::CniError;

impl<E: Enforcer, A: Addresses, N: Announcer> Service<E, A, N> {
    /// Deletes the conntrack entries of UDP clients that sent to the pod's host ports before these
    /// led anywhere: their next packets would not be translated either.
    pub(super) async fn delete_untranslated(&self, wanted: &Attachment) -> Result<(), CniError> {
        let ports: Vec<HostPort> = wanted
            .host_ports
            .iter()
            .filter(|port| port.protocol == Protocol::UDP)
            .copied()
            .collect();
        if ports.is_empty() {
            return Ok(());
        }
        let local = run_blocking(|| Ok(addresses::list(&mut RouteSocket::open()?)?))
            .await
            .map_err(kernel_error)?;
        let flows = LocalPort::of_host_ports(&ports, &local);
        let refusal = |error: TableError| {
            let text = format!("conntrack entries of host ports could not be deleted: {error}");
            CniError::new(code::TRY_AGAIN, text)
        };
        self.parts
            .conntrack
            .purge_untranslated(flows)
            .await
            .map_err(refusal)
    }
}

/// Logs the host ports that the kernel cannot serve.
pub(super) fn warn_of_useless(wanted: &Attachment) {
    let is_loopback = |port: &&HostPort| port.address == Some(IpAddr::V6(Ipv6Addr::LOCALHOST));
    for port in wanted.host_ports.iter().filter(is_loopback) {
        tracing::warn!(
            pod = %wanted.endpoint(),
            %port,
            "a host port of ::1 leads nowhere, as the kernel routes no packets between ::1 and \
             pods; use hostIP 127.0.0.1 or another address of the node"
        );
    }
}

/// Fails if another pod of this node has one of the host ports. Earlier sandboxes of the pod itself
/// are replaced.
pub(super) fn check_free(attachments: &Attachments, wanted: &Attachment) -> Result<(), CniError> {
    match attachments.host_port_owner(wanted) {
        Some((other, port)) => {
            let text = format!(
                "host port {port} of pod {} is used by pod {} on this node; wait until that pod \
                 has ended, or give one of them another hostPort",
                wanted.endpoint(),
                other.endpoint()
            );
            Err(CniError::new(code::TRY_AGAIN, text))
        }
        None => Ok(()),
    }
}
