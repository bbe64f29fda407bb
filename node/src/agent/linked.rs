//! Pods that have a link on this node. Their addresses are routed to it from before their policy is
//! known until after it has been removed.

use std::collections::BTreeMap;

use super::local_pods;
use margay_dataplane::Attached;
use margay_dataplane::routes::plan::LocalPods;

/// A pod's link.
#[derive(Debug)]
struct Link {
    /// Index of the link, if this run of the agent created it.
    index: Option<u32>,
    pod: Attached,
}

/// The pods by host-side interface.
#[derive(Debug, Default)]
pub(super) struct Linked(BTreeMap<String, Link>);

impl Linked {
    /// Pods attached by earlier runs.
    pub(super) fn of(attached: &BTreeMap<String, Attached>) -> Self {
        let links = attached.iter().map(|(name, pod)| (name.clone(), Link { index: None, pod: pod.clone() }));
        Self(links.collect())
    }

    /// Adds a created link.
    pub(super) fn made(&mut self, interface: String, index: u32, pod: Attached) {
        self.0.insert(interface, Link { index: Some(index), pod });
    }

    /// Adds an attached pod whose link is not known; returns whether it was new.
    pub(super) fn attached(&mut self, interface: &str, pod: &Attached) -> bool {
        let is_new = self.0.get(interface).is_none_or(|link| link.pod != *pod);
        if is_new {
            self.0.insert(interface.to_owned(), Link { index: None, pod: pod.clone() });
        }
        is_new
    }

    /// Removes a link; returns whether it was known. A later link of the same name, known by its
    /// index, stays.
    pub(super) fn gone(&mut self, interface: &str, index: Option<u32>) -> bool {
        let is_other = |link: &Link| matches!((link.index, index), (Some(own), Some(gone)) if own != gone);
        let is_known = self.0.get(interface).is_some_and(|link| !is_other(link));
        if is_known {
            self.0.remove(interface);
        }
        is_known
    }

    /// Interface by address, as routes are planned from.
    pub(super) fn pods(&self) -> LocalPods {
        local_pods(self.0.iter().map(|(interface, link)| (interface, &link.pod)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_dataplane::nftables::sample::mk_pod;

    #[test]
    fn addresses_lead_to_a_link_until_it_is_gone_and_to_a_later_one_of_its_name() {
        let (endpoint, addresses) = mk_pod(0);
        let pod = Attached { endpoint, uid: String::new(), addresses };
        let count = |linked: &Linked| linked.pods().len();
        let mut linked = Linked::default();
        linked.made("cali1".to_owned(), 5, pod.clone());
        assert!(!linked.attached("cali1", &pod), "it is known already");
        assert_eq!(count(&linked), pod.addresses.len());
        linked.made("cali1".to_owned(), 6, pod.clone());
        assert!(!linked.gone("cali1", Some(5)), "the former one");
        assert_eq!(count(&linked), pod.addresses.len());
        assert!(linked.gone("cali1", Some(6)) && !linked.gone("cali1", Some(6)));
        assert_eq!(count(&linked), 0);
        let mut earlier = Linked::of(&BTreeMap::from([("cali1".to_owned(), pod.clone())]));
        assert!(!earlier.attached("cali1", &pod) && earlier.gone("cali1", Some(7)), "its index is not known");
        assert!(earlier.attached("cali1", &pod) && earlier.gone("cali1", None), "none is there any more");
    }
}
