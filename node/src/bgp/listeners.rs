//! Sockets that peers connect to.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use margay_bgp::config::Password;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::connections::Event;
use super::sockets;

/// Delay after a failure to accept, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

struct Listener {
    socket: Arc<TcpListener>,
    task: JoinHandle<()>,
}

/// The listening sockets, with the passwords of peers.
pub(super) struct Listeners {
    events: mpsc::Sender<Event>,
    wanted: BTreeSet<SocketAddr>,
    open: BTreeMap<SocketAddr, Listener>,
    passwords: BTreeMap<IpAddr, Password>,
    /// Addresses at which it does not listen, with the reason.
    pub(super) failed: BTreeMap<SocketAddr, String>,
}

impl Listeners {
    pub(super) fn new(events: mpsc::Sender<Event>) -> Self {
        Self {
            events,
            wanted: BTreeSet::new(),
            open: BTreeMap::new(),
            passwords: BTreeMap::new(),
            failed: BTreeMap::new(),
        }
    }

    /// Listens at these addresses, and demands these passwords of peers.
    pub(super) async fn set(
        &mut self,
        wanted: &BTreeSet<SocketAddr>,
        passwords: BTreeMap<IpAddr, Password>,
    ) {
        let closed: Vec<SocketAddr> = self.open.keys().copied().collect();
        for address in closed
            .into_iter()
            .filter(|address| !wanted.contains(address))
        {
            if let Some(listener) = self.open.remove(&address) {
                listener.task.abort();
                // The port is free when the task has dropped its handle.
                let _ = listener.task.await;
            }
        }
        self.wanted.clone_from(wanted);
        let former = std::mem::replace(&mut self.passwords, passwords);
        for (address, listener) in &self.open {
            let result = change_passwords(&listener.socket, *address, &former, &self.passwords);
            note(&mut self.failed, *address, result);
        }
        self.open_missing();
    }

    /// Tries again what has failed.
    pub(super) fn retry(&mut self) {
        if !self.failed.is_empty() {
            self.open_missing();
        }
    }

    fn open_missing(&mut self) {
        self.failed
            .retain(|address, _| self.wanted.contains(address));
        for address in self.wanted.clone() {
            if self.open.contains_key(&address) {
                continue;
            }
            let opened = sockets::listen(address).and_then(|socket| {
                change_passwords(&socket, address, &BTreeMap::new(), &self.passwords)?;
                Ok(socket)
            });
            let opened = opened.map(|socket| {
                let socket = Arc::new(socket);
                let task = tokio::spawn(accept(socket.clone(), self.events.clone()));
                self.open.insert(address, Listener { socket, task });
            });
            // A host without IPv6 has nobody who could connect by it.
            let opened = match opened {
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(()),
                result => result,
            };
            note(&mut self.failed, address, opened);
        }
    }

    /// Addresses at which it listens.
    pub(super) fn addresses(&self) -> BTreeSet<SocketAddr> {
        self.open.keys().copied().collect()
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        self.open
            .values()
            .for_each(|listener| listener.task.abort());
    }
}

fn note(failed: &mut BTreeMap<SocketAddr, String>, address: SocketAddr, result: io::Result<()>) {
    match result {
        Ok(()) => drop(failed.remove(&address)),
        Err(error) => drop(failed.insert(address, describe(&error))),
    }
}

fn describe(error: &io::Error) -> String {
    let remedy = match error.raw_os_error() {
        Some(libc::EADDRINUSE) => "; another BGP daemon of this node has the port: stop it",
        Some(libc::EADDRNOTAVAIL) => "; the node does not have that address",
        Some(libc::ENOPROTOOPT) => "; the kernel has no TCP MD5 signatures (CONFIG_TCP_MD5SIG)",
        _ => "",
    };
    format!("{error}{remedy}")
}

fn change_passwords(
    socket: &TcpListener,
    address: SocketAddr,
    former: &BTreeMap<IpAddr, Password>,
    now: &BTreeMap<IpAddr, Password>,
) -> io::Result<()> {
    let is_of_family = |peer: &&IpAddr| peer.is_ipv4() == address.is_ipv4();
    let gone = former.keys().filter(|peer| !now.contains_key(*peer));
    for peer in gone.filter(is_of_family) {
        match sockets::set_password(socket, *peer, None) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => result?,
        }
    }
    for (peer, password) in now.iter().filter(|(peer, _)| is_of_family(peer)) {
        if former.get(peer) != Some(password) {
            sockets::set_password(socket, *peer, Some(password))?;
        }
    }
    Ok(())
}

async fn accept(socket: Arc<TcpListener>, events: mpsc::Sender<Event>) {
    loop {
        match socket.accept().await {
            Ok((stream, remote)) => {
                if events.send(Event::Accepted(stream, remote)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a BGP connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
