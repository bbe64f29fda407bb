//! On the kernel alone: test layer 4.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::backend::{Backend, Running, WantedPod};
use super::table::Fixture;
use crate::lab::{Lab, Options};
use crate::probe::Protocol;
use crate::probe::serve::Ports;

/// A lab, and what serves in its pods.
pub struct Kernel {
    lab: Lab,
    servers: Runtime,
}

impl Kernel {
    /// Three nodes, one of them behind a router, and a pool of the fixture's range.
    pub fn new(fixture: &Fixture) -> Result<Self> {
        let pool = json!({"cidr": fixture.cidr, "vxlanMode": "CrossSubnet", "natOutgoing": false});
        let lab = Lab::new(&Options {
            pool,
            ..Options::default()
        })?;
        let servers = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        Ok(Self { lab, servers })
    }

    fn serve(&self, ports: Ports) -> Result<()> {
        Ok(self.servers.block_on(async { ports.serve() })?)
    }

    fn node(&self, number: usize) -> Result<String> {
        let node = self
            .lab
            .nodes()
            .nth(number)
            .with_context(|| format!("no node {number}"))?;
        Ok(node.name.clone())
    }
}

impl Backend for Kernel {
    fn apply(&mut self, object: &Value) -> Result<()> {
        let problems = self.lab.apply(object)?;
        ensure!(
            problems.is_empty(),
            "{}: {problems:?}",
            object["metadata"]["name"]
        );
        Ok(())
    }

    fn remove(&mut self, object: &Value) -> Result<()> {
        self.lab.delete(object)
    }

    fn start(&mut self, pods: &[WantedPod]) -> Result<Vec<Running>> {
        let mut running = Vec::new();
        for wanted in pods {
            let object = json!({
                "metadata": {
                    "namespace": wanted.namespace, "name": wanted.name,
                    "labels": wanted.labels, "annotations": wanted.annotations(),
                },
                "spec": {
                    "serviceAccountName": wanted.service_account,
                    "containers": [{"name": "c", "ports": wanted.container_ports()}],
                },
            });
            let node = self.node(wanted.node)?;
            let pod = self.lab.add_pod(&node, &object)?;
            let (address, place) = (pod.addresses[0], pod.place()?);
            let ports: Vec<(Protocol, u16)> = wanted
                .ports
                .iter()
                .map(|port| (port.protocol, port.port))
                .collect();
            let opened = pod.namespace.run(|| Ports::open(&ports))?;
            self.serve(opened)?;
            running.push(Running { address, place });
        }
        Ok(running)
    }

    fn label(&mut self, namespace: &str, name: &str, labels: &Value) -> Result<()> {
        self.lab.label_pod(&format!("{namespace}/{name}"), labels)
    }

    fn stop(&mut self, namespace: &str, name: &str) -> Result<()> {
        self.lab.remove_pod(&format!("{namespace}/{name}"))
    }

    fn serve_on_node(&mut self, node: usize, ports: &[(Protocol, u16)]) -> Result<IpAddr> {
        let name = self.node(node)?;
        let node = self.lab.node(&name)?;
        let (opened, address) = (node.host.run(|| Ports::open(ports))?, node.address.addr());
        self.serve(opened)?;
        Ok(address)
    }
}
