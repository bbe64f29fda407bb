//! The one owner of the node's state: every change comes to it as an [`Event`], and everything that the kernel holds of policy comes from it.
//!
//! It lives on a thread of its own because the kernel's answers block. Events that wait together are committed together: one transaction, one
//! acknowledgement. Nothing is written before the first whole view, unless the kernel holds nothing of ours and a view was saved.

mod acks;
mod changes;
mod linked;
mod owner;
mod routing;

use std::collections::BTreeMap;
use std::sync::Arc;

use margay_api::endpoint::EndpointKey;
use margay_calc::model::{Record, RecordId};
use margay_proto::sync::{Ack, Frame};
use tokio::sync::{mpsc, oneshot, watch};

use crate::cni::ports::{Enforcer, NotEnforced};
use crate::metrics::Metrics;
use crate::state::{Fault, State};
use crate::store::Store;
use margay_dataplane::routes::plan::{LocalPods, Plan};
use margay_dataplane::routes::worker::{Network, Progress};
use margay_dataplane::{Attached, Dataplane, Links};

pub use changes::{watch_drift, watch_links};
pub use owner::Fatal;
pub use routing::RoutingFault;

/// Events that wait at once; whoever has one more waits, and typha with it.
const QUEUE: usize = 256;

/// What can wake the owner.
pub enum Event {
    /// A stream to a server is being opened: what is held is asked for, and the stream is told when a frame cannot be applied.
    Connected {
        /// Number of the stream.
        stream: u64,
        /// Digests for the hello.
        hello: oneshot::Sender<Vec<u64>>,
        /// Takes the reason why the stream must be opened anew.
        fault: oneshot::Sender<Fault>,
        /// Where it leads.
        server: String,
    },
    /// A frame of this stream.
    Frame {
        /// Number of the stream.
        stream: u64,
        /// The frame.
        frame: Box<Frame>,
    },
    /// This stream has ended.
    Disconnected {
        /// Number of the stream.
        stream: u64,
    },
    /// A pod's link is being made.
    Attach {
        /// Host side interface.
        interface: String,
        /// The pod.
        pod: Attached,
        /// Told when its policy and addresses are committed.
        done: oneshot::Sender<Result<(), NotEnforced>>,
    },
    /// A pod is being detached: its policy goes, and its addresses lead to its link for as long as that is there.
    Detach {
        /// Host side interface.
        interface: String,
        /// The pod; another pod's link of this name stays.
        endpoint: EndpointKey,
        /// Told when nothing of it is in the kernel any more; false if nothing is written there yet.
        done: oneshot::Sender<bool>,
    },
    /// A pod's link is there: its addresses lead to it from now on, whether its policy is known or not.
    LinkMade {
        /// Host side interface.
        interface: String,
        /// Index of the link.
        index: u32,
        /// The pod.
        pod: Attached,
        /// Told when that is planned, so that the thread of routes takes none of them away.
        done: oneshot::Sender<bool>,
    },
    /// The link of a pod that was detached is gone.
    LinkGone {
        /// Host side interface.
        interface: String,
        /// Index of the link; a later link of that name is not meant. None: there was none any more.
        index: Option<u32>,
    },
    /// The node's interfaces have these addresses now.
    Links(Links),
    /// Somebody changed our table.
    Drift,
    /// Routes have come further, or are not as wanted any more.
    Routed,
    /// Somebody wants to look.
    Inspect(Look),
}

/// A look at what the owner has.
pub type Look = Box<dyn FnOnce(&State, &dyn Dataplane) + Send>;

/// How far the agent is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The stream is up and the view whole.
    pub in_sync: bool,
    /// The kernel holds our table, from a whole view or from the one saved last.
    pub enforcing: bool,
    /// Revision of the view in the kernel.
    pub revision: u64,
    /// The server that the stream leads to; empty: none.
    pub server: String,
    /// Records that are not enforced as they are written, and why.
    pub errors: BTreeMap<RecordId, String>,
    /// Why nftables does not hold what it should, if that is so.
    pub failing: Option<String>,
    /// Why routing is not as wanted, if that has been so for a while.
    pub routing: Option<RoutingFault>,
}

impl Status {
    /// Why the node is not as it should be, if that is so.
    pub fn not_ready(&self) -> Option<String> {
        self.no_network().or_else(|| self.routing.as_ref().map(|fault| fault.reason.clone()))
    }

    /// Why no pod could be attached now, or would have no network here, if that is so. Kubernetes takes a node of which this is said out of service.
    pub fn no_network(&self) -> Option<String> {
        if let Some(reason) = &self.failing {
            return Some(format!("nftables is not as wanted: {reason}"));
        }
        if !self.enforcing {
            return Some("the node's view has not come from margay-typha yet; is it running and reachable?".to_owned());
        }
        self.routing.as_ref().filter(|fault| fault.is_own).map(|fault| fault.reason.clone())
    }
}

/// Where routes are planned to.
pub trait Routes: Send {
    /// Makes this the wanted plan; returns its generation. Does not wait.
    fn want(&mut self, plan: Plan) -> u64;
    /// Makes the newest plan one of these pods of the node, and changes nothing else; returns its generation. Does not
    /// wait.
    fn want_pods(&mut self, pods: LocalPods) -> u64;
    /// How far the kernel has come, as that changes.
    fn progress(&self) -> watch::Receiver<Progress>;
}

impl Routes for Network {
    fn want(&mut self, plan: Plan) -> u64 {
        Self::want(self, plan)
    }

    fn want_pods(&mut self, pods: LocalPods) -> u64 {
        Self::want_pods(self, pods)
    }

    fn progress(&self) -> watch::Receiver<Progress> {
        self.watch()
    }
}

/// What an agent starts with.
pub struct Parts {
    /// Name of the node.
    pub node: String,
    /// The view saved last.
    pub view: BTreeMap<RecordId, Record>,
    /// Pods that earlier runs have attached, by interface.
    pub attached: BTreeMap<String, Attached>,
    /// Addresses of the node's interfaces.
    pub links: Links,
    /// What enforces policy.
    pub dataplane: Box<dyn Dataplane>,
    /// Links and routes, if this agent plans them.
    pub routes: Option<Box<dyn Routes>>,
    /// Where the view is saved, if it is.
    pub store: Option<Store>,
    /// Numbers.
    pub metrics: Metrics,
}

/// How others speak to the agent; cheap to clone. The agent ends when the last handle is gone.
#[derive(Clone)]
pub struct AgentHandle {
    events: mpsc::Sender<Event>,
    status: watch::Receiver<Status>,
    acks: watch::Receiver<Option<Arc<Ack>>>,
}

/// Starts the owner. The receiver gets the reason when it cannot go on; what the kernel enforces stays. Needs a tokio runtime.
pub fn spawn(parts: Parts) -> std::io::Result<(AgentHandle, oneshot::Receiver<Fatal>)> {
    let (events, queue) = mpsc::channel(QUEUE);
    let (status, seen_status) = watch::channel(Status::default());
    let (acks, seen_acks) = watch::channel(None);
    let (fatal, fate) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    if let Some(routes) = &parts.routes {
        // Its sender would keep the agent alive.
        runtime.spawn(follow(routes.progress(), events.downgrade()));
    }
    let owner = owner::Owner::new(parts, status, acks);
    std::thread::Builder::new().name("agent".to_owned()).spawn(move || {
        if let Err(error) = owner.run(&runtime, queue) {
            // Nobody listens only when the process is ending already.
            let _ = fatal.send(error);
        }
    })?;
    Ok((AgentHandle { events, status: seen_status, acks: seen_acks }, fate))
}

/// Tells the owner of every step of the routes.
async fn follow(mut progress: watch::Receiver<Progress>, events: mpsc::WeakSender<Event>) {
    while progress.changed().await.is_ok() {
        let Some(events) = events.upgrade() else { return };
        if events.send(Event::Routed).await.is_err() {
            return;
        }
    }
}

impl AgentHandle {
    /// Hands an event over; waits while the queue is full. False when the agent has ended.
    pub async fn send(&self, event: Event) -> bool {
        self.events.send(event).await.is_ok()
    }

    /// How far the agent is, now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// How far the agent is, as it changes.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// The newest acknowledgement, as it changes; it stands for all before it.
    pub fn acks(&self) -> watch::Receiver<Option<Arc<Ack>>> {
        self.acks.clone()
    }

    /// Returns when a server has said that the view is whole and it is in the kernel.
    pub async fn wait_in_sync(&self) {
        let mut status = self.status.clone();
        // An agent that has ended will never be in sync: the caller's own deadline ends this.
        if status.wait_for(|status| status.in_sync && status.enforcing).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Looks at the state.
    pub async fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&State, &dyn Dataplane) -> T + Send + 'static,
    ) -> Option<T> {
        let (seen, result) = oneshot::channel();
        let look = move |state: &State, dataplane: &dyn Dataplane| {
            // The one who asked may have gone.
            let _ = seen.send(look(state, dataplane));
        };
        self.events.send(Event::Inspect(Box::new(look))).await.ok()?;
        result.await.ok()
    }
}

impl Enforcer for AgentHandle {
    async fn attach(&self, interface: String, pod: Attached) -> Result<(), NotEnforced> {
        let ended = || NotEnforced::Refused("the agent is ending".to_owned());
        let (done, result) = oneshot::channel();
        self.events.send(Event::Attach { interface, pod, done }).await.map_err(|_| ended())?;
        result.await.unwrap_or_else(|_| Err(ended()))
    }

    async fn detach(&self, endpoint: EndpointKey, interface: String) -> bool {
        let (done, result) = oneshot::channel();
        self.send(Event::Detach { interface, endpoint, done }).await && result.await.unwrap_or(false)
    }

    async fn link_made(&self, interface: String, index: u32, pod: Attached) {
        let (done, result) = oneshot::channel();
        // An agent that has ended plans no routes.
        if self.send(Event::LinkMade { interface, index, pod, done }).await {
            let _ = result.await;
        }
    }

    async fn link_gone(&self, interface: String, index: Option<u32>) {
        self.send(Event::LinkGone { interface, index }).await;
    }

    fn not_ready(&self) -> Option<String> {
        self.status.borrow().no_network()
    }
}

/// The pods of the node, as routes need them.
pub(crate) fn local_pods<'a>(pods: impl Iterator<Item = (&'a String, &'a Attached)>) -> LocalPods {
    let pods = pods.flat_map(|(interface, pod)| pod.addresses.iter().map(move |address| (*address, interface.clone())));
    pods.collect()
}

#[cfg(test)]
mod tests;
