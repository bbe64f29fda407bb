//! What the CNI service needs of the rest of the agent, as traits, so that it can be driven without an API server.

use std::future::Future;

use margay_api::endpoint::EndpointKey;

use super::attachment::Attachment;
use margay_dataplane::Attached;

/// Why a pod's policy is not in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotEnforced {
    /// Nobody has told this node yet what applies to the pod.
    #[error("policy of the pod is not known yet: {0}")]
    Unknown(String),
    /// The kernel refused it.
    #[error("policy of the pod could not be programmed: {0}")]
    Refused(String),
}

/// Puts a pod's policy into the kernel.
pub trait Enforcer: Clone + Send + Sync + 'static {
    /// Returns once policy and addresses of the pod are committed. May wait for as long as the caller lets it.
    fn attach(&self, interface: String, pod: Attached) -> impl Future<Output = Result<(), NotEnforced>> + Send;
    /// Returns once nothing of the endpoint is among what is enforced any more; one that was never attached is a success. False: nothing is written to the
    /// kernel now, and what an earlier run has left there may still let its packets by, so its link has to go first.
    fn detach(&self, endpoint: EndpointKey, interface: String) -> impl Future<Output = bool> + Send;
    /// The link of a pod is there: its addresses lead to it from now on. Returns once nobody on this node takes their routes for strangers.
    fn link_made(&self, interface: String, index: u32, pod: Attached) -> impl Future<Output = ()> + Send;
    /// The link of an endpoint that was detached is gone, and so are its routes. A later link of that name is not meant.
    fn link_gone(&self, interface: String, index: Option<u32>) -> impl Future<Output = ()> + Send;
    /// Why no pod could be attached now, if that is so.
    fn not_ready(&self) -> Option<String>;
}

/// Tells the cluster which addresses a pod has, for everybody who does not hear it from this node.
pub trait Announcer: Send + Sync + 'static {
    /// The pod has these addresses now. Does not wait.
    fn announce(&self, attachment: &Attachment);
    /// The pod has no address any more. Does not wait.
    fn withdraw(&self, attachment: &Attachment);
}
