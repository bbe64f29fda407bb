//! Conversations end with their owner: entries of connection tracking that have an address are deleted when it comes to a pod and when it leaves one.
//!
//! What is established passes policy, so an entry that outlives its pod would let the packets of an old conversation in to the next owner of the
//! address, and out of it. Only entries of addresses that are asked for are touched.
//!
//! Reading order: [`message`] (ctnetlink, in a few messages of our own), [`table`] (the kernel), [`purge`] (which of its ways is taken). This file is the
//! thread that owns the socket.

mod message;
mod purge;
#[cfg(any(test, feature = "testing"))]
mod refusing;
mod table;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::thread;

use tokio::sync::{mpsc, oneshot};

use self::message::Subject;
pub use self::purge::Extent;
use self::purge::Purger;
pub use self::table::TableError;
use self::table::{Kernel, Table};

/// Requests that wait for the thread; who asks for one more waits for a place.
const QUEUE: usize = 256;

struct Request {
    addresses: Vec<IpAddr>,
    extent: Extent,
    done: oneshot::Sender<Result<(), TableError>>,
}

/// Lists the connections of the calling thread's network namespace, of which there may be none. The module that lists them is the one that deletes them.
pub(crate) fn attempt() -> io::Result<()> {
    Kernel::open()?.list()
}

/// A handle to the thread. Cheap to clone.
#[derive(Clone)]
pub struct Conntrack {
    queue: mpsc::Sender<Request>,
}

impl Conntrack {
    /// Starts the thread in the network namespace of the calling thread. It ends with the last handle.
    pub fn spawn() -> io::Result<Self> {
        Self::over(Kernel::open()?)
    }

    fn over(table: impl Table) -> io::Result<Self> {
        let (queue, requests) = mpsc::channel(QUEUE);
        thread::Builder::new().name("conntrack".to_owned()).spawn(move || serve(Purger::new(table), requests))?;
        Ok(Self { queue })
    }

    /// A thread whose kernel refuses everything.
    #[cfg(any(test, feature = "testing"))]
    pub fn refusing() -> io::Result<Self> {
        Self::over(refusing::Refusing)
    }

    /// Returns when no entry that was there has one of these addresses any more. Packets may make new ones meanwhile: the caller sees to it that
    /// those meet policy.
    pub async fn purge(&self, addresses: Vec<IpAddr>, extent: Extent) -> Result<(), TableError> {
        if addresses.is_empty() {
            return Ok(());
        }
        let ended = || TableError::Socket("its thread has ended".to_owned());
        let (done, answer) = oneshot::channel();
        self.queue.send(Request { addresses, extent, done }).await.map_err(|_| ended())?;
        answer.await.unwrap_or_else(|_| Err(ended()))
    }
}

/// Requests that wait together are answered together: many addresses cost one look at the table.
fn serve(mut purger: Purger<impl Table>, mut requests: mpsc::Receiver<Request>) {
    let mut waiting = Vec::with_capacity(QUEUE);
    while requests.blocking_recv_many(&mut waiting, QUEUE) > 0 {
        let mut subjects = BTreeMap::new();
        for request in &waiting {
            for subject in request.addresses.iter().copied().filter_map(Subject::new) {
                let extent = subjects.entry(subject).or_insert(request.extent);
                *extent = request.extent.max(*extent);
            }
        }
        let result = purger.purge(&subjects);
        for request in waiting.drain(..) {
            // Who gave up waiting asks again.
            let _ = request.done.send(result.clone());
        }
    }
}

#[cfg(test)]
mod tests;
