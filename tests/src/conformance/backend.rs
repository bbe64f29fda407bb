//! Backend of a run: what the runner needs, as a trait.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use margay_api::meta::ANNOTATION_POD_ADDRESSES;
use serde_json::{Value, json};

use super::table::Port;
use crate::probe::{Place, Protocol};

/// A pod to start.
#[derive(Clone, Debug)]
pub struct WantedPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: Value,
    /// Its service account.
    pub service_account: String,
    /// Its node, from 0.
    pub node: usize,
    /// The address that it must have, if any.
    pub address: Option<Ipv4Addr>,
    /// The ports that it serves.
    pub ports: Vec<Port>,
}

/// A pod that runs.
#[derive(Debug)]
pub struct Running {
    /// Its address.
    pub address: IpAddr,
    /// Its network.
    pub place: Place,
}

/// Nodes with pods, and a store of objects.
pub trait Backend {
    /// Creates an object or replaces it; returns when it is accepted, which is before packets obey.
    fn apply(&mut self, object: &Value) -> Result<()>;
    /// Deletes an object; one that does not exist is a success. Returns when it is gone.
    fn remove(&mut self, object: &Value) -> Result<()>;
    /// Starts pods; returns when all serve.
    fn start(&mut self, pods: &[WantedPod]) -> Result<Vec<Running>>;
    /// Gives a pod exactly these labels.
    fn label(&mut self, namespace: &str, name: &str, labels: &Value) -> Result<()>;
    /// Stops a pod and deletes it; returns when it is gone.
    fn stop(&mut self, namespace: &str, name: &str) -> Result<()>;
    /// Serves ports in the network of a node, and gives the node's address.
    fn serve_on_node(&mut self, node: usize, ports: &[(Protocol, u16)]) -> Result<IpAddr>;
}

impl WantedPod {
    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The ports of the container, as in a manifest.
    pub fn container_ports(&self) -> Value {
        let port = |port: &Port| {
            let mut object = json!({
                "containerPort": port.port,
                "protocol": port.protocol.to_string().to_uppercase(),
            });
            if !port.name.is_empty() {
                object["name"] = port.name.clone().into();
            }
            object
        };
        self.ports.iter().map(port).collect()
    }

    /// Annotations: the address that it must have.
    pub fn annotations(&self) -> Value {
        let pinned = self
            .address
            .map(|address| (ANNOTATION_POD_ADDRESSES, format!("[\"{address}\"]")));
        json!(pinned.into_iter().collect::<BTreeMap<_, _>>())
    }
}
