//! Debug service, which is read-only except for the log filter. Responses are computed in the owner
//! task from its current state, in chunks where they can be large.

use std::borrow::Cow;
use std::time::Instant;

use margay_calc::digest;
use margay_calc::explain::{ExplainError, Explanation, Outcome, Party, Question, explain};
use margay_calc::flush::Audience;
use margay_calc::model::RecordId;
use margay_calc::text;
use margay_proto::debug::debug_server::Debug;
use margay_proto::debug::{
    self as wire_debug, ExplainRequest, ExplainResponse, GetRecordRequest, ListNodesRequest,
    ListNodesResponse, ListRecordsRequest, ListRecordsResponse, NodeStatus, Problem,
    ReachedRequest, ReachedResponse, RecordEntry, SetLogRequest, SetLogResponse, ViewRequest,
    ViewResponse,
};
use margay_proto::sync::{NodeProblem, encode_id, wire};
use margay_runtime::grpc;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use crate::event::{Event, Snapshot};
use crate::object::{ObjectKey, subject};
use crate::registry::{FrameStages, NodeSession, Registry};

/// Records that the owner task formats at once.
const CHUNK: usize = 64;
/// Length of the texts in a response, in bytes, after which further records are omitted.
const MAX_RESPONSE_BYTES: usize = 64 << 20;
/// Maximal number of problems in a response.
const MAX_PROBLEMS: usize = 10_000;

/// The service `margay.debug.v1.Debug`.
pub struct DebugService {
    events: mpsc::Sender<Event>,
    registry: Registry,
}

impl DebugService {
    /// Creates a service that queries the owner task through `events`.
    pub fn new(events: mpsc::Sender<Event>, registry: Registry) -> Self {
        Self { events, registry }
    }

    async fn query<T: Send + 'static>(
        &self,
        question: impl FnOnce(Snapshot<'_>) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        let query = Event::Query(Box::new(move |state| {
            // The caller may have given up.
            let _ = reply.send(question(state));
        }));
        let gone = || Status::unavailable("this replica shuts down; ask another one");
        self.events.send(query).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// Formats the records of these ids, a few at a time so that the owner task handles other
    /// events in between. If a response cannot hold all of them, a problem states that.
    async fn entries(
        &self,
        node: &str,
        ids: Vec<RecordId>,
        problems: &mut Vec<Problem>,
    ) -> Result<Vec<RecordEntry>, Status> {
        let (mut records, mut bytes, all) = (Vec::with_capacity(ids.len()), 0, ids.len());
        let mut ids = ids.into_iter().peekable();
        while ids.peek().is_some() {
            let (node, chunk): (_, Vec<RecordId>) =
                (node.to_owned(), ids.by_ref().take(CHUNK).collect());
            let made = self.query(move |state| {
                chunk
                    .iter()
                    .filter_map(|id| record_entry(state, &node, id))
                    .collect::<Vec<RecordEntry>>()
            });
            let made = made.await?;
            bytes += made.iter().map(|entry| entry.text.len()).sum::<usize>();
            records.extend(made);
            if bytes > MAX_RESPONSE_BYTES && ids.peek().is_some() {
                let left = all - records.len();
                let reason = format!(
                    "{left} more records do not fit into one answer; ask for one kind or one node"
                );
                problems.push(Problem {
                    object: "ListRecords".to_owned(),
                    reasons: vec![reason],
                });
                break;
            }
        }
        Ok(records)
    }
}

type RpcResult<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Debug for DebugService {
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> RpcResult<ListNodesResponse> {
        let nodes = self.registry.sessions();
        Ok(Response::new(ListNodesResponse {
            nodes: nodes
                .iter()
                .map(|node| node_status(&self.registry, node))
                .collect(),
            revision: self.registry.revision(),
            realised: self.registry.count_current().1 as u32,
            in_sync: self.registry.in_sync(),
        }))
    }

    async fn list_records(
        &self,
        request: Request<ListRecordsRequest>,
    ) -> RpcResult<ListRecordsResponse> {
        let wanted = request.into_inner();
        let mut problems = self.query(object_problems).await?;
        problems.extend(not_enforced(&self.registry));
        let is_wanted = move |id: &RecordId| wanted.kind.is_empty() || wanted.kind == id.kind();
        let node = wanted.node.clone();
        let mut ids = match (wanted.refused_only, wanted.node.is_empty()) {
            (true, _) => Vec::new(),
            (false, true) => self.query(|state| state.hub.graph.ids()).await?,
            (false, false) => {
                self.query(move |state| {
                    state
                        .hub
                        .graph
                        .view(&node)
                        .ids()
                        .map(Cow::into_owned)
                        .collect()
                })
                .await?
            }
        };
        ids.retain(is_wanted);
        let records = self.entries(&wanted.node, ids, &mut problems).await?;
        Ok(Response::new(ListRecordsResponse { records, problems }))
    }

    async fn get_record(&self, request: Request<GetRecordRequest>) -> RpcResult<RecordEntry> {
        let GetRecordRequest { kind, id } = request.into_inner();
        let missing = format!("no {kind} record {id:?}; ListRecords shows what there is");
        let ids = self.query(|state| state.hub.graph.ids()).await?;
        let found = ids
            .into_iter()
            .find(|found| found.kind() == kind && found.name() == id);
        let Some(found) = found else {
            return Err(Status::not_found(missing));
        };
        let entry = self
            .query(move |state| record_entry(state, "", &found))
            .await?;
        entry
            .map(Response::new)
            .ok_or_else(|| Status::not_found(missing))
    }

    async fn view(&self, request: Request<ViewRequest>) -> RpcResult<ViewResponse> {
        let ViewRequest { node } = request.into_inner();
        // A view is a consistent snapshot, so it is not computed in chunks.
        let view = self.query(move |state| ViewResponse {
            revision: state.hub.revision(),
            records: view_entries(state, &node),
            node,
        });
        view.await.map(Response::new)
    }

    async fn reached(&self, request: Request<ReachedRequest>) -> RpcResult<ReachedResponse> {
        let ReachedRequest {
            kind,
            namespace,
            name,
            resource_version,
        } = request.into_inner();
        let key = ObjectKey::new(namespace, name);
        let unknown = Status::invalid_argument(format!(
            "kind: {kind:?}: not one that typha watches, such as NetworkPolicy or Pod"
        ));
        let found = self.query(move |state| {
            let kind = state.cache.kind(&kind)?;
            let reached = match resource_version {
                0 => state.cache.uid_of(kind, &key).is_empty(),
                version => state.freshness.version(kind) >= version,
            };
            let problems = state.cache.problems_of(kind, &key).to_vec();
            Some((reached, state.hub.revision(), problems))
        });
        let (reached, revision, problems) = found.await?.ok_or(unknown)?;
        let sessions = self.registry.sessions();
        Ok(Response::new(ReachedResponse {
            reached: reached && self.registry.in_sync(),
            revision,
            nodes: sessions
                .iter()
                .map(|node| node_status(&self.registry, node))
                .collect(),
            problems,
        }))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> RpcResult<ExplainResponse> {
        let ExplainRequest {
            from,
            to,
            protocol,
            port,
        } = request.into_inner();
        let question = Question {
            from: party_from_wire(from),
            to: party_from_wire(to),
            protocol,
            port,
        };
        let answer = self
            .query(move |state| explain(&state.hub.graph, &question))
            .await?;
        let Explanation {
            enforced, staged, ..
        } = answer.map_err(explain_status)?;
        let (verdict, steps) = outcome_to_wire(enforced);
        let (pending_verdict, pending_steps) = staged.map(outcome_to_wire).unwrap_or_default();
        Ok(Response::new(ExplainResponse {
            verdict,
            steps,
            pending_verdict,
            pending_steps,
        }))
    }

    async fn set_log(&self, request: Request<SetLogRequest>) -> RpcResult<SetLogResponse> {
        grpc::set_log(&request.into_inner().filter)
            .map(|former| Response::new(SetLogResponse { former }))
    }
}

fn party_from_wire(party: Option<wire_debug::Party>) -> Option<Party> {
    match party?.party? {
        wire_debug::party::Party::Pod(name) => Some(Party::Pod(name)),
        wire_debug::party::Party::Address(address) => Some(Party::Address(address)),
    }
}

fn outcome_to_wire(outcome: Outcome) -> (String, Vec<String>) {
    (
        if outcome.is_allowed { "allow" } else { "deny" }.to_owned(),
        outcome.steps(),
    )
}

fn explain_status(error: ExplainError) -> Status {
    match &error {
        ExplainError::Invalid(_) => Status::invalid_argument(error.to_string()),
        ExplainError::NoEndpoint { .. } => {
            Status::not_found(format!("{error}; ListRecords with kind endpoint shows all"))
        }
        ExplainError::NoCommonVersion => Status::failed_precondition(error.to_string()),
    }
}

fn node_status(registry: &Registry, node: &NodeSession) -> NodeStatus {
    let progress = node.progress();
    let error = |(id, message): &(RecordId, String)| wire::RecordError {
        id: Some(encode_id(id)),
        message: message.clone(),
    };
    let now = Instant::now();
    let oldest = progress.in_flight.front();
    NodeStatus {
        node: node.name.clone(),
        agent_version: node.agent_version.clone(),
        sent_revision: progress.sent,
        acked_revision: progress.acked,
        pending_records: progress.pending as u32,
        lag_us: oldest.map_or(0, |sent| (now - sent.at).as_micros() as u64),
        connected_seconds: (now - node.since).as_secs(),
        plan_us: progress.plan_us,
        commit_us: progress.commit_us,
        errors: progress.errors.iter().map(error).collect(),
        sent_bytes: progress.bytes,
        acked: progress.done.iter().map(stages_to_wire).collect(),
        problems: registry
            .problems_of(&node.name)
            .into_iter()
            .map(NodeProblem::into_wire)
            .collect(),
    }
}

fn stages_to_wire(stages: &FrameStages) -> wire_debug::FrameStages {
    wire_debug::FrameStages {
        revision: stages.revision,
        received_unix_ns: stages.event_unix_ns,
        sent_us: stages.sent_us,
        acked_us: stages.acked_us,
        plan_us: stages.plan_us,
        commit_us: stages.commit_us,
    }
}

/// Objects that are refused or conflict with others; limited in number.
fn object_problems(state: Snapshot<'_>) -> Vec<Problem> {
    let refused = state.cache.problems();
    let refused = refused.map(|(kind, key, reasons)| Problem {
        object: subject(kind, key),
        reasons: reasons.to_vec(),
    });
    let conflicts = state.hub.graph.conflicts().into_iter();
    let conflicts = conflicts.map(|conflict| Problem {
        object: conflict.object(),
        reasons: vec![conflict.reason()],
    });
    refused.chain(conflicts).take(MAX_PROBLEMS).collect()
}

/// Records that nodes reported as not enforceable.
fn not_enforced(registry: &Registry) -> Vec<Problem> {
    let of_node = |node: &NodeSession| -> Vec<Problem> {
        let problem = |(id, message): &(RecordId, String)| Problem {
            object: format!("{} {} on node {}", id.kind(), id.name(), node.name),
            reasons: vec![message.clone()],
        };
        node.progress().errors.iter().map(problem).collect()
    };
    registry
        .sessions()
        .iter()
        .flat_map(|node| of_node(node))
        .collect()
}

fn view_entries(state: Snapshot<'_>, node: &str) -> Vec<RecordEntry> {
    let view = state.hub.graph.view(node);
    view.ids()
        .filter_map(|id| record_entry(state, node, &id))
        .collect()
}

fn record_entry(state: Snapshot<'_>, node: &str, id: &RecordId) -> Option<RecordEntry> {
    let graph = &state.hub.graph;
    let record = graph.record_for(node, id)?;
    let (all_nodes, nodes) = match graph.nodes_of(id) {
        Audience::All => (true, Vec::new()),
        Audience::Nodes(nodes) => (false, nodes.into_iter().collect()),
    };
    Some(RecordEntry {
        kind: id.kind().to_owned(),
        id: id.name(),
        text: text::record(id, &record),
        digest: digest::digest(id, &record),
        all_nodes,
        nodes,
    })
}
