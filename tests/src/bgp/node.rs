//! A node with BGP: the agent's own parts in a namespace, from its records to its kernel, with one
//! pod; and routers beside it, each with BIRD.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use margay_api::network::{Encapsulation, NodeInfo};
use margay_calc::model::{BgpPeerRecord, BgpRecord, PoolRecord, Record, RecordId, RouteRecord};
use margay_dataplane::routes::learned::has_routes_of_ours;
use margay_dataplane::routes::plan::{LocalPods, plan};
use margay_dataplane::routes::worker::Network;
use margay_netlink::route::RouteSocket;
use margay_node::bgp::config::BgpInputs;
use margay_node::bgp::metrics::BgpMetrics;
use margay_node::bgp::passwords::{SecretData, SecretSource, SecretState};
use margay_node::bgp::report::{BgpReport, PeerReport};
use margay_node::bgp::{self, BgpParts, InputsSender};
use margay_node::problems::Problems;
use margay_runtime::backoff::jitter;
use parking_lot::Mutex;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

use super::{Daemon, Kind};
use crate::cluster::process::wait_for;
use crate::namespace::{Namespace, connect};

/// How long a test waits for what is to come.
const LIMIT: Duration = Duration::from_secs(60);
/// Name of the node.
const NAME: &str = "n1";
/// AS number of the node.
pub const OUR_AS: u32 = 64512;
/// AS number of the routers.
pub const ROUTER_AS: u32 = 65001;
/// Blocks of the node, of IPv4 and IPv6.
pub const BLOCKS: [&str; 2] = ["10.65.0.0/26", "fd00:65::/122"];
/// The pod's addresses.
pub const POD: [&str; 2] = ["10.65.0.5", "fd00:65::5"];
/// What routers announce.
pub const ROUTES: [&str; 2] = ["192.0.2.0/24", "2001:db8:1::/48"];
/// An address of each router within.
pub const BEHIND: [&str; 2] = ["192.0.2.1", "2001:db8:1::1"];

/// Secrets that a test sets.
#[derive(Clone, Default)]
pub struct Secrets(Arc<Mutex<BTreeMap<String, watch::Sender<SecretState>>>>);

impl Secrets {
    /// Sets the key `password` of a Secret.
    pub fn set(&self, name: &str, password: &str) {
        let data = SecretData::from([("password".to_owned(), password.as_bytes().to_vec())]);
        self.sender(name).send_replace(Some(Ok(data)));
    }

    fn sender(&self, name: &str) -> watch::Sender<SecretState> {
        let missing = || watch::Sender::new(Some(Err("it does not exist".to_owned())));
        self.0
            .lock()
            .entry(name.to_owned())
            .or_insert_with(missing)
            .clone()
    }
}

impl SecretSource for Secrets {
    fn follow(&self, name: &str) -> watch::Receiver<SecretState> {
        self.sender(name).subscribe()
    }
}

/// What runs on a node.
struct Running {
    runtime: Runtime,
    network: Network,
    inputs: InputsSender,
    report: watch::Receiver<Option<BgpReport>>,
    problems: Problems,
}

/// The node.
pub struct BgpNode {
    /// Its network.
    pub host: Namespace,
    /// Its pod, which has [`POD`].
    pub pod: Namespace,
    /// Its record.
    pub record: BgpRecord,
    /// Secrets that it can read.
    pub secrets: Secrets,
    running: Option<Running>,
}

impl BgpNode {
    /// A node whose agent does not run yet.
    pub fn new() -> Result<Self> {
        let (host, pod) = (Namespace::new()?, Namespace::new()?);
        let nets = [
            format!("{}/32", POD[0]).parse()?,
            format!("{}/128", POD[1]).parse()?,
        ];
        host.connect_pod(&pod, "cali1", &nets)?;
        let blocks = BLOCKS.map(|block| (block.parse().expect("a block"), true));
        let pools = ["10.65.0.0/16", "fd00:65::/64"];
        let record = BgpRecord {
            asn: OUR_AS,
            router_id: [10, 9, 0, 1].into(),
            cluster_id: None,
            listen_port: 179,
            binds_node_address: false,
            ignored_interfaces: Default::default(),
            priorities: [1024; 2],
            mesh: None,
            blocks: blocks.into(),
            pools: pools
                .map(|pool| (pool.parse().expect("a pool"), true))
                .into(),
            services: Default::default(),
            service_ranges: Default::default(),
            communities: BTreeMap::new(),
            peers: Vec::new(),
        };
        Ok(Self {
            host,
            pod,
            record,
            secrets: Secrets::default(),
            running: None,
        })
    }

    fn records(&self, has_bgp: bool) -> BTreeMap<RecordId, Record> {
        let info = NodeInfo {
            ipv4: "10.9.0.1/24".parse().ok(),
            ipv6: "fd00:9::1/64".parse().ok(),
            ..NodeInfo::default()
        };
        let mut records = BTreeMap::from([(RecordId::Node(NAME.to_owned()), Record::Node(info))]);
        for block in BLOCKS {
            let route = RouteRecord {
                node: NAME.to_owned(),
                encapsulation: Encapsulation::None,
            };
            let block = block.parse().expect("a block");
            records.insert(RecordId::Route(block), Record::Route(route));
        }
        for pool in self.record.pools.keys() {
            let record = PoolRecord {
                nat_outgoing: false,
                encapsulation: Encapsulation::None,
            };
            records.insert(RecordId::Pool(*pool), Record::Pool(record));
        }
        if has_bgp {
            let record = Record::Bgp(Box::new(self.record.clone()));
            records.insert(RecordId::Bgp, record);
        }
        records
    }

    /// Starts its agent, as far as routes are concerned.
    pub fn start(&mut self) -> Result<()> {
        self.run()?;
        self.apply()
    }

    /// The same on a node that has no BGP.
    pub fn start_without(&mut self) -> Result<()> {
        self.run()?;
        self.turn_off()
    }

    fn run(&mut self) -> Result<()> {
        // Threads begin in the namespace of the thread that starts them.
        let (runtime, network, had_routes) = self.host.run(|| -> Result<_> {
            let runtime = Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()?;
            let had_routes = has_routes_of_ours(&mut RouteSocket::open()?)?;
            Ok((runtime, Network::spawn()?, had_routes))
        })?;
        let (inputs, seen) = watch::channel(None);
        let (sender, report) = watch::channel(None);
        let problems = Problems::default();
        runtime.spawn(bgp::run(BgpParts {
            inputs: seen,
            routes: network.learned(),
            secrets: self.secrets.clone(),
            problems: problems.clone(),
            metrics: BgpMetrics::default(),
            report: sender,
            had_routes,
            jitter,
        }));
        self.running = Some(Running {
            runtime,
            network,
            inputs,
            report,
            problems,
        });
        Ok(())
    }

    /// Passes the record on as it is now.
    pub fn apply(&self) -> Result<()> {
        self.apply_records(true)
    }

    /// Takes BGP from the node.
    pub fn turn_off(&self) -> Result<()> {
        self.apply_records(false)
    }

    fn apply_records(&self, has_bgp: bool) -> Result<()> {
        let running = self.running()?;
        let records = self.records(has_bgp);
        let pods: LocalPods = POD
            .iter()
            .map(|address| (address.parse().expect("an address"), "cali1".to_owned()))
            .collect();
        running.network.set_plan(plan(NAME, &records, &pods));
        let inputs = BgpInputs::new(NAME, &records, &pods);
        running.inputs.send_replace(Some(Arc::new(inputs)));
        Ok(())
    }

    /// Ends its agent as if it were killed.
    pub fn kill(&mut self) {
        if let Some(running) = self.running.take() {
            running.runtime.shutdown_timeout(LIMIT);
        }
    }

    fn running(&self) -> Result<&Running> {
        self.running.as_ref().context("its agent does not run")
    }

    /// Problems that it reports.
    pub fn problems(&self) -> Result<String> {
        let problems = self.running()?.problems.list();
        let lines = problems
            .into_iter()
            .map(|each| format!("{}: {}", each.code, each.message));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    /// State of a session; none: there is none.
    pub fn session(&self, address: SocketAddr) -> Option<PeerReport> {
        let report = self.running.as_ref()?.report.borrow().clone()?;
        report.peers.get(&address).cloned()
    }

    /// Waits until a session is established.
    pub fn wait_established(&self, router: &Router) -> Result<()> {
        for address in router.sockets()? {
            let is_up = || {
                self.session(address)
                    .is_some_and(|peer| peer.is_established())
            };
            let what = || format!("the session with {address}: {:?}", self.session(address));
            wait_for(LIMIT, what, is_up)?;
        }
        Ok(())
    }

    /// Learnt routes in its kernel.
    pub fn learned(&self) -> Result<String> {
        let of = |family: &str| self.host.ip(&format!("{family} route show proto 83"));
        Ok(of("-4")? + &of("-6")?)
    }

    /// Waits until its learnt routes are as wanted.
    pub fn wait_learned(&self, ready: impl Fn(&str) -> bool) -> Result<()> {
        let text = || self.learned().unwrap_or_else(|error| format!("{error:#}"));
        let what = || format!("learnt routes: {}; {:?}", text(), self.problems());
        wait_for(LIMIT, what, || ready(&text()))
    }
}

impl Drop for BgpNode {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a test may choose of a router's configuration.
#[derive(Clone, Default)]
pub struct RouterOptions {
    /// Lines of both of its sessions.
    pub session: &'static str,
    /// More of the configuration.
    pub more: String,
}

/// A router with BIRD on a cable to the node. It announces [`ROUTES`], has [`BEHIND`], and routes
/// by what it learns.
pub struct Router {
    /// Its network.
    pub namespace: Namespace,
    /// BIRD.
    pub daemon: Daemon,
    number: u8,
}

impl Router {
    /// Plugs a router in and starts it. The number is that of the cable: the node has 10.9.NUMBER.1
    /// there, and the router 10.9.NUMBER.2.
    pub fn start(node: &BgpNode, number: u8, options: RouterOptions) -> Result<Self> {
        let namespace = Namespace::new()?;
        let link = format!("eth{number}");
        connect(
            (&node.host, &link, &format!("10.9.{number}.1/24")),
            (&namespace, "eth0", &format!("10.9.{number}.2/24")),
        )?;
        let (own, other) = Self::addresses6(number);
        node.host
            .ip(&format!("addr add {other}/64 dev {link} nodad"))?;
        namespace.ip(&format!("addr add {own}/64 dev eth0 nodad"))?;
        for (behind, length) in BEHIND.iter().zip([32, 128]) {
            namespace.ip(&format!("addr add {behind}/{length} dev lo"))?;
        }
        let daemon = Daemon::start(Kind::Bird, &namespace, &Self::config(number, &options))?;
        Ok(Self {
            namespace,
            daemon,
            number,
        })
    }

    fn addresses6(number: u8) -> (String, String) {
        let net = if number == 0 {
            "fd00:9".to_owned()
        } else {
            format!("fd00:9:{number}")
        };
        (format!("{net}::2"), format!("{net}::1"))
    }

    fn config(number: u8, options: &RouterOptions) -> String {
        let (own, other) = Self::addresses6(number);
        let session = |name: &str, own: &str, other: &str, channel: &str| {
            format!(
                "protocol bgp {name} {{ local {own} as {ROUTER_AS}; neighbor {other} as {OUR_AS}; \
                 connect delay time 1; connect retry time 1; error wait time 1, 2; \
                 graceful restart on; {} {channel} {{ import all; export where source = \
                 RTS_STATIC; }}; }}\n",
                options.session
            )
        };
        let mut text = format!("router id 10.9.{number}.2;\nprotocol device {{}}\n");
        for (version, route) in ["ipv4", "ipv6"].iter().zip(ROUTES) {
            text += &format!(
                "protocol kernel {{ {version} {{ export where source = RTS_BGP; }}; }}\n\
                 protocol static {{ {version}; route {route} blackhole; }}\n"
            );
        }
        let (own4, other4) = (format!("10.9.{number}.2"), format!("10.9.{number}.1"));
        text += &session("node4", &own4, &other4, "ipv4");
        text += &session("node6", &own, &other, "ipv6");
        text + &options.more
    }

    /// Addresses of its two sessions.
    pub fn sockets(&self) -> Result<[SocketAddr; 2]> {
        let own6 = Self::addresses6(self.number).0;
        let own4 = format!("10.9.{}.2:179", self.number);
        Ok([own4.parse()?, format!("[{own6}]:179").parse()?])
    }

    /// Both sessions as the node's record has them.
    pub fn peers(&self) -> Result<Vec<BgpPeerRecord>> {
        let sockets = self.sockets()?.into_iter();
        let peer = |address| BgpPeerRecord::new(format!("tor{}", self.number), address, ROUTER_AS);
        Ok(sockets.map(peer).collect())
    }

    /// Waits until it has learnt the node's blocks.
    pub fn wait_blocks(&self) -> Result<()> {
        for (version, block) in ["ipv4", "ipv6"].into_iter().zip(BLOCKS) {
            let has = |answer: &str| answer.contains(block);
            self.daemon.wait_for(&self.namespace, version, has)?;
        }
        Ok(())
    }
}
