//! A node: the real agent and its stream to typha, over a kernel that stays when they end.

use std::collections::BTreeMap;
use std::sync::Arc;

use margay_node::agent::{AgentHandle, AgentParts, mk_agent};
use margay_node::metrics::Metrics;
use margay_node::problems::Problems;
use margay_node::upstream::Upstream;
use margay_node::upstream::notices::Notices;
use margay_runtime::shutdown::Shutdown;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;

use crate::kernel::{Enforcer, Kernel};
use crate::network::{Line, LineConnector};
use crate::oracle;
use crate::replica::Place;
use crate::run::Run;

/// A node of the cluster.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its kernel.
    pub kernel: Arc<Mutex<Kernel>>,
    /// Its way to the replicas.
    pub line: Arc<Line>,
    run: Run,
    agent: Option<Agent>,
}

struct Agent {
    handle: AgentHandle,
    tasks: [JoinHandle<()>; 2],
}

impl Node {
    /// Creates a node without an agent.
    pub fn new(run: &Run, name: &str, number: usize, places: &[Place]) -> Self {
        let kernel = Arc::new(Mutex::new(Kernel::new(number)));
        let line = Line::new(run, name, places, &kernel);
        Self {
            name: name.to_owned(),
            kernel,
            line,
            run: run.clone(),
            agent: None,
        }
    }

    /// Starts the agent unless it runs.
    pub fn start(&mut self) {
        if self.agent.is_some() {
            return;
        }
        self.run.note(&self.name, || "the agent starts".to_owned());
        let view = {
            let mut kernel = self.kernel.lock();
            kernel.sources.clear();
            kernel.saved = (kernel.records.is_none() && !kernel.store.is_empty())
                .then(|| oracle::sum(&kernel.store));
            kernel.store.clone()
        };
        let parts = AgentParts {
            node: self.name.clone(),
            view,
            attached: BTreeMap::new(),
            links: BTreeMap::new(),
            dataplane: Box::new(Enforcer::new(&self.run, &self.name, &self.kernel)),
            routes: None,
            store: None,
            bgp: Default::default(),
            metrics: Metrics::new(&mut Registry::default()),
        };
        let (handle, work) = mk_agent(parts);
        self.line.set_agent(Some(handle.clone()));
        let upstream = Upstream {
            connector: LineConnector(self.line.clone()),
            server: "typha".to_owned(),
            agent: handle.clone(),
            notices: Notices::default(),
            problems: Problems::default(),
            jitter: || 0.5,
        };
        let work = async {
            // The kernel here takes every commit.
            let _ = work.await;
        };
        let tasks = [
            tokio::spawn(work),
            tokio::spawn(upstream.run(Shutdown::default())),
        ];
        self.agent = Some(Agent { handle, tasks });
    }

    /// Ends the agent silently.
    pub fn kill(&mut self) {
        if let Some(agent) = self.agent.take() {
            self.run
                .note(&self.name, || "the agent is killed".to_owned());
            agent.tasks.iter().for_each(JoinHandle::abort);
            self.line.set_agent(None);
            self.line.cut(None, false);
        }
    }

    /// Saves the view, as the agent does some time after a change.
    pub fn save(&mut self) {
        if self.is_in_sync() {
            let mut kernel = self.kernel.lock();
            kernel.store = kernel.records.clone().unwrap_or_default();
        }
    }

    /// Boots the node: the kernel holds nothing.
    pub fn reboot(&mut self) {
        self.kill();
        self.run.note(&self.name, || "boots".to_owned());
        self.kernel.lock().reboot();
    }

    /// Returns true if the agent has its whole view.
    pub fn is_in_sync(&self) -> bool {
        self.agent
            .as_ref()
            .is_some_and(|agent| agent.handle.status().in_sync)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.agent
            .iter()
            .for_each(|agent| agent.tasks.iter().for_each(JoinHandle::abort));
    }
}
