//! The round: gather, default, validate, render, apply, status. Pure but for the first and the last two.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use margay_api::installation::{InstallationSpec, StatusCondition};
use margay_api::storage::Mode;
use margay_runtime::backoff::{Backoff, jitter};
use margay_runtime::ready::Gate;
use margay_runtime::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{info, instrument, warn};

use crate::apply::{self, Applier};
use crate::certs::{self, Authority, Step, secret, sign};
use crate::inputs::{Inputs, Request};
use crate::metrics::Metrics;
use crate::object::{Key, Object};
use crate::render::{self, Plan, Settings};
use crate::status::{self, Failure, Round};
use crate::watch::World;
use crate::{allocatable, defaults, drain, fields, hosts, validate};

/// Changes that come together are answered together.
const GATHER_PAUSE: Duration = Duration::from_millis(30);
/// Delays after a round in which something could not be written.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// Everything that a round uses.
pub struct Controller {
    /// What is known.
    pub world: Arc<World>,
    /// Who writes.
    pub applier: Applier,
    /// What this process contributes.
    pub settings: Settings,
    /// The operator's own namespace, where the authority's Secret is.
    pub namespace: String,
    /// Tells the signer which authority signs.
    pub authority: watch::Sender<Option<Authority>>,
    /// Blocks that overlap, as the collector has seen them.
    pub overlapping: watch::Receiver<Vec<String>>,
    /// Whether blocks have to be known, and what is known of them: while a pool is being deleted.
    pub draining: watch::Sender<bool>,
    /// See above.
    pub blocks: watch::Receiver<drain::Blocks>,
    /// There has been an Installation, so that finalizers of pools are this operator's.
    pub was_installed: bool,
    /// Which storage the data is in.
    pub mode: Mode,
    /// Counters.
    pub metrics: Metrics,
    /// Installations that have been warned about.
    pub ignored: BTreeSet<String>,
}

/// When the next round is due if nothing changes.
#[derive(Debug, PartialEq)]
enum Next {
    /// At the latest then.
    At(Timestamp),
    /// After a delay: something could not be written.
    Retry,
}

/// Runs rounds whenever something has changed, while this operator leads.
pub async fn run(mut controller: Controller, mut leading: watch::Receiver<bool>, gate: Gate, shutdown: Shutdown) {
    let mut retry = Backoff::new(RETRY.0, RETRY.1);
    let changed = Arc::clone(&controller.world.changed);
    loop {
        let missing = controller.world.missing();
        let pause = if !missing.is_empty() {
            gate.close(format!("{} not read from the API yet", missing.join(", ")));
            Duration::from_secs(1)
        } else {
            gate.open();
            if *leading.borrow_and_update() {
                match controller.round(Timestamp::now()).await {
                    Next::At(moment) => {
                        retry.reset();
                        until(moment)
                    }
                    Next::Retry => retry.next(jitter()),
                }
            } else {
                Duration::from_secs(3600)
            }
        };
        tokio::select! {
            () = shutdown.wait() => return,
            () = tokio::time::sleep(pause) => {}
            () = changed.notified() => tokio::time::sleep(GATHER_PAUSE).await,
            Ok(()) = controller.overlapping.changed() => {}
            Ok(()) = controller.blocks.changed() => {}
            _ = leading.changed() => {}
        }
    }
}

fn until(moment: Timestamp) -> Duration {
    let left = moment.duration_since(Timestamp::now());
    Duration::try_from(left).unwrap_or_default() + Duration::from_secs(1)
}

impl Controller {
    /// One round.
    #[instrument(skip_all)]
    async fn round(&mut self, now: Timestamp) -> Next {
        let inputs = self.world.gather();
        for name in inputs.ignored.difference(&self.ignored) {
            warn!(installation = name, "ignored: only the Installation named default counts");
        }
        self.ignored.clone_from(&inputs.ignored);
        let Some(request) = inputs.request.clone() else {
            self.authority.send_replace(None);
            if !self.keep_pools(&inputs, &BTreeSet::new(), false).await.is_empty() {
                return Next::Retry;
            }
            return Next::At(certs::next_look(&inputs.certificates, now));
        };
        self.was_installed = true;
        self.metrics.rounds.inc();
        let mut found = Round { ignored: fields::report(&inputs), ..Round::default() };
        if self.advance(&inputs, now, &mut found).await {
            // Nothing is signed before the authority is read back, and nothing that waits for certificates is started before they are there.
            return Next::At(now);
        }
        let completed = complete(&request, &inputs, &mut found);
        let secrets = self.leafs(&request, &inputs, now, &mut found);
        let plan = match &completed {
            Some((spec, _)) => render::plan(spec, &inputs, &request.owner, &self.settings),
            None => Plan::default(),
        };
        if let Some((spec, stored)) = &completed {
            found.waiting.extend(plan.waiting.iter().cloned());
            self.write_back(&request, stored, &mut found).await;
            self.write(spec, &plan, secrets, &inputs, &request, &mut found).await;
            let hosts = hosts::plan(&inputs);
            found.hosts.clone_from(&hosts.problems);
            let failures = self.applier.exec_hosts(hosts).await;
            found.failures.extend(failures);
        } else {
            // A spec that cannot be acted upon is no reason to let certificates end. Before the first good spec there is no namespace for them.
            let running = inputs.present.keys().any(|key| key.kind.kind == "Namespace");
            if running {
                let failures = self.applier.exec(&secrets, &inputs.present).await;
                found.failures.extend(failures);
            }
        }
        self.judge_pools(&inputs, now, &mut found).await;
        if !inputs.stale_reports.is_empty() {
            let failure = self.applier.forget_reports(&inputs.stale_reports).await;
            found.failures.extend(failure);
        }
        self.metrics.failures.inc_by(found.failures.len() as u64);
        let told = self.report(&request, &inputs, &found, now).await;
        if found.failures.is_empty() && told {
            Next::At(certs::next_look(&inputs.certificates, now))
        } else {
            Next::Retry
        }
    }

    /// Writes everything wanted, then sweeps. Nothing is swept while something could not be written.
    async fn write(
        &mut self,
        spec: &InstallationSpec,
        plan: &Plan,
        secrets: Vec<Object>,
        inputs: &Inputs,
        request: &Request,
        found: &mut Round,
    ) {
        let pools = render::pools(spec, inputs);
        found.conflicts = pools.conflicts;
        let objects: Vec<Object> = plan.objects.iter().chain(&secrets).chain(&pools.objects).cloned().collect();
        let mut failures = self.applier.exec(&objects, &inputs.present).await;
        if failures.is_empty() {
            let unwanted = apply::unwanted(inputs, &plan.objects, &plan.keep, &request.owner);
            failures = self.applier.sweep(unwanted).await;
        }
        found.failures.extend(failures);
    }

    /// Says of every pool whether addresses may be taken from it. The older storage has no place for that, and only overlaps are told.
    async fn judge_pools(&mut self, inputs: &Inputs, now: Timestamp, found: &mut Round) {
        let blocks = self.blocks.borrow_and_update().clone();
        let pools = inputs.pools.as_deref().unwrap_or_default();
        let verdicts = allocatable::judge(pools, blocks.as_deref(), now);
        found.overlaps = verdicts.overlaps;
        found.overlaps.extend(self.overlapping.borrow_and_update().iter().cloned());
        if self.mode == Mode::V3 {
            let failures = self.applier.exec_statuses(&verdicts.statuses).await;
            found.failures.extend(failures);
        }
        let failures = self.keep_pools(inputs, &verdicts.shadowed, true).await;
        found.failures.extend(failures);
    }

    /// Keeps pools that are deleted until their last block is gone.
    async fn keep_pools(&self, inputs: &Inputs, shadowed: &BTreeSet<String>, is_installed: bool) -> Vec<Failure> {
        if self.mode != Mode::V3 || !(is_installed || self.was_installed) {
            return Vec::new();
        }
        let pools = inputs.pools.as_deref().unwrap_or_default();
        let blocks = self.blocks.borrow().clone();
        let changes = drain::plan(pools, shadowed, blocks.as_deref(), is_installed);
        self.draining.send_if_modified(|wanted| {
            let is_waiting = is_installed && drain::is_waiting(pools);
            std::mem::replace(wanted, is_waiting) != is_waiting
        });
        self.applier.exec_finalizers(&changes).await
    }

    /// Moves the authority on if that is due. Answers whether a new state of it has been stored.
    async fn advance(&self, inputs: &Inputs, now: Timestamp, found: &mut Round) -> bool {
        let stored = &inputs.certificates;
        if let Some(broken) = &stored.broken {
            found.certificates = Some(broken.clone());
            return false;
        }
        let authority = stored.authority.as_ref().map(|(authority, _)| authority);
        let advanced = match certs::step(authority, now) {
            Ok(Step::Keep) => return false,
            Ok(step) => {
                info!(?step, "the authority moves on");
                sign::advance(authority, step, now)
            }
            Err(error) => Err(error.into()),
        };
        match advanced {
            Ok(next) => match self.store_authority(&next, inputs).await {
                None => return true,
                Some(failure) => found.failures.push(failure),
            },
            Err(error) => found.certificates = Some(error.to_string()),
        }
        false
    }

    async fn store_authority(&self, authority: &Authority, inputs: &Inputs) -> Option<Failure> {
        let version = inputs.certificates.authority.as_ref().map(|(_, version)| version);
        let object = secret::authority(authority, &self.namespace, version);
        let written = match version {
            Some(_) => self.applier.apply(&object).await.map(drop),
            None => self.applier.create(&object).await,
        };
        written.err().map(|error| Failure {
            key: object.key,
            message: error.to_string(),
            transient: apply::is_transient(&error),
        })
    }

    /// Secrets of the leafs that are due.
    fn leafs(&self, request: &Request, inputs: &Inputs, now: Timestamp, found: &mut Round) -> Vec<Object> {
        let stored = &inputs.certificates;
        let Some((authority, _)) = &stored.authority else {
            return Vec::new();
        };
        self.authority.send_if_modified(|told| {
            let news = told.as_ref() != Some(authority);
            if news {
                *told = Some(authority.clone());
            }
            news
        });
        let leafs = [(certs::TYPHA, &stored.typha), (certs::READER, &stored.reader)];
        let made: Result<Vec<_>, sign::Error> = leafs
            .iter()
            .filter_map(|(leaf, present)| renewed(authority, leaf, present.as_deref(), now).transpose())
            .collect();
        match made {
            Ok(secrets) => secrets.into_iter().map(|secret| secret.owned_by(&request.owner)).collect(),
            Err(error) => {
                found.certificates = Some(error.to_string());
                Vec::new()
            }
        }
    }

    async fn write_back(&self, request: &Request, completed: &Value, found: &mut Round) {
        let Some(spec) = defaults::write_back(&request.spec, completed, &request.written) else {
            return;
        };
        match self.applier.write_back(&request.owner, spec).await {
            Ok(()) => info!("defaults written back"),
            Err(error) => {
                let transient = apply::is_transient(&error);
                found.failures.push(Failure {
                    key: installation_key(request),
                    message: format!("defaults not written back: {error}"),
                    transient,
                });
            }
        }
    }

    /// Tells what was found. Answers whether everybody knows it now.
    async fn report(&self, request: &Request, inputs: &Inputs, found: &Round, now: Timestamp) -> bool {
        let calico = status::calico(inputs, found);
        let ippools = status::ippools(inputs, found);
        let generation = request.generation;
        let mut told = true;
        let policies = status::policies(inputs);
        for (name, state) in [("calico", &calico), ("ippools", &ippools), ("policies", &policies)] {
            let before = inputs.statuses.get(name);
            let conditions =
                status::conditions("Available", state, generation, before.map(Vec::as_slice).unwrap_or_default(), now);
            if before != Some(&conditions) {
                told &= self.tell(name, request, &conditions).await;
            }
        }
        let state = status::overall(&calico, &ippools);
        let conditions = status::conditions("Ready", &state, generation, &request.conditions, now);
        if request.conditions != conditions {
            told &= self.tell_installation(request, &conditions).await;
        }
        self.metrics.degraded.set(i64::from(state.degraded.or(state.caution).is_some()));
        told
    }

    async fn tell(&self, name: &str, request: &Request, conditions: &[StatusCondition]) -> bool {
        let identity = json!({ "metadata": { "name": name }, "spec": {} });
        let object = Object::new("TigeraStatus", identity).owned_by(&request.owner);
        let with_status = Object::new(
            "TigeraStatus",
            json!({ "metadata": { "name": name }, "status": { "conditions": conditions } }),
        );
        let written = async {
            self.applier.apply(&object).await?;
            self.applier.apply_status(&with_status).await
        };
        let outcome = written.await;
        logged(name, outcome)
    }

    async fn tell_installation(&self, request: &Request, conditions: &[StatusCondition]) -> bool {
        let mtu = request.spec["calicoNetwork"]["mtu"].as_i64();
        let mut body = json!({
            "metadata": { "name": request.owner.name },
            "status": {
                "variant": "Calico",
                "calicoVersion": self.settings.version,
                "conditions": conditions,
            },
        });
        if let Some(mtu) = mtu.filter(|mtu| *mtu > 0) {
            body["status"]["mtu"] = json!(mtu);
        }
        let outcome = self.applier.apply_status(&Object::new("Installation", body)).await;
        logged("Installation", outcome)
    }
}

fn logged(name: &str, outcome: Result<(), kube::Error>) -> bool {
    if let Err(error) = &outcome {
        warn!(object = name, %error, "status not written, trying again");
    }
    outcome.is_ok()
}

/// The completed spec and its JSON, unless it cannot be acted upon; then `found` says why.
fn complete(request: &Request, inputs: &Inputs, found: &mut Round) -> Option<(InstallationSpec, Value)> {
    let given: InstallationSpec = match serde_json::from_value(spec_or_empty(&request.spec)) {
        Ok(given) => given,
        Err(error) => {
            found.undecodable = Some(error.to_string());
            return None;
        }
    };
    let completed = defaults::complete(&given, inputs);
    found.problems = validate::installation(&completed);
    if !found.problems.is_empty() {
        return None;
    }
    let stored = json!(completed);
    Some((completed, stored))
}

fn spec_or_empty(spec: &Value) -> Value {
    if spec.is_null() { json!({}) } else { spec.clone() }
}

fn installation_key(request: &Request) -> Key {
    Key { kind: crate::object::kind("Installation"), namespace: String::new(), name: request.owner.name.clone() }
}

/// The Secret of a leaf, if it has to be made (again).
fn renewed(
    authority: &Authority,
    leaf: &certs::Leaf,
    present: Option<&str>,
    now: Timestamp,
) -> Result<Option<Object>, sign::Error> {
    let facts = certs::Facts::parse(&authority.current.certificate)?;
    let Some(reason) = certs::due(leaf, present, &facts, now) else {
        return Ok(None);
    };
    info!(secret = leaf.secret, reason, "certificate made");
    let pair = sign::leaf(authority, leaf, now)?;
    Ok(Some(secret::leaf(leaf, &pair)))
}
