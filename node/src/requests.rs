//! How the agent asks the API server: no request waits for ever, as whatever waits behind it would too.

use std::time::Duration;

use kube::{Client, Config, Error};

/// The longest that one request may take: a connection that dies silently must not stop what is queued behind it.
const PATIENCE: Duration = Duration::from_secs(15);
/// A connection on which nothing arrives for this long is taken for dead. Longer than the server lets any watch live.
const SILENCE: Duration = Duration::from_secs(300);

/// The way to the API server.
pub async fn client() -> Result<Client, Error> {
    let mut config = Config::infer().await.map_err(Error::InferConfig)?;
    config.read_timeout = Some(SILENCE);
    Client::try_from(config)
}

/// The outcome of a request, or an error when there is none for too long.
pub async fn bounded<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(PATIENCE, request).await {
        Ok(outcome) => outcome,
        Err(silence) => Err(Error::Service(Box::new(silence))),
    }
}
