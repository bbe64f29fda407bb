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
struct Book {
    last: u64,
    words: BTreeMap<EndpointKey, (u64, LocalEndpoint)>,
}

/// Shared queue of notices. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Notices(Arc<watch::Sender<Book>>);

impl Book {
    fn say(&mut self, word: LocalEndpoint) {
        self.last += 1;
        self.words.insert(word.key.clone(), (self.last, word));
    }

    /// Notices after this sequence number, in order.
    fn since(&self, number: u64) -> Vec<(u64, LocalEndpoint)> {
        let mut words: Vec<_> = self.words.values().filter(|(said, _)| *said > number).cloned().collect();
        words.sort_by_key(|(said, _)| *said);
        words
    }

    /// Drops sent notices that another server does not need: that a pod is gone is in the API as
    /// well.
    fn prune(&mut self, said: u64) {
        self.words.retain(|_, (number, word)| *number > said || !word.addresses.is_empty());
    }
}

impl Notices {
    /// Puts a notice of a pod's addresses; empty: it has none any more.
    pub fn say(&self, word: LocalEndpoint) {
        self.0.send_modify(|book| book.say(word));
    }

    /// Sends all notices and each new one until the stream ends.
    pub(super) async fn tell(&self, up: mpsc::Sender<wire::Up>, agent: &AgentHandle) {
        self.forget(agent).await;
        let mut book = self.0.subscribe();
        let mut said = 0;
        loop {
            let words = book.borrow_and_update().since(said);
            for (number, word) in words {
                if up.send(encode_local_endpoint(&word)).await.is_err() {
                    return;
                }
                said = number;
            }
            self.0.send_if_modified(|book| {
                book.prune(said);
                false
            });
            if book.changed().await.is_err() {
                return;
            }
        }
    }

    /// Drops notices that the view reflects already.
    async fn forget(&self, agent: &AgentHandle) {
        let words = self.0.borrow().words.clone();
        let known = agent.inspect(move |state, _| {
            let shows = |word: &LocalEndpoint| match state.records().get(&RecordId::Endpoint(word.key.clone())) {
                Some(Record::Endpoint(record)) => record.addresses == word.addresses,
                _ => false,
            };
            words.into_values().filter(|(_, word)| shows(word)).map(|(number, _)| number).collect::<Vec<_>>()
        });
        let known = known.await.unwrap_or_default();
        self.0.send_if_modified(|book| {
            book.words.retain(|_, (number, _)| !known.contains(number));
            false
        });
    }
}

/// Announces addresses to typha at once, and then through another announcer.
pub struct Announce<N> {
    /// Notices to typha.
    pub notices: Notices,
    /// Announcer for the rest of the cluster.
    pub then: N,
}

impl<N: Announcer> Announcer for Announce<N> {
    fn announce(&self, attachment: &Attachment) {
        let addresses = attachment.addresses.iter().map(ipnet::IpNet::addr).collect();
        self.notices.say(LocalEndpoint { key: attachment.endpoint(), addresses, uid: attachment.uid.clone() });
        self.then.announce(attachment);
    }

    fn withdraw(&self, attachment: &Attachment) {
        self.notices.say(LocalEndpoint {
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

    fn word(name: &str, address: Option<&str>) -> LocalEndpoint {
        let addresses = address.iter().map(|address| address.parse().expect("an address")).collect();
        LocalEndpoint { key: EndpointKey::new("x", name), addresses, uid: "u".to_owned() }
    }

    #[test]
    fn the_newest_word_counts_and_a_farewell_is_said_once() {
        let mut book = Book::default();
        book.say(word("a", Some("10.0.0.1")));
        book.say(word("b", Some("10.0.0.2")));
        book.say(word("a", None));
        assert_eq!(book.since(0), [(2, word("b", Some("10.0.0.2"))), (3, word("a", None))]);
        assert_eq!(book.since(3), []);
        book.prune(2);
        assert_eq!(book.since(0).len(), 2, "a farewell that was not said stays");
        book.prune(3);
        assert_eq!(book.since(0), [(2, word("b", Some("10.0.0.2")))]);
    }
}
