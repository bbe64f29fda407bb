//! Tests the kernel features that the agent needs, once at start, in a temporary network namespace:
//! kernels are configured in too many ways for their versions to tell. A missing feature is
//! reported with its option, its module and the consequence.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::thread;

use margay_api::network::Mac;
use nix::sched::{CloneFlags, unshare};

use crate::nftables;
use crate::routes::conntrack;
use crate::routes::message::{self, VethPair};
use crate::routes::sysctl;
use crate::routes::tunnel::VxlanDevice;
use margay_netlink::route::{NetlinkError, RequestMode, RouteSocket};
use margay_nft::{
    AddressType, Base, Chain, ChainName, ChainPolicy, ChainType, CmpOp, CtState, ExecError, Field,
    FieldType, Hook, Limit, Log, LogTarget, Masquerade, Match, NftSocket, Proto, RateUnit, Rule,
    Ruleset, Selector, Set, SetKind, SetName, Side, Statement, Transaction, Transport,
};

/// Kernel feature that may be missing.
#[derive(Debug)]
pub struct Feature {
    /// Name for users.
    pub name: &'static str,
    /// Options of the kernel configuration.
    pub options: &'static str,
    /// Kernel module of the feature.
    pub module: &'static str,
    /// Consequence if it is missing; `None`: nothing can be enforced.
    pub without: Option<&'static str>,
    trial: Trial,
}

/// How a feature is tested.
#[derive(Debug, Clone, Copy)]
enum Trial {
    /// Loads a table with these rules.
    Table(fn() -> Ruleset),
    /// Lists conntrack entries.
    Connections,
    Veth,
    Vxlan,
    Ipv6,
}

/// A missing feature.
#[derive(Debug)]
pub struct MissingFeature {
    feature: &'static Feature,
    error: io::Error,
}

/// The kernel lacks a feature without which nothing can be enforced.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UnsupportedKernel(String);

/// All features, prerequisites first.
const FEATURES: [Feature; 11] = [
    required_feature(
        "nftables with tables of the family inet",
        "CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET",
        "nf_tables",
        empty_table,
    ),
    required_feature(
        "connection tracking in nftables (ct)",
        "CONFIG_NF_CONNTRACK, CONFIG_NFT_CT",
        "nft_ct",
        ct_table,
    ),
    required_feature(
        "sets of ranges over several fields (Linux 5.6 and later)",
        "CONFIG_NF_TABLES",
        "nf_tables",
        ranges_table,
    ),
    required_feature(
        "source NAT in nftables (masquerade)",
        "CONFIG_NFT_NAT, CONFIG_NFT_MASQ",
        "nft_masq",
        masquerade_table,
    ),
    required_feature(
        "route lookups in nftables (fib)",
        "CONFIG_NFT_FIB_INET",
        "nft_fib_inet",
        fib_table,
    ),
    Feature {
        trial: Trial::Veth,
        ..required_feature(
            "pairs of virtual links (veth)",
            "CONFIG_VETH",
            "veth",
            empty_table,
        )
    },
    // Running pods stay enforced without it, so the agent starts.
    Feature {
        without: Some(
            "no pod starts, because conntrack entries of the former owner of its address cannot be \
             deleted",
        ),
        trial: Trial::Connections,
        ..required_feature(
            "listing and deleting connections (ctnetlink)",
            "CONFIG_NF_CT_NETLINK",
            "nf_conntrack_netlink",
            empty_table,
        )
    },
    Feature {
        without: Some("a list of policies with a Log rule denies everything"),
        ..required_feature(
            "log messages of nftables (log)",
            "CONFIG_NFT_LOG",
            "nft_log",
            log_table,
        )
    },
    Feature {
        without: Some(
            "if logActionRateLimit is set, a list of policies with a Log rule denies everything",
        ),
        ..required_feature(
            "rate limits in nftables (limit)",
            "CONFIG_NFT_LIMIT",
            "nft_limit",
            limit_table,
        )
    },
    Feature {
        without: Some("pods of other nodes cannot be reached in pools with VXLAN encapsulation"),
        trial: Trial::Vxlan,
        ..required_feature("VXLAN links", "CONFIG_VXLAN", "vxlan", empty_table)
    },
    Feature {
        without: Some("pods get no IPv6 addresses"),
        trial: Trial::Ipv6,
        ..required_feature(
            "IPv6",
            "CONFIG_IPV6, and no ipv6.disable=1 on the kernel's command line",
            "ipv6",
            empty_table,
        )
    },
];

const fn required_feature(
    name: &'static str,
    options: &'static str,
    module: &'static str,
    rules: fn() -> Ruleset,
) -> Feature {
    Feature {
        name,
        options,
        module,
        without: None,
        trial: Trial::Table(rules),
    }
}

impl fmt::Display for MissingFeature {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Feature {
            name,
            options,
            module,
            without,
            ..
        } = self.feature;
        let without = without.unwrap_or("no policy can be enforced");
        write!(
            out,
            "this kernel lacks {name} ({}): {without}; load the module {module} on the node, or \
             use a kernel with {options}",
            self.error
        )
    }
}

impl MissingFeature {
    /// Kernel module of the feature.
    pub const fn module(&self) -> &'static str {
        self.feature.module
    }
}

/// Tests all features in a temporary network namespace. An error means that they could not be
/// tested.
pub fn probe() -> io::Result<Vec<MissingFeature>> {
    let trial = || -> io::Result<Vec<MissingFeature>> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| {
            let error = io::Error::from(errno);
            io::Error::new(
                error.kind(),
                format!("no network namespace can be created: {error}; run the agent privileged"),
            )
        })?;
        Ok(find_missing(Feature::attempt))
    };
    thread::Builder::new()
        .name("features".to_owned())
        .spawn(trial)?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the feature test panicked")))
}

/// Fails if a feature is missing without which nothing can be enforced; returns the other missing
/// features.
pub fn require_features(
    missing: Vec<MissingFeature>,
) -> Result<Vec<MissingFeature>, UnsupportedKernel> {
    let fatal: Vec<String> = missing
        .iter()
        .filter(|feature| feature.feature.without.is_none())
        .map(MissingFeature::to_string)
        .collect();
    if fatal.is_empty() {
        Ok(missing)
    } else {
        Err(UnsupportedKernel(fatal.join("; ")))
    }
}

/// Describes the missing features; `None` if none is missing.
pub fn describe_missing(missing: &[MissingFeature]) -> Option<String> {
    let each: Vec<String> = missing.iter().map(MissingFeature::to_string).collect();
    (!each.is_empty()).then(|| each.join("; "))
}

fn find_missing(
    mut attempt: impl FnMut(&'static Feature) -> io::Result<()>,
) -> Vec<MissingFeature> {
    let try_one = |feature: &'static Feature| {
        attempt(feature)
            .err()
            .map(|error| MissingFeature { feature, error })
    };
    FEATURES.iter().filter_map(try_one).collect()
}

impl Feature {
    fn attempt(&self) -> io::Result<()> {
        match self.trial {
            Trial::Table(ruleset) => {
                let done = NftSocket::open()?.exec(&Transaction::replace(&ruleset()));
                done.map(drop).map_err(|error| match error {
                    ExecError::Refused { source, .. } => source,
                    other => io::Error::other(other),
                })
            }
            Trial::Connections => conntrack::try_listing(),
            Trial::Veth => {
                let own = File::open("/proc/thread-self/ns/net")?;
                let pair = VethPair {
                    host: "probe0",
                    pod: "probe1",
                    namespace: own.as_raw_fd(),
                    host_mac: Mac([2; 6]),
                    mac: Mac([2, 0, 0, 0, 0, 1]),
                    mtu: 1500,
                };
                create_link(message::new_veth(&pair))
            }
            Trial::Vxlan => {
                let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
                let (mac, underlay) = (Mac([2; 6]), Some(LOOPBACK));
                let (vni, port, mtu) = (1, 4789, 1450);
                let device = VxlanDevice {
                    address: local,
                    mac,
                    local,
                    vni,
                    port,
                    mtu,
                    underlay,
                    up: true,
                    offloads: true,
                };
                create_link(message::new_vxlan(&device, LOOPBACK))
            }
            Trial::Ipv6 if sysctl::has_ipv6() => Ok(()),
            Trial::Ipv6 => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX` in `net/flow.h`).
const LOOPBACK: u32 = 1;

/// Creates a link, which is removed with the namespace.
fn create_link(request: netlink_packet_route::RouteNetlinkMessage) -> io::Result<()> {
    let error = |error| match error {
        NetlinkError::Refused { errno, .. } => io::Error::from(errno),
        other => io::Error::other(other),
    };
    let mut socket = RouteSocket::open().map_err(error)?;
    socket
        .exec(request, RequestMode::Create, || "a link".to_owned())
        .map_err(error)
}

// --- Tables ---

fn empty_table() -> Ruleset {
    Ruleset::new(nftables::table())
}

/// A table with one base chain with this rule.
fn table_with_rule(kind: ChainType, hook: Hook, rule: Rule) -> Ruleset {
    let mut ruleset = empty_table();
    let base = Base {
        kind,
        hook,
        priority: 0,
        policy: ChainPolicy::Accept,
    };
    let name = ChainName::new("trial").expect("a constant name is valid");
    ruleset.put_chain(name, Chain::base(base, vec![rule]));
    ruleset
}

fn ct_table() -> Ruleset {
    let states = [CtState::ESTABLISHED, CtState::RELATED];
    let known = Rule::new()
        .when(Match::CtState(CmpOp::Eq, states[0] | states[1]))
        .counter()
        .accept();
    table_with_rule(ChainType::Filter, Hook::Forward, known)
}

/// A set of ranges over several fields, as the sets of peers with ports use.
fn ranges_table() -> Ruleset {
    let name = SetName::new("trial").expect("a constant name is valid");
    let key = vec![
        Selector::Saddr4,
        Selector::L4proto,
        Selector::Dport(Transport::Any),
    ];
    let rule = Rule::new().when(Match::in_set(key, &name)).accept();
    let mut ruleset = table_with_rule(ChainType::Filter, Hook::Forward, rule);
    let kind =
        SetKind::of(vec![FieldType::Ipv4, FieldType::Proto, FieldType::Port]).with_intervals();
    let net: ipnet::IpNet = "10.0.0.0/8".parse().expect("a constant range");
    ruleset.put_set(
        name,
        Set::members(
            kind,
            [[
                Field::from(net),
                Field::from(Proto::TCP),
                Field::from(80..=90),
            ]],
        ),
    );
    ruleset
}

fn masquerade_table() -> Ruleset {
    let masquerade = Statement::Masquerade(Masquerade {
        ports: None,
        fully_random: true,
    });
    table_with_rule(
        ChainType::Nat,
        Hook::Postrouting,
        Rule::new().then(masquerade),
    )
}

fn fib_table() -> Ruleset {
    let local = Match::AddressType(Side::Source, CmpOp::Eq, AddressType::Local);
    table_with_rule(
        ChainType::Nat,
        Hook::Postrouting,
        Rule::new().when(local).accept(),
    )
}

fn log_table() -> Ruleset {
    let log = Log {
        prefix: "trial".to_owned(),
        target: LogTarget::Syslog(5),
    };
    table_with_rule(
        ChainType::Filter,
        Hook::Forward,
        Rule::new().then(Statement::Log(log)),
    )
}

fn limit_table() -> Ruleset {
    let limit = Limit {
        rate: 1,
        unit: RateUnit::Second,
        burst: Limit::DEFAULT_BURST,
        over: false,
    };
    table_with_rule(
        ChainType::Filter,
        Hook::Forward,
        Rule::new().then(Statement::Limit(limit)).accept(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Missing features of a kernel without these modules.
    fn without(modules: &[&str]) -> Vec<MissingFeature> {
        find_missing(|feature| match modules.contains(&feature.module) {
            true => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            false => Ok(()),
        })
    }

    #[test]
    fn what_is_lacking_is_named_with_option_module_and_remedy() {
        let missing =
            require_features(without(&["vxlan", "ipv6"])).expect("nothing that is always needed");
        let words: Vec<String> = missing.iter().map(MissingFeature::to_string).collect();
        let wanted = [
            "this kernel lacks VXLAN links (Operation not supported (os error 95)): pods of other \
             nodes cannot be reached in pools with VXLAN encapsulation; load the module vxlan on \
             the node, or use a kernel with CONFIG_VXLAN",
            "this kernel lacks IPv6 (Operation not supported (os error 95)): pods get no IPv6 \
             addresses; load the module ipv6 on the node, or use a kernel with CONFIG_IPV6, and no \
             ipv6.disable=1 on the kernel's command line",
        ];
        assert_eq!(words, wanted);
        assert_eq!(super::describe_missing(&missing), Some(wanted.join("; ")));
        assert_eq!(super::describe_missing(&[]), None);
    }

    #[test]
    fn nothing_starts_where_nothing_can_be_enforced() {
        let refused = require_features(without(&["nft_ct", "veth", "vxlan"]))
            .expect_err("two that are always needed")
            .to_string();
        assert!(
            refused.contains("CONFIG_NFT_CT") && refused.contains("CONFIG_VETH"),
            "{refused}"
        );
        assert!(
            !refused.contains("VXLAN"),
            "what is not always needed hides what is: {refused}"
        );
    }

    /// Every test passes on a complete kernel.
    #[test]
    fn this_kernel_lacks_nothing() {
        let missing = probe().expect("root");
        assert!(
            missing.is_empty(),
            "{:?}",
            missing
                .iter()
                .map(MissingFeature::to_string)
                .collect::<Vec<_>>()
        );
    }
}
