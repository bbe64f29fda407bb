//! Pods of this node: starts IPAM, the CNI service and what they need of the view, and keeps the node's own annotations true.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use margay_api::meta::{ANNOTATION_NODE_IPV4, ANNOTATION_VXLAN_IPV4, ANNOTATION_VXLAN_MAC, Labels};
use margay_api::network::{Encapsulation, Mac, NodeInfo};
use margay_calc::model::{Record, RecordId};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::agent::AgentHandle;
use crate::cni::announce::Annotations;
use crate::cni::attachment::Attachments;
use crate::cni::server;
use crate::cni::service::{Parts, Service};
use crate::ipam::addresses::NodeAddresses;
use crate::ipam::allocator::{Allocator, BlockMap};
use crate::ipam::objects::Objects;
use crate::ipam::pools;
use crate::net::driver::Driver;
use crate::net::netlink::Socket;
use crate::net::plan::VXLAN_OVERHEAD;
use crate::net::present;
use crate::policy::Attached;
use crate::upstream::notices::{Announce, Notices};

/// The view is looked at for blocks, labels and pools at most this often.
const LOOK: Duration = Duration::from_millis(50);
/// Delay before something that the API refused is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// File of the CNI socket in the run folder.
const SOCKET: &str = "cni.sock";

/// What the pods' side of a node starts with.
pub struct Settings {
    /// Name of the node.
    pub node: String,
    /// Address of the node.
    pub address: Ipv4Addr,
    /// Folder of the CNI socket.
    pub run_dir: PathBuf,
    /// How long an ADD waits for policy.
    pub policy_timeout: Duration,
    /// MTU of pods; 0 means that of the underlay, less the overhead of the encapsulation in use.
    pub mtu: u32,
}

/// The pods that earlier runs have attached and whose links are still there, by interface. Links that went with a reboot are left to DEL.
pub fn attached(attachments: &Attachments) -> Result<BTreeMap<String, Attached>> {
    let links = present::links(&mut Socket::open()?)?;
    let live = attachments
        .iter()
        .filter(|attachment| !attachment.addresses.is_empty() && links.contains_key(&attachment.interface));
    let pod = |attachment: &crate::cni::attachment::Attachment| Attached {
        endpoint: attachment.endpoint(),
        addresses: attachment.addresses.iter().map(ipnet::IpNet::addr).collect(),
    };
    Ok(live.map(|attachment| (attachment.interface.clone(), pod(attachment))).collect())
}

/// What of the view the pods' side needs.
#[derive(Clone, Debug, Default, PartialEq)]
struct Outlook {
    blocks: BlockMap,
    own: NodeInfo,
    has_vxlan: bool,
}

fn outlook(node: &str, records: &BTreeMap<RecordId, Record>) -> Outlook {
    let mut outlook = Outlook::default();
    let mut blocks = BTreeMap::new();
    for (id, record) in records {
        match (id, record) {
            (RecordId::Route(cidr), Record::Route(route)) if cidr.prefix_len() < cidr.max_prefix_len() => {
                drop(blocks.insert(*cidr, route.node.clone()))
            }
            (RecordId::Node(name), Record::Node(info)) if name == node => outlook.own = info.clone(),
            (RecordId::Pool(_), Record::Pool(pool)) => {
                outlook.has_vxlan |=
                    matches!(pool.encapsulation, Encapsulation::Vxlan | Encapsulation::VxlanCrossSubnet);
            }
            _ => {}
        }
    }
    outlook.blocks = Some(Arc::new(blocks));
    outlook
}

/// Runs until the socket fails.
pub async fn serve(
    settings: Settings,
    client: Client,
    agent: AgentHandle,
    attachments: Attachments,
    notices: Notices,
) -> Result<()> {
    let underlay = Driver::open()?.underlay_mtu(settings.address)?;
    let (blocks, blocks_seen) = watch::channel(BlockMap::default());
    let (labels, labels_seen) = watch::channel(Labels::default());
    let (mtu, mtu_seen) = watch::channel(pod_mtu(settings.mtu, underlay, true));
    let store = Arc::new(Objects::new(client.clone(), settings.node.clone()));
    let pools = pools::watch(client.clone(), labels_seen);
    let allocator = Allocator::spawn(settings.node.clone(), store, blocks_seen, pools, now);
    let addresses = NodeAddresses::new(settings.node.clone(), allocator, now);
    let parts = Parts {
        enforcer: agent.clone(),
        addresses: addresses.clone(),
        announcer: Announce { notices, then: Annotations::spawn(client.clone()) },
        mtu: mtu_seen,
        policy_timeout: settings.policy_timeout,
    };
    let service = Arc::new(Service::new(parts, attachments));
    let recovering = service.clone();
    tokio::spawn(async move { recovering.recover().await });

    let (own, own_seen) = watch::channel(Outlook::default());
    let node = settings.node.clone();
    tokio::spawn(annotate(settings.node.clone(), settings.address, client, addresses, own_seen));
    tokio::spawn(async move {
        let mut status = agent.watch();
        while status.changed().await.is_ok() {
            let name = node.clone();
            let Some(seen) = agent.inspect(move |state, _| outlook(&name, state.records())).await else { return };
            mtu.send_if_modified(|present| replace(present, pod_mtu(settings.mtu, underlay, seen.has_vxlan)));
            labels.send_if_modified(|present| replace(present, seen.own.labels.clone()));
            blocks.send_if_modified(|present| replace(present, seen.blocks.clone()));
            own.send_if_modified(|present| replace(present, seen));
            tokio::time::sleep(LOOK).await;
        }
    });
    let path = settings.run_dir.join(SOCKET);
    let listener = server::bind(&path).with_context(|| format!("CNI socket {}", path.display()))?;
    server::serve(listener, service).await.context("CNI socket")
}

fn replace<T: PartialEq>(present: &mut T, wanted: T) -> bool {
    let differs = *present != wanted;
    *present = wanted;
    differs
}

fn pod_mtu(configured: u32, underlay: u32, has_vxlan: bool) -> u32 {
    match (configured, has_vxlan) {
        (0, true) => underlay.saturating_sub(VXLAN_OVERHEAD),
        (0, false) => underlay,
        (configured, _) => configured,
    }
}

fn now() -> String {
    Timestamp::now().to_string()
}

/// Keeps this node's annotations true: its address with its subnet, and its tunnel end point once anything is encapsulated.
async fn annotate(
    node: String,
    address: Ipv4Addr,
    client: Client,
    addresses: NodeAddresses,
    mut outlook: watch::Receiver<Outlook>,
) {
    let nodes: Api<Node> = Api::all(client);
    while outlook.changed().await.is_ok() {
        loop {
            let seen = outlook.borrow_and_update().clone();
            match put_annotations(&nodes, &node, address, &addresses, &seen).await {
                Ok(()) => break,
                Err(error) => tracing::warn!(error = format!("{error:#}"), "annotations of the node; trying again"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

async fn put_annotations(
    nodes: &Api<Node>,
    node: &str,
    address: Ipv4Addr,
    addresses: &NodeAddresses,
    seen: &Outlook,
) -> Result<()> {
    let subnet = Driver::open()?.subnet_of(IpAddr::V4(address))?;
    let mut wanted = Map::new();
    if let Some(ipnet::IpNet::V4(subnet)) = subnet.filter(|_| seen.own.ipv4.map(ipnet::IpNet::V4) != subnet) {
        wanted.insert(ANNOTATION_NODE_IPV4.to_owned(), json!(subnet));
    }
    if seen.has_vxlan && seen.own.vtep.is_none() {
        let claimed = addresses.tunnel().await.context("address of the VXLAN device")?;
        if let Some(tunnel) = claimed.first() {
            wanted.insert(ANNOTATION_VXLAN_IPV4.to_owned(), json!(tunnel.addr()));
            wanted.insert(
                ANNOTATION_VXLAN_MAC.to_owned(),
                json!(tunnel_mac(node).0.map(|byte| format!("{byte:02x}")).join(":")),
            );
        }
    }
    if wanted.is_empty() {
        return Ok(());
    }
    let patch = json!({"metadata": {"annotations": Value::Object(wanted)}});
    nodes
        .patch(node, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .with_context(|| format!("annotate Node {node}"))?;
    Ok(())
}

/// Calico's MAC address of a node's VXLAN device: 66 and the first five bytes of SHA-1 over the node's name.
fn tunnel_mac(node: &str) -> Mac {
    use sha1::{Digest, Sha1};
    let hash = Sha1::digest(node.as_bytes());
    Mac([0x66, hash[0], hash[1], hash[2], hash[3], hash[4]])
}
