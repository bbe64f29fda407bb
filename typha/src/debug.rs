//! The read-only debug service: every answer is made in the owner task, from the current state.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::time::Instant;

use margay_calc::digest;
use margay_calc::flush::Audience;
use margay_calc::graph::Graph;
use margay_calc::model::RecordId;
use margay_calc::text;
use margay_proto::debug::debug_server::Debug;
use margay_proto::debug::{
    ExplainRequest, ExplainResponse, GetRecordRequest, ListNodesRequest, ListNodesResponse, ListRecordsRequest,
    ListRecordsResponse, NodeStatus, Problem, RecordEntry, ViewRequest, ViewResponse,
};
use margay_proto::sync::{encode_id, wire};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use crate::compute::{Event, Owner};
use crate::registry::{Node, Registry};

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
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Debug for DebugService {
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Answer<ListNodesResponse> {
        let nodes = self.registry.nodes();
        Ok(Response::new(ListNodesResponse {
            nodes: nodes.iter().map(|node| status(node)).collect(),
            revision: self.registry.revision(),
            realised: self.registry.realised().1 as u32,
            in_sync: self.registry.in_sync(),
        }))
    }

    async fn list_records(&self, request: Request<ListRecordsRequest>) -> Answer<ListRecordsResponse> {
        let wanted = request.into_inner();
        let registry = self.registry.clone();
        self.ask(move |owner| records(owner, &registry, &wanted)).await.map(Response::new)
    }

    async fn get_record(&self, request: Request<GetRecordRequest>) -> Answer<RecordEntry> {
        let GetRecordRequest { kind, id } = request.into_inner();
        let missing = format!("no {kind} record {id:?}; ListRecords shows what there is");
        let found = self.ask(move |owner| {
            let ids = all_ids(&owner.hub.graph);
            let mut same = ids.iter().filter(|found| kind_of(found) == kind && name_of(found) == id);
            entry(owner, "", same.next()?)
        });
        found.await?.map(Response::new).ok_or_else(|| Status::not_found(missing))
    }

    async fn view(&self, request: Request<ViewRequest>) -> Answer<ViewResponse> {
        let ViewRequest { node } = request.into_inner();
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
}

fn status(node: &Node) -> NodeStatus {
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
    }
}

fn records(owner: &Owner, registry: &Registry, wanted: &ListRecordsRequest) -> ListRecordsResponse {
    let mut records = match (wanted.refused_only, wanted.node.as_str()) {
        (true, _) => Vec::new(),
        (false, "") => {
            let ids = all_ids(&owner.hub.graph);
            ids.iter().filter_map(|id| entry(owner, "", id)).collect()
        }
        (false, node) => of_node(owner, node),
    };
    records.retain(|record| wanted.kind.is_empty() || record.kind == wanted.kind);
    let problems = owner.cache.problems();
    let problems = problems.map(|(kind, key, reasons)| Problem {
        object: match key.namespace.as_str() {
            "" => format!("{kind} {}", key.name),
            _ => format!("{kind} {key}"),
        },
        reasons: reasons.to_vec(),
    });
    let among_others = owner.hub.graph.problems().into_iter();
    let among_others =
        among_others.map(|problem| Problem { object: problem.object(), reasons: vec![problem.reason()] });
    let problems = problems.chain(among_others).chain(not_enforced(registry));
    ListRecordsResponse { records, problems: problems.collect() }
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

/// Every record that some node holds.
pub fn all_ids(graph: &Graph) -> BTreeSet<RecordId> {
    let mut ids: BTreeSet<RecordId> = graph.view("").ids().map(Cow::into_owned).collect();
    let nodes: Vec<String> = ids
        .iter()
        .filter_map(|id| match id {
            RecordId::Node(name) => Some(name.clone()),
            _ => None,
        })
        .collect();
    for node in &nodes {
        ids.extend(graph.view(node).ids().map(Cow::into_owned));
    }
    ids
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

fn kind_of(id: &RecordId) -> &'static str {
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

fn name_of(id: &RecordId) -> String {
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
