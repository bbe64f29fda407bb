//! Output of the plugin, in the format of each version of the specification.

use margay_proto::cni;
use serde::Serialize;

use crate::config::{Version, version_in};
use crate::error::Error;

#[derive(Serialize)]
struct Success<'a> {
    #[serde(rename = "cniVersion")]
    version: &'static str,
    interfaces: Vec<Interface<'a>>,
    ips: Vec<Ip<'a>>,
    routes: Vec<Route<'a>>,
    dns: Dns<'a>,
}

#[derive(Serialize)]
struct Interface<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    mac: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(skip_serializing_if = "str::is_empty")]
    sandbox: &'a str,
}

#[derive(Serialize)]
struct Ip<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<u32>,
    address: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    gateway: &'a str,
}

#[derive(Serialize)]
struct Route<'a> {
    dst: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    gw: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    advmss: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    table: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<u32>,
}

#[derive(Default, Serialize)]
struct Dns<'a> {
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    nameservers: &'a [String],
    #[serde(skip_serializing_if = "str::is_empty")]
    domain: &'a str,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    search: &'a [String],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    options: &'a [String],
}

#[derive(Serialize)]
struct Failure<'a> {
    #[serde(rename = "cniVersion")]
    version: &'static str,
    code: u32,
    msg: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    details: &'a str,
}

#[derive(Serialize)]
struct Versions {
    #[serde(rename = "cniVersion")]
    version: &'static str,
    #[serde(rename = "supportedVersions")]
    supported: [&'static str; Version::ALL.len()],
}

/// Formats the result of ADD.
pub fn success(version: Version, result: &cni::Result) -> String {
    // Callers of older versions may refuse fields that these did not have.
    let since_110 = |value: u32| (value != 0 && version >= Version::V110).then_some(value);
    let newer = |value: Option<u32>| value.filter(|_| version >= Version::V110);
    let interfaces = result.interfaces.iter().map(|interface| Interface {
        name: &interface.name,
        mac: &interface.mac,
        mtu: since_110(interface.mtu),
        sandbox: &interface.sandbox,
    });
    let ips = result.ips.iter().map(|ip| Ip {
        version: (version < Version::V100).then(|| family(&ip.address)),
        interface: ip.interface,
        address: &ip.address,
        gateway: &ip.gateway,
    });
    let routes = result.routes.iter().map(|route| Route {
        dst: &route.dst,
        gw: &route.gw,
        mtu: since_110(route.mtu),
        advmss: since_110(route.advmss),
        priority: newer(route.priority),
        table: newer(route.table),
        scope: newer(route.scope),
    });
    let dns = result.dns.as_ref().map(|dns| Dns {
        nameservers: &dns.nameservers,
        domain: &dns.domain,
        search: &dns.search,
        options: &dns.options,
    });
    text(&Success {
        version: version.as_str(),
        interfaces: interfaces.collect(),
        ips: ips.collect(),
        routes: routes.collect(),
        dns: dns.unwrap_or_default(),
    })
}

/// Formats an error for standard output.
pub fn error(version: Version, error: &Error) -> String {
    text(&Failure {
        version: version.as_str(),
        code: error.code(),
        msg: error.to_string(),
        details: error.details(),
    })
}

/// Formats the answer to VERSION, which never fails: callers use it to negotiate.
pub fn versions(config: &[u8]) -> String {
    let version = version_in(config).as_str();
    text(&Versions {
        version,
        supported: Version::ALL.map(Version::as_str),
    })
}

fn family(address: &str) -> &'static str {
    if address.contains(':') { "6" } else { "4" }
}

fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings and numbers always serialize") + "\n"
}
