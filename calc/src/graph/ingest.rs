//! Ingestion: converts objects to their stored form. Strings become symbols; selectors and the sets
//! that rules refer to become handles.

use data_encoding::HEXLOWER;
use margay_api::endpoint::{EndpointKey, HostEndpoint, Profile, WorkloadEndpoint};
use margay_api::meta::{
    LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_PARENT_NAME, LABEL_SERVICE_ACCOUNT, Labels,
    NamespacedName, PREFIX_NAMESPACE, PREFIX_SERVICE_ACCOUNT,
};
use margay_api::network::NetworkSet;
use margay_api::policy::{Policy, PolicyKey, StagedPolicy};
use margay_api::rule::Rule;
use margay_api::selector::Selector;
use sha2::{Digest, Sha256};

use crate::index::{LabelList, ParentName};
use crate::interner::{Interner, Symbol};
use crate::items::{Endpoint, EndpointName, Payload, StoredProfile};
use crate::policies::{self, Binding, normalise_order};
use crate::refcount::RefCounts;
use crate::rules::{Reference, SharedLists, Side, StoredRule, store_rule};
use crate::selector::is_inherited;
use crate::selectors::Selectors;
use crate::sets::SetSpec;
use crate::update::NamespaceInfo;
use crate::update::NetworkSetKey;

use super::Graph;
use super::staged::StagedChange;
use super::update::Placement;

/// Maximal length of a label value in Kubernetes. Names of service accounts from this length on get
/// no label.
const LABEL_VALUE_MAX: usize = 63;

/// Labels that only the system sets, with the values of an object that is in no namespace and is no
/// workload. A user's label of the same name is ignored.
const RESERVED_LABELS: [(&str, Option<&str>); 3] = [
    (LABEL_NAMESPACE, None),
    (LABEL_SERVICE_ACCOUNT, None),
    (LABEL_ORCHESTRATOR, None),
];

impl Graph {
    pub(crate) fn apply_endpoint(
        &mut self,
        name: &EndpointKey,
        endpoint: Option<WorkloadEndpoint>,
    ) {
        let key = self.interner.intern_pair(name);
        let known = self.items.find_endpoint(EndpointName::Pod(key.0, key.1));
        let Some(endpoint) = endpoint else {
            return known.into_iter().for_each(|item| self.delete_item(item));
        };
        let account = endpoint.service_account.as_str();
        let reserved = [
            (LABEL_NAMESPACE, Some(name.namespace.as_str())),
            (
                LABEL_SERVICE_ACCOUNT,
                Some(account).filter(|name| !name.is_empty() && name.len() < LABEL_VALUE_MAX),
            ),
        ];
        let parent = (!account.is_empty()).then(|| Some(self.interner.intern(account)));
        let placement = Placement {
            labels: own_labels(&endpoint.labels, &reserved, &mut self.interner),
            parents: std::iter::once(None)
                .chain(parent)
                .map(|account| (key.0, account))
                .collect(),
            payload: Payload::Endpoint(Endpoint::pod(key, &endpoint, &mut self.interner)),
        };
        let item = known.unwrap_or_else(|| self.index.add_item());
        self.put_item(item, placement);
    }

    pub(crate) fn apply_host_endpoint(&mut self, name: &str, endpoint: Option<HostEndpoint>) {
        self.auto_hosts.set(name, endpoint.as_ref());
        let Some(endpoint) = endpoint else {
            let name = self.interner.intern(name);
            let known = self.items.find_endpoint(EndpointName::Host(name));
            return known.into_iter().for_each(|item| self.delete_item(item));
        };
        match self.auto_hosts.get(name) {
            Some(_) => self.put_auto_host(name),
            None => self.store_host_endpoint(name, endpoint),
        }
    }

    /// Stores a host endpoint with the addresses that it is to have.
    pub(crate) fn store_host_endpoint(&mut self, name: &str, endpoint: HostEndpoint) {
        let name = self.interner.intern(name);
        let known = self.items.find_endpoint(EndpointName::Host(name));
        let profiles: Box<[StoredProfile]> = endpoint
            .profiles
            .iter()
            .map(|profile| stored_profile(profile, &mut self.interner))
            .collect();
        let mut parents: Vec<ParentName> = Vec::with_capacity(profiles.len());
        for profile in &profiles {
            if let StoredProfile::Of(parent) = profile
                && !parents.contains(parent)
            {
                parents.push(*parent);
            }
        }
        let placement = Placement {
            labels: own_labels(&endpoint.labels, &RESERVED_LABELS, &mut self.interner),
            parents,
            payload: Payload::Endpoint(Endpoint::host(
                name,
                &endpoint,
                profiles,
                &mut self.interner,
            )),
        };
        let item = known.unwrap_or_else(|| self.index.add_item());
        self.put_item(item, placement);
    }

    pub(crate) fn apply_network_set(&mut self, name: &NetworkSetKey, set: Option<NetworkSet>) {
        let key = self.interner.intern_pair(name);
        let known = self.items.find_network_set(key);
        let Some(set) = set else {
            self.items.forget_network_set(key);
            return known.into_iter().for_each(|item| self.delete_item(item));
        };
        let namespace = Some(name.namespace.as_str()).filter(|namespace| !namespace.is_empty());
        let reserved = RESERVED_LABELS
            .map(|(label, _)| (label, namespace.filter(|_| label == LABEL_NAMESPACE)));
        let placement = Placement {
            labels: own_labels(&set.labels, &reserved, &mut self.interner),
            parents: namespace.iter().map(|_| (key.0, None)).collect(),
            payload: Payload::NetworkSet(set.nets.iter().map(|net| net.trunc()).collect()),
        };
        let item = known.unwrap_or_else(|| self.index.add_item());
        self.items.name_network_set(key, item);
        self.put_item(item, placement);
    }

    pub(crate) fn apply_namespace(&mut self, name: &str, namespace: Option<&NamespaceInfo>) {
        let names_pools = namespace.is_some_and(|namespace| namespace.names_pools);
        self.globals.set_names_pools(name, names_pools);
        let labels = namespace.map(|namespace| {
            inherited(
                PREFIX_NAMESPACE,
                name,
                &namespace.labels,
                &mut self.interner,
            )
        });
        let name: ParentName = (self.interner.intern(name), None);
        self.update_parent(name, labels);
    }

    pub(crate) fn apply_service_account(&mut self, name: &NamespacedName, labels: Option<&Labels>) {
        let labels = labels.map(|labels| {
            inherited(
                PREFIX_SERVICE_ACCOUNT,
                &name.name,
                labels,
                &mut self.interner,
            )
        });
        let (namespace, name) = self.interner.intern_pair(name);
        self.update_parent((namespace, Some(name)), labels);
    }

    pub(crate) fn apply_policy(&mut self, name: &PolicyKey, policy: Option<Policy>) {
        let key = self.intern_policy_key(name);
        // A staged policy, or one without types, decides no packet.
        match policy.filter(|policy| !name.kind.is_staged() && policy.applies()) {
            Some(policy) => {
                let policy = self.store_policy(key, &policy);
                self.put_policy(policy);
            }
            None => self.delete_policy(key),
        }
    }

    pub(crate) fn apply_staged(&mut self, name: &PolicyKey, staged: Option<StagedPolicy>) {
        let key = self.intern_policy_key(name);
        let action = staged.and_then(|staged| match staged {
            // Enforced without types it would decide nothing, as if it were deleted.
            StagedPolicy::Set(policy) if policy.applies() => {
                Some(StagedChange::Set(self.store_policy(key, &policy)))
            }
            StagedPolicy::Set(_) | StagedPolicy::Delete => Some(StagedChange::Delete),
            StagedPolicy::Ignore => None,
        });
        if let Some(StagedChange::Set(former)) = self.staged.put(key, action) {
            former.sets.iter().for_each(|set| self.sets.unmention(*set));
            self.selectors.unmention(former.binding.subject);
        }
    }

    fn intern_policy_key(&mut self, name: &PolicyKey) -> policies::PolicyId {
        (
            name.kind,
            self.interner.intern(&name.namespace),
            self.interner.intern(&name.name),
        )
    }

    /// Converts a policy to its stored form and takes a reference to its selectors and sets.
    fn store_policy(&mut self, key: policies::PolicyId, policy: &Policy) -> policies::StoredPolicy {
        let mut sets = Vec::new();
        let mut lists = SharedLists::default();
        let mut rules = |local: Side, applies: bool, rules: &[Rule]| -> Box<[StoredRule]> {
            let rules = rules.iter().filter(|_| applies);
            let local = (local, &policy.selector);
            let mut refer = |reference: Reference<'_>| self.refer(reference, &mut sets);
            let stored = rules.map(|rule| store_rule(rule, local, &mut lists, &mut refer));
            stored.collect()
        };
        let ingress = rules(Side::Destination, policy.applies_ingress, &policy.ingress);
        let egress = rules(Side::Source, policy.applies_egress, &policy.egress);
        sets.sort_unstable();
        let mut once: Vec<u32> = Vec::with_capacity(sets.len());
        for set in sets {
            match once.last() == Some(&set) {
                // A policy holds one reference to a set, however many of its rules use it.
                true => self.sets.unmention(set),
                false => once.push(set),
            }
        }
        let binding = Binding {
            tier: self.interner.intern(&policy.tier),
            order: normalise_order(policy.order),
            subject: self
                .selectors
                .mention(&policy.selector, &mut self.index, &mut self.interner),
            traffic: policy.traffic,
            ingress: policy.applies_ingress,
            egress: policy.applies_egress,
        };
        policies::StoredPolicy {
            key,
            binding,
            ingress,
            egress,
            sets: once.into(),
            nodes: RefCounts::default(),
        }
    }

    /// Takes a reference to the set that a rule refers to and appends its handle to `mentioned`.
    fn refer(&mut self, reference: Reference<'_>, mentioned: &mut Vec<u32>) -> u32 {
        let mut select = |selector: &Selector, interner: &mut Interner| {
            self.selectors.mention(selector, &mut self.index, interner)
        };
        let spec = match reference {
            Reference::Selected(selector) => {
                SetSpec::Selected(select(selector, &mut self.interner))
            }
            Reference::NamedPorts(selector, protocol, names) => {
                let all = Selector::all();
                let selector = select(selector.unwrap_or(&all), &mut self.interner);
                SetSpec::NamedPorts(
                    selector,
                    protocol,
                    self.port_names.acquire(names, &mut self.interner),
                )
            }
            Reference::Nodes(selector) => {
                SetSpec::Nodes(self.interner.intern(&selector.to_string()))
            }
            Reference::Service(name) => {
                let (namespace, service) = self.interner.intern_pair(name);
                SetSpec::Service(namespace, service)
            }
            Reference::ServiceAddresses(name) => {
                let (namespace, service) = self.interner.intern_pair(name);
                SetSpec::ServiceAddresses(namespace, service)
            }
        };
        let (set, is_new) = self
            .sets
            .mention(spec, || set_id(spec, &self.selectors, &mut self.interner));
        // A set holds one reference to its selector and its port names, however many policies refer
        // to the set.
        if !is_new {
            if let Some(selector) = spec.selector() {
                self.selectors.unmention(selector);
            }
            if let SetSpec::NamedPorts(_, _, names) = spec {
                self.port_names.release(names);
            }
        }
        mentioned.push(set);
        set
    }
}

/// Id of a set, derived from its content: equal sets have equal ids in every process.
fn set_id(spec: SetSpec, selectors: &Selectors, interner: &mut Interner) -> Symbol {
    let id = match spec {
        SetSpec::Selected(selector) => return selectors.users(selector).id,
        SetSpec::NamedPorts(selector, protocol, names) => {
            let selector = interner.get(selectors.users(selector).id);
            let protocol = protocol.map_or(String::from("any"), |protocol| protocol.0.to_string());
            let hash = Sha256::digest(format!("n:{selector},{protocol},{}", interner.get(names)));
            format!("n:{}", HEXLOWER.encode(&hash[..20]))
        }
        SetSpec::Nodes(selector) => {
            let hash = Sha256::digest(format!("nodes:{}", interner.get(selector)));
            format!("nodes:{}", HEXLOWER.encode(&hash[..20]))
        }
        SetSpec::Service(namespace, name) => {
            format!("svc:{}/{}", interner.get(namespace), interner.get(name))
        }
        SetSpec::ServiceAddresses(namespace, name) => {
            format!("svcaddr:{}/{}", interner.get(namespace), interner.get(name))
        }
    };
    interner.intern(&id)
}

fn stored_profile(profile: &Profile, interner: &mut Interner) -> StoredProfile {
    match profile {
        Profile::Allow => StoredProfile::Allow,
        Profile::Unknown => StoredProfile::Deny,
        Profile::Namespace(name) => StoredProfile::Of((interner.intern(name), None)),
        Profile::ServiceAccount(name) => {
            let (namespace, account) = interner.intern_pair(name);
            StoredProfile::Of((namespace, Some(account)))
        }
    }
}

/// Labels of the object itself, without those that only its namespace, its service account or the
/// system can set.
fn own_labels(
    labels: &Labels,
    reserved: &[(&str, Option<&str>)],
    interner: &mut Interner,
) -> LabelList {
    let own = labels
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .filter(|(key, _)| !is_inherited(key) && reserved.iter().all(|(name, _)| name != key));
    let given = reserved
        .iter()
        .filter_map(|(key, value)| Some((*key, (*value)?)));
    sorted(own.chain(given), interner)
}

/// Labels of a namespace or service account, with the prefix under which endpoints inherit them.
fn inherited(prefix: &str, name: &str, labels: &Labels, interner: &mut Interner) -> LabelList {
    let own = labels.iter().filter(|(key, _)| *key != LABEL_PARENT_NAME);
    let own = own.map(|(key, value)| (format!("{prefix}{key}"), value.as_str()));
    let all: Vec<(String, &str)> = own
        .chain([(format!("{prefix}{LABEL_PARENT_NAME}"), name)])
        .collect();
    sorted(
        all.iter().map(|(key, value)| (key.as_str(), *value)),
        interner,
    )
}

fn sorted<'a>(
    labels: impl Iterator<Item = (&'a str, &'a str)>,
    interner: &mut Interner,
) -> LabelList {
    let mut labels: Vec<(Symbol, Symbol)> = labels
        .map(|(key, value)| (interner.intern(key), interner.intern(value)))
        .collect();
    labels.sort_unstable();
    labels.into()
}
