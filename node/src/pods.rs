//! Starts what serves this node's pods: IPAM, the CNI service, their inputs from the view, and the
//! node's annotations.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use kube::Client;
use margay_api::hosts::{NodeInterface, node_interfaces};
use margay_api::meta::Labels;
use margay_api::network::{NodeInfo, TunnelKind};
use margay_api::rule::IpVersion;
use margay_api::storage::Mode;
use margay_calc::model::{Record, RecordId, globals};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::agent::AgentHandle;
use crate::cni::announce::Annotations;
use crate::cni::attachment::Attachments;
use crate::cni::ports::Announcer;
use crate::cni::server;
use crate::cni::service::{Service, ServiceParts};
use crate::config::NodeIps;
use crate::node_annotations;
use crate::problems::Problems;
use crate::state::State;
use crate::upstream::notices::{AnnounceBoth, Notices};
use margay_dataplane::routes::conntrack::Conntrack;
use margay_dataplane::routes::driver::tunnel_mtu;
use margay_dataplane::routes::present;
use margay_dataplane::routes::removal::LinkRemover;
use margay_dataplane::routes::tunnel::{configured_mtu, has_tunnel};
use margay_dataplane::routes::underlay;
use margay_dataplane::{Attached, Dataplane};
use margay_ipam::addresses::NodeAddresses;
use margay_ipam::allocator::Allocator;
use margay_ipam::excess;
use margay_ipam::inputs::{BlockMap, Inputs};
use margay_ipam::limits;
use margay_ipam::namespaces;
use margay_ipam::pools::Pools;
use margay_ipam::store::Store;
use margay_ipam::store::api_server::ApiServer;
use margay_netlink::route::RouteSocket;

/// Minimal interval between reads of the view for blocks, labels and pools.
const VIEW_INTERVAL: Duration = Duration::from_millis(50);
/// File name of the CNI socket in the run directory.
const SOCKET: &str = "cni.sock";

/// Settings of the node's CNI service and IPAM.
pub struct Settings {
    /// Name of the node.
    pub node: String,
    /// Addresses of the node.
    pub addresses: NodeIps,
    /// Directory of the CNI socket.
    pub run_dir: PathBuf,
    /// How long ADD waits for policy.
    pub policy_timeout: Duration,
    /// MTU of pods; 0 means that of the tunnels in use, or of the underlay.
    pub mtu: u32,
    /// Problems of the node: an MTU that does not fit is reported here.
    pub problems: Problems,
}

/// Pods attached by earlier runs whose links still exist, by interface. Links that a reboot removed
/// are left to DEL.
pub fn load_attached(attachments: &Attachments) -> Result<BTreeMap<String, Attached>> {
    let links = present::list_links(&mut RouteSocket::open()?)?;
    let live = attachments.iter().filter(|attachment| {
        !attachment.addresses.is_empty() && links.contains_key(&attachment.interface)
    });
    Ok(live
        .map(|attachment| (attachment.interface.clone(), attachment.attached()))
        .collect())
}

/// What the CNI service, IPAM and the node's annotations need of the view.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ViewInputs {
    /// `None`, and the labels in `own` not valid, until the view is complete and contains the node
    /// itself.
    blocks: BlockMap,
    pub(crate) own: NodeInfo,
    /// Tunnels that pools use, each with its configured MTU; 0: not configured.
    pub(crate) tunnels: BTreeMap<TunnelKind, u32>,
    /// Whether there is an IPv6 pool.
    pub(crate) has_ipv6: bool,
    /// No Namespace names pools for its pods, as of the view.
    no_namespace_names_pools: bool,
    /// Interfaces other than those of pods and loopback.
    pub(crate) interfaces: Vec<NodeInterface>,
}

/// Extracts the inputs, except interfaces, from the records that every node holds; `is_whole`: they
/// are a complete view, or have been one.
fn view_inputs(node: &str, records: &BTreeMap<RecordId, Record>, is_whole: bool) -> ViewInputs {
    let mut inputs = ViewInputs::default();
    let (mut blocks, mut has_own) = (BTreeMap::new(), false);
    for (id, record) in globals(records) {
        match (id, record) {
            (RecordId::Route(cidr), Record::Route(route))
                if cidr.prefix_len() < cidr.max_prefix_len() =>
            {
                drop(blocks.insert(*cidr, route.node.clone()))
            }
            (RecordId::Node(name), Record::Node(info)) if name == node => {
                (inputs.own, has_own) = (info.clone(), true);
            }
            (RecordId::Pool(range), _) => inputs.has_ipv6 |= range.addr().is_ipv6(),
            _ => {}
        }
    }
    if let Some(Record::Settings(settings)) = records.get(&RecordId::Settings) {
        inputs.no_namespace_names_pools = settings.no_namespace_names_pools;
    }
    let used = TunnelKind::ALL
        .into_iter()
        .filter(|kind| has_tunnel(records, *kind));
    inputs.tunnels = used
        .map(|kind| (kind, configured_mtu(records, kind)))
        .collect();
    // Blocks of this node may be missing in a partial view, and typha may not have seen the node
    // yet.
    inputs.blocks = (is_whole && has_own).then(|| Arc::new(blocks));
    inputs
}

/// Dependencies of the CNI service and IPAM.
pub struct Dependencies<S, P, N> {
    /// Stored IPAM objects.
    pub store: Arc<S>,
    /// Returns the pools that a node with these labels may use; labels are `None` until they are
    /// known.
    pub pools: P,
    /// Limits of IPAM.
    pub limits: watch::Receiver<limits::KnownLimits>,
    /// Announces addresses to the cluster, after typha.
    pub announcer: N,
}

/// Client of the API server, and the storage of Calico's data there.
pub struct Storage {
    /// API client.
    pub client: Client,
    /// Which of the two storages is used.
    pub mode: Mode,
}

/// Running CNI service and IPAM.
pub struct Pods {
    /// IPAM, for the node's tunnel addresses.
    pub addresses: NodeAddresses,
    /// Task that serves the socket; it ends when the socket fails.
    pub served: JoinHandle<io::Result<()>>,
    inputs: watch::Receiver<ViewInputs>,
}

/// Serves pods and maintains the node's annotations until the socket fails.
pub async fn serve(
    settings: Settings,
    storage: Storage,
    agent: AgentHandle,
    attachments: Attachments,
    notices: Notices,
) -> Result<()> {
    let Storage { client, mode } = storage;
    let (node, own, problems) = (
        settings.node.clone(),
        settings.addresses,
        settings.problems.clone(),
    );
    let server = ApiServer::new(client.clone(), mode);
    let dependencies = Dependencies {
        store: Arc::new(server.clone()),
        pools: |labels| server.watch_pools(labels),
        limits: server.watch_limits(),
        announcer: Annotations::spawn(client.clone()),
    };
    let pods = start(settings, dependencies, agent, attachments, notices)?;
    tokio::spawn(node_annotations::maintain(
        node,
        own,
        client,
        pods.addresses,
        pods.inputs,
        problems,
    ));
    pods.served.await?.context("CNI socket")
}

/// Opens the socket and serves it. Pods' links are created from the network namespace of the
/// runtime's threads.
pub fn start<S: Store, N: Announcer>(
    settings: Settings,
    dependencies: Dependencies<
        S,
        impl FnOnce(watch::Receiver<Option<Labels>>) -> watch::Receiver<Pools>,
        N,
    >,
    agent: AgentHandle,
    attachments: Attachments,
    notices: Notices,
) -> Result<Pods> {
    let mut underlay = underlay::watch(settings.addresses.first())?;
    let (blocks, blocks_seen) = watch::channel(BlockMap::default());
    let (labels, labels_seen) = watch::channel(None::<Labels>);
    // Until the encapsulation is known, assume all tunnels: smaller packets always arrive.
    let every = TunnelKind::ALL.map(|kind| (kind, 0)).into();
    let (mtu, mtu_seen) = watch::channel(pod_mtu(settings.mtu, *underlay.borrow(), &every));
    let (known_mtu, known_mtu_seen) = watch::channel(None);
    let (unnamed, unnamed_seen) = watch::channel(false);
    let inputs = Inputs {
        map: blocks_seen,
        pools: (dependencies.pools)(labels_seen),
        limits: dependencies.limits,
        no_namespace_names_pools: unnamed_seen,
    };
    let problems = settings.problems.clone();
    let report = move |excess: Option<&str>| problems.report("blocks", true, excess);
    tokio::spawn(excess::watch(settings.node.clone(), inputs.clone(), report));
    let namespaces = namespaces::reader(dependencies.store.clone());
    let allocator = Allocator::spawn(settings.node.clone(), dependencies.store, inputs, now);
    let addresses = NodeAddresses::new(settings.node.clone(), allocator, namespaces, now);
    let parts = ServiceParts {
        enforcer: agent.clone(),
        addresses: addresses.clone(),
        announcer: AnnounceBoth {
            notices,
            then: dependencies.announcer,
        },
        links: LinkRemover::spawn()?,
        conntrack: Conntrack::spawn().context("connection tracking")?,
        mtu: mtu_seen,
        policy_timeout: settings.policy_timeout,
    };
    let path = settings.run_dir.join(SOCKET);
    let listener = server::bind(&path).with_context(|| format!("CNI socket {}", path.display()))?;
    let service = Arc::new(Service::new(parts, attachments));
    let recovering = service.clone();
    tokio::spawn(async move { recovering.recover().await });
    let following = service.clone();
    tokio::spawn(async move { following.follow_mtu(known_mtu_seen).await });
    let served = tokio::spawn(server::serve(listener, service));

    let (own, inputs_seen) = watch::channel(ViewInputs::default());
    tokio::spawn(async move {
        let mut status = agent.watch();
        // Changes of the records that every node holds, as of the inputs computed last: a pod's
        // start changes none of them.
        let mut known = None;
        loop {
            tokio::select! {
                changed = status.changed() => if changed.is_err() { return },
                Ok(()) = underlay.changed() => {}
            }
            let name = settings.node.clone();
            // Read before the view: what is inspected afterwards is at least as complete.
            let (is_whole, is_in_sync) = {
                let status = status.borrow_and_update();
                (status.enforcing, status.in_sync)
            };
            let look = move |state: &State, dataplane: &dyn Dataplane| {
                let version = Some((state.global_changes(), is_whole));
                let inputs =
                    (known != version).then(|| view_inputs(&name, state.records(), is_whole));
                (version, inputs, node_interfaces(dataplane.links()))
            };
            let Some((version, inputs, interfaces)) = agent.inspect(look).await else {
                return;
            };
            known = version;
            let seen = ViewInputs {
                interfaces,
                ..inputs.unwrap_or_else(|| own.borrow().clone())
            };
            // A node that is cut off does not hear of new ones.
            let is_unnamed = is_in_sync && seen.no_namespace_names_pools;
            unnamed.send_if_modified(|present| replace_value(present, is_unnamed));
            let below = *underlay.borrow_and_update();
            if seen.blocks.is_some() {
                let wanted = pod_mtu(settings.mtu, below, &seen.tunnels);
                mtu.send_if_modified(|present| replace_value(present, wanted));
                known_mtu.send_if_modified(|present| replace_value(present, Some(wanted)));
                let problem = mtu_problem(settings.mtu, below, &seen.tunnels);
                settings.problems.report("mtu", true, problem.as_deref());
            }
            let known_labels = seen.blocks.is_some().then(|| seen.own.labels.clone());
            labels.send_if_modified(|present| replace_value(present, known_labels));
            blocks.send_if_modified(|present| replace_value(present, seen.blocks.clone()));
            own.send_if_modified(|present| replace_value(present, seen));
            tokio::time::sleep(VIEW_INTERVAL).await;
        }
    });
    Ok(Pods {
        addresses,
        served,
        inputs: inputs_seen,
    })
}

fn replace_value<T: PartialEq>(present: &mut T, wanted: T) -> bool {
    let differs = *present != wanted;
    *present = wanted;
    differs
}

/// MTU of pods: the configured one, else the smallest of the tunnels (which have these configured
/// MTUs), else the underlay's.
fn pod_mtu(configured: u32, underlay: u32, tunnels: &BTreeMap<TunnelKind, u32>) -> u32 {
    let carried = tunnels
        .iter()
        .map(|(kind, mtu)| tunnel_mtu(*kind, *mtu, Some(underlay), None));
    if configured == 0 {
        carried.min().unwrap_or(underlay)
    } else {
        configured
    }
}

/// Describes configured MTUs that are larger than the node's link allows: the setting, the
/// consequence and the remedy.
fn mtu_problem(
    configured: u32,
    underlay: u32,
    tunnels: &BTreeMap<TunnelKind, u32>,
) -> Option<String> {
    let mut found = Vec::new();
    for (kind, wanted) in tunnels {
        let carried = tunnel_mtu(*kind, *wanted, Some(underlay), None);
        if *wanted > carried {
            let field = match kind {
                TunnelKind::Vxlan(IpVersion::V4) => "vxlanMTU",
                TunnelKind::Vxlan(IpVersion::V6) => "vxlanMTUV6",
                TunnelKind::Ipip => "ipipMTU",
            };
            found.push(format!(
                "{field} of FelixConfiguration is {wanted}, but the node's link has MTU \
                 {underlay}, so {} is given {carried}",
                kind.device_name()
            ));
        }
    }
    let carried = pod_mtu(0, underlay, tunnels);
    if configured > carried {
        found.push(format!(
            "calicoNetwork.mtu of the Installation is {configured}, but packets to other nodes may \
             have {carried} bytes at most: larger ones are dropped or rejected on the way, and \
             connections without path MTU discovery stall"
        ));
    }
    let remedy = "configure a smaller MTU, or a larger one on the node's link";
    (!found.is_empty()).then(|| format!("{}; {remedy}", found.join("; ")))
}

fn now() -> String {
    Timestamp::now().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipnet::IpNet;
    use margay_api::network::Encapsulation;
    use margay_api::settings::FelixSettings;
    use margay_calc::model::{PoolRecord, RouteRecord};

    #[test]
    fn pods_have_the_mtu_of_the_smallest_tunnel_and_one_that_does_not_fit_is_a_problem() {
        let [v4, v6, ipip] = TunnelKind::ALL;
        for (configured, underlay, tunnels, mtu, problems) in [
            (0, 1500, vec![], 1500, vec![]),
            (0, 1500, vec![(v4, 0)], 1450, vec![]),
            (0, 1500, vec![(v4, 0), (v6, 0)], 1430, vec![]),
            (0, 1500, vec![(ipip, 0)], 1480, vec![]),
            (0, 1500, vec![(ipip, 0), (v4, 0)], 1450, vec![]),
            (
                0,
                1500,
                vec![(ipip, 1500)],
                1480,
                vec!["ipipMTU of", "tunl0 is given 1480"],
            ),
            (0, 1500, vec![(v4, 1300), (v6, 0)], 1300, vec![]),
            (0, 1500, vec![(v4, 1450), (v6, 1430)], 1430, vec![]),
            (
                0,
                1500,
                vec![(v4, 8950)],
                1450,
                vec![
                    "vxlanMTU of FelixConfiguration is 8950",
                    "MTU 1500, so vxlan.calico is given 1450",
                ],
            ),
            (
                0,
                1500,
                vec![(v6, 1450)],
                1430,
                vec!["vxlanMTUV6 of FelixConfiguration is 1450", "is given 1430"],
            ),
            (1400, 1500, vec![(v4, 0)], 1400, vec![]),
            (1500, 1500, vec![], 1500, vec![]),
            (
                1500,
                1500,
                vec![(v4, 0)],
                1500,
                vec!["calicoNetwork.mtu of the Installation is 1500", "1450"],
            ),
            (
                9000,
                1500,
                vec![(v4, 8950)],
                9000,
                vec!["vxlanMTU of", "calicoNetwork.mtu of", "smaller MTU"],
            ),
        ] {
            let tunnels = tunnels.into_iter().collect();
            assert_eq!(
                pod_mtu(configured, underlay, &tunnels),
                mtu,
                "{configured} {underlay} {tunnels:?}"
            );
            let problem = mtu_problem(configured, underlay, &tunnels);
            assert_eq!(
                problem.is_some(),
                !problems.is_empty(),
                "{configured} {underlay} {tunnels:?}: {problem:?}"
            );
            for part in problems {
                assert!(
                    problem
                        .as_ref()
                        .is_some_and(|problem| problem.contains(part)),
                    "{part:?} in {problem:?}"
                );
            }
        }
    }

    #[test]
    fn configured_mtus_are_those_of_the_versions_that_are_encapsulated() {
        let settings = FelixSettings {
            vxlan_mtu: 1300,
            vxlan_mtu_v6: 1280,
            ..FelixSettings::default()
        };
        let pool = PoolRecord {
            nat_outgoing: false,
            encapsulation: Encapsulation::Vxlan,
        };
        let records = BTreeMap::from([
            (RecordId::Settings, Record::Settings(settings)),
            (
                RecordId::Pool("10.0.0.0/16".parse().expect("a range")),
                Record::Pool(pool),
            ),
        ]);
        let inputs = view_inputs("own", &records, true);
        let vxlan = TunnelKind::Vxlan(IpVersion::V4);
        assert_eq!(inputs.tunnels, BTreeMap::from([(vxlan, 1300)]));
    }

    #[test]
    fn blocks_are_known_once_the_view_is_whole_and_has_the_node_itself() {
        let block: IpNet = "10.0.0.0/26".parse().expect("a block");
        let node = |name: &str| {
            (
                RecordId::Node(name.to_owned()),
                Record::Node(NodeInfo::default()),
            )
        };
        let route = Record::Route(RouteRecord {
            node: "own".to_owned(),
            encapsulation: Encapsulation::None,
        });
        let mut records = BTreeMap::from([node("other"), (RecordId::Route(block), route)]);
        let blocks =
            |records: &BTreeMap<_, _>, is_whole| view_inputs("own", records, is_whole).blocks;
        assert_eq!(blocks(&BTreeMap::new(), false), None, "nothing has come");
        assert_eq!(blocks(&records, true), None, "typha has not seen the node");
        records.extend([node("own")]);
        assert_eq!(blocks(&records, false), None, "a part has come");
        assert_eq!(
            blocks(&records, true).as_deref(),
            Some(&BTreeMap::from([(block, "own".to_owned())]))
        );
    }
}
