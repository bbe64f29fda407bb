//! A typha without an API server, its certificate authority, and nodes that connect to it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use margay_api::endpoint::{EndpointKey, WorkloadEndpoint, interface_name};
use margay_api::meta::{LABEL_NAMESPACE, LABEL_ORCHESTRATOR, Labels};
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, Tier, Traffic};
use margay_api::report::Report;
use margay_api::rule::{Action, EntityMatch, Rule};
use margay_api::selector::Selector;
use margay_calc::model::{Member, Record, RecordId};
use margay_calc::update::Update;
use margay_proto::sync::wire::sync_client::SyncClient;
use margay_proto::sync::{Ack, Frame, Joiner, MAX_FRAME, encode_ack, wire};
use margay_runtime::ready::Readiness;
use margay_runtime::shutdown::Shutdown;
use margay_runtime::tls::{Connector, Files, Tls};
use margay_typha::app::{GrpcServices, Timeouts};
use margay_typha::cache::Cache;
use margay_typha::cause::Cause;
use margay_typha::compute::{EVENT_QUEUE, GraphOwner};
use margay_typha::event::Event;
use margay_typha::metrics::Counters;
use margay_typha::object::Observed;
use margay_typha::registry::Registry;
use margay_typha::reporter;
use prometheus_client::registry::Registry as Metrics;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::held::{Held, apply, buckets};

/// The name in typha's certificate.
const SERVER: &str = "margay-typha";
/// Timeout of everything here.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Waits for a condition that another task brings about.
pub async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let held = tokio::time::timeout(TIMEOUT, wait).await;
    held.expect("the condition never held");
}

// ---- objects

/// A pod of the namespace `ns`.
pub fn key(name: &str) -> EndpointKey {
    EndpointKey::new("ns", name)
}

/// The address of a pod, by number.
pub fn address_of(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 0, high, low).into()
}

/// An object with this value.
pub fn mk_object(name: &str, update: Update) -> Observed {
    Observed {
        key: key(name),
        uid: String::new(),
        update: Some(update),
        prefers_former: false,
        problems: Vec::new(),
    }
}

/// A pod with one address.
pub fn mk_pod(name: &str, node: &str, address: u16) -> Observed {
    let key = key(name);
    let endpoint = WorkloadEndpoint {
        node: node.to_owned(),
        labels: [
            (LABEL_NAMESPACE, key.namespace.as_str()),
            (LABEL_ORCHESTRATOR, "k8s"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into(),
        service_account: String::new(),
        addresses: vec![address_of(address)],
        ports: Vec::new(),
        uid: String::new(),
        interface: interface_name(&key),
    };
    Observed {
        key: key.clone(),
        uid: format!("u-{name}"),
        update: Some(Update::Endpoint(key, Some(endpoint))),
        prefers_former: false,
        problems: Vec::new(),
    }
}

/// Gives the pod this address.
pub fn set_address(pod: &mut Observed, address: u32) {
    if let Some(Update::Endpoint(_, Some(endpoint))) = &mut pod.update {
        endpoint.addresses = vec![Ipv4Addr::from(address).into()];
    }
}

/// Value of a metric with its labels in a text of metrics.
pub fn value(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| {
        let value = line.strip_prefix(name)?;
        value.strip_prefix(' ')
    });
    let value = line.and_then(|value| value.parse().ok());
    value.unwrap_or_else(|| panic!("{name} is not in {text}"))
}

/// The pod as it is before it has an address.
pub fn clear_addresses(pod: &mut Observed) {
    if let Some(Update::Endpoint(_, Some(endpoint))) = &mut pod.update {
        endpoint.addresses.clear();
    }
}

/// Addresses of a pod, according to a node's records.
pub fn addresses<'a>(held: &'a Held, name: &str) -> &'a [IpAddr] {
    match held.get(&RecordId::Endpoint(key(name))) {
        Some(Record::Endpoint(endpoint)) => &endpoint.addresses,
        _ => &[],
    }
}

/// Returns true if a set contains the address.
pub fn is_member_anywhere(held: &Held, address: IpAddr) -> bool {
    held.values().any(|record| match record {
        Record::IpSet(set) => set.members.contains(&Member::Net(address.into())),
        _ => false,
    })
}

// ---- certificates

/// A certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new([]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("key");
        let pem = params.self_signed(&key).expect("sign").pem();
        let issuer = Issuer::new(params, key);
        Self { issuer, pem }
    }

    fn write(&self, folder: &Path, name: &str, organization: &str) {
        let mut params = CertificateParams::new([SERVER.to_owned()]).expect("params");
        params.distinguished_name.push(DnType::CommonName, name);
        if !organization.is_empty() {
            params
                .distinguished_name
                .push(DnType::OrganizationName, organization);
        }
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().expect("key");
        let certificate = params.signed_by(&key, &self.issuer).expect("sign");
        let write = |file: &str, text: String| {
            std::fs::write(folder.join(file), text).expect("write");
        };
        write("tls.crt", certificate.pem());
        write("tls.key", key.serialize_pem());
        write("ca.crt", self.pem.clone());
    }
}

// ---- typha

/// A typha whose API is the test.
pub struct Typha {
    pub authority: Authority,
    pub address: SocketAddr,
    pub registry: Registry,
    pub readiness: Readiness,
    pub shutdown: Shutdown,
    metrics: Metrics,
    folder: TempDir,
    events: mpsc::Sender<Event>,
    tasks: Vec<JoinHandle<()>>,
}

impl Typha {
    /// Starts one that is in sync with an empty API.
    pub async fn start() -> Self {
        Self::start_with(Timeouts::default(), &[]).await
    }

    /// Starts one that waits for lists of these kinds.
    pub async fn start_with(timeouts: Timeouts, kinds: &[&'static str]) -> Self {
        Self::start_as(timeouts, kinds, None).await
    }

    /// Starts one where reports of a node expire after this time without a stream.
    pub async fn start_with_grace(grace: Duration) -> Self {
        Self::start_as(Timeouts::default(), &[], Some(grace)).await
    }

    async fn start_as(timeouts: Timeouts, kinds: &[&'static str], grace: Option<Duration>) -> Self {
        let authority = Authority::new();
        let registry = Registry::default();
        let mut metrics = Metrics::default();
        let counters = Counters::register(&mut metrics, registry.clone());
        let (readiness, shutdown) = (Readiness::default(), Shutdown::default());
        let (events, inbox) = mpsc::channel(EVENT_QUEUE);
        let cache = Cache::new(kinds.iter().copied());
        let gate = readiness.gate("sync", "starting");
        let mut owner = GraphOwner::new(cache, counters.clone(), registry.clone(), gate);
        owner.grace = grace.unwrap_or(owner.grace);
        let owner = tokio::spawn(owner.run(inbox, shutdown.clone()));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let services = GrpcServices {
            events: events.clone(),
            registry: registry.clone(),
            counters,
            readiness: readiness.clone(),
            shutdown: shutdown.clone(),
            timeouts,
        };
        let folder = TempDir::new().expect("a folder");
        authority.write(folder.path(), SERVER, "");
        let files = Files::in_dirs(folder.path(), folder.path());
        let tls = Tls::load(files).expect("certificates");
        let server = tokio::spawn(async move {
            services.serve(listener, tls).await.expect("server");
        });
        Self {
            authority,
            address,
            registry,
            readiness,
            shutdown,
            metrics,
            folder,
            events,
            tasks: vec![owner, server],
        }
    }

    /// Replaces its certificate and key.
    pub fn renew_certificate(&self) {
        self.authority.write(self.folder.path(), SERVER, "");
    }

    /// Its metrics as Prometheus gets them.
    pub fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics).expect("a text");
        text
    }

    /// Current problems.
    pub async fn report(&self) -> Report {
        reporter::report(&self.events, &self.registry)
            .await
            .expect("the owner lives")
    }

    pub async fn send(&self, event: Event) {
        assert!(self.events.send(event).await.is_ok(), "the owner has ended");
    }

    /// Delivers these objects, as a watch would.
    pub async fn observe(&self, objects: Vec<Observed>) {
        self.send(Event::Observed {
            kind: "Pod",
            objects,
            cause: Cause::default(),
        })
        .await;
    }

    /// A policy that selects all pods and refers to all pods, so that every node has a set of all
    /// addresses.
    pub async fn select_everything(&self) {
        let mut rule = Rule::any(Action::Allow);
        rule.source = EntityMatch {
            selector: Some(Selector::all()),
            ..EntityMatch::default()
        };
        let policy = Policy {
            tier: "default".to_owned(),
            order: Order(None),
            selector: Selector::all(),
            traffic: Traffic::Normal,
            applies_ingress: true,
            applies_egress: false,
            ingress: vec![rule],
            egress: Vec::new(),
        };
        let policy_key = PolicyKey {
            kind: PolicyKind::GlobalNetworkPolicy,
            namespace: String::new(),
            name: "all".to_owned(),
        };
        let tier = Tier {
            order: Order(None),
            default_action: Action::Deny,
        };
        let namespace = Update::Namespace("ns".to_owned(), Some(Labels::new().into()));
        self.observe(vec![
            mk_object("namespace", namespace),
            mk_object("tier", Update::Tier("default".to_owned(), Some(tier))),
            mk_object("policy", Update::Policy(policy_key, Some(policy))),
        ])
        .await;
    }

    pub async fn channel(
        &self,
        authority: &Authority,
        name: &str,
        organization: &str,
    ) -> Result<Channel, tonic::transport::Error> {
        self.channel_at(self.address, authority, name, organization)
            .await
    }

    pub async fn channel_at(
        &self,
        address: SocketAddr,
        authority: &Authority,
        name: &str,
        organization: &str,
    ) -> Result<Channel, tonic::transport::Error> {
        // A stranger has a certificate of another authority, but trusts typha's.
        let folder = TempDir::new().expect("folder");
        authority.write(folder.path(), name, organization);
        std::fs::write(folder.path().join("ca.crt"), &self.authority.pem).expect("write");
        let tls = Tls::load(Files::in_dirs(folder.path(), folder.path())).expect("certificates");
        let connector = Connector::new(tls, &address.to_string(), SERVER).expect("a name");
        // The HTTP/2 default, so that a stream that is not read is full soon.
        let endpoint = connector
            .endpoint()
            .initial_stream_window_size(65_535)
            .initial_connection_window_size(65_535);
        endpoint.connect_with_connector(connector).await
    }

    /// Connects a node that holds nothing.
    pub async fn node(&self, name: &str) -> Agent {
        self.node_holding(name, Held::new()).await
    }

    /// Connects a node that holds these records.
    pub async fn node_holding(&self, name: &str, held: Held) -> Agent {
        let name = format!("margay:node:{name}");
        let channel = self.channel(&self.authority, &name, "margay:nodes").await;
        let agent = Agent::open(channel.expect("our CA"), buckets(&held)).await;
        let mut agent = agent.expect("a stream");
        agent.held = held;
        agent
    }

    /// Returns when all tasks have ended.
    pub async fn ended(self) {
        for task in self.tasks {
            let ended = tokio::time::timeout(TIMEOUT, task).await;
            ended
                .expect("a part does not end")
                .expect("a part panicked");
        }
    }
}

// ---- nodes

/// The stream of one node.
pub struct Agent {
    pub held: Held,
    /// Number of frames applied.
    pub frames: usize,
    up: mpsc::Sender<wire::Up>,
    down: Streaming<wire::Frame>,
    revision: u64,
}

impl Agent {
    /// Sends hello.
    pub async fn open(channel: Channel, buckets: Vec<u64>) -> Result<Self, Status> {
        let hello = wire::Hello {
            agent_version: "test".to_owned(),
            buckets,
            host_endpoints: true,
            bgp: true,
            compact: true,
            ..wire::Hello::default()
        };
        let message = Some(wire::up::Message::Hello(hello));
        Self::open_raw(channel, vec![wire::Up { message }]).await
    }

    /// Sends arbitrary messages.
    pub async fn open_raw(channel: Channel, first: Vec<wire::Up>) -> Result<Self, Status> {
        let (up, messages) = mpsc::channel(16);
        for message in first {
            up.send(message).await.expect("room for a few");
        }
        let mut client = SyncClient::new(channel).max_decoding_message_size(MAX_FRAME);
        let down = client
            .sync(ReceiverStream::new(messages))
            .await?
            .into_inner();
        Ok(Self {
            held: Held::new(),
            frames: 0,
            up,
            down,
            revision: 0,
        })
    }

    pub async fn send(&self, message: wire::Up) {
        self.up.send(message).await.expect("the stream is open");
    }

    /// Returns true if a message arrives, false if the stream ends.
    pub async fn is_answered(&mut self) -> bool {
        let next = tokio::time::timeout(TIMEOUT, self.down.message()).await;
        matches!(
            next.expect("neither a frame nor an end arrives"),
            Ok(Some(_))
        )
    }

    /// Applies the next frame.
    pub async fn frame(&mut self) -> Frame {
        let mut parts = Joiner::default();
        let frame = loop {
            let next = tokio::time::timeout(TIMEOUT, self.down.message()).await;
            let part = next
                .expect("no frame arrives")
                .expect("an error")
                .expect("the stream has ended");
            if let Some(frame) = parts.push(part).expect("a frame") {
                break frame;
            }
        };
        apply(&mut self.held, &frame);
        self.frames += 1;
        self.revision = frame.trailer.revision;
        frame
    }

    /// Applies frames until the records are as wanted.
    pub async fn until(&mut self, wanted: impl Fn(&Held) -> bool) {
        while !wanted(&self.held) {
            self.frame().await;
        }
    }

    /// Acknowledges everything.
    pub async fn ack(&self) {
        let ack = Ack {
            revision: self.revision,
            ..Ack::default()
        };
        self.send(encode_ack(&ack)).await;
    }

    /// Acknowledges everything but one record.
    pub async fn refuse(&self, id: RecordId, reason: &str) {
        let ack = Ack {
            revision: self.revision,
            errors: vec![(id, reason.to_owned())],
            ..Ack::default()
        };
        self.send(encode_ack(&ack)).await;
    }

    /// Status with which the stream ends.
    pub async fn end(&mut self) -> Status {
        loop {
            let next = tokio::time::timeout(TIMEOUT, self.down.message()).await;
            match next.expect("the stream does not end") {
                Ok(Some(_)) => {}
                Ok(None) => return Status::ok(""),
                Err(status) => return status,
            }
        }
    }
}

// ---- a network that fails

/// Forwards bytes until it is frozen: then it neither reads nor writes nor closes.
pub struct Proxy {
    pub address: SocketAddr,
    frozen: Arc<watch::Sender<bool>>,
}

impl Proxy {
    pub async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let frozen = Arc::new(watch::Sender::new(false));
        let state = frozen.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(to).await.expect("typha");
                let (client, server) = (client.into_split(), server.into_split());
                tokio::spawn(forward(client.0, server.1, state.subscribe()));
                tokio::spawn(forward(server.0, client.1, state.subscribe()));
            }
        });
        Self { address, frozen }
    }

    pub fn freeze(&self) {
        self.frozen.send_replace(true);
    }
}

async fn forward(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut frozen: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        tokio::select! {
            read = from.read(&mut buffer) => match read {
                Ok(0) | Err(_) => return,
                Ok(length) => if to.write_all(&buffer[..length]).await.is_err() { return },
            },
            () = async {
                drop(frozen.wait_for(|frozen| *frozen).await)
            } => std::future::pending().await,
        }
    }
}
