//! The thread that removes pods' links, many at once.
//!
//! The kernel waits several times for all its readers when a link goes, some 20 ms, and does so once for a whole group of links. While one removal waits,
//! others queue up here, and go together in the next.

use std::io;
use std::thread;

use tokio::sync::{mpsc, oneshot};

use super::netlink::{NetlinkError, Socket};
use super::pod;

/// Removals that wait for the thread; who asks for one more waits for a place.
const QUEUE: usize = 256;

struct Request {
    host: String,
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
        let socket = Socket::open()?;
        thread::Builder::new().name("link-removal".to_owned()).spawn(move || serve(socket, requests))?;
        Ok(Self { queue })
    }

    /// Removes a pod's link by its host side; a link that is gone is a success.
    pub async fn remove(&self, host: String) -> Result<(), NetlinkError> {
        let (done, answer) = oneshot::channel();
        let ended = |_| NetlinkError::Socket(io::Error::other("the thread that removes links has ended"));
        self.queue.send(Request { host, done }).await.map_err(|_| ended(()))?;
        answer.await.unwrap_or_else(|_| Err(ended(())))
    }
}

fn serve(mut socket: Socket, mut requests: mpsc::Receiver<Request>) {
    let mut waiting = Vec::with_capacity(QUEUE);
    while requests.blocking_recv_many(&mut waiting, QUEUE) > 0 {
        let (hosts, answers): (Vec<_>, Vec<_>) = waiting.drain(..).map(|request| (request.host, request.done)).unzip();
        for (result, answer) in pod::remove_all(&mut socket, &hosts).into_iter().zip(answers) {
            // Who gave up waiting asks again.
            let _ = answer.send(result);
        }
    }
}
