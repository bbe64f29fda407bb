//! The API client of the agent. Every request has a time limit, because whatever is queued behind
//! it would wait as well.

use std::time::Duration;

use kube::{Client, Config, Error};

/// Time limit of one request: a connection that dies silently must not stop what is queued behind
/// it.
const PATIENCE: Duration = Duration::from_secs(15);
/// Read timeout of a connection, longer than the API server lets any watch live.
const READ_TIMEOUT: Duration = Duration::from_secs(300);

/// Creates a client for the API server.
pub async fn client() -> Result<Client, Error> {
    let mut config = Config::infer().await.map_err(Error::InferConfig)?;
    config.read_timeout = Some(READ_TIMEOUT);
    Client::try_from(config)
}

/// Awaits a request, or fails when its time limit is over.
pub async fn bounded<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(PATIENCE, request).await {
        Ok(outcome) => outcome,
        Err(silence) => Err(Error::Service(Box::new(silence))),
    }
}
