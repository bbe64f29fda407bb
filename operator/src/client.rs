//! Requests to the API server: with a time limit, and whether a retry of a failed one can help.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::{Client, Error};

/// Time limit of a request: a connection that has died silently must not stop every later
/// reconcile.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// Runs a request with a time limit.
// Not a timeout layer of the client: it would end with the header of the response, but the body can
// stall too.
pub async fn bounded<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
        Ok(outcome) => outcome,
        Err(elapsed) => Err(Error::Service(Box::new(elapsed))),
    }
}

/// Reads a node by name, which is authoritative where a list may be incomplete.
pub async fn has_node(client: &Client, name: &str) -> Result<bool, Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    Ok(bounded(nodes.get_metadata_opt(name)).await?.is_some())
}

/// Returns true when a retry can help: the server was busy, the object has changed, or the server
/// could not be reached.
pub fn is_transient(error: &Error) -> bool {
    match error {
        Error::Api(status) => {
            matches!(status.code, 409 | 429 | 500..=599) || is_terminating(&status.message)
        }
        Error::SerdeError(_) | Error::BuildRequest(_) => false,
        _ => true,
    }
}

/// Returns true when the namespace is terminating; it is recreated when it is gone.
pub fn is_terminating(message: &str) -> bool {
    message.contains("because it is being terminated")
}
