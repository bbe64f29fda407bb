//! The speaker's caller: one thread in a namespace, with sockets, a clock and chance.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ipnet::IpNet;
use margay_bgp::config::{PORT, PeerConfig, PeerId, SpeakerConfig};
use margay_bgp::rib::{KernelRoute, RouteChange};
use margay_bgp::session::Moment;
use margay_bgp::speaker::{Action, PeerStatus, Speaker};
use margay_node::bgp::connections::{Connections, Event};
use margay_node::bgp::sockets;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::cluster::process::wait_for;
use crate::namespace::Namespace;

/// How long a test waits for what is to come.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes that one write takes.
const CHUNK: usize = 64 << 10;

/// What came out of the speaker.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Routes that the kernel would have.
    pub kernel: BTreeMap<IpNet, Arc<KernelRoute>>,
    /// Status of each peer.
    pub peers: BTreeMap<PeerId, PeerStatus>,
    /// Every action but those about bytes, as text.
    pub log: Vec<String>,
}

type Command = Box<dyn FnOnce(&mut Speaker, Moment) + Send>;

/// A speaker in a namespace, until it is dropped: then its sockets close silently.
pub struct Driver {
    commands: Option<mpsc::Sender<Command>>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

impl Driver {
    /// Starts a speaker with peers; it listens on port 179 of the namespace.
    pub fn start(
        namespace: &Namespace,
        config: SpeakerConfig,
        peers: Vec<(PeerId, PeerConfig)>,
    ) -> Result<Self> {
        let file = namespace.file().try_clone()?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (commands, receiver) = mpsc::channel(16);
        let (ready, is_ready) = std::sync::mpsc::channel();
        let shared = seen.clone();
        let work = move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async move {
                let mut state = Loop::new(config, peers, shared)?;
                ready.send(())?;
                state.run(receiver).await;
                Ok(())
            })
        };
        let thread = std::thread::spawn(move || {
            let result = margay_netlink::namespace::within(&file, work);
            result
                .expect("the namespace is there")
                .expect("a speaker that can start");
        });
        is_ready.recv().context("the speaker did not start")?;
        Ok(Self {
            commands: Some(commands),
            seen,
            thread: Some(thread),
        })
    }

    /// Calls the speaker.
    pub fn call(&self, work: impl FnOnce(&mut Speaker, Moment) + Send + 'static) {
        let commands = self.commands.as_ref().expect("a driver that runs");
        commands
            .blocking_send(Box::new(work))
            .expect("the loop runs as long as this");
    }

    /// What has come out so far.
    pub fn seen(&self) -> Seen {
        self.seen.lock().clone()
    }

    /// Waits until something has come out; the error has all that has.
    pub fn wait_for(&self, what: &str, ready: impl Fn(&Seen) -> bool) -> Result<()> {
        wait_for(LIMIT, || what.to_owned(), || ready(&self.seen.lock()))
            .with_context(|| format!("{:#?}", self.seen()))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the speaker's thread panicked");
        }
    }
}

struct Loop {
    speaker: Speaker,
    seen: Arc<Mutex<Seen>>,
    start: Instant,
    seed: u64,
    listeners: Vec<TcpListener>,
    connections: Connections,
    inbox: mpsc::Receiver<Event>,
}

impl Loop {
    fn new(
        config: SpeakerConfig,
        peers: Vec<(PeerId, PeerConfig)>,
        seen: Arc<Mutex<Seen>>,
    ) -> Result<Self> {
        let mut listeners = Vec::new();
        for address in [
            IpAddr::from(Ipv4Addr::UNSPECIFIED),
            Ipv6Addr::UNSPECIFIED.into(),
        ] {
            let listener = sockets::listen(SocketAddr::new(address, PORT))
                .with_context(|| format!("listen on {address}"))?;
            for (_, peer) in peers
                .iter()
                .filter(|(_, peer)| peer.address.is_ipv4() == address.is_ipv4())
            {
                if let Some(password) = &peer.transport.password {
                    sockets::set_password(&listener, peer.address.ip(), Some(password))?;
                }
            }
            listeners.push(listener);
        }
        let seed = u64::from(std::process::id()) << 20 | u64::from(config.router_id.to_bits());
        let start = Instant::now();
        let mut speaker = Speaker::new(config, Duration::ZERO)?;
        for (peer, config) in peers {
            speaker.set_peer(
                peer,
                config,
                Moment {
                    now: start.elapsed(),
                    jitter: 0,
                },
            )?;
        }
        let (connections, inbox) = Connections::new();
        Ok(Self {
            speaker,
            seen,
            start,
            seed,
            listeners,
            connections,
            inbox,
        })
    }

    fn moment(&mut self) -> Moment {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        Moment {
            now: self.start.elapsed(),
            jitter: (self.seed >> 32) as u8,
        }
    }

    async fn run(&mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            self.run_actions();
            let deadline = self
                .speaker
                .deadline()
                .map(|at| tokio::time::Instant::from_std(self.start + at));
            let far = tokio::time::Instant::now() + LIMIT;
            tokio::select! {
                command = commands.recv() => {
                    let Some(command) = command else { return };
                    let moment = self.moment();
                    command(&mut self.speaker, moment);
                }
                Some(event) = self.inbox.recv() => self.handle(event),
                accepted = accept(&self.listeners) => self.accept(accepted),
                () = tokio::time::sleep_until(deadline.unwrap_or(far)) => {
                    let moment = self.moment();
                    self.speaker.tick(moment);
                }
            }
        }
    }

    fn run_actions(&mut self) {
        loop {
            let actions = self.speaker.poll();
            if actions.is_empty() {
                break;
            }
            for action in actions {
                self.act(action);
            }
        }
        for connection in self.speaker.pending() {
            if self.connections.is_idle(connection) {
                let (mut bytes, moment) = (Vec::new(), self.moment());
                self.speaker.transmit(connection, CHUNK, moment, &mut bytes);
                self.connections.send(connection, bytes);
            }
        }
        let peers = self.speaker.peers().map(|(peer, _)| peer);
        let status = peers
            .filter_map(|peer| Some((peer, self.speaker.status(peer)?)))
            .collect();
        self.seen.lock().peers = status;
    }

    fn act(&mut self, action: Action) {
        let text = match &action {
            Action::Ended { peer, reason } => format!("{peer:?} ended: {reason}"),
            other => format!("{other:?}"),
        };
        self.seen
            .lock()
            .log
            .push(format!("{:?} {text}", self.start.elapsed()));
        match action {
            Action::Connect { peer, connection } => {
                if let Some(config) = self.speaker.peer(peer) {
                    self.connections.connect(connection, config);
                }
            }
            Action::Close { connection, last } => self.connections.close(connection, last),
            Action::Route(RouteChange::Set { net, route }) => {
                self.seen.lock().kernel.insert(net, route);
            }
            Action::Route(RouteChange::Remove { net }) => {
                self.seen.lock().kernel.remove(&net);
            }
            _ => {}
        }
    }

    fn accept(&mut self, (stream, remote): (TcpStream, SocketAddr)) {
        let moment = self.moment();
        let Ok(local) = stream.local_addr() else {
            return;
        };
        if let Some(connection) = self.speaker.accept(remote.ip(), local.ip(), moment) {
            self.connections.attach(connection, stream);
        }
    }

    fn handle(&mut self, event: Event) {
        let moment = self.moment();
        match event {
            Event::Connected(connection, Ok(stream)) => {
                let local = stream.local_addr().map(|address| address.ip());
                // It may have been given up meanwhile.
                if let (Ok(local), Some(_)) = (local, self.speaker.owner(connection)) {
                    self.connections.attach(connection, stream);
                    self.speaker.connected(connection, local, moment);
                }
            }
            Event::Connected(connection, Err(_)) => self.speaker.closed(connection, moment),
            Event::Read(connection, bytes) => self.speaker.receive(connection, &bytes, moment),
            Event::Closed(connection) => {
                self.connections.remove(connection);
                self.speaker.closed(connection, moment);
            }
            Event::Wrote(connection) => self.connections.note_sent(connection),
            Event::Accepted(stream, remote) => self.accept((stream, remote)),
        }
    }
}

async fn accept(listeners: &[TcpListener]) -> (TcpStream, SocketAddr) {
    loop {
        let accepts = listeners.iter().map(|listener| Box::pin(listener.accept()));
        if let (Ok(accepted), _, _) = futures::future::select_all(accepts).await {
            return accepted;
        }
    }
}
