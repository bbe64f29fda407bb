//! A replica of typha: the real watches, owner and stream service, in tasks that end with it.

use std::sync::Arc;
use std::time::Duration;

use margay_api::storage::Mode;
use margay_runtime::ready::Readiness;
use margay_runtime::shutdown::Shutdown;
use margay_typha::cache::Cache;
use margay_typha::compute::{EVENT_QUEUE, GraphOwner};
use margay_typha::metrics::Counters;
use margay_typha::registry::Registry;
use margay_typha::server::SyncService;
use parking_lot::Mutex;
use prometheus_client::registry::Registry as Metrics;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api::{Api, kinds};
use crate::oracle::{self, Oracle};
use crate::run::Run;
use crate::serve::Door;

/// Time that typha waits for a node's first message.
const HELLO: Duration = Duration::from_secs(10);

/// One process of a replica.
pub struct Process {
    /// The stream service.
    pub service: SyncService,
    /// Progress of the nodes.
    pub registry: Registry,
    /// What it may know.
    pub oracle: oracle::Shared,
    /// Its way to the API server.
    pub door: Arc<Door>,
    shutdown: Shutdown,
    tasks: Vec<JoinHandle<()>>,
}

/// A place where a replica runs, or does not.
pub type Place = Arc<Mutex<Option<Process>>>;

impl Process {
    /// Starts a process.
    pub fn start(run: &Run, number: u64, api: &Api, nodes: &[String]) -> Self {
        let name = format!("typha-{number}");
        run.note(&name, || "starts".to_owned());
        let listed = oracle::Listed::default();
        let door = Door::new(run, &name, api, &listed);
        let registry = Registry::default();
        let counters = Counters::register(&mut Metrics::default(), registry.clone());
        let gate = Readiness::default().gate("sync", "nothing listed yet");
        let cache = Cache::new(kinds().map(|kind| kind.name));
        let owner = GraphOwner::new(cache, counters.clone(), registry.clone(), gate);
        let (events, inbox) = mpsc::channel(EVENT_QUEUE);
        let (watched, watches) = mpsc::channel(EVENT_QUEUE);
        let oracle = Arc::new(Mutex::new(Oracle::new(run, &name, api, nodes, listed)));
        let shutdown = Shutdown::default();
        let client = door.client();
        let mut tasks = vec![
            tokio::spawn(owner.run(inbox, shutdown.clone())),
            tokio::spawn(oracle::relay(
                run.clone(),
                oracle.clone(),
                watches,
                events.clone(),
            )),
        ];
        for kind in kinds() {
            let watch = kind.start(
                Mode::V3,
                client.clone(),
                watched.clone(),
                counters.clone(),
                || 0.5,
            );
            tasks.push(tokio::spawn(watch));
        }
        let service = SyncService::new(events, registry.clone(), counters, HELLO);
        Self {
            service,
            registry,
            oracle,
            door,
            shutdown,
            tasks,
        }
    }

    /// Asks it to send its nodes away.
    pub fn drain(&self) {
        self.shutdown.trigger();
    }

    /// Returns true while the process runs.
    pub fn is_running(&self) -> bool {
        !self.tasks[0].is_finished()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}
