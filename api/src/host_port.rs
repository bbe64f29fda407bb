//! Host ports: ports of a node that lead to ports of a pod, as runtimes pass them to CNI plugins.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::rule::Protocol;

/// Protocols of host ports, with their names in a pod's `ports`.
const PROTOCOLS: [(&str, Protocol); 3] = [
    ("TCP", Protocol::TCP),
    ("UDP", Protocol::UDP),
    ("SCTP", Protocol::SCTP),
];

/// A port of the node that leads to a port of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "PortMapping", into = "PortMapping")]
pub struct HostPort {
    /// Address of the node, from `hostIP`. The unspecified one means every address of its IP
    /// version, and `None` every address.
    pub address: Option<IpAddr>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// Port of the node; not 0.
    pub port: u16,
    /// Port of the pod; not 0.
    pub pod_port: u16,
}

/// An entry of `portMappings` as written (CNI conventions, "dynamic plugin specific fields").
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortMapping {
    /// Port of the node; 0: the port of the pod has none.
    pub host_port: i64,
    /// Port of the pod.
    pub container_port: i64,
    /// Protocol in any case; empty: TCP.
    pub protocol: String,
    /// Address of the node; empty: every one.
    #[serde(rename = "hostIP")]
    pub host_ip: String,
}

/// A bad entry of `portMappings`: field, value and rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: must be {rule}")]
pub struct BadPortMapping {
    field: &'static str,
    value: String,
    rule: &'static str,
}

impl TryFrom<PortMapping> for HostPort {
    type Error = BadPortMapping;

    fn try_from(written: PortMapping) -> Result<Self, BadPortMapping> {
        Ok(Self {
            address: parse_address(&written.host_ip)?,
            protocol: parse_protocol(&written.protocol)?,
            port: parse_port("hostPort", written.host_port)?,
            pod_port: parse_port("containerPort", written.container_port)?,
        })
    }
}

impl From<HostPort> for PortMapping {
    fn from(port: HostPort) -> Self {
        Self {
            host_port: port.port.into(),
            container_port: port.pod_port.into(),
            protocol: protocol_name(port.protocol).to_owned(),
            host_ip: port
                .address
                .map(|address| address.to_string())
                .unwrap_or_default(),
        }
    }
}

impl HostPort {
    /// Whether some packet to the node is for both. Kubernetes' scheduler decides the same way
    /// whether a node has a port free.
    pub fn overlaps(&self, other: &Self) -> bool {
        let shares_address = match (self.address, other.address) {
            (Some(own), Some(other)) => {
                own.is_ipv4() == other.is_ipv4()
                    && (own == other || own.is_unspecified() || other.is_unspecified())
            }
            _ => true,
        };
        self.protocol == other.protocol && self.port == other.port && shares_address
    }
}

/// As in messages: `8080/TCP`, or `192.0.2.1:8080/TCP`.
impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        write!(f, "{}/{}", self.port, protocol_name(self.protocol))
    }
}

fn protocol_name(protocol: Protocol) -> &'static str {
    PROTOCOLS
        .iter()
        .find(|(_, known)| *known == protocol)
        .map_or("TCP", |(name, _)| name)
}

fn parse_protocol(text: &str) -> Result<Protocol, BadPortMapping> {
    if text.is_empty() {
        return Ok(Protocol::TCP);
    }
    PROTOCOLS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(text))
        .map(|(_, protocol)| *protocol)
        .ok_or_else(|| BadPortMapping {
            field: "protocol",
            value: format!("{text:?}"),
            rule: "TCP, UDP or SCTP",
        })
}

fn parse_port(field: &'static str, number: i64) -> Result<u16, BadPortMapping> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| BadPortMapping {
            field,
            value: number.to_string(),
            rule: "a port from 1 to 65535",
        })
}

fn parse_address(text: &str) -> Result<Option<IpAddr>, BadPortMapping> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| BadPortMapping {
        field: "hostIP",
        value: format!("{text:?}"),
        rule: "an IP address of the node, 0.0.0.0, :: or empty",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<HostPort, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn port_mappings_are_read_as_runtimes_write_them_and_written_as_they_are_read() {
        for (text, wanted) in [
            (r#"{"hostPort":8080,"containerPort":80}"#, "8080/TCP"),
            (
                r#"{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":""}"#,
                "53/UDP",
            ),
            (
                r#"{"hostPort":1,"containerPort":2,"protocol":"SCTP","hostIP":"192.0.2.1"}"#,
                "192.0.2.1:1/SCTP",
            ),
            (
                r#"{"hostPort":65535,"containerPort":2,"hostIP":"fd00::1","other":true}"#,
                "[fd00::1]:65535/TCP",
            ),
        ] {
            let port = parse(text).expect(text);
            assert_eq!(port.to_string(), wanted, "{text}");
            let again = serde_json::to_string(&port).expect("a mapping");
            assert_eq!(parse(&again), Ok(port), "{again}");
        }
        for (text, wanted) in [
            (
                r#"{"hostPort":65536,"containerPort":80}"#,
                "hostPort is 65536: must be a port from 1 to 65535",
            ),
            (
                r#"{"hostPort":80}"#,
                "containerPort is 0: must be a port from 1 to 65535",
            ),
            (
                r#"{"hostPort":80,"containerPort":80,"protocol":"icmp"}"#,
                r#"protocol is "icmp": must be TCP, UDP or SCTP"#,
            ),
            (
                r#"{"hostPort":80,"containerPort":80,"hostIP":"node"}"#,
                r#"hostIP is "node": must be an IP address of the node, 0.0.0.0, :: or empty"#,
            ),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.starts_with(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn ports_overlap_where_the_scheduler_says_so() {
        let port = |ip: &str, protocol: &str| {
            parse(&format!(
                r#"{{"hostPort":80,"containerPort":1,"protocol":"{protocol}","hostIP":"{ip}"}}"#
            ))
            .expect("a mapping")
        };
        for (one, other, overlap) in [
            ("", "", true),
            ("", "192.0.2.1", true),
            ("", "fd00::1", true),
            ("0.0.0.0", "192.0.2.1", true),
            ("0.0.0.0", "fd00::1", false),
            ("0.0.0.0", "::", false),
            ("::", "fd00::1", true),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
        ] {
            let (left, right) = (port(one, "TCP"), port(other, "TCP"));
            assert_eq!(left.overlaps(&right), overlap, "{one} and {other}");
            assert_eq!(right.overlaps(&left), overlap, "{other} and {one}");
            assert!(!left.overlaps(&port(other, "UDP")), "another protocol");
        }
        let other = HostPort {
            port: 81,
            ..port("", "TCP")
        };
        assert!(!other.overlaps(&port("", "TCP")), "another port");
    }
}
