//! Objects as they are kept: their texts become numbers, their selectors numbers of selectors, what rules refer to numbers of sets.

use margay_api::endpoint::{EndpointKey, HostEndpoint, Profile as WrittenProfile, WorkloadEndpoint};
use margay_api::meta::{
    LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_PARENT_NAME, LABEL_SERVICE_ACCOUNT, Labels, NamespacedName,
    PREFIX_NAMESPACE, PREFIX_SERVICE_ACCOUNT,
};
use margay_api::network::NetworkSet;
use margay_api::policy::{Order, Policy, PolicyKey, StagedPolicy};
use margay_api::rule::Rule;
use margay_api::selector::Selector;
use sha2::{Digest, Sha256};

use crate::counts::Counts;
use crate::graph::Graph;
use crate::index::{LabelList, ParentName};
use crate::members::{Endpoint, Name, Payload, Profile};
use crate::policies::{self, Binding};
use crate::rules::{End, Lists, Reference, StoredRule, store};
use crate::selector::is_inherited;
use crate::selectors::Selectors;
use crate::sets::Spec;
use crate::staged::Action;
use crate::texts::{Text, Texts};
use crate::update::NetworkSetKey;
use crate::wiring::{Placement, key};

/// Names of service accounts from this length on are in no label, as a label's value could not hold them.
const LONG_NAME: usize = 63;

/// The labels that say what an object is, for one that is nothing of it: in no namespace, nobody's workload.
const NOBODY: [(&str, Option<&str>); 3] =
    [(LABEL_NAMESPACE, None), (LABEL_SERVICE_ACCOUNT, None), (LABEL_ORCHESTRATOR, None)];

impl Graph {
    pub(crate) fn take_endpoint(&mut self, name: &EndpointKey, endpoint: Option<WorkloadEndpoint>) {
        let key = key(name, &mut self.texts);
        let known = self.members.find_endpoint(Name::Pod(key.0, key.1));
        let Some(endpoint) = endpoint else {
            return known.into_iter().for_each(|item| self.displace(item));
        };
        let account = endpoint.service_account.as_str();
        let reserved = [
            (LABEL_NAMESPACE, Some(name.namespace.as_str())),
            (LABEL_SERVICE_ACCOUNT, Some(account).filter(|name| !name.is_empty() && name.len() < LONG_NAME)),
        ];
        let parent = (!account.is_empty()).then(|| Some(self.texts.intern(account)));
        let placement = Placement {
            labels: own_labels(&endpoint.labels, &reserved, &mut self.texts),
            parents: std::iter::once(None).chain(parent).map(|account| (key.0, account)).collect(),
            payload: Payload::Endpoint(Endpoint::pod(key, &endpoint, &mut self.texts)),
        };
        let item = known.unwrap_or_else(|| self.index.add_item());
        self.place(item, placement);
    }

    pub(crate) fn take_host_endpoint(&mut self, name: &str, endpoint: Option<HostEndpoint>) {
        let name = self.texts.intern(name);
        let known = self.members.find_endpoint(Name::Host(name));
        let Some(endpoint) = endpoint else {
            return known.into_iter().for_each(|item| self.displace(item));
        };
        let profiles: Box<[Profile]> =
            endpoint.profiles.iter().map(|profile| stored_profile(profile, &mut self.texts)).collect();
        let mut parents: Vec<ParentName> = Vec::with_capacity(profiles.len());
        for profile in &profiles {
            if let Profile::Of(parent) = profile
                && !parents.contains(parent)
            {
                parents.push(*parent);
            }
        }
        let placement = Placement {
            labels: own_labels(&endpoint.labels, &NOBODY, &mut self.texts),
            parents,
            payload: Payload::Endpoint(Endpoint::host(name, &endpoint, profiles, &mut self.texts)),
        };
        let item = known.unwrap_or_else(|| self.index.add_item());
        self.place(item, placement);
    }

    pub(crate) fn take_network_set(&mut self, name: &NetworkSetKey, set: Option<NetworkSet>) {
        let key = key(name, &mut self.texts);
        let known = self.members.find_network_set(key);
        let Some(set) = set else {
            self.members.forget_network_set(key);
            return known.into_iter().for_each(|item| self.displace(item));
        };
        let namespace = Some(name.namespace.as_str()).filter(|namespace| !namespace.is_empty());
        let reserved = NOBODY.map(|(label, _)| (label, namespace.filter(|_| label == LABEL_NAMESPACE)));
        let placement = Placement {
            labels: own_labels(&set.labels, &reserved, &mut self.texts),
            parents: namespace.iter().map(|_| (key.0, None)).collect(),
            payload: Payload::NetworkSet(set.nets.iter().map(|net| net.trunc()).collect()),
        };
        let item = known.unwrap_or_else(|| self.index.add_item());
        self.members.name_network_set(key, item);
        self.place(item, placement);
    }

    pub(crate) fn take_namespace(&mut self, name: &str, labels: Option<&Labels>) {
        let labels = labels.map(|labels| inherited(PREFIX_NAMESPACE, name, labels, &mut self.texts));
        let name: ParentName = (self.texts.intern(name), None);
        self.relabel(name, labels);
    }

    pub(crate) fn take_service_account(&mut self, name: &NamespacedName, labels: Option<&Labels>) {
        let labels = labels.map(|labels| inherited(PREFIX_SERVICE_ACCOUNT, &name.name, labels, &mut self.texts));
        let (namespace, name) = key(name, &mut self.texts);
        self.relabel((namespace, Some(name)), labels);
    }

    pub(crate) fn take_policy(&mut self, name: &PolicyKey, policy: Option<Policy>) {
        let key = self.intern_policy_key(name);
        // A policy that is staged, or in force in no direction, decides about no packet.
        match policy.filter(|policy| !name.kind.is_staged() && policy.applies()) {
            Some(policy) => {
                let policy = self.keep_policy(key, &policy);
                self.enforce(policy);
            }
            None => self.repeal(key),
        }
    }

    pub(crate) fn take_staged(&mut self, name: &PolicyKey, staged: Option<StagedPolicy>) {
        let key = self.intern_policy_key(name);
        let action = staged.and_then(|staged| match staged {
            // In force in no direction, it would be as good as gone.
            StagedPolicy::Set(policy) if policy.applies() => Some(Action::Set(self.keep_policy(key, &policy))),
            StagedPolicy::Set(_) | StagedPolicy::Delete => Some(Action::Delete),
            StagedPolicy::Ignore => None,
        });
        if let Some(Action::Set(former)) = self.staged.put(key, action) {
            former.sets.iter().for_each(|set| self.sets.unmention(*set));
            self.selectors.unmention(former.binding.subject);
        }
    }

    fn intern_policy_key(&mut self, name: &PolicyKey) -> policies::Key {
        (name.kind, self.texts.intern(&name.namespace), self.texts.intern(&name.name))
    }

    /// The policy as it is kept, with its selectors and sets mentioned.
    fn keep_policy(&mut self, key: policies::Key, policy: &Policy) -> policies::Policy {
        let mut sets = Vec::new();
        let mut lists = Lists::default();
        let mut rules = |local: End, applies: bool, rules: &[Rule]| -> Box<[StoredRule]> {
            let rules = rules.iter().filter(|_| applies);
            let local = (local, &policy.selector);
            let mut refer = |reference: Reference<'_>| self.refer(reference, &mut sets);
            let stored = rules.map(|rule| store(rule, local, &mut lists, &mut refer));
            stored.collect()
        };
        let ingress = rules(End::Destination, policy.applies_ingress, &policy.ingress);
        let egress = rules(End::Source, policy.applies_egress, &policy.egress);
        sets.sort_unstable();
        let mut once: Vec<u32> = Vec::with_capacity(sets.len());
        for set in sets {
            match once.last() == Some(&set) {
                // A policy mentions a set once, however many of its rules refer to it.
                true => self.sets.unmention(set),
                false => once.push(set),
            }
        }
        let binding = Binding {
            tier: self.texts.intern(&policy.tier),
            order: plain(policy.order),
            subject: self.selectors.mention(&policy.selector, &mut self.index, &mut self.texts),
            traffic: policy.traffic,
            ingress: policy.applies_ingress,
            egress: policy.applies_egress,
        };
        policies::Policy { key, binding, ingress, egress, sets: once.into(), nodes: Counts::default() }
    }

    /// The set that a reference means, mentioned once more; noted in `mentioned`.
    fn refer(&mut self, reference: Reference<'_>, mentioned: &mut Vec<u32>) -> u32 {
        let mut select =
            |selector: &Selector, texts: &mut Texts| self.selectors.mention(selector, &mut self.index, texts);
        let spec = match reference {
            Reference::Selected(selector) => Spec::Selected(select(selector, &mut self.texts)),
            Reference::NamedPorts(selector, protocol, names) => {
                let anybody = Selector::all();
                let selector = select(selector.unwrap_or(&anybody), &mut self.texts);
                Spec::NamedPorts(selector, protocol, self.port_names.hold(names, &mut self.texts))
            }
            Reference::Nodes(selector) => Spec::Nodes(self.texts.intern(&selector.to_string())),
            Reference::Service(name) => {
                let (namespace, service) = key(name, &mut self.texts);
                Spec::Service(namespace, service)
            }
            Reference::ServiceAddresses(name) => {
                let (namespace, service) = key(name, &mut self.texts);
                Spec::ServiceAddresses(namespace, service)
            }
        };
        let (set, is_new) = self.sets.mention(spec, || set_id(spec, &self.selectors, &mut self.texts));
        // A set mentions its selector, and holds its names, once, however many policies mention the set.
        if !is_new {
            if let Some(selector) = spec.selector() {
                self.selectors.unmention(selector);
            }
            if let Spec::NamedPorts(_, _, names) = spec {
                self.port_names.release(names);
            }
        }
        mentioned.push(set);
        set
    }
}

/// The id of a set: made from its content, so that it is the same wherever and whenever it is made.
fn set_id(spec: Spec, selectors: &Selectors, texts: &mut Texts) -> Text {
    let id = match spec {
        Spec::Selected(selector) => return selectors.users(selector).id,
        Spec::NamedPorts(selector, protocol, names) => {
            let selector = texts.get(selectors.users(selector).id);
            let protocol = protocol.map_or(String::from("any"), |protocol| protocol.0.to_string());
            let hash = Sha256::digest(format!("n:{selector},{protocol},{}", texts.get(names)));
            let hex: String = hash[..20].iter().map(|byte| format!("{byte:02x}")).collect();
            format!("n:{hex}")
        }
        Spec::Nodes(selector) => {
            let hash = Sha256::digest(format!("nodes:{}", texts.get(selector)));
            let hex: String = hash[..20].iter().map(|byte| format!("{byte:02x}")).collect();
            format!("nodes:{hex}")
        }
        Spec::Service(namespace, name) => {
            format!("svc:{}/{}", texts.get(namespace), texts.get(name))
        }
        Spec::ServiceAddresses(namespace, name) => {
            format!("svcaddr:{}/{}", texts.get(namespace), texts.get(name))
        }
    };
    texts.intern(&id)
}

/// The order with minus zero as zero: they are the same number, and ties are broken otherwise.
pub(crate) fn plain(order: Order) -> Order {
    Order(order.0.map(|order| order + 0.0))
}

fn stored_profile(profile: &WrittenProfile, texts: &mut Texts) -> Profile {
    match profile {
        WrittenProfile::Allow => Profile::Allow,
        WrittenProfile::Unknown => Profile::Deny,
        WrittenProfile::Namespace(name) => Profile::Of((texts.intern(name), None)),
        WrittenProfile::ServiceAccount(name) => {
            let (namespace, account) = key(name, texts);
            Profile::Of((namespace, Some(account)))
        }
    }
}

/// Labels that nobody inherits: an object's own, without those that only its namespace, its service account or Margay can give it.
fn own_labels(labels: &Labels, reserved: &[(&str, Option<&str>)], texts: &mut Texts) -> LabelList {
    let own = labels
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .filter(|(key, _)| !is_inherited(key) && reserved.iter().all(|(name, _)| name != key));
    let given = reserved.iter().filter_map(|(key, value)| Some((*key, (*value)?)));
    sorted(own.chain(given), texts)
}

/// Labels of a namespace or service account as its endpoints have them.
fn inherited(prefix: &str, name: &str, labels: &Labels, texts: &mut Texts) -> LabelList {
    let own = labels.iter().filter(|(key, _)| *key != LABEL_PARENT_NAME);
    let own = own.map(|(key, value)| (format!("{prefix}{key}"), value.as_str()));
    let all: Vec<(String, &str)> = own.chain([(format!("{prefix}{LABEL_PARENT_NAME}"), name)]).collect();
    sorted(all.iter().map(|(key, value)| (key.as_str(), *value)), texts)
}

fn sorted<'a>(labels: impl Iterator<Item = (&'a str, &'a str)>, texts: &mut Texts) -> LabelList {
    let mut labels: Vec<(Text, Text)> = labels.map(|(key, value)| (texts.intern(key), texts.intern(value))).collect();
    labels.sort_unstable();
    labels.into()
}
