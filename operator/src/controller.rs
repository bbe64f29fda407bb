//! The reconcile loop: gather, default, validate, render, apply, status. Only the first step and
//! the last two have side effects.

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

use crate::advice::Failure;
use crate::apply::{self, Applier};
use crate::certs::{self, Authority, Step, issue, secret};
use crate::client::is_transient;
use crate::inputs::{Inputs, Request};
use crate::manifest::{Key, Object};
use crate::metrics::Metrics;
use crate::render::{self, Plan, Settings};
use crate::status::{self, Findings, SpecError};
use crate::watch::Reflectors;
use crate::{allocatable, defaults, fields, hosts, pool_finalizer, validate};

/// Pause after a change, in which further changes are collected.
const GATHER_PAUSE: Duration = Duration::from_millis(30);
/// Delays after a reconcile in which something could not be written: first and maximum.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// Pause between checks whether every kind has been read.
const START_PERIOD: Duration = Duration::from_secs(1);
/// Pause of an operator that does not lead; a change of leadership ends it.
const IDLE_PERIOD: Duration = Duration::from_secs(3600);

/// Problem of an Installation beside components that come from a manifest.
const STANDALONE: &str = "Installation default has no effect: the components come from a manifest, \
                          deploy/margay.yaml; delete the Installation, or install the operator \
                          instead";

/// Everything that a reconcile uses.
pub struct Controller {
    /// State of the cluster.
    pub reflectors: Arc<Reflectors>,
    /// Writer of objects.
    pub applier: Applier,
    /// Settings from the operator's own process.
    pub settings: Settings,
    /// The operator's own namespace, where the CA's Secret is.
    pub namespace: String,
    /// CA that signs, for the CSR controller.
    pub authority: watch::Sender<Option<Authority>>,
    /// Overlapping blocks, from the collector.
    pub overlapping: watch::Receiver<Vec<String>>,
    /// True while a pool is being deleted, so that blocks must be watched.
    pub watch_blocks: watch::Sender<bool>,
    /// Blocks, while they are watched.
    pub blocks: watch::Receiver<pool_finalizer::BlockRanges>,
    /// True when there has been an Installation, so that the finalizers of pools are this
    /// operator's.
    pub was_installed: bool,
    /// Storage of Calico's data.
    pub mode: Mode,
    /// Counters.
    pub metrics: Metrics,
    /// Installations that have been warned about.
    pub ignored: BTreeSet<String>,
    /// True if the components come from a manifest and not from an Installation: certificates,
    /// configuration and reports are all that is written.
    pub standalone: bool,
}

/// Time of the next reconcile if nothing changes.
#[derive(Debug, PartialEq)]
enum Next {
    /// At the latest then.
    At(Timestamp),
    /// After a delay: something could not be written.
    Retry,
}

/// Reconciles whenever something has changed, while this operator leads.
pub async fn run(
    mut controller: Controller,
    mut leading: watch::Receiver<bool>,
    gate: Gate,
    shutdown: Shutdown,
) {
    let mut retry = Backoff::new(RETRY.0, RETRY.1);
    let changed = Arc::clone(&controller.reflectors.changed);
    loop {
        let missing = controller.reflectors.missing();
        let pause = if !missing.is_empty() {
            gate.close(format!("{} not read from the API yet", missing.join(", ")));
            START_PERIOD
        } else {
            gate.open();
            if *leading.borrow_and_update() {
                match controller.reconcile(Timestamp::now()).await {
                    Next::At(moment) => {
                        retry.reset();
                        until(moment)
                    }
                    Next::Retry => retry.next(jitter()),
                }
            } else {
                IDLE_PERIOD
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

/// Result of a step of the CA's rotation.
enum Rotation {
    /// The CA is as stored; an error of the rotation is reported and does not stop the reconcile.
    Unchanged(Result<(), RotationError>),
    /// A new state of it has been stored.
    Stored,
}

/// Reasons why the CA could not be rotated.
enum RotationError {
    /// A certificate is invalid or could not be issued.
    Certificate(String),
    /// The Secret could not be written.
    Write(Failure),
}

impl Controller {
    /// Reconciles once.
    #[instrument(skip_all)]
    async fn reconcile(&mut self, now: Timestamp) -> Next {
        let inputs = self.reflectors.gather();
        for name in inputs.ignored.difference(&self.ignored) {
            warn!(
                installation = name,
                "Installation ignored: only the one named default is used"
            );
        }
        self.ignored.clone_from(&inputs.ignored);
        let asked = match self.standalone {
            // `kubectl wait` compares the generation with that of the TigeraStatus.
            true => Some(Request {
                generation: 1,
                ..Request::default()
            }),
            false => inputs.request.clone(),
        };
        let Some(request) = asked else {
            self.authority.send_replace(None);
            if !self
                .update_pool_finalizers(&inputs, &BTreeSet::new(), false)
                .await
                .is_empty()
            {
                return Next::Retry;
            }
            return Next::At(certs::next_check(&inputs.certificates, now));
        };
        self.was_installed = true;
        self.metrics.reconciles.inc();
        let mut findings = Findings {
            ignored: fields::report(&inputs),
            ..Findings::default()
        };
        match self.rotate_authority(&inputs, now).await {
            // Nothing may be signed before the new CA is read back from the API, and nothing that
            // needs certificates may start before they exist: the next reconcile continues from
            // there.
            Rotation::Stored => return Next::At(now),
            Rotation::Unchanged(Ok(())) => {}
            Rotation::Unchanged(Err(RotationError::Certificate(error))) => {
                findings.certificates = Some(error)
            }
            Rotation::Unchanged(Err(RotationError::Write(failure))) => {
                findings.failures.push(failure)
            }
        }
        let secrets = self
            .renew_leaf_secrets(&request, &inputs, now)
            .unwrap_or_else(|error| {
                findings.certificates = Some(error.to_string());
                Vec::new()
            });
        match complete(&request, &inputs) {
            Ok(spec) => {
                let plan = match self.standalone {
                    true => render::configuration(&spec, &inputs, &self.settings),
                    false => render::plan(&spec, &inputs, &request.owner, &self.settings),
                };
                findings.waiting.clone_from(&plan.waiting);
                if !self.standalone {
                    findings
                        .failures
                        .extend(self.write_back(&request, &json!(spec)).await);
                }
                let mut pools = match self.standalone {
                    true => render::first_pools(&spec, &inputs),
                    false => render::pools(&spec, &inputs),
                };
                if self.standalone && inputs.request.is_some() {
                    pools.conflicts.push(STANDALONE.to_owned());
                }
                let objects = [
                    plan.objects.as_slice(),
                    secrets.as_slice(),
                    pools.objects.as_slice(),
                ]
                .concat();
                findings.conflicts = pools.conflicts;
                findings
                    .failures
                    .extend(self.write(&objects, &plan, &inputs, &request).await);
                let hosts = hosts::plan(&inputs);
                findings.hosts.clone_from(&hosts.problems);
                findings
                    .failures
                    .extend(self.applier.exec_hosts(hosts).await);
            }
            Err(error) => {
                findings.spec = Some(error);
                // An invalid spec is no reason to let certificates expire. Before the first valid
                // one there is no namespace for them.
                let has_namespace = inputs
                    .present
                    .keys()
                    .any(|key| key.kind.kind == "Namespace");
                if has_namespace {
                    findings
                        .failures
                        .extend(self.applier.exec(&secrets, &inputs.present).await);
                }
            }
        }
        let (overlaps, failures) = self.write_pool_statuses(&inputs, now).await;
        findings.overlaps = overlaps;
        findings.failures.extend(failures);
        if !inputs.stale_reports.is_empty() {
            findings
                .failures
                .extend(self.applier.delete_reports(&inputs.stale_reports).await);
        }
        self.metrics.failures.inc_by(findings.failures.len() as u64);
        let is_reported = self.write_statuses(&request, &inputs, &findings, now).await;
        if findings.failures.is_empty() && is_reported {
            Next::At(certs::next_check(&inputs.certificates, now))
        } else {
            Next::Retry
        }
    }

    /// Writes wanted objects, then sweeps. While something could not be written, nothing is swept:
    /// it may still be in use by what was not replaced.
    async fn write(
        &mut self,
        objects: &[Object],
        plan: &Plan,
        inputs: &Inputs,
        request: &Request,
    ) -> Vec<Failure> {
        let failures = self.applier.exec(objects, &inputs.present).await;
        if !failures.is_empty() || self.standalone {
            return failures;
        }
        let unwanted = apply::unwanted(inputs, &plan.objects, &plan.keep, &request.owner);
        self.applier.sweep(unwanted).await
    }

    /// Writes the condition `Allocatable` and the finalizer of every pool, and returns overlapping
    /// pools and blocks. The older storage has neither; there overlaps are only returned.
    async fn write_pool_statuses(
        &mut self,
        inputs: &Inputs,
        now: Timestamp,
    ) -> (Vec<String>, Vec<Failure>) {
        let blocks = self.blocks.borrow_and_update().clone();
        let pools = inputs.pools.as_deref().unwrap_or_default();
        let evaluation = allocatable::evaluate(pools, blocks.as_deref(), now);
        let mut overlaps = evaluation.overlaps;
        overlaps.extend(self.overlapping.borrow_and_update().iter().cloned());
        let mut failures = match self.mode {
            Mode::V3 => self.applier.exec_statuses(&evaluation.statuses).await,
            Mode::V1 => Vec::new(),
        };
        failures.extend(
            self.update_pool_finalizers(inputs, &evaluation.shadowed, true)
                .await,
        );
        (overlaps, failures)
    }

    /// Adds and removes the finalizers that keep deleted pools until their last block is gone.
    async fn update_pool_finalizers(
        &self,
        inputs: &Inputs,
        shadowed: &BTreeSet<String>,
        is_installed: bool,
    ) -> Vec<Failure> {
        if self.mode != Mode::V3 || !(is_installed || self.was_installed) {
            return Vec::new();
        }
        let pools = inputs.pools.as_deref().unwrap_or_default();
        let blocks = self.blocks.borrow().clone();
        let changes = pool_finalizer::plan(pools, shadowed, blocks.as_deref(), is_installed);
        self.watch_blocks.send_if_modified(|wanted| {
            let is_needed = is_installed && pool_finalizer::needs_blocks(pools);
            std::mem::replace(wanted, is_needed) != is_needed
        });
        self.applier.exec_finalizers(&changes).await
    }

    /// Takes the step of the CA's rotation that is due.
    async fn rotate_authority(&self, inputs: &Inputs, now: Timestamp) -> Rotation {
        let stored = &inputs.certificates;
        let failed = |error: String| Rotation::Unchanged(Err(RotationError::Certificate(error)));
        if let Some(broken) = &stored.broken {
            return failed(broken.clone());
        }
        let authority = stored.authority.as_ref().map(|(authority, _)| authority);
        let rotated = match certs::step(authority, now) {
            Ok(Step::Keep) => return Rotation::Unchanged(Ok(())),
            Ok(step) => {
                info!(?step, "rotating the CA");
                issue::advance(authority, step, now)
            }
            Err(error) => Err(error.into()),
        };
        match rotated {
            Ok(next) => match self.store_authority(&next, inputs).await {
                None => Rotation::Stored,
                Some(failure) => Rotation::Unchanged(Err(RotationError::Write(failure))),
            },
            Err(error) => failed(error.to_string()),
        }
    }

    async fn store_authority(&self, authority: &Authority, inputs: &Inputs) -> Option<Failure> {
        let version = inputs
            .certificates
            .authority
            .as_ref()
            .map(|(_, version)| version);
        let object = secret::authority(authority, &self.namespace, version);
        let written = match version {
            Some(_) => self.applier.apply(&object).await.map(drop),
            None => self.applier.create(&object).await,
        };
        written.err().map(|error| Failure {
            key: object.key,
            message: error.to_string(),
            transient: is_transient(&error),
        })
    }

    /// Publishes the CA to the CSR controller, and returns the Secrets of the leaf certificates
    /// that are due.
    fn renew_leaf_secrets(
        &self,
        request: &Request,
        inputs: &Inputs,
        now: Timestamp,
    ) -> Result<Vec<Object>, issue::IssueError> {
        let stored = &inputs.certificates;
        let Some((authority, _)) = &stored.authority else {
            return Ok(Vec::new());
        };
        self.authority.send_if_modified(|published| {
            let is_new = published.as_ref() != Some(authority);
            if is_new {
                *published = Some(authority.clone());
            }
            is_new
        });
        [
            (certs::TYPHA, &stored.typha),
            (certs::READER, &stored.reader),
            (certs::CAPTURE, &stored.capture),
        ]
        .iter()
        .filter_map(|(leaf, present)| renewed(authority, leaf, present.as_deref(), now).transpose())
        .map(|secret| secret.map(|secret| secret.owned_by(&request.owner)))
        .collect()
    }

    async fn write_back(&self, request: &Request, completed: &Value) -> Option<Failure> {
        let spec = defaults::write_back(&request.spec, completed, &request.written)?;
        match self.applier.write_back(&request.owner, spec).await {
            Ok(()) => {
                info!("defaults written to the Installation");
                None
            }
            Err(error) => Some(Failure {
                key: installation_key(request),
                message: format!("cannot write defaults: {error}"),
                transient: is_transient(&error),
            }),
        }
    }

    /// Writes the conditions of every TigeraStatus and of the Installation that have changed.
    /// Returns true when all of them are written.
    async fn write_statuses(
        &self,
        request: &Request,
        inputs: &Inputs,
        findings: &Findings,
        now: Timestamp,
    ) -> bool {
        let calico = status::calico(inputs, findings);
        let ippools = status::ippools(inputs, findings);
        let policies = status::policies(inputs);
        let generation = request.generation;
        let mut is_written = true;
        for (name, state) in [
            ("calico", &calico),
            ("ippools", &ippools),
            ("policies", &policies),
        ] {
            let before = inputs.statuses.get(name);
            let conditions = status::conditions(
                "Available",
                state,
                generation,
                before.map(Vec::as_slice).unwrap_or_default(),
                now,
            );
            if before != Some(&conditions) {
                is_written &= self.write_tigera_status(name, request, &conditions).await;
            }
        }
        let state = status::overall(&calico, &ippools);
        if self.standalone {
            return is_written;
        }
        let conditions = status::conditions("Ready", &state, generation, &request.conditions, now);
        if request.conditions != conditions {
            is_written &= self.write_installation_status(request, &conditions).await;
        }
        self.metrics
            .degraded
            .set(i64::from(state.degraded.or(state.caution).is_some()));
        is_written
    }

    async fn write_tigera_status(
        &self,
        name: &str,
        request: &Request,
        conditions: &[StatusCondition],
    ) -> bool {
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

    async fn write_installation_status(
        &self,
        request: &Request,
        conditions: &[StatusCondition],
    ) -> bool {
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
        let outcome = self
            .applier
            .apply_status(&Object::new("Installation", body))
            .await;
        logged("Installation", outcome)
    }
}

fn logged(name: &str, outcome: Result<(), kube::Error>) -> bool {
    if let Err(error) = &outcome {
        warn!(object = name, %error, "cannot write the status, retrying");
    }
    outcome.is_ok()
}

/// Returns the completed spec, or why it is invalid.
fn complete(request: &Request, inputs: &Inputs) -> Result<InstallationSpec, SpecError> {
    let given: InstallationSpec = serde_json::from_value(spec_or_empty(&request.spec))
        .map_err(|error| SpecError::Undecodable(error.to_string()))?;
    let completed = defaults::complete(&given, inputs);
    let problems = validate::installation(&completed);
    if problems.is_empty() {
        Ok(completed)
    } else {
        Err(SpecError::Invalid(problems))
    }
}

fn spec_or_empty(spec: &Value) -> Value {
    if spec.is_null() {
        json!({})
    } else {
        spec.clone()
    }
}

fn installation_key(request: &Request) -> Key {
    Key {
        kind: crate::manifest::kind("Installation"),
        namespace: String::new(),
        name: request.owner.name.clone(),
    }
}

/// Returns the Secret of a leaf certificate, if it must be issued (again).
fn renewed(
    authority: &Authority,
    leaf: &certs::Leaf,
    present: Option<&str>,
    now: Timestamp,
) -> Result<Option<Object>, issue::IssueError> {
    let facts = certs::CertificateFacts::parse(&authority.current.certificate)?;
    let Some(reason) = certs::due(leaf, present, &facts, now) else {
        return Ok(None);
    };
    info!(secret = leaf.secret, reason, "certificate issued");
    let pair = issue::leaf(authority, leaf, now)?;
    Ok(Some(secret::leaf(leaf, &pair)))
}
