//! The graph: objects in, records out, computed once for the whole cluster.
//!
//! ```text
//! Endpoint, NetworkSet -> index: items <-select-> selectors -+-> policy applies -> endpoint record
//! Namespace, Account ---> index: inherited labels            |     | in force ---> policy record
//! Policy, Tier ---------> policies: subject, order, rules    |     v
//!                                                            +-> set is live ----> set record
//! Service ------------------------------------------------------> set is live ----> set record
//! Node, Pool, Block, Settings -> globals -----------------------------------------> global records
//! ```
//!
//! [`Graph::apply`] propagates a change from left to right at once (the steps are in `update`): it
//! adjusts reference counts (an address in a set, a node of a policy) and marks records dirty.
//! [`Graph::flush`] compares dirty records with what was last flushed, so what is sent depends on
//! the objects alone, not on the path to them.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::net::IpAddr;

use margay_api::endpoint::EndpointKey;
use margay_api::network::NodeInfo;
use margay_api::policy::{PolicyKey, Traffic};
use margay_api::rule::Action;

use crate::auto_hosts::AutoHosts;
use crate::bgp::Speakers;
use crate::claims::{Claim, RejectedClaim};
use crate::conflict::Conflict;
use crate::digest;
use crate::evaluate::Records;
use crate::flush::{Audience, Flush, NodeSet};
use crate::globals::Globals;
use crate::index::Index;
use crate::interner::{Interner, NamePair, Symbol};
use crate::items::{Attachment, Endpoint, EndpointName, Host, Items, Payload, StoredProfile};
use crate::model::{EndpointRecord, HostEndpointRecord, Member, Record, RecordId, SetId, SetKind};
use crate::node_sets::NodeSets;
use crate::policies::{self, Policies, StoredPolicy};
use crate::port_names::PortNames;
use crate::refcount::audience;
use crate::selector::WellKnown;
use crate::selectors::Selectors;
use crate::services::ServiceEntry;
use crate::sets::Sets;
use crate::store::Map;
use crate::update::Update;

use self::staged::Staged;

mod bgp;
mod ingest;
mod staged;
mod update;
mod view;

pub use self::staged::StagedView;
pub use self::view::View;

/// Every object of the cluster and the records derived from them. Output depends on the current
/// objects alone, never on their history.
#[derive(Debug)]
pub struct Graph {
    pub(crate) interner: Interner,
    pub(crate) index: Index,
    pub(crate) selectors: Selectors,
    pub(crate) items: Items,
    pub(crate) policies: Policies,
    pub(crate) staged: Staged,
    pub(crate) sets: Sets,
    pub(crate) port_names: PortNames,
    pub(crate) services: Map<NamePair, ServiceEntry>,
    pub(crate) node_sets: NodeSets,
    pub(crate) auto_hosts: AutoHosts,
    pub(crate) speakers: Speakers,
    pub(crate) globals: Globals,
}

impl Default for Graph {
    fn default() -> Self {
        let mut interner = Interner::default();
        let index = Index::new(WellKnown::new(&mut interner));
        Self {
            interner,
            index,
            selectors: Selectors::default(),
            items: Items::default(),
            policies: Policies::default(),
            staged: Staged::default(),
            sets: Sets::default(),
            port_names: PortNames::default(),
            services: Map::default(),
            node_sets: NodeSets::default(),
            auto_hosts: AutoHosts::default(),
            speakers: Speakers::default(),
            globals: Globals::default(),
        }
    }
}

impl Records for Graph {
    fn record(&self, id: &RecordId) -> Option<Cow<'_, Record>> {
        Graph::record(self, id)
    }
}

impl Graph {
    /// Applies the latest state of an object. Queries return mixed old and new state until the next
    /// [`Graph::flush`].
    pub fn apply(&mut self, update: Update) {
        match update {
            Update::Endpoint(name, endpoint) => self.apply_endpoint(&name, endpoint),
            Update::HostEndpoint(name, endpoint) => self.apply_host_endpoint(&name, endpoint),
            Update::Namespace(name, labels) => self.apply_namespace(&name, labels.as_ref()),
            Update::ServiceAccount(name, labels) => {
                self.apply_service_account(&name, labels.as_ref())
            }
            Update::Policy(name, policy) => self.apply_policy(&name, policy),
            Update::Staged(name, staged) => self.apply_staged(&name, staged),
            Update::Tier(name, tier) => {
                let name = self.interner.intern(&name);
                self.update_tier(name, tier);
            }
            Update::NetworkSet(name, set) => self.apply_network_set(&name, set),
            Update::Service(name, backends) => {
                let backends = backends.unwrap_or_default();
                self.speakers.set_backends(&name, &backends);
                let name = self.interner.intern_pair(&name);
                self.update_service(name, backends);
            }
            Update::Node(name, node) => {
                let changes = self.globals.set_node(name.clone(), node);
                self.update_nodes(changes);
                self.update_auto_hosts_on(&name);
            }
            Update::Pool(name, pool) => {
                self.speakers.mark_all();
                let change = self.globals.set_pool(name, pool);
                self.update_blocks(change);
            }
            Update::Block(net, block) => {
                let owner = block.as_ref().and_then(|block| block.node.as_deref());
                self.speakers.set_block(net, owner);
                let change = self.globals.set_block(net, block);
                self.update_blocks(change);
            }
            Update::Settings(name, settings) => self.globals.set_settings(name, settings),
            Update::ServiceAddresses(name, addresses) => {
                self.speakers.set_service(&name, addresses);
            }
            Update::BgpSettings(name, settings) => self.speakers.set_settings(name, settings),
            Update::BgpPeer(name, peer) => self.apply_bgp_peer(name, peer),
            Update::BgpFilter(name, filter) => self.speakers.set_filter(name, filter),
        }
    }

    /// Returns the records that changed since the last flush.
    pub fn flush(&mut self) -> Flush {
        let mut flush = Flush::default();
        self.flush_bgp(&mut flush);
        self.globals.flush(&mut flush);
        self.flush_endpoints(&mut flush);
        self.policies.flush(&mut flush, &self.sets, &self.interner);
        let (deactivated, gone) = self.sets.flush(&mut flush, &self.interner);
        self.free_unused(deactivated, gone);
        if self.interner.is_sweep_due() {
            self.sweep();
        }
        flush
    }

    /// Returns a record; of the settings, those of nodes that no object other than `default`
    /// selects, and of the speakers, that of the first node by name. Sets are borrowed, never
    /// copied.
    pub fn record(&self, id: &RecordId) -> Option<Cow<'_, Record>> {
        let node = match id {
            RecordId::Bgp => self.speakers.nodes().next().map_or("", String::as_str),
            _ => "",
        };
        self.record_for(node, id)
    }

    /// Returns a record as this node holds it. Differs from [`Graph::record`] for
    /// [`RecordId::Settings`] and [`RecordId::Bgp`] only.
    pub fn record_for(&self, node: &str, id: &RecordId) -> Option<Cow<'_, Record>> {
        match id {
            RecordId::Settings => self
                .globals
                .settings(node)
                .map(|(record, _)| Cow::Borrowed(record)),
            RecordId::Bgp => {
                let held = self.speakers.get(node)?;
                Some(Cow::Borrowed(&held.record))
            }
            RecordId::Pool(_) | RecordId::Node(_) | RecordId::Route(_) => self
                .globals
                .record(id)
                .map(|(record, _)| Cow::Borrowed(record)),
            RecordId::IpSet(set) => self
                .sets
                .record(self.interner.find(&set.0)?)
                .map(Cow::Borrowed),
            RecordId::Policy(name) => {
                let policy =
                    self.policies
                        .record(self.policy_key(name)?, &self.sets, &self.interner)?;
                Some(Cow::Owned(Record::Policy(policy)))
            }
            RecordId::Endpoint(_) | RecordId::HostEndpoint(_) => {
                let (item, endpoint) = self.endpoint(id)?;
                Some(Cow::Owned(self.compute_endpoint(item, endpoint)))
            }
        }
    }

    /// Kind and members of a set.
    pub fn ip_set(&self, id: &SetId) -> Option<(SetKind, &BTreeSet<Member>)> {
        match self.sets.record(self.interner.find(&id.0)?)? {
            Record::IpSet(set) => Some((set.kind, &set.members)),
            _ => None,
        }
    }

    /// Digest of a record, as returned by [`Graph::record`].
    pub fn digest(&self, id: &RecordId) -> Option<u64> {
        match id {
            RecordId::Bgp => self.bgp_digest(self.speakers.nodes().next()?),
            RecordId::Settings => self.globals.settings("").map(|(_, digest)| digest),
            RecordId::Pool(_) | RecordId::Node(_) | RecordId::Route(_) => {
                self.globals.record(id).map(|(_, digest)| digest)
            }
            RecordId::IpSet(set) => self.sets.digest(self.interner.find(&set.0)?),
            RecordId::Policy(name) => Some(self.policies.sent(self.policy_key(name)?)?.digest),
            RecordId::Endpoint(_) | RecordId::HostEndpoint(_) => {
                Some(self.items.sent(self.endpoint_name(id)?)?.1)
            }
        }
    }

    /// Nodes that hold the record.
    pub fn nodes_of(&self, id: &RecordId) -> Audience {
        let nodes = match id {
            RecordId::Bgp => {
                let nodes = self.speakers.nodes().map(String::as_str);
                Some(Audience::Nodes(nodes.collect()))
            }
            RecordId::Settings => self.globals.settings("").map(|_| Audience::All),
            RecordId::Pool(_) | RecordId::Node(_) | RecordId::Route(_) => {
                self.globals.record(id).map(|_| Audience::All)
            }
            RecordId::IpSet(set) => {
                let nodes = self
                    .interner
                    .find(&set.0)
                    .and_then(|set| self.sets.nodes(set));
                nodes.map(|nodes| audience(nodes.nodes(), &self.interner))
            }
            RecordId::Policy(name) => {
                let sent = self
                    .policy_key(name)
                    .and_then(|key| self.policies.sent(key));
                sent.map(|sent| audience(sent.nodes.iter().copied(), &self.interner))
            }
            RecordId::Endpoint(_) | RecordId::HostEndpoint(_) => {
                let sent = self
                    .endpoint_name(id)
                    .and_then(|name| self.items.sent(name));
                sent.map(|(node, _)| audience([node], &self.interner))
            }
        };
        nodes.unwrap_or_else(|| Audience::Nodes(NodeSet::new()))
    }

    /// Ids of all records that some node holds, ascending, as of the last flush. Costs time and
    /// memory proportional to their number.
    pub fn ids(&self) -> Vec<RecordId> {
        let settings = self.globals.settings("").map(|_| RecordId::Settings);
        let sets = self
            .sets
            .ids()
            .map(|set| RecordId::IpSet(SetId(self.interner.get(set).to_owned())));
        let policies = self
            .policies
            .keys()
            .map(|policy| RecordId::Policy(policies::key(policy, &self.interner)));
        let endpoints = self.items.names().map(|name| name.id(&self.interner));
        let globals = self.globals.ids().cloned();
        let speakers = self.speakers.nodes().next().map(|_| RecordId::Bgp);
        let mut ids: Vec<_> = settings
            .into_iter()
            .chain(globals)
            .chain(sets)
            .chain(policies)
            .chain(endpoints)
            .chain(speakers)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// The pod that has the address; of several, the first by name.
    pub fn pod_at(&self, address: IpAddr) -> Option<EndpointKey> {
        let pods = self
            .items
            .pods_at(address)
            .filter_map(|name| match name.id(&self.interner) {
                RecordId::Endpoint(key) => Some(key),
                _ => None,
            });
        pods.min()
    }

    /// Nodes by name, without rejected addresses.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &NodeInfo)> {
        self.globals
            .accepted_nodes()
            .iter()
            .map(|(name, node)| (name.as_str(), node))
    }

    /// View of a node: the records that it must hold.
    pub fn view<'a>(&'a self, node: &'a str) -> View<'a> {
        View { graph: self, node }
    }

    /// Records of every node as if staged policies were enforced; `None` if nothing is staged.
    pub fn staged_view(&self) -> Option<StagedView<'_>> {
        (!self.staged.is_empty()).then_some(StagedView(self))
    }

    /// Objects that have no effect as written, in order.
    pub fn conflicts(&self) -> BTreeSet<Conflict> {
        let staged = self
            .staged
            .policies()
            .map(|policy| (policy.key, policy.binding.tier));
        let staged = staged.filter(|(_, tier)| !self.policies.has_tier(*tier));
        let tiers = self
            .policies
            .without_tier()
            .chain(staged)
            .map(|(policy, tier)| Conflict::TierMissing {
                policy: policies::key(policy, &self.interner),
                tier: self.interner.get(tier).to_owned(),
            });
        let pools = self
            .globals
            .shadowed_pools()
            .map(|(pool, winner)| Conflict::PoolShadowed {
                pool: pool.clone(),
                winner: winner.clone(),
            });
        let is_known = |node: Symbol| {
            self.globals
                .accepted_nodes()
                .contains_key(self.interner.get(node))
        };
        let hosts =
            self.items
                .hosts_not_on(is_known)
                .map(|(endpoint, node)| Conflict::NodeMissing {
                    endpoint: self.interner.get(endpoint).to_owned(),
                    node: self.interner.get(node).to_owned(),
                });
        tiers
            .chain(pools)
            .chain(hosts)
            .chain(self.rejected_claims())
            .chain(self.speakers.conflicts(self.globals.accepted_nodes()))
            .collect()
    }

    /// Blocks and addresses that agents wrote and that contradict other objects.
    fn rejected_claims(&self) -> impl Iterator<Item = Conflict> {
        let blocks = self.globals.refused_blocks();
        let blocks = blocks.map(|(range, info, why)| Conflict::BlockRefused {
            range,
            node: info.node.clone(),
            why,
        });
        let addresses =
            self.globals
                .rejected_claims()
                .map(|(node, RejectedClaim { claim, winner })| {
                    let (address, is_tunnel) = match claim {
                        Claim::Own(address) => (address, false),
                        Claim::Tunnel(address) => (address, true),
                    };
                    Conflict::AddressRejected {
                        node: node.clone(),
                        address,
                        is_tunnel,
                        winner,
                    }
                });
        let hosts = self.auto_hosts.iter().flat_map(move |(endpoint, written)| {
            let is_rejected =
                move |address: &&IpAddr| !self.globals.may_have(&written.node, **address);
            written
                .addresses
                .iter()
                .filter(is_rejected)
                .map(move |address| Conflict::HostAddressRejected {
                    endpoint: endpoint.clone(),
                    node: written.node.clone(),
                    address: *address,
                })
        });
        blocks
            .chain(self.globals.excesses().map(Conflict::Excess))
            .chain(addresses)
            .chain(hosts)
    }

    /// Drops symbols that no object uses any more. A flush calls this when it is worth its cost.
    pub fn sweep(&mut self) {
        let Self {
            interner,
            index,
            selectors,
            items,
            policies,
            staged,
            sets,
            port_names,
            services,
            ..
        } = self;
        interner.sweep(|marks| {
            index.mark(marks);
            selectors.mark(marks);
            items.mark(marks);
            policies.mark(marks);
            staged.mark(marks);
            sets.mark(marks);
            port_names.mark(marks);
            services
                .keys()
                .for_each(|(namespace, name)| marks.mark_all([*namespace, *name]));
        });
    }

    /// Policies that apply to an endpoint, in no order.
    pub(crate) fn policies_of(&self, item: u32, endpoint: &Endpoint) -> impl Iterator<Item = u32> {
        let selectors = self.index.selectors_of(item).iter();
        let policies =
            selectors.flat_map(|selector| self.selectors.users(*selector).subjects.iter().copied());
        let subject = endpoint.subject();
        policies.filter(move |policy| self.policies.get(*policy).applies_to(subject))
    }

    fn flush_endpoints(&mut self, flush: &mut Flush) {
        // Moved out for the call: the digest of an endpoint is computed from the rest of the graph.
        let mut items = std::mem::take(&mut self.items);
        items.flush(flush, &self.interner, |item, endpoint, id| {
            digest::digest(id, &self.compute_endpoint(item, endpoint))
        });
        self.items = items;
    }

    /// Looks up an endpoint that is on a node, by the id of its record.
    pub(crate) fn endpoint(&self, id: &RecordId) -> Option<(u32, &Endpoint)> {
        let item = self.items.find_endpoint(self.endpoint_name(id)?)?;
        match self.items.get(item)? {
            Payload::Endpoint(endpoint) => endpoint.node.map(|_| (item, endpoint)),
            Payload::NetworkSet(_) => None,
        }
    }

    fn endpoint_name(&self, id: &RecordId) -> Option<EndpointName> {
        match id {
            RecordId::Endpoint(name) => self
                .interner
                .find_pair(&name.namespace, &name.name)
                .map(|(a, b)| EndpointName::Pod(a, b)),
            RecordId::HostEndpoint(name) => self.interner.find(name).map(EndpointName::Host),
            _ => None,
        }
    }

    fn compute_endpoint(&self, item: u32, endpoint: &Endpoint) -> Record {
        let policies = self
            .policies_of(item, endpoint)
            .map(|policy| self.policies.get(policy))
            .collect();
        self.build_endpoint(endpoint, policies)
    }

    /// Builds the record of an endpoint to which these policies apply.
    pub(crate) fn build_endpoint(
        &self,
        endpoint: &Endpoint,
        policies: Vec<&StoredPolicy>,
    ) -> Record {
        match (&endpoint.attachment, endpoint.name) {
            (Attachment::Host(host), _) => {
                Record::HostEndpoint(self.build_host_endpoint(host, &policies))
            }
            (Attachment::Pod(interface, uid), name) => {
                let has_profile = matches!(
                    name,
                    EndpointName::Pod(namespace, _) if self.index.is_parent((namespace, None)),
                );
                Record::Endpoint(EndpointRecord {
                    interface: interface.to_string(),
                    uid: uid.to_string(),
                    addresses: endpoint.addresses.to_vec(),
                    tiers: self.policies.bindings(policies, &self.interner),
                    unmatched: if has_profile {
                        Action::Allow
                    } else {
                        Action::Deny
                    },
                })
            }
        }
    }

    fn build_host_endpoint(&self, host: &Host, policies: &[&StoredPolicy]) -> HostEndpointRecord {
        let tiers = |kinds: &[Traffic]| {
            let of_kind = policies
                .iter()
                .copied()
                .filter(|policy| kinds.contains(&policy.binding.traffic));
            self.policies.bindings(of_kind.collect(), &self.interner)
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

    /// Action for packets that no policy decides: the first profile that exists and decides.
    /// Profiles of service accounts never decide; one that does not exist denies.
    fn unmatched(&self, profiles: &[StoredProfile]) -> Action {
        for profile in profiles {
            match profile {
                StoredProfile::Allow => return Action::Allow,
                StoredProfile::Of(parent) if self.index.is_parent(*parent) => {
                    if parent.1.is_none() {
                        return Action::Allow;
                    }
                }
                StoredProfile::Of(_) | StoredProfile::Deny => return Action::Deny,
            }
        }
        Action::Deny
    }

    pub(crate) fn policy_key(&self, name: &PolicyKey) -> Option<policies::PolicyId> {
        let (namespace, text) = self.interner.find_pair(&name.namespace, &name.name)?;
        Some((name.kind, namespace, text))
    }
}
