//! Notices to typha about the addresses of this node's pods, so that other nodes need not wait for
//! the API. The newest notice of a pod replaces older ones.

use std::collections::BTreeMap;
use std::sync::Arc;

use margay_api::endpoint::EndpointKey;
use margay_calc::model::{Record, RecordId};
use margay_proto::sync::{LocalEndpoint, encode_local_endpoint, wire};
use tokio::sync::{mpsc, watch};

use crate::agent::AgentHandle;
use crate::cni::attachment::Attachment;
use crate::cni::ports::Announcer;

/// Latest notice per pod, each with its sequence number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct NoticeQueue {
    last: u64,
    notices: BTreeMap<EndpointKey, (u64, LocalEndpoint)>,
}

/// Shared queue of notices. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Notices(Arc<watch::Sender<NoticeQueue>>);

impl NoticeQueue {
    fn put(&mut self, notice: LocalEndpoint) {
        self.last += 1;
        self.notices.insert(notice.key.clone(), (self.last, notice));
    }

    /// Notices after this sequence number, in order.
    fn newer_than(&self, number: u64) -> Vec<(u64, LocalEndpoint)> {
        let mut notices: Vec<_> = self
            .notices
            .values()
            .filter(|(sent, _)| *sent > number)
            .cloned()
            .collect();
        notices.sort_by_key(|(sent, _)| *sent);
        notices
    }

    /// Drops sent notices that another server does not need: that a pod is gone is in the API as
    /// well.
    fn drop_sent(&mut self, sent: u64) {
        self.notices
            .retain(|_, (number, notice)| *number > sent || !notice.addresses.is_empty());
    }
}

impl Notices {
    /// Puts a notice of a pod's addresses; empty: it has none any more.
    pub fn put(&self, notice: LocalEndpoint) {
        self.0.send_modify(|queue| queue.put(notice));
    }

    /// Sends all notices and each new one until the stream ends.
    pub(super) async fn send_all(&self, up: mpsc::Sender<wire::Up>, agent: &AgentHandle) {
        self.drop_known(agent).await;
        let mut queue = self.0.subscribe();
        let mut sent = 0;
        loop {
            let notices = queue.borrow_and_update().newer_than(sent);
            for (number, notice) in notices {
                if up.send(encode_local_endpoint(&notice)).await.is_err() {
                    return;
                }
                sent = number;
            }
            self.0.send_if_modified(|queue| {
                queue.drop_sent(sent);
                false
            });
            if queue.changed().await.is_err() {
                return;
            }
        }
    }

    /// Drops notices that the view reflects already.
    async fn drop_known(&self, agent: &AgentHandle) {
        let notices = self.0.borrow().notices.clone();
        let known = agent.inspect(move |state, _| {
            let shows = |notice: &LocalEndpoint| match state
                .records()
                .get(&RecordId::Endpoint(notice.key.clone()))
            {
                Some(Record::Endpoint(record)) => record.addresses == notice.addresses,
                _ => false,
            };
            notices
                .into_values()
                .filter(|(_, notice)| shows(notice))
                .map(|(number, _)| number)
                .collect::<Vec<_>>()
        });
        let known = known.await.unwrap_or_default();
        self.0.send_if_modified(|queue| {
            queue
                .notices
                .retain(|_, (number, _)| !known.contains(number));
            false
        });
    }
}

/// Announces addresses to typha at once, and then through another announcer.
pub struct AnnounceBoth<N> {
    /// Notices to typha.
    pub notices: Notices,
    /// Announcer for the rest of the cluster.
    pub then: N,
}

impl<N: Announcer> Announcer for AnnounceBoth<N> {
    fn announce(&self, attachment: &Attachment) {
        let addresses = attachment
            .addresses
            .iter()
            .map(ipnet::IpNet::addr)
            .collect();
        self.notices.put(LocalEndpoint {
            key: attachment.endpoint(),
            addresses,
            uid: attachment.uid.clone(),
        });
        self.then.announce(attachment);
    }

    fn withdraw(&self, attachment: &Attachment) {
        self.notices.put(LocalEndpoint {
            key: attachment.endpoint(),
            addresses: Vec::new(),
            uid: attachment.uid.clone(),
        });
        self.then.withdraw(attachment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(name: &str, address: Option<&str>) -> LocalEndpoint {
        let addresses = address
            .iter()
            .map(|address| address.parse().expect("an address"))
            .collect();
        LocalEndpoint {
            key: EndpointKey::new("x", name),
            addresses,
            uid: "u".to_owned(),
        }
    }

    #[test]
    fn the_latest_notice_replaces_older_ones_and_a_removal_is_sent_once() {
        let mut queue = NoticeQueue::default();
        queue.put(notice("a", Some("10.0.0.1")));
        queue.put(notice("b", Some("10.0.0.2")));
        queue.put(notice("a", None));
        assert_eq!(
            queue.newer_than(0),
            [(2, notice("b", Some("10.0.0.2"))), (3, notice("a", None))]
        );
        assert_eq!(queue.newer_than(3), []);
        queue.drop_sent(2);
        assert_eq!(
            queue.newer_than(0).len(),
            2,
            "a removal that was not sent stays"
        );
        queue.drop_sent(3);
        assert_eq!(queue.newer_than(0), [(2, notice("b", Some("10.0.0.2")))]);
    }
}
