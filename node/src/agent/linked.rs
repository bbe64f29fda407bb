//! Pods that have a link on this node. Their addresses are routed to it from before their policy is
//! known until after it has been removed.

use std::collections::BTreeMap;

use super::pods_by_address;
use margay_dataplane::Attached;
use margay_dataplane::routes::plan::LocalPods;

/// A pod's link.
#[derive(Debug)]
struct LinkedPod {
    /// Index of the link, if this run of the agent created it.
    index: Option<u32>,
    pod: Attached,
}

/// The pods by host-side interface.
#[derive(Debug, Default)]
pub(super) struct LinkedPods(BTreeMap<String, LinkedPod>);

impl LinkedPods {
    /// Pods attached by earlier runs.
    pub(super) fn from_attached(attached: &BTreeMap<String, Attached>) -> Self {
        let links = attached.iter().map(|(name, pod)| {
            (
                name.clone(),
                LinkedPod {
                    index: None,
                    pod: pod.clone(),
                },
            )
        });
        Self(links.collect())
    }

    /// Adds a created link.
    pub(super) fn add(&mut self, interface: String, index: u32, pod: Attached) {
        self.0.insert(
            interface,
            LinkedPod {
                index: Some(index),
                pod,
            },
        );
    }

    /// Adds an attached pod whose link is not known; returns whether it was new.
    pub(super) fn ensure(&mut self, interface: &str, pod: &Attached) -> bool {
        let is_new = self.0.get(interface).is_none_or(|link| link.pod != *pod);
        if is_new {
            self.0.insert(
                interface.to_owned(),
                LinkedPod {
                    index: None,
                    pod: pod.clone(),
                },
            );
        }
        is_new
    }

    /// Removes a link; returns whether it was known. A later link of the same name, known by its
    /// index, stays.
    pub(super) fn remove(&mut self, interface: &str, index: Option<u32>) -> bool {
        let is_other = |link: &LinkedPod| {
            matches!(
                (link.index, index),
                (Some(own), Some(gone)) if own != gone,
            )
        };
        let is_known = self.0.get(interface).is_some_and(|link| !is_other(link));
        if is_known {
            self.0.remove(interface);
        }
        is_known
    }

    /// Interface by address, as routes are planned from.
    pub(super) fn local_pods(&self) -> LocalPods {
        pods_by_address(
            self.0
                .iter()
                .map(|(interface, link)| (interface, &link.pod)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_dataplane::nftables::sample::mk_pod;

    #[test]
    fn addresses_lead_to_a_link_until_it_is_gone_and_to_a_later_one_of_its_name() {
        let (endpoint, addresses) = mk_pod(0);
        let pod = Attached {
            endpoint,
            uid: String::new(),
            addresses,
            host_ports: Vec::new(),
        };
        let count = |linked: &LinkedPods| linked.local_pods().len();
        let mut linked = LinkedPods::default();
        linked.add("cali1".to_owned(), 5, pod.clone());
        assert!(!linked.ensure("cali1", &pod), "it is known already");
        assert_eq!(count(&linked), pod.addresses.len());
        linked.add("cali1".to_owned(), 6, pod.clone());
        assert!(!linked.remove("cali1", Some(5)), "the former one");
        assert_eq!(count(&linked), pod.addresses.len());
        assert!(linked.remove("cali1", Some(6)) && !linked.remove("cali1", Some(6)));
        assert_eq!(count(&linked), 0);
        let mut earlier =
            LinkedPods::from_attached(&BTreeMap::from([("cali1".to_owned(), pod.clone())]));
        assert!(
            !earlier.ensure("cali1", &pod) && earlier.remove("cali1", Some(7)),
            "its index is not known"
        );
        assert!(
            earlier.ensure("cali1", &pod) && earlier.remove("cali1", None),
            "none is there any more"
        );
    }
}
