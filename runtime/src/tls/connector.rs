//! Connections to one server, for a gRPC client.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::Endpoint;
use tower::Service;

use super::{HANDSHAKE, Tls, TlsError};

/// Reasons why a connection fails.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing listens there, or there is no route.
    #[error("{address}: {source}")]
    Tcp {
        /// The server's address.
        address: Arc<str>,
        /// Error of the system call.
        source: io::Error,
    },
    /// The peer is not the server that we expect, or it does not accept us.
    #[error(
        "{address}: TLS handshake with {name:?}: {source}; both certificates must be of the \
         cluster's CA and in force"
    )]
    Handshake {
        /// The server's address.
        address: Arc<str>,
        /// Server name expected in its certificate.
        name: String,
        /// TLS error.
        source: io::Error,
    },
    /// The peer accepts the connection and does not answer.
    #[error("{address}: no connection within {patience:?}")]
    Timeout {
        /// The server's address.
        address: Arc<str>,
        /// Time limit.
        patience: Duration,
    },
}

/// Connects to one address, checks the server's name, and presents our newest certificate each
/// time.
#[derive(Debug, Clone)]
pub struct Connector {
    tls: Tls,
    address: Arc<str>,
    name: ServerName<'static>,
}

impl Connector {
    /// `address` is `HOST:PORT`; the server's certificate must be valid for `server_name`, whatever
    /// its address.
    pub fn new(tls: Tls, address: &str, server_name: &str) -> Result<Self, TlsError> {
        let name = ServerName::try_from(server_name.to_owned())
            .map_err(|_| TlsError::ServerName(server_name.to_owned()))?;
        Ok(Self {
            tls,
            address: Arc::from(address),
            name,
        })
    }

    /// The same to another address.
    pub fn at(&self, address: &str) -> Self {
        Self {
            address: Arc::from(address),
            ..self.clone()
        }
    }

    /// An endpoint to give this connector to, as in `endpoint.connect_with_connector(connector)`.
    /// Its URI only becomes the request's authority; its scheme is plain because TLS is made here.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint::from_shared(format!("http://{}", self.name.to_str()))
            .expect("a server name is a valid authority")
            .tcp_nodelay(true)
    }

    /// Connects and completes the handshake.
    pub async fn connect(&self) -> Result<TlsStream<TcpStream>, ConnectError> {
        let connected = tokio::time::timeout(HANDSHAKE, self.shake()).await;
        connected.unwrap_or_else(|_| {
            Err(ConnectError::Timeout {
                address: self.address.clone(),
                patience: HANDSHAKE,
            })
        })
    }

    async fn shake(&self) -> Result<TlsStream<TcpStream>, ConnectError> {
        let tcp = |source| ConnectError::Tcp {
            address: self.address.clone(),
            source,
        };
        let stream = TcpStream::connect(&*self.address).await.map_err(tcp)?;
        stream.set_nodelay(true).map_err(tcp)?;
        let connector = TlsConnector::from(self.tls.current().client.clone());
        connector
            .connect(self.name.clone(), stream)
            .await
            .map_err(|source| {
                let name = self.name.to_str().into_owned();
                ConnectError::Handshake {
                    address: self.address.clone(),
                    name,
                    source,
                }
            })
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect().await.map(TokioIo::new) })
    }
}
