//! The debug service, which only reads, but for what goes to the log: answers are made in the owner task, from the current state, in pieces where they can be large.

use std::borrow::Cow;
use std::time::Instant;

use margay_calc::digest;
use margay_calc::flush::Audience;
use margay_calc::model::RecordId;
use margay_calc::text;
use margay_proto::debug::debug_server::Debug;
use margay_proto::debug::{
    ExplainRequest, ExplainResponse, GetRecordRequest, ListNodesRequest, ListNodesResponse, ListRecordsRequest,
    ListRecordsResponse, NodeStatus, Problem, RecordEntry, SetLogRequest, SetLogResponse, ViewRequest, ViewResponse,
};
use margay_proto::sync::{NodeProblem, encode_id, wire};
use margay_runtime::grpc;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use crate::compute::{Event, Owner, subject};
use crate::registry::{Node, Registry};

/// Records that the owner task makes text of in one go.
const CHUNK: usize = 64;
/// Bytes of the texts of one answer, from which on there are no more records in it.
const ANSWER: usize = 64 << 20;
/// Problems of one answer.
const PROBLEMS: usize = 10_000;

/// The service `margay.debug.v1.Debug`.
pub struct DebugService {
    events: mpsc::Sender<Event>,
    registry: Registry,
}

impl DebugService {
    /// A service that asks the owner task behind `events`.
    pub fn new(events: mpsc::Sender<Event>, registry: Registry) -> Self {
        Self { events, registry }
    }

    async fn ask<T: Send + 'static>(&self, question: impl FnOnce(&Owner) -> T + Send + 'static) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        let query = Event::Query(Box::new(move |owner| {
            // Whoever asked may not wait any more.
            let _ = reply.send(question(owner));
        }));
        let gone = || Status::unavailable("this replica goes away; ask another one");
        self.events.send(query).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// The records of these ids, as they are when their turn comes: a few at a time, so that the owner task does not wait for whoever asks. More than
    /// an answer can hold are left out, and a problem says so.
    async fn entries(
        &self,
        node: &str,
        ids: Vec<RecordId>,
        problems: &mut Vec<Problem>,
    ) -> Result<Vec<RecordEntry>, Status> {
        let (mut records, mut bytes, all) = (Vec::with_capacity(ids.len()), 0, ids.len());
        let mut ids = ids.into_iter().peekable();
        while ids.peek().is_some() {
            let (node, chunk): (_, Vec<RecordId>) = (node.to_owned(), ids.by_ref().take(CHUNK).collect());
            let made = self
                .ask(move |owner| chunk.iter().filter_map(|id| entry(owner, &node, id)).collect::<Vec<RecordEntry>>());
            let made = made.await?;
            bytes += made.iter().map(|entry| entry.text.len()).sum::<usize>();
            records.extend(made);
            if bytes > ANSWER && ids.peek().is_some() {
                let left = all - records.len();
                let reason = format!("{left} more records do not fit into one answer; ask for one kind or one node");
                problems.push(Problem { object: "ListRecords".to_owned(), reasons: vec![reason] });
                break;
            }
        }
        Ok(records)
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Debug for DebugService {
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Answer<ListNodesResponse> {
        let nodes = self.registry.nodes();
        Ok(Response::new(ListNodesResponse {
            nodes: nodes.iter().map(|node| status(&self.registry, node)).collect(),
            revision: self.registry.revision(),
            realised: self.registry.realised().1 as u32,
            in_sync: self.registry.in_sync(),
        }))
    }

    async fn list_records(&self, request: Request<ListRecordsRequest>) -> Answer<ListRecordsResponse> {
        let wanted = request.into_inner();
        let mut problems = self.ask(problems).await?;
        problems.extend(not_enforced(&self.registry));
        let is_wanted = move |id: &RecordId| wanted.kind.is_empty() || wanted.kind == kind_of(id);
        let node = wanted.node.clone();
        let mut ids = match (wanted.refused_only, wanted.node.is_empty()) {
            (true, _) => Vec::new(),
            (false, true) => self.ask(|owner| owner.hub.graph.ids()).await?,
            (false, false) => {
                self.ask(move |owner| owner.hub.graph.view(&node).ids().map(Cow::into_owned).collect()).await?
            }
        };
        ids.retain(is_wanted);
        let records = self.entries(&wanted.node, ids, &mut problems).await?;
        Ok(Response::new(ListRecordsResponse { records, problems }))
    }

    async fn get_record(&self, request: Request<GetRecordRequest>) -> Answer<RecordEntry> {
        let GetRecordRequest { kind, id } = request.into_inner();
        let missing = format!("no {kind} record {id:?}; ListRecords shows what there is");
        let ids = self.ask(|owner| owner.hub.graph.ids()).await?;
        let found = ids.into_iter().find(|found| kind_of(found) == kind && name_of(found) == id);
        let Some(found) = found else { return Err(Status::not_found(missing)) };
        let entry = self.ask(move |owner| entry(owner, "", &found)).await?;
        entry.map(Response::new).ok_or_else(|| Status::not_found(missing))
    }

    async fn view(&self, request: Request<ViewRequest>) -> Answer<ViewResponse> {
        let ViewRequest { node } = request.into_inner();
        // A view is of one moment, so that it is not made in pieces.
        let view = self.ask(move |owner| ViewResponse {
            revision: owner.hub.revision(),
            records: of_node(owner, &node),
            node,
        });
        view.await.map(Response::new)
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Answer<ExplainResponse> {
        let question = request.into_inner();
        let answer = self.ask(move |owner| crate::explain::explain(&owner.hub.graph, &question));
        answer.await?.map(Response::new)
    }

    async fn set_log(&self, request: Request<SetLogRequest>) -> Answer<SetLogResponse> {
        grpc::set_log(&request.into_inner().filter).map(|former| Response::new(SetLogResponse { former }))
    }
}

fn status(registry: &Registry, node: &Node) -> NodeStatus {
    let progress = node.progress();
    let error =
        |(id, message): &(RecordId, String)| wire::RecordError { id: Some(encode_id(id)), message: message.clone() };
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
        problems: registry.problems_of(&node.name).into_iter().map(NodeProblem::into_wire).collect(),
    }
}

/// Objects that are not used as they are written, or at odds with others: the first of them, where they are very many.
fn problems(owner: &Owner) -> Vec<Problem> {
    let refused = owner.cache.problems();
    let refused = refused.map(|(kind, key, reasons)| Problem { object: subject(kind, key), reasons: reasons.to_vec() });
    let among_others = owner.hub.graph.problems().into_iter();
    let among_others =
        among_others.map(|problem| Problem { object: problem.object(), reasons: vec![problem.reason()] });
    refused.chain(among_others).take(PROBLEMS).collect()
}

/// What nodes have said that they do not enforce as it is written.
fn not_enforced(registry: &Registry) -> Vec<Problem> {
    let of_node = |node: &Node| -> Vec<Problem> {
        let problem = |(id, message): &(RecordId, String)| Problem {
            object: format!("{} {} on node {}", kind_of(id), name_of(id), node.name),
            reasons: vec![message.clone()],
        };
        node.progress().errors.iter().map(problem).collect()
    };
    registry.nodes().iter().flat_map(|node| of_node(node)).collect()
}

fn of_node(owner: &Owner, node: &str) -> Vec<RecordEntry> {
    let view = owner.hub.graph.view(node);
    view.ids().filter_map(|id| entry(owner, node, &id)).collect()
}

fn entry(owner: &Owner, node: &str, id: &RecordId) -> Option<RecordEntry> {
    let graph = &owner.hub.graph;
    let record = graph.record_for(node, id)?;
    let (all_nodes, nodes) = match graph.nodes_of(id) {
        Audience::All => (true, Vec::new()),
        Audience::Nodes(nodes) => (false, nodes.into_iter().collect()),
    };
    Some(RecordEntry {
        kind: kind_of(id).to_owned(),
        id: name_of(id),
        text: text::record(id, &record),
        digest: digest::digest(id, &record),
        all_nodes,
        nodes,
    })
}

pub(crate) fn kind_of(id: &RecordId) -> &'static str {
    match id {
        RecordId::Settings => "settings",
        RecordId::Pool(_) => "pool",
        RecordId::Node(_) => "node",
        RecordId::Route(_) => "route",
        RecordId::IpSet(_) => "ip-set",
        RecordId::Policy(_) => "policy",
        RecordId::Endpoint(_) => "endpoint",
        RecordId::HostEndpoint(_) => "host-endpoint",
    }
}

pub(crate) fn name_of(id: &RecordId) -> String {
    match id {
        RecordId::Settings => String::new(),
        RecordId::Pool(range) | RecordId::Route(range) => range.to_string(),
        RecordId::Node(name) => name.clone(),
        RecordId::IpSet(set) => set.to_string(),
        RecordId::Policy(key) => key.to_string(),
        RecordId::Endpoint(key) => key.to_string(),
        RecordId::HostEndpoint(name) => name.clone(),
    }
}
