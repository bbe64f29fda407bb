//! The thread that removes pods' links, many at once, and the removals that nobody waits for.
//!
//! The kernel waits several times for all its readers when a link goes, some 20 ms with the lock of all links held, and does so once for a whole group of
//! links. While one removal waits, others queue up here, and go together in the next. A link whose pod is out of the rules carries nothing, so a DEL does not
//! wait for it: most such links have gone with their network namespaces when their turn comes.

use std::io;
use std::thread;
use std::time::Duration;

use nix::net::if_::{if_indextoname, if_nametoindex};
use tokio::sync::{mpsc, oneshot};

use super::message::LinkRef;
use super::pod;
use margay_netlink::route::{NetlinkError, RouteSocket};

/// Removals that wait for the thread; who asks for one more waits for a place.
const QUEUE: usize = 256;
/// What nobody waits for is left to the end of its network namespace for this long: runtimes end it right after DEL.
const LINGER: Duration = Duration::from_millis(500);
/// Meanwhile it is looked at this often.
const LOOK: Duration = Duration::from_millis(20);

/// Index of the link of this name, in the network namespace of the calling thread. Does not take the lock that removals hold.
pub fn index_of(host: &str) -> Option<u32> {
    if_nametoindex(host).ok()
}

struct Request {
    link: LinkRef,
    done: oneshot::Sender<Result<(), NetlinkError>>,
}

/// A handle to the thread. Cheap to clone.
#[derive(Clone)]
pub struct Removal {
    queue: mpsc::Sender<Request>,
}

impl Removal {
    /// Starts the thread in the network namespace of the calling thread. It ends with the last handle.
    pub fn spawn() -> Result<Self, NetlinkError> {
        let (queue, requests) = mpsc::channel(QUEUE);
        let socket = RouteSocket::open()?;
        thread::Builder::new().name("link-removal".to_owned()).spawn(move || serve(socket, requests))?;
        Ok(Self { queue })
    }

    /// Removes a pod's link by its host side; a link that is gone is a success.
    pub async fn remove(&self, host: String) -> Result<(), NetlinkError> {
        self.exec(LinkRef::Name(host)).await
    }

    /// Returns once the link of this index is gone: by itself, or removed after a while. The calling thread is in its network namespace.
    pub async fn expect_gone(&self, index: u32) -> Result<(), NetlinkError> {
        let mut waited = Duration::ZERO;
        while waited < LINGER {
            tokio::time::sleep(LOOK).await;
            waited += LOOK;
            if if_indextoname(index).is_err() {
                return Ok(());
            }
        }
        self.exec(LinkRef::Index(index)).await
    }

    async fn exec(&self, link: LinkRef) -> Result<(), NetlinkError> {
        let (done, answer) = oneshot::channel();
        let ended = |_| NetlinkError::Socket(io::Error::other("the thread that removes links has ended"));
        self.queue.send(Request { link, done }).await.map_err(|_| ended(()))?;
        answer.await.unwrap_or_else(|_| Err(ended(())))
    }
}

fn serve(mut socket: RouteSocket, mut requests: mpsc::Receiver<Request>) {
    let mut waiting = Vec::with_capacity(QUEUE);
    while requests.blocking_recv_many(&mut waiting, QUEUE) > 0 {
        let (links, answers): (Vec<_>, Vec<_>) = waiting.drain(..).map(|request| (request.link, request.done)).unzip();
        for (result, answer) in pod::remove_all(&mut socket, &links).into_iter().zip(answers) {
            // Who gave up waiting asks again.
            let _ = answer.send(result);
        }
    }
}
