//! Results and errors of calls.

use ipnet::IpNet;
use margay_dataplane::routes::plan::HOST_MAC;
use margay_dataplane::routes::pod::{self, PodError};
use margay_ipam::request::NoAddress;
use margay_proto::cni::{self, code};

use crate::cni::attachment::Attachment;
use crate::cni::request::CniError;

pub(super) fn cni_result(attachment: &Attachment, mtu: u32) -> cni::Result {
    let host = cni::Interface {
        name: attachment.interface.clone(),
        mac: HOST_MAC.to_string(),
        mtu,
        sandbox: String::new(),
    };
    let inside = cni::Interface {
        name: attachment.id.ifname.clone(),
        mac: attachment.mac.clone(),
        mtu,
        sandbox: attachment.netns.clone(),
    };
    let ip = |address: &IpNet| cni::Ip {
        address: address.to_string(),
        gateway: String::new(),
        interface: Some(1),
    };
    let default = |address: &IpNet| {
        let dst = if address.addr().is_ipv4() {
            "0.0.0.0/0"
        } else {
            "::/0"
        };
        cni::Route {
            dst: dst.to_owned(),
            gw: pod::pod_gateway(address.addr()).to_string(),
            ..cni::Route::default()
        }
    };
    cni::Result {
        interfaces: vec![host, inside],
        ips: attachment.addresses.iter().map(ip).collect(),
        routes: attachment.addresses.iter().map(default).collect(),
        dns: None,
    }
}

pub(super) fn io_error(error: std::io::Error) -> CniError {
    CniError::new(code::IO, error.to_string())
}

pub(super) fn kernel_error(error: PodError) -> CniError {
    CniError::new(code::KERNEL, error.to_string())
}

pub(super) fn address_error(error: NoAddress) -> CniError {
    match error {
        NoAddress::Exhausted(_) | NoAddress::Refused(_) => {
            CniError::new(code::NO_ADDRESS, error.to_string())
        }
        NoAddress::Unavailable(_) => unavailable_error(error),
    }
}

pub(super) fn unavailable_error(error: NoAddress) -> CniError {
    CniError::new(code::TRY_AGAIN, error.to_string())
}
