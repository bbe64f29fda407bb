//! Reference computation of everything from the objects at once: no index, no history. Slow and
//! simple; the graph is compared with it.

mod labels;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use margay_api::endpoint::{
    EndpointKey, HostEndpoint, HostInterface, NamedPort, Profile, WorkloadEndpoint,
};
use margay_api::hosts::{CREATED_BY, LABEL_CREATED_BY};
use margay_api::meta::{Labels, NamespacedName};
use margay_api::network::{BlockInfo, Encapsulation, NetworkSet, NodeInfo, Pool};
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, StagedPolicy, Tier, Traffic};
use margay_api::rule::{Action, Rule};
use margay_api::selector::Selector;
use margay_api::settings::{FelixOverrides, FelixSettings, SettingsScope};

use margay_calc::evaluate::Direction;
use margay_calc::flush::Audience;
use margay_calc::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, Member, PolicyRecord,
    PoolRecord, Record, RecordId, RouteRecord, SetId, TierBinding,
};
use margay_calc::update::{Backend, NamespaceInfo, NetworkSetKey, Update};
use rules::{SetSpec, resolve};

/// Normalises minus zero to zero.
pub fn order(order: Order) -> Order {
    let is_zero = order.0.is_some_and(|number| number == 0.0);
    if is_zero { Order(Some(0.0)) } else { order }
}

/// Breaks ties among policies.
pub fn tie(key: &PolicyKey) -> String {
    format!("{}/{}/{}", key.name, key.namespace, key.kind.as_str())
}

/// Every object, by kind.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    pub endpoints: BTreeMap<EndpointKey, WorkloadEndpoint>,
    pub hosts: BTreeMap<String, HostEndpoint>,
    pub namespaces: BTreeMap<String, NamespaceInfo>,
    pub service_accounts: BTreeMap<NamespacedName, Labels>,
    pub policies: BTreeMap<PolicyKey, Policy>,
    pub staged: BTreeMap<PolicyKey, StagedPolicy>,
    pub tiers: BTreeMap<String, Tier>,
    pub network_sets: BTreeMap<NetworkSetKey, NetworkSet>,
    pub services: BTreeMap<NamespacedName, Vec<Backend>>,
    pub nodes: BTreeMap<String, NodeInfo>,
    pub pools: BTreeMap<String, Pool>,
    pub blocks: BTreeMap<IpNet, BlockInfo>,
    pub settings: BTreeMap<String, FelixOverrides>,
}

/// An object with addresses.
pub struct Owner<'a> {
    pub labels: Labels,
    pub addresses: Vec<IpAddr>,
    pub ports: &'a [NamedPort],
}

fn is_for_hosts_only(policy: &Policy) -> bool {
    policy.traffic == Traffic::PreDnat || policy.traffic == Traffic::Untracked
}

/// Every record that some node holds.
pub type Computed = BTreeMap<RecordId, (Record, Audience)>;

fn put<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
    match value {
        Some(value) => map.insert(key, value),
        None => map.remove(&key),
    };
}

impl Objects {
    pub fn apply(&mut self, update: Update) {
        match update {
            Update::Endpoint(key, value) => put(&mut self.endpoints, key, value),
            Update::HostEndpoint(key, value) => put(&mut self.hosts, key, value),
            Update::Namespace(key, value) => put(&mut self.namespaces, key, value),
            Update::ServiceAccount(key, value) => put(&mut self.service_accounts, key, value),
            Update::Policy(key, value) => put(&mut self.policies, key, value),
            Update::Staged(key, value) => put(&mut self.staged, key, value),
            Update::Tier(key, value) => put(&mut self.tiers, key, value),
            Update::NetworkSet(key, value) => put(&mut self.network_sets, key, value),
            Update::Service(key, value) => put(&mut self.services, key, value),
            Update::Node(key, value) => put(&mut self.nodes, key, value),
            Update::Pool(key, value) => put(&mut self.pools, key, value),
            Update::Block(key, value) => put(&mut self.blocks, key, value),
            Update::Settings(key, value) => put(&mut self.settings, key, value),
            // Without BGP they have no effect.
            Update::ServiceAddresses(..)
            | Update::BgpSettings(..)
            | Update::BgpPeer(..)
            | Update::BgpFilter(..) => {}
        }
    }

    pub fn settings(&self, node: &str) -> FelixSettings {
        let labels = self
            .nodes
            .get(node)
            .map(|info| info.labels.clone())
            .unwrap_or_default();
        let selected = self.settings.values().filter(|object| {
            let SettingsScope::Selected(selector) = &object.scope else {
                return false;
            };
            self.nodes.contains_key(node) && selector.matches(&labels)
        });
        let own = self.settings.get(&format!("node.{node}"));
        // From the strongest layer: the first that sets a field decides it.
        let layers: Vec<&FelixOverrides> = own
            .into_iter()
            .chain(selected)
            .chain(self.settings.get("default"))
            .collect();
        let built_in = FelixSettings::default();
        FelixSettings {
            vxlan_mtu: layers
                .iter()
                .find_map(|layer| layer.vxlan_mtu)
                .unwrap_or(built_in.vxlan_mtu),
            vxlan_port: layers
                .iter()
                .find_map(|layer| layer.vxlan_port)
                .unwrap_or(built_in.vxlan_port),
            allow_conntrack_invalid: { layers.iter() }
                .find_map(|layer| layer.allow_conntrack_invalid)
                .unwrap_or(built_in.allow_conntrack_invalid),
            log_prefix: layers
                .iter()
                .find_map(|layer| layer.log_prefix.clone())
                .unwrap_or(built_in.log_prefix),
            failsafe_inbound: { layers.iter() }
                .find_map(|layer| layer.failsafe_inbound.clone())
                .unwrap_or(built_in.failsafe_inbound),
            failsafe_outbound: { layers.iter() }
                .find_map(|layer| layer.failsafe_outbound.clone())
                .unwrap_or(built_in.failsafe_outbound),
            no_namespace_names_pools: !self.namespaces.values().any(|info| info.names_pools),
            ..FelixSettings::default()
        }
    }

    pub fn compute(&self) -> Computed {
        let mut records = self.global();
        let mut policies: BTreeMap<&PolicyKey, BTreeSet<&str>> = BTreeMap::new();
        for (key, endpoint) in self
            .endpoints
            .iter()
            .filter(|(_, endpoint)| !endpoint.node.is_empty())
        {
            let applied = self.applied(key, endpoint);
            for (policy, _) in &applied {
                policies.entry(policy).or_default().insert(&endpoint.node);
            }
            let has_profile = self.namespaces.contains_key(&key.namespace);
            let record = EndpointRecord {
                interface: endpoint.interface.clone(),
                uid: endpoint.uid.clone(),
                addresses: endpoint.addresses.clone(),
                tiers: self.bindings(&applied),
                unmatched: if has_profile {
                    Action::Allow
                } else {
                    Action::Deny
                },
            };
            let audience = Audience::Nodes([endpoint.node.as_str()].into_iter().collect());
            records.insert(
                RecordId::Endpoint(key.clone()),
                (Record::Endpoint(record), audience),
            );
        }
        for (name, host) in self.hosts.iter().filter(|(_, host)| !host.node.is_empty()) {
            for (policy, _) in &self.applied_to_host(host) {
                policies.entry(policy).or_default().insert(&host.node);
            }
            let audience = Audience::Nodes([host.node.as_str()].into_iter().collect());
            records.insert(
                RecordId::HostEndpoint(name.clone()),
                (self.host_record(host), audience),
            );
        }
        let mut sets: BTreeMap<SetSpec, BTreeSet<&str>> = BTreeMap::new();
        for (key, nodes) in policies {
            let mut set = |spec: SetSpec| {
                let id = spec.id();
                sets.entry(spec).or_default().extend(&nodes);
                id
            };
            let record = Record::Policy(policy_record(&self.policies[key], &mut set));
            records.insert(
                RecordId::Policy(key.clone()),
                (record, Audience::Nodes(nodes.into_iter().collect())),
            );
        }
        for (spec, nodes) in sets {
            let record = Record::IpSet(IpSetRecord {
                kind: spec.kind(),
                members: self.members(&spec),
            });
            records.insert(
                RecordId::IpSet(spec.id()),
                (record, Audience::Nodes(nodes.into_iter().collect())),
            );
        }
        records
    }

    /// Policies that apply to an endpoint, in order within their tiers.
    fn applied(
        &self,
        key: &EndpointKey,
        endpoint: &WorkloadEndpoint,
    ) -> Vec<(&PolicyKey, &Policy)> {
        let labels = self.labels(key, endpoint);
        let in_force = self
            .policies
            .iter()
            .filter(|(_, policy)| policy.applies() && !is_for_hosts_only(policy));
        let mut applied: Vec<_> = in_force
            .filter(|(_, policy)| policy.selector.matches(&labels))
            .collect();
        applied.sort_by_key(|(key, policy)| (order(policy.order), tie(key)));
        applied
    }

    /// Policies that apply to some packets of a host endpoint, in order within their tiers.
    pub fn applied_to_host(&self, host: &HostEndpoint) -> Vec<(&PolicyKey, &Policy)> {
        let labels = self.host_labels(host);
        let global = self
            .policies
            .iter()
            .filter(|(key, _)| key.kind == PolicyKind::GlobalNetworkPolicy);
        let mut applied: Vec<_> = global
            .filter(|(_, policy)| policy.applies() && policy.selector.matches(&labels))
            .collect();
        applied.sort_by_key(|(key, policy)| (order(policy.order), tie(key)));
        applied
    }

    fn host_record(&self, host: &HostEndpoint) -> Record {
        let applied = self.applied_to_host(host);
        let tiers = |kind: fn(Traffic) -> bool| {
            let of_kind: Vec<_> = applied
                .iter()
                .copied()
                .filter(|(_, policy)| kind(policy.traffic))
                .collect();
            self.bindings(&of_kind)
        };
        Record::HostEndpoint(HostEndpointRecord {
            interfaces: match &host.interface {
                HostInterface::All => HostInterfaces::All,
                HostInterface::Named(name) => HostInterfaces::Named(name.clone()),
                HostInterface::ByAddress => {
                    HostInterfaces::WithAddress(self.represented(host).into_iter().collect())
                }
            },
            normal: tiers(|traffic| traffic == Traffic::Normal || traffic == Traffic::Forwarded),
            forward: tiers(|traffic| traffic == Traffic::Forwarded),
            pre_dnat: tiers(|traffic| traffic == Traffic::PreDnat),
            untracked: tiers(|traffic| traffic == Traffic::Untracked),
            unmatched: self.by_profiles(&host.profiles),
        })
    }

    /// Action of the profiles for packets that no policy decides.
    pub fn by_profiles(&self, profiles: &[Profile]) -> Action {
        let [first, rest @ ..] = profiles else {
            return Action::Deny;
        };
        match first {
            Profile::Allow => Action::Allow,
            Profile::Namespace(name) if self.namespaces.contains_key(name) => Action::Allow,
            Profile::ServiceAccount(name) if self.service_accounts.contains_key(name) => {
                self.by_profiles(rest)
            }
            Profile::Namespace(_) | Profile::ServiceAccount(_) | Profile::Unknown => Action::Deny,
        }
    }

    fn global(&self) -> Computed {
        let mut records = Computed::new();
        records.insert(
            RecordId::Settings,
            (Record::Settings(self.settings("")), Audience::All),
        );
        for pool in self.pools.values().rev() {
            let record = PoolRecord {
                nat_outgoing: pool.nat_outgoing,
                encapsulation: pool.encapsulation,
            };
            records.insert(
                RecordId::Pool(pool.cidr.trunc()),
                (Record::Pool(record), Audience::All),
            );
        }
        for (name, node) in &self.nodes {
            records.insert(
                RecordId::Node(name.clone()),
                (Record::Node(self.believed(name, node)), Audience::All),
            );
        }
        let mut route = |net: IpNet, node: &str| {
            let record = RouteRecord {
                node: node.to_owned(),
                encapsulation: self.encapsulation(&net),
            };
            records.insert(
                RecordId::Route(net.trunc()),
                (Record::Route(record), Audience::All),
            );
        };
        let count = self
            .blocks
            .iter()
            .filter(|(net, block)| self.counts(net, block));
        let blocks: Vec<(&IpNet, &BlockInfo)> = count.collect();
        for (net, block) in blocks.iter().rev() {
            if let Some(node) = &block.node {
                route(**net, node);
            }
        }
        for (_, block) in blocks.iter().rev() {
            for (address, node) in block.borrowed.iter().rev() {
                route(IpNet::from(*address), node);
            }
        }
        records
    }

    /// Returns true if a pool is divided into the block, and no older block overlaps it.
    fn counts(&self, net: &IpNet, block: &BlockInfo) -> bool {
        let fits = |net: &IpNet, block: &BlockInfo| {
            let fits =
                |pool: &Pool| pool.block_size == net.prefix_len() || block.created < pool.created;
            self.pools
                .values()
                .any(|pool| pool.cidr.contains(net) && fits(pool))
        };
        let overlaps = |other: &IpNet| other.contains(net) || net.contains(other);
        let is_before =
            |other: &IpNet, them: &BlockInfo| (them.created, other) < (block.created, net);
        let mut blocks = self.blocks.iter();
        fits(net, block)
            && !blocks
                .any(|(other, them)| overlaps(other) && is_before(other, them) && fits(other, them))
    }

    /// The node without addresses that other nodes have.
    pub fn believed(&self, name: &str, node: &NodeInfo) -> NodeInfo {
        let first = |claims: &dyn Fn(&str, &NodeInfo) -> bool, reported: fn(&NodeInfo) -> bool| {
            let claimants = self.nodes.iter().filter(|(name, node)| claims(name, node));
            claimants
                .map(|(name, node)| ((!reported(node), node.standing.created), name.as_str()))
                .min()
                .map(|(_, name)| name)
        };
        let may_be = |name: &str, address: IpAddr| self.may_be(name, address);
        let own4 = |name: &str, other: &NodeInfo| {
            let own = other.ipv4.map(|net| net.addr());
            let may = |own: Ipv4Addr| other.standing.ipv4_reported || may_be(name, own.into());
            own == node.ipv4.map(|net| net.addr()) && own.is_some_and(may)
        };
        let own6 = |name: &str, other: &NodeInfo| {
            let own = other.ipv6.map(|net| net.addr());
            let may = |own: Ipv6Addr| other.standing.ipv6_reported || may_be(name, own.into());
            own == node.ipv6.map(|net| net.addr()) && own.is_some_and(may)
        };
        let tunnel4 = |name: &str, other: &NodeInfo| {
            let end = other.vtep.map(|vtep| vtep.address);
            end == node.vtep.map(|vtep| vtep.address)
                && end.is_some_and(|end| may_be(name, end.into()))
        };
        let tunnel6 = |name: &str, other: &NodeInfo| {
            let end = other.vtep6.map(|vtep| vtep.address);
            end == node.vtep6.map(|vtep| vtep.address)
                && end.is_some_and(|end| may_be(name, end.into()))
        };
        let ipip = |name: &str, other: &NodeInfo| {
            other.ipip == node.ipip && other.ipip.is_some_and(|end| may_be(name, end.into()))
        };
        NodeInfo {
            ipv4: node
                .ipv4
                .filter(|_| first(&own4, |node| node.standing.ipv4_reported) == Some(name)),
            ipv6: node
                .ipv6
                .filter(|_| first(&own6, |node| node.standing.ipv6_reported) == Some(name)),
            vtep: node
                .vtep
                .filter(|_| first(&tunnel4, |_| true) == Some(name)),
            vtep6: node
                .vtep6
                .filter(|_| first(&tunnel6, |_| true) == Some(name)),
            ipip: node.ipip.filter(|_| first(&ipip, |_| true) == Some(name)),
            labels: node.labels.clone(),
            ..NodeInfo::default()
        }
    }

    /// Whether no block gives the address to somebody else.
    fn may_be(&self, name: &str, address: IpAddr) -> bool {
        let mut around = self
            .blocks
            .iter()
            .filter(|(net, block)| net.contains(&address) && self.counts(net, block));
        around.all(|(_, block)| {
            let is_lent = block
                .borrowed
                .iter()
                .any(|(lent, user)| *lent == address && user != name);
            block.node.as_deref() == Some(name) && !is_lent
                || block.tunnels.contains(&(address, name.to_owned()))
        })
    }

    /// Addresses of a host endpoint: an automatic one has none that is a pod's.
    fn represented(&self, host: &HostEndpoint) -> Vec<IpAddr> {
        let is_automatic = host
            .labels
            .get(LABEL_CREATED_BY)
            .is_some_and(|by| by == CREATED_BY);
        let is_reported = |address: IpAddr| {
            self.nodes.get(&host.node).is_some_and(|node| {
                let own4 = node
                    .ipv4
                    .filter(|_| node.standing.ipv4_reported)
                    .map(|net| IpAddr::from(net.addr()));
                let own6 = node
                    .ipv6
                    .filter(|_| node.standing.ipv6_reported)
                    .map(|net| net.addr().into());
                [own4, own6].contains(&Some(address))
            })
        };
        let may_be = |address: &IpAddr| {
            !is_automatic || is_reported(*address) || self.may_be(&host.node, *address)
        };
        host.addresses.iter().copied().filter(may_be).collect()
    }

    fn encapsulation(&self, net: &IpNet) -> Encapsulation {
        let covering = self
            .pools
            .values()
            .rev()
            .filter(|pool| pool.cidr.contains(net));
        covering
            .max_by_key(|pool| pool.cidr.prefix_len())
            .map_or(Encapsulation::None, |pool| pool.encapsulation)
    }

    fn bindings(&self, applied: &[(&PolicyKey, &Policy)]) -> Vec<TierBinding> {
        let mut tiers: Vec<&String> = applied.iter().map(|(_, policy)| &policy.tier).collect();
        tiers.sort_by_key(|name| {
            let tier = self.tiers.get(*name);
            (tier.is_none(), tier.map(|tier| order(tier.order)), *name)
        });
        tiers.dedup();
        let binding = |name: &String| {
            let keys = |direction: fn(&Policy) -> bool| {
                let applied = applied
                    .iter()
                    .filter(|(_, policy)| policy.tier == *name && direction(policy));
                applied.map(|(key, _)| (*key).clone()).collect()
            };
            TierBinding {
                name: name.clone(),
                default_action: self
                    .tiers
                    .get(name)
                    .map_or(Action::Deny, |tier| tier.default_action),
                ingress: keys(|policy| policy.applies_ingress),
                egress: keys(|policy| policy.applies_egress),
            }
        };
        tiers.into_iter().map(binding).collect()
    }

    fn members(&self, spec: &SetSpec) -> BTreeSet<Member> {
        let selected = |selector: &Selector| {
            let owners = self.owners().into_iter();
            owners
                .filter(|owner| selector.matches(&owner.labels))
                .collect::<Vec<_>>()
        };
        match spec {
            SetSpec::Selected(selector) => {
                let sets = self
                    .network_sets
                    .iter()
                    .filter(|(key, set)| selector.matches(&self.set_labels(key, set)));
                let nets =
                    sets.flat_map(|(_, set)| set.nets.iter().map(|net| Member::Net(net.trunc())));
                let addresses = selected(selector)
                    .into_iter()
                    .flat_map(|endpoint| endpoint.addresses);
                nets.chain(addresses.map(|address| Member::Net(IpNet::from(address))))
                    .collect()
            }
            SetSpec::NamedPorts(selector, protocol, names) => {
                let mut members = BTreeSet::new();
                for endpoint in selected(selector) {
                    let ports = endpoint.ports.iter().filter(|port| {
                        names.contains(&port.name)
                            && protocol.is_none_or(|protocol| protocol == port.protocol)
                    });
                    for port in ports {
                        members.extend(endpoint.addresses.iter().map(|address| {
                            Member::AddressPort(*address, port.protocol, port.port)
                        }));
                    }
                }
                members
            }
            SetSpec::Nodes(selector) => {
                let selected = self
                    .nodes
                    .iter()
                    .filter(|(_, node)| selector.matches(&node.labels));
                let selected = selected.map(|(name, node)| self.believed(name, node));
                let addresses = selected.flat_map(|node| {
                    let ipv4 = node.ipv4.map(|net| IpAddr::V4(net.addr()));
                    ipv4.into_iter()
                        .chain(node.ipv6.map(|net| IpAddr::V6(net.addr())))
                });
                addresses
                    .map(|address| Member::Net(IpNet::from(address)))
                    .collect()
            }
            SetSpec::Service(name) => {
                let backends = self.services.get(name).into_iter().flatten();
                backends
                    .map(|backend| {
                        Member::AddressPort(backend.address, backend.protocol, backend.port)
                    })
                    .collect()
            }
            SetSpec::ServiceAddresses(name) => {
                let backends = self.services.get(name).into_iter().flatten();
                backends
                    .map(|backend| Member::Net(IpNet::from(backend.address)))
                    .collect()
            }
        }
    }

    /// Objects with addresses.
    pub fn owners(&self) -> Vec<Owner<'_>> {
        let pods = self.endpoints.iter().map(|(key, endpoint)| Owner {
            labels: self.labels(key, endpoint),
            addresses: endpoint.addresses.clone(),
            ports: &endpoint.ports,
        });
        let hosts = self.hosts.values().map(|host| Owner {
            labels: self.host_labels(host),
            addresses: self.represented(host),
            ports: &host.ports,
        });
        pods.chain(hosts).collect()
    }
}

fn policy_record(policy: &Policy, set: &mut impl FnMut(SetSpec) -> SetId) -> PolicyRecord {
    let mut rules = |direction: Direction, applies: bool, rules: &[Rule]| {
        let rules = rules.iter().filter(|_| applies);
        let local = |rule| resolve(rule, direction, &policy.selector, set);
        rules.map(local).collect()
    };
    PolicyRecord {
        ingress: rules(Direction::Ingress, policy.applies_ingress, &policy.ingress),
        egress: rules(Direction::Egress, policy.applies_egress, &policy.egress),
    }
}
