//! Mutual TLS from files that change: certificates are renewed while the process runs.
//!
//! Identity is the certificate. A server demands a client certificate of the cluster's CA and hands
//! the peer's name to the service as [`Peer`]; a client checks the server's name. Files are checked
//! again when a connection is made, at most once a second, so a renewal needs no restart and no
//! watcher; a half-written or wrong renewal is logged and the former certificate stays in use.

mod connector;
mod files;
mod incoming;
mod leaf;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustls::{ClientConfig, ServerConfig};
use tracing::{info, warn};

pub use connector::{ConnectError, Connector};
pub use files::Files;
pub use incoming::{Connection, Incoming, incoming};
pub use leaf::{Leaf, Peer, peer};

use files::Stamp;

/// Interval of checks of the files, at least: three `stat` calls.
const CHECK: Duration = Duration::from_secs(1);
/// Limit of a handshake, on both sides.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Reasons why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error(
        "{path}: {source}; the operator writes it into a Secret or ConfigMap that must be mounted \
         there",
        path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error(
        "{path}: {rule}; delete the object that it comes from and the operator writes a new one",
        path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks.
        rule: String,
    },
    /// A certificate names its holder ambiguously or not at all.
    #[error("certificate: {0}")]
    Leaf(String),
    /// A server name that is not a DNS name.
    #[error("server name {0:?} is not a DNS name")]
    ServerName(String),
}

/// Configuration built from one reading of the files.
#[derive(Debug)]
pub struct Material {
    /// Demands a client certificate of our CA.
    pub server: Arc<ServerConfig>,
    /// Shows our certificate and trusts only our CA.
    pub client: Arc<ClientConfig>,
    /// Our own certificate.
    pub leaf: Leaf,
    /// True when one of the authorities has signed our certificate for client use. If none has,
    /// peers that trust the same authorities refuse us.
    pub is_trusted: bool,
}

/// The certificates of this process; cheap to clone, always the newest that could be read.
#[derive(Debug, Clone)]
pub struct Tls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    files: Files,
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    checked: Instant,
    material: Arc<Material>,
    /// Stamp of the files that `material` was read from.
    stamp: Stamp,
    /// A state of the files that was refused, so that it is logged once.
    refused: Option<Stamp>,
}

impl Tls {
    /// Reads the files for the first time; here an error is final.
    pub fn load(files: Files) -> Result<Self, TlsError> {
        Self::load_checking(files, CHECK)
    }

    fn load_checking(files: Files, interval: Duration) -> Result<Self, TlsError> {
        let stamp = files.stamp();
        let material = Arc::new(files.read()?);
        let state = State {
            checked: Instant::now(),
            material,
            stamp,
            refused: None,
        };
        Ok(Self(Arc::new(Inner {
            files,
            interval,
            state: Mutex::new(state),
        })))
    }

    /// Returns the material for new connections, reading changed files again.
    pub fn current(&self) -> Arc<Material> {
        let mut state = self.0.state.lock();
        if state.checked.elapsed() >= self.0.interval {
            state.checked = Instant::now();
            self.0.reload(&mut state);
        }
        state.material.clone()
    }
}

impl Inner {
    fn reload(&self, state: &mut State) {
        // The stamp is taken before reading, so that a change during the reading is seen the next
        // time.
        let stamp = self.files.stamp();
        if stamp == state.stamp {
            return;
        }
        match self.files.read() {
            Ok(material) => {
                info!(
                    name = %material.leaf.peer.common_name,
                    not_after = material.leaf.not_after,
                    "certificate renewed",
                );
                *state = State {
                    checked: state.checked,
                    material: Arc::new(material),
                    stamp,
                    refused: None,
                };
            }
            Err(error) if state.refused.as_ref() != Some(&stamp) => {
                warn!(
                    %error,
                    "changed certificate files cannot be used; the former ones stay in use",
                );
                state.refused = Some(stamp);
            }
            Err(_) => {}
        }
    }
}
