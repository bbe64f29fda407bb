//! The baseline: every object to every node, encoded per node, with one send per event and no
//! views, over the same TLS connections and from the same source.
//!
//! Frames are a length (4 bytes, big-endian) and a message; a node acknowledges with the revision
//! (8 bytes, big-endian). Nothing is compressed and nothing is merged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use margay_calc::update::Update;
use margay_runtime::ready::Gate;
use margay_runtime::tls::{Connection, Tls, incoming};
use margay_typha::event::Event;
use margay_typha::object::{Missing, Observed};
use parking_lot::Mutex;
use prost::Message;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc};

use super::control::reply;
use super::server::KINDS;

/// Events that a node may be behind before its connection is closed.
const BACKLOG: usize = 1 << 17;
/// Time for a write to a node.
const WRITE: Duration = Duration::from_secs(10);
/// Longest frame that a node accepts, in bytes.
const MAX_FRAME: usize = 1 << 20;

/// One object as it is sent.
#[derive(Clone, PartialEq, Message)]
pub struct ObjectMessage {
    /// Its kind, namespace and name as a path.
    #[prost(string, tag = "1")]
    pub key: String,
    /// Its value as JSON, serialised once for all nodes.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
    /// Revision of the server; 0 before the end of the snapshot.
    #[prost(uint64, tag = "3")]
    pub revision: u64,
}

/// An object in the form in which it is held.
#[derive(Debug)]
struct SharedObject {
    key: String,
    value: Vec<u8>,
    revision: u64,
}

/// Objects by key, and the objects that change.
struct ObjectStore {
    objects: Mutex<BTreeMap<String, Arc<SharedObject>>>,
    changes: broadcast::Sender<Arc<SharedObject>>,
}

/// Serves connections and applies events until the source ends.
pub async fn serve(
    listener: TcpListener,
    tls: Tls,
    mut events: mpsc::Receiver<Event>,
    gate: Gate,
) -> Result<()> {
    let store = Arc::new(ObjectStore {
        objects: Mutex::default(),
        changes: broadcast::channel(BACKLOG).0,
    });
    let serving = store.clone();
    tokio::spawn(async move {
        let mut connections = incoming(listener, tls);
        while let Some(connection) = connections.next().await {
            let store = serving.clone();
            tokio::spawn(async move {
                if let Ok(connection) = connection {
                    // A node that has gone ends its task alone.
                    let _ = send(connection, store).await;
                }
            });
        }
    });
    let (mut synced, mut revision) = (0, 0);
    while let Some(event) = events.recv().await {
        match event {
            Event::Observed { kind, objects, .. } => {
                for observed in objects {
                    revision += 1;
                    store.put(kind, &observed, revision)?;
                }
            }
            Event::ListCompleted { reply, .. } => drop(reply.send(Missing::default())),
            Event::Sweep { .. } => {
                synced += 1;
                if synced == KINDS.len() {
                    gate.open();
                    reply(&json!({"synced": true}))?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

impl ObjectStore {
    fn put(&self, kind: &str, observed: &Observed, revision: u64) -> Result<()> {
        let value = match &observed.update {
            Some(Update::Endpoint(_, Some(endpoint))) => serde_json::to_vec(&json!({
                "node": endpoint.node, "labels": endpoint.labels,
                "serviceAccount": endpoint.service_account,
                "addresses": endpoint.addresses, "uid": endpoint.uid,
                "interface": endpoint.interface,
            }))?,
            other => format!("{other:?}").into_bytes(),
        };
        let key = format!("/{kind}/{}", observed.key);
        let stored = Arc::new(SharedObject {
            key: key.clone(),
            value,
            revision,
        });
        self.objects.lock().insert(key, stored.clone());
        // Fails only while no node is connected.
        let _ = self.changes.send(stored);
        Ok(())
    }
}

/// Sends the snapshot and then every change to one node.
async fn send(connection: Connection, store: Arc<ObjectStore>) -> Result<()> {
    let (mut read, mut write) = tokio::io::split(connection);
    // Before the snapshot, so that no change is missed.
    let mut changes = store.changes.subscribe();
    let snapshot: Vec<Arc<SharedObject>> = store.objects.lock().values().cloned().collect();
    tokio::spawn(async move { while read.read_u64().await.is_ok() {} });
    let last = snapshot.len().saturating_sub(1);
    let mut buffer = Vec::new();
    for (place, stored) in snapshot.iter().enumerate() {
        encode(stored, u64::from(place == last), &mut buffer);
        if buffer.len() > 64 << 10 || place == last {
            tokio::time::timeout(WRITE, write.write_all(&buffer)).await??;
            buffer.clear();
        }
    }
    write.flush().await?;
    drop(snapshot);
    loop {
        let stored = changes.recv().await.context("the node is too far behind")?;
        buffer.clear();
        encode(&stored, stored.revision, &mut buffer);
        tokio::time::timeout(WRITE, write.write_all(&buffer)).await??;
        write.flush().await?;
    }
}

fn encode(stored: &SharedObject, revision: u64, buffer: &mut Vec<u8>) {
    let object = ObjectMessage {
        key: stored.key.clone(),
        value: stored.value.clone(),
        revision,
    };
    buffer.extend_from_slice(&(object.encoded_len() as u32).to_be_bytes());
    buffer.extend_from_slice(&object.encode_to_vec());
}

/// Reads the next frame of the server.
pub async fn receive(stream: &mut (impl AsyncReadExt + Unpin)) -> Result<Vec<u8>> {
    let length = stream.read_u32().await? as usize;
    if length > MAX_FRAME {
        bail!("a frame of {length} bytes is longer than {MAX_FRAME}");
    }
    let mut frame = vec![0; length];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}
