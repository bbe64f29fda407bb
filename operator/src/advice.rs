//! Failed writes as users read them: the error of the API with its remedy.

use kube::Error;

use crate::client::{is_terminating, is_transient};
use crate::manifest::Key;

/// An object that could not be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Identity of the object.
    pub key: Key,
    /// Error of the API.
    pub message: String,
    /// True when a retry can help without a change by a person.
    pub transient: bool,
}

/// Describes the failed write of an object.
pub fn failure(key: Key, error: &Error) -> Failure {
    let transient = is_transient(error);
    let message = match error {
        Error::Api(status) if is_terminating(&status.message) => status.message.clone(),
        Error::Api(status) if status.code == 403 => format!(
            "{}; apply deploy/operator.yaml of this version again, it has the operator's \
             permissions",
            status.message
        ),
        Error::Api(status) if status.code == 404 => format!(
            "{}; the API does not serve {} {}, apply deploy/operator.yaml of this version",
            status.message,
            key.kind.api_version(),
            key.kind.plural
        ),
        Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    };
    Failure {
        key,
        message,
        transient,
    }
}
