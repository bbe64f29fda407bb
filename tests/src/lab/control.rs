//! typha without an API server: the lab sends the events of its watches, and nodes connect by the
//! real stream, with certificates.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use margay_node::upstream::SERVER_NAME;
use margay_runtime::ready::Readiness;
use margay_runtime::shutdown::Shutdown;
use margay_runtime::tls::{Connector, Files, Tls};
use margay_typha::app::{GrpcServices, Timeouts};
use margay_typha::cache::Cache;
use margay_typha::cause::Cause;
use margay_typha::compute::{EVENT_QUEUE, GraphOwner};
use margay_typha::event::{Event, Snapshot};
use margay_typha::metrics::Counters;
use margay_typha::object::{ObjectKey, Observed};
use margay_typha::registry::Registry;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

/// A running typha, and the authority of its certificates.
pub struct Control {
    authority: Authority,
    address: SocketAddr,
    events: mpsc::Sender<Event>,
    registry: Registry,
}

/// What was sent to a node.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Revision of the newest frame sent.
    pub revision: u64,
    /// Number of records that have yet to be sent.
    pub pending: usize,
}

impl Control {
    /// Starts it, in sync with an empty API, on a port of the loopback; with `bgp`, nodes have
    /// speakers.
    pub async fn start(bgp: bool) -> Result<Self> {
        let authority = Authority::new()?;
        let registry = Registry::default();
        let counters = Counters::register(&mut Default::default(), registry.clone());
        let (readiness, shutdown) = (Readiness::default(), Shutdown::default());
        let (events, inbox) = mpsc::channel(EVENT_QUEUE);
        let gate = readiness.gate("sync", "starting");
        let owner = GraphOwner::new(Cache::new([]), counters.clone(), registry.clone(), gate);
        tokio::spawn(owner.with_bgp(bgp).run(inbox, shutdown.clone()));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let tls = authority.tls(SERVER_NAME, "")?;
        let services = GrpcServices {
            events: events.clone(),
            registry: registry.clone(),
            counters,
            readiness,
            shutdown,
            timeouts: Timeouts::default(),
        };
        tokio::spawn(services.serve(listener, tls));
        Ok(Self {
            authority,
            address,
            events,
            registry,
        })
    }

    /// Address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sender of events to it.
    pub fn events(&self) -> mpsc::Sender<Event> {
        self.events.clone()
    }

    /// Returns a connector to that address with the certificate of a node.
    pub fn connector(&self, node: &str, address: SocketAddr) -> Result<Connector> {
        let tls = self
            .authority
            .tls(&format!("margay:node:{node}"), "margay:nodes")?;
        Ok(Connector::new(tls, &address.to_string(), SERVER_NAME)?)
    }

    /// Reports this object as created or changed.
    pub async fn observe(&self, kind: &'static str, object: Observed) -> Result<()> {
        self.send(Event::Observed {
            kind,
            objects: vec![object],
            cause: Cause::default(),
        })
        .await
    }

    /// Reports this object as deleted.
    pub async fn delete(&self, kind: &'static str, key: ObjectKey) -> Result<()> {
        self.send(Event::Deleted {
            kind,
            key,
            cause: Cause::default(),
        })
        .await
    }

    /// Returns what was sent to a node, with everything that was observed before this call taken
    /// into account.
    pub async fn sent(&self, node: &str) -> Result<Sent> {
        let (reply, answer) = oneshot::channel();
        let (name, registry) = (node.to_owned(), self.registry.clone());
        let ask = move |state: Snapshot<'_>| {
            let sent = registry
                .sessions()
                .iter()
                .find(|node| node.name == name)
                .map(|node| node.progress().sent);
            let sent = sent.map(|revision| Sent {
                revision,
                pending: state.hub.pending(&name),
            });
            // The caller may have given up.
            let _ = reply.send(sent);
        };
        self.send(Event::Query(Box::new(ask))).await?;
        answer
            .await?
            .with_context(|| format!("{node} has no stream"))
    }

    async fn send(&self, event: Event) -> Result<()> {
        ensure!(self.events.send(event).await.is_ok(), "typha has ended");
        Ok(())
    }
}

/// A certificate authority.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::new([])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            pem,
        })
    }

    /// A certificate of this holder, loaded as the components load theirs.
    fn tls(&self, name: &str, organization: &str) -> Result<Tls> {
        let mut params = CertificateParams::new([SERVER_NAME.to_owned()])?;
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
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let folder = TempDir::new()?;
        let write = |path: &Path, file: &str, text: String| std::fs::write(path.join(file), text);
        write(folder.path(), "tls.crt", certificate.pem())?;
        write(folder.path(), "tls.key", key.serialize_pem())?;
        write(folder.path(), "ca.crt", self.pem.clone())?;
        Ok(Tls::load(Files::in_dirs(folder.path(), folder.path()))?)
    }
}
