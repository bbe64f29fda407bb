//! The agent: one thread owns the node's state. Every change reaches it as an [`AgentEvent`], and
//! it alone has the dataplane program policy.
//!
//! The kernel's answers block, so the owner has a thread of its own. Events that are queued
//! together are committed together: one transaction, one acknowledgement. Nothing is written to the
//! kernel before the first complete view, unless the kernel holds nothing of ours and a view was
//! saved.

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

use crate::bgp::InputsSender;
use crate::cni::ports::{Enforcer, NotEnforced};
use crate::metrics::Metrics;
use crate::state::{Held, State, ViewError};
use crate::store::ViewStore;
use margay_dataplane::routes::plan::{LocalPods, Plan};
use margay_dataplane::routes::worker::{Network, Progress};
use margay_dataplane::{Attached, Dataplane, Links};

pub use changes::{watch_drift, watch_links};
pub use owner::RetriesExhausted;
pub use routing::RoutingFault;

/// Capacity of the event queue. Senders wait while it is full, and through them typha.
const QUEUE: usize = 256;

/// Event for the owner of the state.
pub enum AgentEvent {
    /// A stream to a server is being opened. The owner returns what it holds, and reports through
    /// `fault` when a frame cannot be applied.
    Connected {
        /// Number of the stream.
        stream: u64,
        /// Receives what the hello says.
        hello: oneshot::Sender<Held>,
        /// Receives the error after which the stream must be reopened.
        fault: oneshot::Sender<ViewError>,
        /// Address of the server.
        server: String,
    },
    /// Frame received on a stream.
    Frame {
        /// Number of the stream.
        stream: u64,
        /// The frame.
        frame: Box<Frame>,
    },
    /// A stream ended.
    Disconnected {
        /// Number of the stream.
        stream: u64,
    },
    /// Attaches a pod whose link is being created.
    Attach {
        /// Host side interface.
        interface: String,
        /// The pod.
        pod: Attached,
        /// Completed when the pod's policy and addresses are committed.
        done: oneshot::Sender<Result<(), NotEnforced>>,
    },
    /// Detaches a pod: removes it from policy. Its addresses stay routed to its link while that
    /// exists.
    Detach {
        /// Host side interface.
        interface: String,
        /// The pod. A link of this name that belongs to another pod is left alone.
        endpoint: EndpointKey,
        /// Completed when nothing of the pod is in the kernel any more. False: nothing is written
        /// to the kernel yet.
        done: oneshot::Sender<bool>,
    },
    /// A pod's link was created: its addresses are routed to it from now on, whether its policy is
    /// known or not.
    LinkMade {
        /// Host side interface.
        interface: String,
        /// Index of the link.
        index: u32,
        /// The pod.
        pod: Attached,
        /// Completed when the routes are planned, so that the route worker does not remove them as
        /// stale.
        done: oneshot::Sender<bool>,
    },
    /// The link of a detached pod was removed.
    LinkGone {
        /// Host side interface.
        interface: String,
        /// Index of the link, so that a later link of the same name is left alone. `None`: no link
        /// of that name existed any more.
        index: Option<u32>,
    },
    /// The addresses of the node's interfaces changed.
    Links(Links),
    /// Another program changed our nftables table.
    Drift,
    /// The progress of the route worker changed.
    Routed,
    /// Runs a closure on the state.
    Inspect(Inspection),
}

/// Closure that reads the owner's state.
pub type Inspection = Box<dyn FnOnce(&State, &dyn Dataplane) + Send>;

/// Status of the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The stream is up and the view complete.
    pub in_sync: bool,
    /// The kernel holds our table, from a complete view or from the saved one.
    pub enforcing: bool,
    /// Revision of the view in the kernel.
    pub revision: u64,
    /// Server of the current stream; empty if there is none.
    pub server: String,
    /// Records that are not enforced as written, with the reason.
    pub errors: BTreeMap<RecordId, String>,
    /// Why the last nftables commit failed; `None` if it succeeded.
    pub failing: Option<String>,
    /// Why routing has differed from the plan for longer than the grace period.
    pub routing: Option<RoutingFault>,
}

impl Status {
    /// Reason why the node is not ready, if any.
    pub fn not_ready_reason(&self) -> Option<String> {
        self.no_network_reason()
            .or_else(|| self.routing.as_ref().map(|fault| fault.reason.clone()))
    }

    /// Reason why pods cannot be attached or would have no network on this node, if any. CNI STATUS
    /// reports it, and the kubelet then marks the node NotReady.
    pub fn no_network_reason(&self) -> Option<String> {
        if let Some(reason) = &self.failing {
            return Some(format!("nftables could not be programmed: {reason}"));
        }
        if !self.enforcing {
            return Some(
                "no complete view received from margay-typha yet; check that it is running and \
                 reachable"
                    .to_owned(),
            );
        }
        self.routing
            .as_ref()
            .filter(|fault| fault.is_own)
            .map(|fault| fault.reason.clone())
    }
}

/// Sink of route plans.
pub trait Routes: Send {
    /// Replaces the wanted plan and returns its generation. Does not block.
    fn set_plan(&mut self, plan: Plan) -> u64;
    /// Replaces the node's own pods in the newest plan and returns its generation. Does not block.
    fn set_pods(&mut self, pods: LocalPods) -> u64;
    /// Progress of the kernel towards the plan.
    fn progress(&self) -> watch::Receiver<Progress>;
}

impl Routes for Network {
    fn set_plan(&mut self, plan: Plan) -> u64 {
        Self::set_plan(self, plan)
    }

    fn set_pods(&mut self, pods: LocalPods) -> u64 {
        Self::set_pods(self, pods)
    }

    fn progress(&self) -> watch::Receiver<Progress> {
        self.watch()
    }
}

/// Initial state and dependencies of an agent.
pub struct AgentParts {
    /// Name of the node.
    pub node: String,
    /// The saved view.
    pub view: BTreeMap<RecordId, Record>,
    /// Pods that earlier runs have attached, by interface.
    pub attached: BTreeMap<String, Attached>,
    /// Addresses of the node's interfaces.
    pub links: Links,
    /// Dataplane that enforces policy.
    pub dataplane: Box<dyn Dataplane>,
    /// Route worker, if this agent plans routes.
    pub routes: Option<Box<dyn Routes>>,
    /// Where what BGP follows from is sent.
    pub bgp: InputsSender,
    /// Where the view is saved; `None`: it is not.
    pub store: Option<ViewStore>,
    /// Metrics.
    pub metrics: Metrics,
}

/// Handle to the agent; cheap to clone. The agent ends when the last handle is dropped.
#[derive(Clone)]
pub struct AgentHandle {
    events: mpsc::Sender<AgentEvent>,
    status: watch::Receiver<Status>,
    acks: watch::Receiver<Option<Arc<Ack>>>,
}

/// Starts the owner's thread. The receiver gets the error when it cannot go on; what is enforced
/// stays enforced. Needs a tokio runtime.
pub fn spawn(
    parts: AgentParts,
) -> std::io::Result<(AgentHandle, oneshot::Receiver<RetriesExhausted>)> {
    let (agent, owner, queue) = mk_owner(parts);
    let (fatal, fate) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("agent".to_owned())
        .spawn(move || {
            if let Err(error) = runtime.block_on(owner.run(queue)) {
                // The receiver is gone only if the process is ending already.
                let _ = fatal.send(error);
            }
        })?;
    Ok((agent, fate))
}

/// Creates an agent without a thread: the future does the owner's work, and blocks while the
/// dataplane does. For simulations, whose dataplane does not, and which have one thread. Needs a
/// tokio runtime.
pub fn mk_agent(
    parts: AgentParts,
) -> (
    AgentHandle,
    impl Future<Output = Result<(), RetriesExhausted>>,
) {
    let (agent, owner, queue) = mk_owner(parts);
    (agent, owner.run(queue))
}

fn mk_owner(parts: AgentParts) -> (AgentHandle, owner::StateOwner, mpsc::Receiver<AgentEvent>) {
    let (events, queue) = mpsc::channel(QUEUE);
    let (status, seen_status) = watch::channel(Status::default());
    let (acks, seen_acks) = watch::channel(None);
    if let Some(routes) = &parts.routes {
        // A strong sender would keep the agent alive.
        tokio::spawn(forward_progress(routes.progress(), events.downgrade()));
    }
    let owner = owner::StateOwner::new(parts, status, acks);
    (
        AgentHandle {
            events,
            status: seen_status,
            acks: seen_acks,
        },
        owner,
        queue,
    )
}

/// Forwards each change of the route worker's progress to the owner.
async fn forward_progress(
    mut progress: watch::Receiver<Progress>,
    events: mpsc::WeakSender<AgentEvent>,
) {
    while progress.changed().await.is_ok() {
        let Some(events) = events.upgrade() else {
            return;
        };
        if events.send(AgentEvent::Routed).await.is_err() {
            return;
        }
    }
}

impl AgentHandle {
    /// Sends an event, waiting while the queue is full. False: the agent has ended.
    pub async fn send(&self, event: AgentEvent) -> bool {
        self.events.send(event).await.is_ok()
    }

    /// Current status.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Subscription to the status.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Subscription to the newest acknowledgement, which covers all before it.
    pub fn acks(&self) -> watch::Receiver<Option<Arc<Ack>>> {
        self.acks.clone()
    }

    /// Waits until a server has declared the view complete and it is in the kernel.
    pub async fn wait_in_sync(&self) {
        let mut status = self.status.clone();
        // An agent that has ended never gets in sync: the caller's own deadline ends this.
        if status
            .wait_for(|status| status.in_sync && status.enforcing)
            .await
            .is_err()
        {
            std::future::pending::<()>().await;
        }
    }

    /// Runs a closure on the state and returns its result; `None` if the agent has ended.
    pub async fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&State, &dyn Dataplane) -> T + Send + 'static,
    ) -> Option<T> {
        let (seen, result) = oneshot::channel();
        let look = move |state: &State, dataplane: &dyn Dataplane| {
            // The caller may have been cancelled.
            let _ = seen.send(look(state, dataplane));
        };
        self.events
            .send(AgentEvent::Inspect(Box::new(look)))
            .await
            .ok()?;
        result.await.ok()
    }
}

impl Enforcer for AgentHandle {
    async fn attach(&self, interface: String, pod: Attached) -> Result<(), NotEnforced> {
        let ended = || NotEnforced::Refused("the agent is ending".to_owned());
        let (done, result) = oneshot::channel();
        self.events
            .send(AgentEvent::Attach {
                interface,
                pod,
                done,
            })
            .await
            .map_err(|_| ended())?;
        result.await.unwrap_or_else(|_| Err(ended()))
    }

    async fn detach(&self, endpoint: EndpointKey, interface: String) -> bool {
        let (done, result) = oneshot::channel();
        self.send(AgentEvent::Detach {
            interface,
            endpoint,
            done,
        })
        .await
            && result.await.unwrap_or(false)
    }

    async fn link_made(&self, interface: String, index: u32, pod: Attached) {
        let (done, result) = oneshot::channel();
        // An agent that has ended plans no routes.
        if self
            .send(AgentEvent::LinkMade {
                interface,
                index,
                pod,
                done,
            })
            .await
        {
            let _ = result.await;
        }
    }

    async fn link_gone(&self, interface: String, index: Option<u32>) {
        self.send(AgentEvent::LinkGone { interface, index }).await;
    }

    fn not_ready_reason(&self) -> Option<String> {
        self.status.borrow().no_network_reason()
    }
}

/// Interface by address of the node's pods, as routes are planned from.
pub(crate) fn pods_by_address<'a>(
    pods: impl Iterator<Item = (&'a String, &'a Attached)>,
) -> LocalPods {
    let pods = pods.flat_map(|(interface, pod)| {
        pod.addresses
            .iter()
            .map(move |address| (*address, interface.clone()))
    });
    pods.collect()
}

#[cfg(test)]
mod tests;
