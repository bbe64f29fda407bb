//! Parses a request from the socket into valid values.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, interface_name};
use margay_api::host_port::{HostPort, PortMapping};
use margay_api::meta::{
    ANNOTATION_POD_ADDRESSES, ANNOTATION_POD_ADDRESSES_NO_IPAM, ANNOTATION_POD_POOLS_V4,
    ANNOTATION_POD_POOLS_V6,
};
use margay_proto::cni::{self, code};
use serde::Deserialize;

use super::attachment::{Attachment, AttachmentId};
use margay_ipam::request::Demand;
use margay_netlink::namespace;

use margay_dataplane::routes::pod;

/// Maximal length of an interface name (`IFNAMSIZ - 1` in `linux/if.h`).
const MAX_IFNAME: usize = 15;
/// Margin between the agent's time limit and the plugin's.
const MARGIN: Duration = Duration::from_millis(500);

/// A failed call, with an error code of the CNI specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{msg}")]
pub struct CniError {
    /// Error code.
    pub code: u32,
    /// What is wrong, in one line, with its remedy.
    pub msg: String,
}

impl CniError {
    /// Creates an error with a code of [`margay_proto::cni::code`].
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
        }
    }
}

/// The agent's part of the network configuration; other fields are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Config {
    /// `mtu`; 0: as determined by the agent.
    #[serde(default)]
    pub mtu: u32,
    /// `policy_setup_timeout_seconds`: how long ADD waits for policy; 0: the agent's own limit.
    #[serde(default)]
    pub policy_setup_timeout_seconds: u64,
    /// `ipam`.
    #[serde(default)]
    pub ipam: IpamConfig,
    /// `runtimeConfig`: what the runtime passes for the capabilities of the configuration.
    #[serde(default, rename = "runtimeConfig")]
    pub runtime: RuntimeConfig,
    /// `prevResult`: the result of ADD as cached by the runtime, or null, or anything else.
    #[serde(default, rename = "prevResult")]
    pub previous: serde_json::Value,
}

/// The `runtimeConfig` section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct RuntimeConfig {
    /// Annotations of the pod; a runtime may pass null.
    #[serde(default, rename = "io.kubernetes.cri.pod-annotations")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// `portMappings`: ports of the pod's containers; a runtime may pass null.
    #[serde(default, rename = "portMappings")]
    pub port_mappings: Option<Vec<PortMapping>>,
}

/// The `ipam` section, with Calico's fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct IpamConfig {
    /// Whether pods get an IPv4 address; absent: if there is a pool for it.
    #[serde(default)]
    pub assign_ipv4: Option<Switch>,
    /// Whether pods get an IPv6 address; absent: if there is a pool for it.
    #[serde(default)]
    pub assign_ipv6: Option<Switch>,
    /// Names or ranges of the pools that pods may get IPv4 addresses from; empty: all.
    #[serde(default)]
    pub ipv4_pools: Vec<String>,
    /// Names or ranges of the pools that pods may get IPv6 addresses from; empty: all.
    #[serde(default)]
    pub ipv6_pools: Vec<String>,
}

/// A boolean; Calico writes it as a string.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "SwitchText")]
pub struct Switch(pub bool);

#[derive(Deserialize)]
#[serde(untagged)]
enum SwitchText {
    Bool(bool),
    Text(String),
}

impl TryFrom<SwitchText> for Switch {
    type Error = String;

    fn try_from(written: SwitchText) -> Result<Self, String> {
        match written {
            SwitchText::Bool(value) => Ok(Self(value)),
            SwitchText::Text(text) => match text.to_ascii_lowercase().as_str() {
                "true" => Ok(Self(true)),
                "false" => Ok(Self(false)),
                _ => Err(format!("{text:?} must be true or false")),
            },
        }
    }
}

impl Config {
    /// Parses the configuration of a request.
    pub fn parse(text: &[u8]) -> Result<Self, CniError> {
        let wrong = |error: serde_json::Error| {
            CniError::new(
                code::INVALID_CONFIG,
                format!(
                    "network configuration: {error}; correct the file in the CNI configuration \
                     folder"
                ),
            )
        };
        serde_json::from_slice(text).map_err(wrong)
    }

    /// Whether the pod needs an IPv4 and an IPv6 address. Pools named by the pod take precedence
    /// over those of the network configuration.
    pub fn demands(&self) -> Result<[Demand; 2], CniError> {
        let demand = |switch: Option<Switch>, annotation: &str, configured: &[String]| {
            let named = self
                .annotation(annotation)
                .map(|text| parse_pools(annotation, text))
                .transpose()?;
            let pools = named.unwrap_or_else(|| configured.to_vec());
            Ok(match switch {
                Some(Switch(false)) => Demand::Never,
                None if pools.is_empty() => Demand::IfPooled,
                Some(Switch(true)) | None => Demand::Always(pools),
            })
        };
        let ipam = &self.ipam;
        Ok([
            demand(ipam.assign_ipv4, ANNOTATION_POD_POOLS_V4, &ipam.ipv4_pools)?,
            demand(ipam.assign_ipv6, ANNOTATION_POD_POOLS_V6, &ipam.ipv6_pools)?,
        ])
    }

    /// Whether the pod's annotations name pools for its IPv4 and IPv6 address.
    pub fn names_pools(&self) -> [bool; 2] {
        [ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6]
            .map(|name| self.annotation(name).is_some())
    }

    /// Addresses of an earlier ADD, if the runtime passes them.
    pub fn previous_addresses(&self) -> Vec<IpAddr> {
        let ips = self
            .previous
            .get("ips")
            .and_then(serde_json::Value::as_array)
            .into_iter()
            .flatten();
        let address = |ip: &serde_json::Value| ip.get("address")?.as_str()?.parse::<IpNet>().ok();
        ips.filter_map(address).map(|net| net.addr()).collect()
    }

    /// Host ports of the pod, each once.
    pub fn host_ports(&self) -> Result<Vec<HostPort>, CniError> {
        let written = self.runtime.port_mappings.iter().flatten();
        let parse = |(index, mapping): (usize, &PortMapping)| {
            HostPort::try_from(mapping.clone()).map_err(|error| {
                CniError::new(
                    code::INVALID_CONFIG,
                    format!(
                        "runtimeConfig.portMappings[{index}].{error}; correct the ports of the \
                         pod's containers"
                    ),
                )
            })
        };
        // Some runtimes pass the ports that have no host port, too.
        let has_host_port = |(_, mapping): &(usize, &PortMapping)| mapping.host_port != 0;
        let ports: Result<BTreeSet<HostPort>, CniError> = written
            .enumerate()
            .filter(has_host_port)
            .map(parse)
            .collect();
        Ok(ports?.into_iter().collect())
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.runtime
            .annotations
            .as_ref()?
            .get(name)
            .map(String::as_str)
    }

    /// Addresses requested by the pod's annotation; empty without one.
    pub fn requested_addresses(&self) -> Result<Vec<IpAddr>, CniError> {
        if let Some(text) = self.annotation(ANNOTATION_POD_ADDRESSES_NO_IPAM) {
            let text = format!(
                "annotation {ANNOTATION_POD_ADDRESSES_NO_IPAM} is {text:?}: addresses outside IPAM \
                 are not supported, as nothing would keep two pods from using the same; request an \
                 address of a pool with {ANNOTATION_POD_ADDRESSES}"
            );
            return Err(CniError::new(code::DECODE, text));
        }
        let Some(text) = self.annotation(ANNOTATION_POD_ADDRESSES) else {
            return Ok(Vec::new());
        };
        let addresses: Vec<IpAddr> = serde_json::from_str(text).unwrap_or_default();
        let ipv4 = addresses.iter().filter(|address| address.is_ipv4()).count();
        if addresses.is_empty() || ipv4 > 1 || addresses.len() - ipv4 > 1 {
            let rule = r#"a JSON list of one IPv4 address, one IPv6 address or one of each, such as ["10.0.0.7"]"#;
            let text = format!(
                "annotation {ANNOTATION_POD_ADDRESSES} is {text:?}: must be {rule}; correct the pod"
            );
            return Err(CniError::new(code::DECODE, text));
        }
        Ok(addresses)
    }
}

/// Parses the pools that an annotation names.
fn parse_pools(annotation: &str, text: &str) -> Result<Vec<String>, CniError> {
    let named: Vec<String> = serde_json::from_str(text).unwrap_or_default();
    if named.is_empty() || named.iter().any(String::is_empty) {
        let rule = r#"a JSON list of names or ranges of IPPools, such as ["pool-a"]"#;
        let text = format!("annotation {annotation} is {text:?}: must be {rule}; correct the pod");
        return Err(CniError::new(code::DECODE, text));
    }
    Ok(named)
}

/// Validates the identity in a request: only letters, digits and `_.-`, so that it can be a file
/// name.
pub fn attachment_id(attachment: &cni::Attachment) -> Result<AttachmentId, CniError> {
    let plain = |text: &str| {
        !text.is_empty()
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
            && !text.starts_with('.')
    };
    if !plain(&attachment.container_id) {
        return Err(environment_error(
            "CNI_CONTAINERID",
            &attachment.container_id,
            "one or more letters, digits, '_', '.', '-', not beginning with '.'",
        ));
    }
    if !plain(&attachment.ifname) || attachment.ifname.len() > MAX_IFNAME {
        return Err(environment_error(
            "CNI_IFNAME",
            &attachment.ifname,
            "an interface name of 1 to 15 letters, digits, '_', '.', '-'",
        ));
    }
    Ok(AttachmentId {
        container: attachment.container_id.clone(),
        ifname: attachment.ifname.clone(),
    })
}

/// The pod, if the request names one.
pub fn endpoint(attachment: &cni::Attachment) -> Option<EndpointKey> {
    let pod = attachment
        .pod
        .as_ref()
        .filter(|pod| !pod.namespace.is_empty() && !pod.name.is_empty())?;
    Some(EndpointKey::new(&pod.namespace, &pod.name))
}

/// Builds the attachment that an ADD requests, without addresses.
pub fn new_attachment(network: &str, asked: &cni::Attachment) -> Result<Attachment, CniError> {
    let id = attachment_id(asked)?;
    let asked_pod = asked.pod.clone().unwrap_or_default();
    for (variable, value) in [
        ("K8S_POD_NAMESPACE", &asked_pod.namespace),
        ("K8S_POD_NAME", &asked_pod.name),
    ] {
        if value.is_empty() {
            return Err(environment_error(
                "CNI_ARGS",
                "",
                &format!("{variable}=... present; only Kubernetes pods can be attached"),
            ));
        }
    }
    let interface = interface_name(&EndpointKey::new(&asked_pod.namespace, &asked_pod.name));
    let mac = pod::pod_mac(&id.container, &id.ifname).to_string();
    Ok(Attachment {
        id,
        network: network.to_owned(),
        namespace: asked_pod.namespace,
        pod: asked_pod.name,
        uid: asked_pod.uid,
        netns: asked.netns.clone(),
        interface,
        addresses: Vec::new(),
        mac,
        mtu: 0,
        host_ports: Vec::new(),
        is_finished: false,
    })
}

/// Opens the network namespace of ADD or CHECK.
pub fn open_namespace(path: &str) -> Result<File, CniError> {
    let rule = "the path of a network namespace that exists on this node";
    namespace::open(Path::new(path)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::InvalidInput => {
            environment_error("CNI_NETNS", path, rule)
        }
        _ => CniError::new(
            code::IO,
            format!("CNI_NETNS {path:?}: {error}; must be {rule}"),
        ),
    })
}

/// Time limit of a response: the plugin's less a margin, at most the configured one.
pub fn time_limit(timeout_millis: u32, configured: Duration) -> Duration {
    let plugin = Duration::from_millis(u64::from(timeout_millis)).saturating_sub(MARGIN);
    if timeout_millis == 0 {
        configured
    } else {
        plugin.min(configured)
    }
}

fn environment_error(variable: &str, value: &str, rule: &str) -> CniError {
    CniError::new(
        code::INVALID_ENVIRONMENT,
        format!("{variable} is {value:?}: must be {rule}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_ports_are_those_of_the_runtime_each_once() {
        let ports = |text: &str| {
            let config = Config::parse(text.as_bytes()).expect("a configuration");
            let ports = config.host_ports().map_err(|error| error.msg)?;
            Ok::<_, String>(ports.iter().map(HostPort::to_string).collect::<Vec<_>>())
        };
        assert_eq!(ports("{}"), Ok(Vec::new()));
        assert_eq!(
            ports(r#"{"runtimeConfig": {"portMappings": null}}"#),
            Ok(Vec::new())
        );
        let written = r#"{"runtimeConfig": {"portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
            {"hostPort": 0, "containerPort": 90}
        ]}}"#;
        assert_eq!(ports(written), Ok(vec!["8080/TCP".to_owned()]));
        let bad =
            r#"{"runtimeConfig": {"portMappings": [{"hostPort": 70000, "containerPort": 80}]}}"#;
        let error = ports(bad).expect_err("a port");
        assert!(
            error.starts_with("runtimeConfig.portMappings[0].hostPort is 70000"),
            "{error}"
        );
    }

    #[test]
    fn demands_are_read_from_calicos_configuration() {
        let any = || Demand::Always(Vec::new());
        let table = [
            ("{}", [Demand::IfPooled, Demand::IfPooled]),
            (
                r#"{"ipam": {"assign_ipv4": "false", "assign_ipv6": "true"}}"#,
                [Demand::Never, any()],
            ),
            (
                r#"{"ipam": {"assign_ipv4": true, "assign_ipv6": false}}"#,
                [any(), Demand::Never],
            ),
            (
                r#"{"ipam": {"ipv6_pools": ["six"]}}"#,
                [Demand::IfPooled, Demand::Always(vec!["six".to_owned()])],
            ),
        ];
        for (text, wanted) in table {
            assert_eq!(
                Config::parse(text.as_bytes())
                    .expect("a configuration")
                    .demands(),
                Ok(wanted),
                "{text}"
            );
        }
        let none =
            Config::parse(br#"{"runtimeConfig": {"io.kubernetes.cri.pod-annotations": null}}"#);
        assert_eq!(
            none.expect("a configuration").requested_addresses(),
            Ok(Vec::new())
        );
        let refusal =
            Config::parse(br#"{"ipam": {"assign_ipv6": "perhaps"}}"#).expect_err("no yes or no");
        assert_eq!(refusal.code, code::INVALID_CONFIG);
        assert!(
            refusal.msg.contains(r#""perhaps" must be true or false"#),
            "{refusal}"
        );
    }

    #[test]
    fn addresses_of_an_earlier_add_are_taken_as_far_as_they_can_be_read() {
        let table: [(&str, &[&str]); 5] = [
            ("null", &[]),
            ("7", &[]),
            (r#"{"ips": 7}"#, &[]),
            (
                r#"{"ips": [{"address": "10.0.0.7/32"}, {"address": "x"}, {}, {"address": "fd00::7/128"}]}"#,
                &["10.0.0.7", "fd00::7"],
            ),
            (
                r#"{"ips": [{"version": "4", "address": "10.0.0.7/24"}]}"#,
                &["10.0.0.7"],
            ),
        ];
        for (text, wanted) in table {
            let config = Config::parse(format!(r#"{{"prevResult": {text}}}"#).as_bytes())
                .expect("a configuration");
            let addresses: Vec<String> = config
                .previous_addresses()
                .iter()
                .map(IpAddr::to_string)
                .collect();
            assert_eq!(addresses, wanted, "{text}");
        }
    }

    fn annotated(annotation: &str, text: &str) -> Config {
        let annotations = BTreeMap::from([(annotation.to_owned(), text.to_owned())]);
        let ipam = IpamConfig {
            ipv4_pools: vec!["configured".to_owned()],
            ..IpamConfig::default()
        };
        Config {
            ipam,
            runtime: RuntimeConfig {
                annotations: Some(annotations),
                ..RuntimeConfig::default()
            },
            ..Config::default()
        }
    }

    #[test]
    fn pools_that_a_pod_names_come_before_those_of_the_configuration() {
        let always =
            |pools: &[&str]| Demand::Always(pools.iter().map(|pool| (*pool).to_owned()).collect());
        let four = annotated(ANNOTATION_POD_POOLS_V4, r#"["a", "10.0.0.0/16"]"#).demands();
        assert_eq!(four, Ok([always(&["a", "10.0.0.0/16"]), Demand::IfPooled]));
        assert_eq!(
            annotated(ANNOTATION_POD_POOLS_V4, r#"["a"]"#).names_pools(),
            [true, false]
        );
        let six = annotated(ANNOTATION_POD_POOLS_V6, r#"["six"]"#).demands();
        assert_eq!(six, Ok([always(&["configured"]), always(&["six"])]));
        for wrong in ["", "a", "[]", r#"[""]"#, "[1]"] {
            let refusal = annotated(ANNOTATION_POD_POOLS_V4, wrong)
                .demands()
                .expect_err(wrong);
            assert!(
                refusal.code == code::DECODE && refusal.msg.contains("must be a JSON list"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn addresses_without_ipam_are_refused() {
        let refusal = annotated(ANNOTATION_POD_ADDRESSES_NO_IPAM, r#"["10.0.0.7"]"#)
            .requested_addresses()
            .expect_err("refused");
        assert!(
            refusal.msg.contains("ipAddrsNoIpam")
                && refusal.msg.contains("cni.projectcalico.org/ipAddrs"),
            "{refusal}"
        );
    }

    #[test]
    fn addresses_that_a_pod_names_are_one_of_each_version_at_most() {
        let requested =
            |text: &str| annotated(ANNOTATION_POD_ADDRESSES, text).requested_addresses();
        let addresses = requested(r#"["fd00::7", "10.0.0.7"]"#).expect("one of each");
        assert_eq!(
            addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>(),
            ["fd00::7", "10.0.0.7"]
        );
        for wrong in [
            "",
            "[]",
            "10.0.0.7",
            r#"["10.0.0.7/32"]"#,
            r#"["10.0.0.7", "10.0.0.8"]"#,
            r#"["fd00::1", "fd00::2"]"#,
        ] {
            let refusal = requested(wrong).expect_err(wrong);
            assert!(
                refusal.code == code::DECODE && refusal.msg.contains("must be a JSON list"),
                "{refusal}"
            );
        }
    }
}
