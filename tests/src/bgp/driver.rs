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
use margay_bgp::session::{ConnectionId, Moment};
use margay_bgp::speaker::{PeerStatus, Speaker, SpeakerAction};
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::md5;
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

/// A speaker in a namespace, until it is dropped: then its sockets close without a word.
pub struct Driver {
    commands: Option<mpsc::Sender<Command>>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

enum Event {
    Connected(ConnectionId, std::io::Result<TcpStream>),
    Read(ConnectionId, Vec<u8>),
    Closed(ConnectionId),
    Wrote(ConnectionId),
}

struct Wire {
    writer: mpsc::Sender<Vec<u8>>,
    is_busy: bool,
    reader: tokio::task::AbortHandle,
}

impl Driver {
    /// Starts a speaker with peers; it listens on port 179 of the namespace.
    pub fn start(namespace: &Namespace, config: SpeakerConfig, peers: Vec<(PeerId, PeerConfig)>) -> Result<Self> {
        let file = namespace.file().try_clone()?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (commands, receiver) = mpsc::channel(16);
        let (ready, is_ready) = std::sync::mpsc::channel();
        let shared = seen.clone();
        let work = move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async move {
                let mut state = Loop::new(config, peers, shared)?;
                ready.send(())?;
                state.run(receiver).await;
                Ok(())
            })
        };
        let thread = std::thread::spawn(move || {
            let result = margay_netlink::namespace::within(&file, work);
            result.expect("the namespace is there").expect("a speaker that can start");
        });
        is_ready.recv().context("the speaker did not start")?;
        Ok(Self { commands: Some(commands), seen, thread: Some(thread) })
    }

    /// Calls the speaker.
    pub fn call(&self, work: impl FnOnce(&mut Speaker, Moment) + Send + 'static) {
        let commands = self.commands.as_ref().expect("a driver that runs");
        commands.blocking_send(Box::new(work)).expect("the loop runs as long as this");
    }

    /// What has come out so far.
    pub fn seen(&self) -> Seen {
        self.seen.lock().clone()
    }

    /// Waits until something has come out; the error has all that has.
    pub fn wait_for(&self, what: &str, ready: impl Fn(&Seen) -> bool) -> Result<()> {
        wait_for(LIMIT, || what.to_owned(), || ready(&self.seen.lock())).with_context(|| format!("{:#?}", self.seen()))
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
    wires: BTreeMap<ConnectionId, Wire>,
    tasks: JoinSet<()>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
}

impl Loop {
    fn new(config: SpeakerConfig, peers: Vec<(PeerId, PeerConfig)>, seen: Arc<Mutex<Seen>>) -> Result<Self> {
        let mut listeners = Vec::new();
        for address in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
            let listener = listen(address).with_context(|| format!("listen on {address}"))?;
            for (_, peer) in peers.iter().filter(|(_, peer)| peer.address.is_ipv4() == address.is_ipv4()) {
                if let Some(password) = &peer.transport.password {
                    md5::set_key(&listener, peer.address.ip(), password.reveal())?;
                }
            }
            listeners.push(TcpListener::from_std(listener.into())?);
        }
        let seed = u64::from(std::process::id()) << 20 | u64::from(config.router_id.to_bits());
        let start = Instant::now();
        let mut speaker = Speaker::new(config, Duration::ZERO)?;
        for (peer, config) in peers {
            speaker.set_peer(peer, config, Moment { now: start.elapsed(), jitter: 0 })?;
        }
        let (events, inbox) = mpsc::channel(64);
        let tasks = JoinSet::new();
        Ok(Self { speaker, seen, start, seed, listeners, wires: BTreeMap::new(), tasks, events, inbox })
    }

    fn moment(&mut self) -> Moment {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        Moment { now: self.start.elapsed(), jitter: (self.seed >> 32) as u8 }
    }

    async fn run(&mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            self.settle();
            let deadline = self.speaker.deadline().map(|at| tokio::time::Instant::from_std(self.start + at));
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

    fn settle(&mut self) {
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
            let moment = self.moment();
            let Some(wire) = self.wires.get_mut(&connection).filter(|wire| !wire.is_busy) else { continue };
            let mut bytes = Vec::new();
            self.speaker.transmit(connection, CHUNK, moment, &mut bytes);
            wire.is_busy = !bytes.is_empty() && wire.writer.try_send(bytes).is_ok();
        }
        let peers = self.speaker.peers().map(|(peer, _)| peer);
        let status = peers.filter_map(|peer| Some((peer, self.speaker.status(peer)?))).collect();
        self.seen.lock().peers = status;
    }

    fn act(&mut self, action: SpeakerAction) {
        let text = match &action {
            SpeakerAction::Ended { peer, reason } => format!("{peer:?} ended: {reason}"),
            other => format!("{other:?}"),
        };
        self.seen.lock().log.push(format!("{:?} {text}", self.start.elapsed()));
        match action {
            SpeakerAction::Connect { peer, connection } => self.connect(peer, connection),
            SpeakerAction::Close { connection, last } => {
                if let Some(wire) = self.wires.remove(&connection) {
                    wire.reader.abort();
                    let _ = wire.writer.try_send(last);
                }
            }
            SpeakerAction::Route(RouteChange::Set { net, route }) => {
                self.seen.lock().kernel.insert(net, route);
            }
            SpeakerAction::Route(RouteChange::Remove { net }) => {
                self.seen.lock().kernel.remove(&net);
            }
            _ => {}
        }
    }

    fn connect(&mut self, peer: PeerId, connection: ConnectionId) {
        let Some(config) = self.speaker.peer(peer).cloned() else { return };
        let events = self.events.clone();
        self.tasks.spawn(async move {
            let stream = tokio::time::timeout(Duration::from_secs(5), open(&config)).await;
            let stream = stream.unwrap_or_else(|late| Err(late.into()));
            let _ = events.send(Event::Connected(connection, stream)).await;
        });
    }

    fn accept(&mut self, (stream, remote): (TcpStream, SocketAddr)) {
        let moment = self.moment();
        let Ok(local) = stream.local_addr() else { return };
        if let Some(connection) = self.speaker.accept(remote.ip(), local.ip(), moment) {
            self.attach(connection, stream);
        }
    }

    fn attach(&mut self, connection: ConnectionId, stream: TcpStream) {
        let (mut read, mut write) = stream.into_split();
        let events = self.events.clone();
        let reader = self.tasks.spawn(async move {
            let mut buffer = vec![0; CHUNK];
            while let Ok(length @ 1..) = read.read(&mut buffer).await {
                if events.send(Event::Read(connection, buffer[..length].to_vec())).await.is_err() {
                    return;
                }
            }
            let _ = events.send(Event::Closed(connection)).await;
        });
        let (writer, mut bytes) = mpsc::channel::<Vec<u8>>(2);
        let events = self.events.clone();
        self.tasks.spawn(async move {
            while let Some(bytes) = bytes.recv().await {
                if write.write_all(&bytes).await.is_err() || events.send(Event::Wrote(connection)).await.is_err() {
                    return;
                }
            }
            let _ = write.shutdown().await;
        });
        self.wires.insert(connection, Wire { writer, is_busy: false, reader });
    }

    fn handle(&mut self, event: Event) {
        let moment = self.moment();
        match event {
            Event::Connected(connection, Ok(stream)) => {
                let local = stream.local_addr().map(|address| address.ip());
                // It may have been given up meanwhile.
                if let (Ok(local), Some(_)) = (local, self.speaker.owner(connection)) {
                    self.attach(connection, stream);
                    self.speaker.connected(connection, local, moment);
                }
            }
            Event::Connected(connection, Err(_)) => self.speaker.closed(connection, moment),
            Event::Read(connection, bytes) => self.speaker.receive(connection, &bytes, moment),
            Event::Closed(connection) => {
                self.wires.remove(&connection);
                self.speaker.closed(connection, moment);
            }
            Event::Wrote(connection) => {
                if let Some(wire) = self.wires.get_mut(&connection) {
                    wire.is_busy = false;
                }
            }
        }
    }
}

fn listen(address: IpAddr) -> std::io::Result<Socket> {
    let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(address, PORT).into())?;
    socket.listen(16)?;
    Ok(socket)
}

async fn accept(listeners: &[TcpListener]) -> (TcpStream, SocketAddr) {
    loop {
        let accepts = listeners.iter().map(|listener| Box::pin(listener.accept()));
        if let (Ok(accepted), _, _) = futures::future::select_all(accepts).await {
            return accepted;
        }
    }
}

async fn open(config: &PeerConfig) -> std::io::Result<TcpStream> {
    let socket = if config.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(password) = &config.transport.password {
        md5::set_key(&socket, config.address.ip(), password.reveal())?;
    }
    if let Some(source) = config.transport.source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    socket.connect(config.address).await
}
