//! Effective labels: own ones, and those that are inherited from namespace and service account.

use margay_api::endpoint::{EndpointKey, HostEndpoint, Profile, WorkloadEndpoint};
use margay_api::meta::{
    LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_PARENT_NAME, LABEL_SERVICE_ACCOUNT, Labels,
    NamespacedName, PREFIX_NAMESPACE, PREFIX_SERVICE_ACCOUNT,
};
use margay_api::network::NetworkSet;
use margay_calc::update::NetworkSetKey;

use super::Objects;

impl Objects {
    /// Effective labels of a host endpoint; where several profiles define one, the first wins.
    pub fn host_labels(&self, host: &HostEndpoint) -> Labels {
        let mut labels = Labels::new();
        for profile in host.profiles.iter().rev() {
            match profile {
                Profile::Namespace(name) => self.inherit(&mut labels, name),
                Profile::ServiceAccount(name) => {
                    if let Some(parent) = self.service_accounts.get(name) {
                        inherit(&mut labels, PREFIX_SERVICE_ACCOUNT, &name.name, parent);
                    }
                }
                Profile::Allow | Profile::Unknown => {}
            }
        }
        let mut own = namespaced(&host.labels, "");
        for reserved in [LABEL_NAMESPACE, LABEL_SERVICE_ACCOUNT, LABEL_ORCHESTRATOR] {
            own.remove(reserved);
        }
        labels.extend(own);
        labels
    }

    /// Effective labels of an endpoint.
    pub fn labels(&self, key: &EndpointKey, endpoint: &WorkloadEndpoint) -> Labels {
        let mut labels = namespaced(&endpoint.labels, &key.namespace);
        let account = NamespacedName::new(&key.namespace, &endpoint.service_account);
        labels.remove(LABEL_SERVICE_ACCOUNT);
        if !account.name.is_empty() && account.name.len() < 63 {
            labels.insert(LABEL_SERVICE_ACCOUNT.to_owned(), account.name.clone());
        }
        self.inherit(&mut labels, &key.namespace);
        if let Some(parent) = self.service_accounts.get(&account) {
            inherit(&mut labels, PREFIX_SERVICE_ACCOUNT, &account.name, parent);
        }
        labels
    }

    /// Effective labels of a network set.
    pub fn set_labels(&self, key: &NetworkSetKey, set: &NetworkSet) -> Labels {
        if key.namespace.is_empty() {
            let mut labels = namespaced(&set.labels, "");
            for reserved in [LABEL_NAMESPACE, LABEL_SERVICE_ACCOUNT, LABEL_ORCHESTRATOR] {
                labels.remove(reserved);
            }
            return labels;
        }
        let mut labels = namespaced(&set.labels, &key.namespace);
        for reserved in [LABEL_SERVICE_ACCOUNT, LABEL_ORCHESTRATOR] {
            labels.remove(reserved);
        }
        self.inherit(&mut labels, &key.namespace);
        labels
    }

    fn inherit(&self, labels: &mut Labels, namespace: &str) {
        if let Some(parent) = self.namespaces.get(namespace) {
            inherit(labels, PREFIX_NAMESPACE, namespace, &parent.labels);
        }
    }
}

fn namespaced(own: &Labels, namespace: &str) -> Labels {
    let own = own.iter().filter(|(key, _)| {
        !key.starts_with(PREFIX_NAMESPACE) && !key.starts_with(PREFIX_SERVICE_ACCOUNT)
    });
    let mut labels: Labels = own
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    labels.insert(LABEL_NAMESPACE.to_owned(), namespace.to_owned());
    labels
}

fn inherit(labels: &mut Labels, prefix: &str, name: &str, parent: &Labels) {
    for (key, value) in parent {
        labels.insert(format!("{prefix}{key}"), value.clone());
    }
    labels.insert(format!("{prefix}{LABEL_PARENT_NAME}"), name.to_owned());
}
