//! Interfaces of the CNI service to the rest of the agent, as traits, so that it can be tested
//! without an API server.

use std::future::Future;

use margay_api::endpoint::EndpointKey;

use super::attachment::Attachment;
use margay_dataplane::Attached;

/// Reason why a pod's policy is not in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotEnforced {
    /// typha has not sent the pod's policy yet.
    #[error("policy of the pod has not been received yet: {0}")]
    Unknown(String),
    /// The kernel refused the policy.
    #[error("policy of the pod could not be programmed: {0}")]
    Refused(String),
}

/// Programs pods' policy and routes in the kernel.
pub trait Enforcer: Clone + Send + Sync + 'static {
    /// Returns once the pod's policy and addresses are committed. May wait for as long as the
    /// caller allows.
    fn attach(
        &self,
        interface: String,
        pod: Attached,
    ) -> impl Future<Output = Result<(), NotEnforced>> + Send;
    /// Returns once nothing of the endpoint is enforced any more; one that was never attached is a
    /// success. False: nothing is written to the kernel now, and rules of an earlier run may still
    /// let its packets pass, so its link has to be removed first.
    fn detach(&self, endpoint: EndpointKey, interface: String)
    -> impl Future<Output = bool> + Send;
    /// Notes that a pod's link was created: its addresses are routed to it from now on. Returns
    /// once the route worker does not remove these routes as stale.
    fn link_made(
        &self,
        interface: String,
        index: u32,
        pod: Attached,
    ) -> impl Future<Output = ()> + Send;
    /// Notes that the link of a detached endpoint is gone, and its routes with it. A later link of
    /// the same name is left alone.
    fn link_gone(&self, interface: String, index: Option<u32>) -> impl Future<Output = ()> + Send;
    /// Reason why no pod can be attached now, if any.
    fn not_ready_reason(&self) -> Option<String>;
}

/// Announces the addresses of pods to the cluster.
pub trait Announcer: Send + Sync + 'static {
    /// Announces the pod's addresses. Does not block.
    fn announce(&self, attachment: &Attachment);
    /// Announces that the pod has no addresses any more. Does not block.
    fn withdraw(&self, attachment: &Attachment);
}
