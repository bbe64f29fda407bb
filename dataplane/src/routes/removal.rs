//! The thread that deletes pods' links in batches, and deferred deletions.
//!
//! Deleting a link takes the kernel several RCU grace periods, some 20 ms, with the RTNL lock held,
//! and no longer for a whole group of links. While one deletion runs, others queue up here and are
//! deleted together. A link whose pod has left the rules carries nothing, so DEL does not wait for
//! it: most links are gone with their network namespaces when their turn comes.

use std::io;
use std::thread;
use std::time::Duration;

use nix::net::if_::{if_indextoname, if_nametoindex};
use tokio::sync::{mpsc, oneshot};

use super::message::LinkRef;
use super::pod;
use margay_netlink::route::{NetlinkError, RouteSocket};

/// Capacity of the queue; senders wait while it is full.
const QUEUE: usize = 256;
/// How long a deferred deletion leaves a link to the end of its network namespace, which runtimes
/// delete right after DEL.
const DELETE_DELAY: Duration = Duration::from_millis(500);
/// Interval of checking such a link.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Index of a link in the calling thread's network namespace. Does not take the RTNL lock, which
/// deletions hold.
pub fn link_index(host: &str) -> Option<u32> {
    if_nametoindex(host).ok()
}

struct Request {
    link: LinkRef,
    done: oneshot::Sender<Result<(), NetlinkError>>,
}

/// Handle to the thread. Cheap to clone.
#[derive(Clone)]
pub struct LinkRemover {
    queue: mpsc::Sender<Request>,
}

impl LinkRemover {
    /// Starts the thread in the calling thread's network namespace. It ends with the last handle.
    pub fn spawn() -> Result<Self, NetlinkError> {
        let (queue, requests) = mpsc::channel(QUEUE);
        let socket = RouteSocket::open()?;
        thread::Builder::new()
            .name("link-removal".to_owned())
            .spawn(move || serve(socket, requests))?;
        Ok(Self { queue })
    }

    /// Deletes a pod's link by its host side; a missing link is a success.
    pub async fn remove(&self, host: String) -> Result<(), NetlinkError> {
        self.exec(LinkRef::Name(host)).await
    }

    /// Waits until the link of this index is gone, and deletes it after a while. The calling thread
    /// must be in its network namespace.
    pub async fn wait_or_remove(&self, index: u32) -> Result<(), NetlinkError> {
        let mut waited = Duration::ZERO;
        while waited < DELETE_DELAY {
            tokio::time::sleep(POLL_INTERVAL).await;
            waited += POLL_INTERVAL;
            if if_indextoname(index).is_err() {
                return Ok(());
            }
        }
        self.exec(LinkRef::Index(index)).await
    }

    async fn exec(&self, link: LinkRef) -> Result<(), NetlinkError> {
        let (done, answer) = oneshot::channel();
        let ended =
            |_| NetlinkError::Socket(io::Error::other("the thread that removes links has ended"));
        self.queue
            .send(Request { link, done })
            .await
            .map_err(|_| ended(()))?;
        answer.await.unwrap_or_else(|_| Err(ended(())))
    }
}

fn serve(mut socket: RouteSocket, mut requests: mpsc::Receiver<Request>) {
    let mut waiting = Vec::with_capacity(QUEUE);
    while requests.blocking_recv_many(&mut waiting, QUEUE) > 0 {
        let (links, answers): (Vec<_>, Vec<_>) = waiting
            .drain(..)
            .map(|request| (request.link, request.done))
            .unzip();
        for (result, answer) in pod::remove_links(&mut socket, &links)
            .into_iter()
            .zip(answers)
        {
            // The caller may have timed out; it asks again.
            let _ = answer.send(result);
        }
    }
}
