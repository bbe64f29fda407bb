//! Deletes the conntrack entries of an address when it is assigned to a pod and when it is
//! released.
//!
//! Packets of established connections pass policy, so an entry that outlives its pod would let
//! packets of the old connection reach the next owner of the address, and leave it. Only entries of
//! requested addresses are touched.
//!
//! Reading order: `message` (ctnetlink messages), `table` (the kernel), `purge` (which method
//! is used). This file is the thread that owns the socket.

mod message;
mod purge;
#[cfg(any(test, feature = "testing"))]
mod refusing;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::thread;

use tokio::sync::{mpsc, oneshot};

pub use self::message::LocalPort;
use self::message::PurgeAddress;
pub use self::purge::Extent;
use self::purge::Purger;
pub use self::table::TableError;
use self::table::{ConntrackTable, KernelTable};

/// Capacity of the queue; senders wait while it is full.
const QUEUE: usize = 256;

struct Request {
    subject: Subject,
    done: oneshot::Sender<Result<(), TableError>>,
}

/// Whose entries are to be deleted.
enum Subject {
    Addresses(Vec<IpAddr>, Extent),
    Untranslated(BTreeSet<LocalPort>),
}

/// Tests whether conntrack entries of the calling thread's network namespace can be listed; there
/// may be none. The same module lists and deletes them.
pub(crate) fn try_listing() -> io::Result<()> {
    KernelTable::open()?.list()
}

/// Handle to the thread. Cheap to clone.
#[derive(Clone)]
pub struct Conntrack {
    queue: mpsc::Sender<Request>,
}

impl Conntrack {
    /// Starts the thread in the calling thread's network namespace. It ends with the last handle.
    pub fn spawn() -> io::Result<Self> {
        Self::spawn_over(KernelTable::open()?)
    }

    fn spawn_over(table: impl ConntrackTable) -> io::Result<Self> {
        let (queue, requests) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("conntrack".to_owned())
            .spawn(move || serve(Purger::new(table), requests))?;
        Ok(Self { queue })
    }

    /// Starts a thread whose kernel refuses everything.
    #[cfg(any(test, feature = "testing"))]
    pub fn refusing() -> io::Result<Self> {
        Self::spawn_over(refusing::Refusing)
    }

    /// Deletes all entries with these addresses. Packets may create new ones meanwhile: the caller
    /// ensures that those meet policy.
    pub async fn purge(&self, addresses: Vec<IpAddr>, extent: Extent) -> Result<(), TableError> {
        if addresses.is_empty() {
            return Ok(());
        }
        self.request(Subject::Addresses(addresses, extent)).await
    }

    /// Deletes all entries of UDP packets to these ports of the node that are not translated, so
    /// that the next packet is.
    pub async fn purge_untranslated(&self, ports: BTreeSet<LocalPort>) -> Result<(), TableError> {
        if ports.is_empty() {
            return Ok(());
        }
        self.request(Subject::Untranslated(ports)).await
    }

    async fn request(&self, subject: Subject) -> Result<(), TableError> {
        let ended = || TableError::Socket("its thread has ended".to_owned());
        let (done, answer) = oneshot::channel();
        self.queue
            .send(Request { subject, done })
            .await
            .map_err(|_| ended())?;
        answer.await.unwrap_or_else(|_| Err(ended()))
    }
}

/// Serves requests; queued ones are handled together, as many addresses cost one walk of the table.
fn serve(mut purger: Purger<impl ConntrackTable>, mut requests: mpsc::Receiver<Request>) {
    let mut waiting = Vec::with_capacity(QUEUE);
    while requests.blocking_recv_many(&mut waiting, QUEUE) > 0 {
        let (mut subjects, mut ports) = (BTreeMap::new(), BTreeSet::new());
        for request in &waiting {
            match &request.subject {
                Subject::Addresses(addresses, extent) => {
                    for subject in addresses.iter().copied().filter_map(PurgeAddress::new) {
                        let largest = subjects.entry(subject).or_insert(*extent);
                        *largest = (*extent).max(*largest);
                    }
                }
                Subject::Untranslated(more) => ports.extend(more),
            }
        }
        let result = purger
            .purge(&subjects)
            .and_then(|()| purger.purge_untranslated(&ports));
        for request in waiting.drain(..) {
            // The caller may have timed out; it asks again.
            let _ = request.done.send(result.clone());
        }
    }
}

#[cfg(test)]
mod tests;
