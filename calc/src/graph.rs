//! The graph: objects in, records out, computed once for the whole cluster.
//!
//! ```text
//!  Endpoint, NetworkSet ---> index: items <--select--> selectors --+--> policy applies to endpoint ---> endpoint record
//!  Namespace, Account -----> index: inherited labels               |        | in force on a node -----> policy record
//!  Policy, Tier -----------> policies: subject, order, rules       |        v
//!                                                                  +--> set is live: members ---------> set record
//!  Service ------------------------------------------------------------> set is live: members ---------> set record
//!  Node, Pool, Block, Settings --> globals -----------------------------------------------------------> global records
//! ```
//!
//! A change walks this from left to right at once, in [`Graph::apply`] (the steps are in `wiring`): it adds and takes reasons (an address in
//! a set, a node of a policy) and marks what it reaches. [`Graph::flush`] compares what is marked with what was told, so what is told
//! depends on the objects alone, not on the way to them.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::ipam::names;
use margay_api::meta::{ANNOTATION_NODE_IPV4, ANNOTATION_NODE_IPV6, ANNOTATION_VXLAN_IPV4, ANNOTATION_VXLAN_IPV6};
use margay_api::network::NodeInfo;
use margay_api::policy::{PolicyKey, Traffic};
use margay_api::rule::Action;

use crate::blocks::{Excess, Refused};
use crate::claims::{Claim, Denied};
use crate::counts::audience;
use crate::digest;
use crate::flush::{Audience, Flush, NodeSet};
use crate::globals::Globals;
use crate::index::Index;
use crate::members::{Attachment, Endpoint, Host, Members, Name, Payload, Profile};
use crate::model::{EndpointRecord, HostEndpointRecord, Member, Record, RecordId, SetId, SetKind};
use crate::node_sets::NodeSets;
use crate::policies::{self, Policies, Policy};
use crate::port_names::PortNames;
use crate::selector::Known;
use crate::selectors::Selectors;
use crate::sets::Sets;
use crate::staged::{Pending, Staged};
use crate::store::Map;
use crate::texts::{Text, Texts};
use crate::update::Update;
use crate::wiring::{Service, key};

pub use crate::view::View;

/// Every object of the cluster and what follows from it. What it puts out depends on the objects alone, never on their history.
#[derive(Debug)]
pub struct Graph {
    pub(crate) texts: Texts,
    pub(crate) index: Index,
    pub(crate) selectors: Selectors,
    pub(crate) members: Members,
    pub(crate) policies: Policies,
    pub(crate) staged: Staged,
    pub(crate) sets: Sets,
    pub(crate) port_names: PortNames,
    pub(crate) services: Map<(Text, Text), Service>,
    pub(crate) node_sets: NodeSets,
    pub(crate) globals: Globals,
}

/// An object that does not mean what its author may think, because of others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Problem {
    /// A policy of a tier that does not exist.
    TierMissing {
        /// The policy.
        policy: PolicyKey,
        /// The tier.
        tier: String,
    },
    /// Two pools of one range.
    PoolShadowed {
        /// The pool without effect.
        pool: String,
        /// The pool that decides.
        winner: String,
    },
    /// A host endpoint of a node that does not exist.
    NodeMissing {
        /// The host endpoint.
        endpoint: String,
        /// The node.
        node: String,
    },
    /// A block that does not count.
    BlockRefused {
        /// Its range.
        range: IpNet,
        /// The node that it is of, if any.
        node: Option<String>,
        /// Why.
        why: Refused,
    },
    /// A node has more blocks, or borrows more addresses, than counts.
    Excess(Excess),
    /// A node says that it has an address that it is not believed to have.
    AddressDenied {
        /// The node.
        node: String,
        /// The address.
        address: IpAddr,
        /// It is the end of the node's tunnel, not its own address.
        is_tunnel: bool,
        /// The node that has it, if any.
        winner: Option<String>,
    },
}

impl Problem {
    /// Kind and name of the object.
    pub fn object(&self) -> String {
        match self {
            Self::TierMissing { policy, .. } => policy.to_string(),
            Self::PoolShadowed { pool, .. } => format!("IPPool {pool}"),
            Self::NodeMissing { endpoint, .. } => format!("HostEndpoint {endpoint}"),
            Self::BlockRefused { range, .. } => format!("IPAMBlock {}", names::block(*range)),
            Self::AddressDenied { node, .. } | Self::Excess(Excess { node, .. }) => format!("Node {node}"),
        }
    }

    /// Field, value, rule and remedy.
    pub fn reason(&self) -> String {
        match self {
            Self::TierMissing { tier, .. } => format!(
                "spec.tier: {tier:?}: there is no such tier, so the policy comes after those of all tiers, and what it does not allow is denied; \
                 create the tier or correct the name"
            ),
            Self::PoolShadowed { winner, .. } => {
                format!("spec.cidr: it is also that of IPPool {winner}, which decides; delete one of them")
            }
            Self::NodeMissing { node, .. } => format!(
                "spec.node: {node:?}: there is no such node, so nobody enforces it; correct the name or delete the host endpoint"
            ),
            Self::BlockRefused { range, node, why } => {
                format!("spec.cidr: {range} of {}: {why}", node.as_deref().unwrap_or("nobody"))
            }
            Self::Excess(excess) => excess.to_string(),
            Self::AddressDenied { address, is_tunnel, winner, .. } => {
                let annotations = match (is_tunnel, address) {
                    (true, IpAddr::V4(_)) => ANNOTATION_VXLAN_IPV4,
                    (true, IpAddr::V6(_)) => ANNOTATION_VXLAN_IPV6,
                    (false, IpAddr::V4(_)) => ANNOTATION_NODE_IPV4,
                    (false, IpAddr::V6(_)) => ANNOTATION_NODE_IPV6,
                };
                let why = match winner {
                    Some(winner) => format!("node {winner} has that address"),
                    None => {
                        "it is in a block of another node, and not under the handle of this node's tunnel".to_owned()
                    }
                };
                format!(
                    "{annotations}: {address}: {why}, so that others do not reach this node there; if the node has changed, delete the \
                     annotation and restart its agent, and find out who has written it"
                )
            }
        }
    }
}

impl Default for Graph {
    fn default() -> Self {
        let mut texts = Texts::default();
        let index = Index::new(Known::new(&mut texts));
        Self {
            texts,
            index,
            selectors: Selectors::default(),
            members: Members::default(),
            policies: Policies::default(),
            staged: Staged::default(),
            sets: Sets::default(),
            port_names: PortNames::default(),
            services: Map::default(),
            node_sets: NodeSets::default(),
            globals: Globals::default(),
        }
    }
}

impl Graph {
    /// Takes the latest state of an object. Ask nothing before the next [`Graph::flush`]: answers may be half old, half new.
    pub fn apply(&mut self, update: Update) {
        match update {
            Update::Endpoint(name, endpoint) => self.take_endpoint(&name, endpoint),
            Update::HostEndpoint(name, endpoint) => self.take_host_endpoint(&name, endpoint),
            Update::Namespace(name, labels) => self.take_namespace(&name, labels.as_ref()),
            Update::ServiceAccount(name, labels) => self.take_service_account(&name, labels.as_ref()),
            Update::Policy(name, policy) => self.take_policy(&name, policy),
            Update::Staged(name, staged) => self.take_staged(&name, staged),
            Update::Tier(name, tier) => {
                let name = self.texts.intern(&name);
                self.retier(name, tier);
            }
            Update::NetworkSet(name, set) => self.take_network_set(&name, set),
            Update::Service(name, backends) => {
                let name = key(&name, &mut self.texts);
                self.reserve(name, backends.unwrap_or_default());
            }
            Update::Node(name, node) => {
                let changes = self.globals.set_node(name, node);
                self.renode(changes);
            }
            Update::Pool(name, pool) => {
                let changes = self.globals.set_pool(name, pool);
                self.renode(changes);
            }
            Update::Block(net, block) => {
                let changes = self.globals.set_block(net, block);
                self.renode(changes);
            }
            Update::Settings(name, settings) => self.globals.set_settings(name, settings),
        }
    }

    /// What changed since the last flush.
    pub fn flush(&mut self) -> Flush {
        let mut flush = Flush::default();
        self.globals.flush(&mut flush);
        self.flush_endpoints(&mut flush);
        self.policies.flush(&mut flush, &self.sets, &self.texts);
        let (retired, gone) = self.sets.flush(&mut flush, &self.texts);
        self.settle(retired, gone);
        if self.texts.is_sweep_due() {
            self.sweep();
        }
        flush
    }

    /// The value of a record; of the settings, that for nodes without settings of their own. Sets are borrowed, never copied.
    pub fn record(&self, id: &RecordId) -> Option<Cow<'_, Record>> {
        self.record_for("", id)
    }

    /// The value of a record for this node. It differs from [`Graph::record`] for [`RecordId::Settings`] only.
    pub fn record_for(&self, node: &str, id: &RecordId) -> Option<Cow<'_, Record>> {
        match id {
            RecordId::Settings => self.globals.settings(node).map(|(record, _)| Cow::Borrowed(record)),
            RecordId::Pool(_) | RecordId::Node(_) | RecordId::Route(_) => {
                self.globals.record(id).map(|(record, _)| Cow::Borrowed(record))
            }
            RecordId::IpSet(set) => self.sets.record(self.texts.find(&set.0)?).map(Cow::Borrowed),
            RecordId::Policy(name) => {
                let policy = self.policies.record(self.policy_key(name)?, &self.sets, &self.texts)?;
                Some(Cow::Owned(Record::Policy(policy)))
            }
            RecordId::Endpoint(_) | RecordId::HostEndpoint(_) => {
                let (item, endpoint) = self.endpoint(id)?;
                Some(Cow::Owned(self.resolve(item, endpoint)))
            }
        }
    }

    /// Kind and members of a set.
    pub fn ip_set(&self, id: &SetId) -> Option<(SetKind, &BTreeSet<Member>)> {
        match self.sets.record(self.texts.find(&id.0)?)? {
            Record::IpSet(set) => Some((set.kind, &set.members)),
            _ => None,
        }
    }

    /// The digest of a record, as [`Graph::record`] has it.
    pub fn digest(&self, id: &RecordId) -> Option<u64> {
        match id {
            RecordId::Settings => self.globals.settings("").map(|(_, digest)| digest),
            RecordId::Pool(_) | RecordId::Node(_) | RecordId::Route(_) => {
                self.globals.record(id).map(|(_, digest)| digest)
            }
            RecordId::IpSet(set) => self.sets.digest(self.texts.find(&set.0)?),
            RecordId::Policy(name) => Some(self.policies.told(self.policy_key(name)?)?.digest),
            RecordId::Endpoint(_) | RecordId::HostEndpoint(_) => Some(self.members.told(self.endpoint_name(id)?)?.1),
        }
    }

    /// Who holds the record.
    pub fn nodes_of(&self, id: &RecordId) -> Audience {
        let nodes = match id {
            RecordId::Settings => self.globals.settings("").map(|_| Audience::All),
            RecordId::Pool(_) | RecordId::Node(_) | RecordId::Route(_) => {
                self.globals.record(id).map(|_| Audience::All)
            }
            RecordId::IpSet(set) => {
                let nodes = self.texts.find(&set.0).and_then(|set| self.sets.nodes(set));
                nodes.map(|nodes| audience(nodes.nodes(), &self.texts))
            }
            RecordId::Policy(name) => {
                let told = self.policy_key(name).and_then(|key| self.policies.told(key));
                told.map(|told| audience(told.nodes.iter().copied(), &self.texts))
            }
            RecordId::Endpoint(_) | RecordId::HostEndpoint(_) => {
                let told = self.endpoint_name(id).and_then(|name| self.members.told(name));
                told.map(|(node, _)| audience([node], &self.texts))
            }
        };
        nodes.unwrap_or_else(|| Audience::Nodes(NodeSet::new()))
    }

    /// The ids of all records that some node holds, ascending, as of the last flush. Takes time and room for each of them, and no more.
    pub fn ids(&self) -> Vec<RecordId> {
        let settings = self.globals.settings("").map(|_| RecordId::Settings);
        let sets = self.sets.ids().map(|set| RecordId::IpSet(SetId(self.texts.get(set).to_owned())));
        let policies = self.policies.keys().map(|policy| RecordId::Policy(policies::key(policy, &self.texts)));
        let endpoints = self.members.names().map(|name| name.id(&self.texts));
        let globals = self.globals.ids().cloned();
        let mut ids: Vec<_> =
            settings.into_iter().chain(globals).chain(sets).chain(policies).chain(endpoints).collect();
        ids.sort_unstable();
        ids
    }

    /// The pod that has the address; of several, the first by name.
    pub fn pod_at(&self, address: IpAddr) -> Option<EndpointKey> {
        let pods = self.members.pods_at(address).filter_map(|name| match name.id(&self.texts) {
            RecordId::Endpoint(key) => Some(key),
            _ => None,
        });
        pods.min()
    }

    /// The nodes, by name, without the addresses that they are not believed to have.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &NodeInfo)> {
        self.globals.nodes().iter().map(|(name, node)| (name.as_str(), node))
    }

    /// What this node must hold.
    pub fn view<'a>(&'a self, node: &'a str) -> View<'a> {
        View { graph: self, node }
    }

    /// The records of every node as they would be if what is staged were enforced; none if nothing is staged.
    pub fn pending(&self) -> Option<Pending<'_>> {
        (!self.staged.is_empty()).then_some(Pending(self))
    }

    /// Objects that do not mean what their authors may think, in order.
    pub fn problems(&self) -> BTreeSet<Problem> {
        let staged = self.staged.policies().map(|policy| (policy.key, policy.binding.tier));
        let staged = staged.filter(|(_, tier)| !self.policies.has_tier(*tier));
        let tiers = self.policies.without_tier().chain(staged).map(|(policy, tier)| Problem::TierMissing {
            policy: policies::key(policy, &self.texts),
            tier: self.texts.get(tier).to_owned(),
        });
        let pools = self
            .globals
            .shadowed_pools()
            .map(|(pool, winner)| Problem::PoolShadowed { pool: pool.clone(), winner: winner.clone() });
        let is_known = |node: Text| self.globals.nodes().contains_key(self.texts.get(node));
        let hosts = self.members.hosts_not_on(is_known).map(|(endpoint, node)| Problem::NodeMissing {
            endpoint: self.texts.get(endpoint).to_owned(),
            node: self.texts.get(node).to_owned(),
        });
        tiers.chain(pools).chain(hosts).chain(self.disbelieved()).collect()
    }

    /// What agents have written that contradicts others.
    fn disbelieved(&self) -> impl Iterator<Item = Problem> {
        let blocks = self.globals.refused_blocks();
        let blocks = blocks.map(|(range, info, why)| Problem::BlockRefused { range, node: info.node.clone(), why });
        let addresses = self.globals.denied_addresses().map(|(node, Denied { claim, winner })| {
            let (address, is_tunnel) = match claim {
                Claim::Own(address) => (address, false),
                Claim::Tunnel(address) => (address, true),
            };
            Problem::AddressDenied { node: node.clone(), address, is_tunnel, winner }
        });
        blocks.chain(self.globals.excesses().map(Problem::Excess)).chain(addresses)
    }

    /// Forgets texts that no object uses any more. A flush does it when it is worth its cost.
    pub fn sweep(&mut self) {
        let Self { texts, index, selectors, members, policies, staged, sets, port_names, services, .. } = self;
        texts.sweep(|marks| {
            index.mark(marks);
            selectors.mark(marks);
            members.mark(marks);
            policies.mark(marks);
            staged.mark(marks);
            sets.mark(marks);
            port_names.mark(marks);
            services.keys().for_each(|(namespace, name)| marks.all([*namespace, *name]));
        });
    }

    /// Policies that apply to an endpoint, in no order.
    pub(crate) fn policies_of(&self, item: u32, endpoint: &Endpoint) -> impl Iterator<Item = u32> {
        let selectors = self.index.selectors_of(item).iter();
        let policies = selectors.flat_map(|selector| self.selectors.users(*selector).subjects.iter().copied());
        let subject = endpoint.subject();
        policies.filter(move |policy| self.policies.get(*policy).applies_to(subject))
    }

    fn flush_endpoints(&mut self, flush: &mut Flush) {
        let mut members = std::mem::take(&mut self.members);
        members.flush(flush, &self.texts, |item, endpoint, id| digest::digest(id, &self.resolve(item, endpoint)));
        self.members = members;
    }

    /// An endpoint that is on a node, by the id of its record.
    pub(crate) fn endpoint(&self, id: &RecordId) -> Option<(u32, &Endpoint)> {
        let item = self.members.find_endpoint(self.endpoint_name(id)?)?;
        match self.members.get(item)? {
            Payload::Endpoint(endpoint) => endpoint.node.map(|_| (item, endpoint)),
            Payload::NetworkSet(_) => None,
        }
    }

    fn endpoint_name(&self, id: &RecordId) -> Option<Name> {
        match id {
            RecordId::Endpoint(name) => self.pair(&name.namespace, &name.name).map(|(a, b)| Name::Pod(a, b)),
            RecordId::HostEndpoint(name) => self.texts.find(name).map(Name::Host),
            _ => None,
        }
    }

    fn resolve(&self, item: u32, endpoint: &Endpoint) -> Record {
        let policies = self.policies_of(item, endpoint).map(|policy| self.policies.get(policy)).collect();
        self.endpoint_under(endpoint, policies)
    }

    /// The record of an endpoint to which these policies apply.
    pub(crate) fn endpoint_under(&self, endpoint: &Endpoint, policies: Vec<&Policy>) -> Record {
        match (&endpoint.attachment, endpoint.name) {
            (Attachment::Host(host), _) => Record::HostEndpoint(self.host_under(host, &policies)),
            (Attachment::Pod(interface, uid), name) => {
                let has_profile = matches!(name, Name::Pod(namespace, _) if self.index.is_parent((namespace, None)));
                Record::Endpoint(EndpointRecord {
                    interface: interface.to_string(),
                    uid: uid.to_string(),
                    addresses: endpoint.addresses.to_vec(),
                    tiers: self.policies.bindings(policies, &self.texts),
                    unmatched: if has_profile { Action::Allow } else { Action::Deny },
                })
            }
        }
    }

    fn host_under(&self, host: &Host, policies: &[&Policy]) -> HostEndpointRecord {
        let tiers = |kinds: &[Traffic]| {
            let of_kind = policies.iter().copied().filter(|policy| kinds.contains(&policy.binding.traffic));
            self.policies.bindings(of_kind.collect(), &self.texts)
        };
        HostEndpointRecord {
            interfaces: host.interfaces.clone(),
            normal: tiers(&[Traffic::Normal, Traffic::Forwarded]),
            forward: tiers(&[Traffic::Forwarded]),
            pre_dnat: tiers(&[Traffic::PreDnat]),
            untracked: tiers(&[Traffic::Untracked]),
            unmatched: self.unmatched(&host.profiles),
        }
    }

    /// What profiles decide, in order. Those of service accounts decide nothing themselves; one that does not exist denies.
    fn unmatched(&self, profiles: &[Profile]) -> Action {
        for profile in profiles {
            match profile {
                Profile::Allow => return Action::Allow,
                Profile::Of(parent) if self.index.is_parent(*parent) => {
                    if parent.1.is_none() {
                        return Action::Allow;
                    }
                }
                Profile::Of(_) | Profile::Deny => return Action::Deny,
            }
        }
        Action::Deny
    }

    pub(crate) fn pair(&self, namespace: &str, name: &str) -> Option<(Text, Text)> {
        Some((self.texts.find(namespace)?, self.texts.find(name)?))
    }

    pub(crate) fn policy_key(&self, name: &PolicyKey) -> Option<policies::Key> {
        let (namespace, text) = self.pair(&name.namespace, &name.name)?;
        Some((name.kind, namespace, text))
    }
}
