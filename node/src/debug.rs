//! The debug service of the agent. It only reads, except for the log filter.

use std::net::SocketAddr;

use margay_calc::model::{Record, RecordId};
use margay_calc::{digest, text};
use margay_dataplane::Dataplane;
use margay_dataplane::routes::learned::LearnedProgress;
use margay_dataplane::routes::plan;
use margay_dataplane::routes::sysctl::ChangedParameter;
use margay_dataplane::routes::worker::Progress;
use margay_proto::debug::node_debug_server::NodeDebug;
use margay_proto::debug::{
    BgpSession, BgpStatus, HostChange, KernelRequest, KernelResponse, RecordEntry, SetLogRequest,
    SetLogResponse, StatusRequest, StatusResponse, ViewRequest, ViewResponse,
};
use margay_proto::sync::{NodeProblem, encode_id, wire};
use margay_runtime::grpc;
use margay_runtime::ready::Readiness;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::agent::{AgentHandle, pods_by_address};
use crate::bgp::report::{BgpReport, PeerReport};
use crate::problems::Problems;

/// Implementation of the debug service.
pub struct DebugService {
    /// Name of the node.
    pub node: String,
    /// The agent.
    pub agent: AgentHandle,
    /// Progress of routes and kernel parameters.
    pub routing: watch::Receiver<Progress>,
    /// Readiness gates.
    pub readiness: Readiness,
    /// Problems of the node.
    pub problems: Problems,
    /// State of BGP; `None`: the node has none.
    pub bgp: watch::Receiver<Option<BgpReport>>,
    /// How far the kernel has come with routes of BGP peers.
    pub learned: watch::Receiver<LearnedProgress>,
}

impl DebugService {
    fn agent_ended() -> Status {
        Status::unavailable("the agent is ending")
    }

    fn bgp_status(&self) -> Option<BgpStatus> {
        let report = self.bgp.borrow().clone()?;
        let learned = self.learned.borrow();
        let now = Instant::now();
        let sessions = report.peers.into_iter();
        Some(BgpStatus {
            asn: report.asn,
            router_id: report.router_id.to_string(),
            listening: report.listening.iter().map(SocketAddr::to_string).collect(),
            sessions: sessions
                .map(|(address, peer)| bgp_session(address, peer, now))
                .collect(),
            routes_wanted: learned.wanted as u64,
            routes_installed: learned.installed as u64,
        })
    }
}

#[tonic::async_trait]
impl NodeDebug for DebugService {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let status = self.agent.status();
        let missing = self
            .readiness
            .missing()
            .into_iter()
            .map(|(name, why)| format!("{name}: {why}"));
        let errors = status.errors.iter().map(|(id, message)| wire::RecordError {
            id: Some(encode_id(id)),
            message: message.clone(),
        });
        Ok(Response::new(StatusResponse {
            node: self.node.clone(),
            in_sync: status.in_sync,
            revision: status.revision,
            errors: errors.collect(),
            waiting: missing.chain(status.not_ready_reason()).collect(),
            typha: status.server,
            problems: self
                .problems
                .list()
                .into_iter()
                .map(NodeProblem::into_wire)
                .collect(),
            host_changes: self
                .routing
                .borrow()
                .changed
                .values()
                .cloned()
                .map(host_change)
                .collect(),
            bgp: self.bgp_status(),
        }))
    }

    async fn view(&self, request: Request<ViewRequest>) -> Result<Response<ViewResponse>, Status> {
        let asked = request.into_inner().node;
        if !asked.is_empty() && asked != self.node {
            return Err(Status::invalid_argument(format!(
                "this is node {}; request the view of {asked} from typha",
                self.node
            )));
        }
        let held = self
            .agent
            .inspect(|state, _| (state.revision(), state.records().clone()))
            .await
            .ok_or_else(Self::agent_ended)?;
        let records = held
            .1
            .iter()
            .map(|(id, record)| record_entry(id, record))
            .collect();
        Ok(Response::new(ViewResponse {
            node: self.node.clone(),
            revision: held.0,
            records,
        }))
    }

    async fn kernel(&self, _: Request<KernelRequest>) -> Result<Response<KernelResponse>, Status> {
        let node = self.node.clone();
        let look = move |state: &crate::state::State, dataplane: &dyn Dataplane| {
            let plan = plan::plan(
                &node,
                state.records(),
                &pods_by_address(dataplane.attached().iter()),
            );
            (dataplane.dump(state.records()), plan)
        };
        let (nftables, plan) = self
            .agent
            .inspect(look)
            .await
            .ok_or_else(Self::agent_ended)?;
        Ok(Response::new(KernelResponse {
            nftables,
            network: format!("{plan:#?}"),
        }))
    }

    async fn set_log(
        &self,
        request: Request<SetLogRequest>,
    ) -> Result<Response<SetLogResponse>, Status> {
        grpc::set_log(&request.into_inner().filter)
            .map(|former| Response::new(SetLogResponse { former }))
    }
}

fn bgp_session(address: SocketAddr, peer: PeerReport, now: Instant) -> BgpSession {
    BgpSession {
        name: peer.name,
        address: address.to_string(),
        asn: peer.asn,
        state: format!("{:?}", peer.state),
        state_seconds: now.saturating_duration_since(peer.since).as_secs(),
        received: peer.received.iter().sum::<usize>() as u64,
        sent: peer.sent as u64,
        last_end: peer.last_end.unwrap_or_default(),
        stale: peer.is_stale,
    }
}

fn host_change(changed: ChangedParameter) -> HostChange {
    let ChangedParameter {
        parameter,
        former,
        now,
    } = changed;
    HostChange {
        parameter,
        former,
        now,
    }
}

fn record_entry(id: &RecordId, record: &Record) -> RecordEntry {
    RecordEntry {
        kind: id.kind().to_owned(),
        id: id.name(),
        text: text::record(id, record),
        digest: digest::digest(id, record),
        all_nodes: false,
        nodes: Vec::new(),
    }
}
