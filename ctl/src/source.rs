//! Where a cluster is read from: manifests, or its API server.

use anyhow::Result;

use crate::live::{self, Connection, ConnectionArgs};
use crate::objects::Objects;

/// Reads what policy depends on: the manifests of these paths, or without any the cluster.
pub fn objects(paths: &[String], namespace: &str, cluster: &ConnectionArgs) -> Result<Objects> {
    match paths {
        [] => live::block_on(async { Connection::open(cluster).await?.objects().await }),
        paths => Objects::read(paths, namespace),
    }
}
