//! Datagrams from a pod to an address behind routers, each answered: how many are lost.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cluster::process::wait_for;
use crate::namespace::Namespace;

/// Port of those who answer.
const PORT: u16 = 7007;
/// Between two datagrams.
const PACE: Duration = Duration::from_millis(10);
/// Looks at what is under way, to find what is lost.
const SAMPLES: u32 = 30;
/// How long the last answers may take.
const LAST: Duration = Duration::from_secs(2);
/// How long a test waits for the first answer.
const LIMIT: Duration = Duration::from_secs(30);

/// Datagrams that are being sent, until this value is finished or dropped.
pub struct Flow {
    ends: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Flow {
    /// Sends from a pod to this address, which each of these namespaces has and answers at.
    pub fn start(from: &Namespace, target: IpAddr, at: &[&Namespace]) -> Result<Self> {
        let ends = Arc::new(AtomicBool::new(false));
        let (sent, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let mut threads = Vec::new();
        for namespace in at {
            let server = namespace.run(|| UdpSocket::bind((target, PORT)))?;
            server.set_read_timeout(Some(PACE))?;
            let is_over = ends.clone();
            threads.push(std::thread::spawn(move || answer(&server, &is_over)));
        }
        let any: IpAddr = match target {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let client = from.run(|| UdpSocket::bind((any, 0)))?;
        client.set_nonblocking(true)?;
        let (is_over, out, back) = (ends.clone(), sent.clone(), answered.clone());
        let target = SocketAddr::new(target, PORT);
        threads.push(std::thread::spawn(move || {
            ask(&client, target, &is_over, (&out, &back))
        }));
        Ok(Self {
            ends,
            sent,
            answered,
            threads,
        })
    }

    /// Datagrams that were answered so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }

    /// Waits until some more are answered, and so are all that follow as far as routes are
    /// concerned.
    pub fn wait_answers(&self) -> Result<()> {
        let wanted = self.answered() + 10;
        let what = || format!("answers: {} of {:?}", self.answered(), self.sent);
        wait_for(LIMIT, what, || self.answered() >= wanted)
    }

    /// Datagrams that were lost so far: the fewest without an answer within a moment, as some are
    /// under way.
    pub fn lost(&self) -> u64 {
        let samples = (0..SAMPLES).map(|_| {
            std::thread::sleep(PACE / 3);
            self.unanswered()
        });
        samples.min().unwrap_or_default()
    }

    fn unanswered(&self) -> u64 {
        let answered = self.answered();
        self.sent.load(Ordering::SeqCst).saturating_sub(answered)
    }

    /// Ends it, and fails if more were lost than these.
    pub fn finish(self, lost_before: u64) -> Result<()> {
        self.ends.store(true, Ordering::SeqCst);
        let is_over = || self.unanswered() <= lost_before;
        let what = || format!("{} of {:?} datagrams lost", self.unanswered(), self.sent);
        let sent = self.sent.load(Ordering::SeqCst);
        ensure!(sent > 0, "nothing was sent");
        wait_for(LAST, what, is_over)
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            // Its panic is that of the test.
            let _ = thread.join();
        }
    }
}

fn answer(server: &UdpSocket, is_over: &AtomicBool) {
    let mut buffer = [0; 16];
    let mut rounds = 0;
    // Those under way at the end are answered too.
    while rounds < 100 {
        match server.recv_from(&mut buffer) {
            // The sender's node may have no route back: it is lost.
            Ok((length, sender)) => drop(server.send_to(&buffer[..length], sender)),
            Err(_) if is_over.load(Ordering::SeqCst) => rounds += 1,
            Err(_) => {}
        }
    }
}

fn ask(
    client: &UdpSocket,
    target: SocketAddr,
    is_over: &AtomicBool,
    (sent, answered): (&AtomicU64, &AtomicU64),
) {
    let mut buffer = [0; 16];
    let mut rounds = 0;
    while rounds < 100 {
        if is_over.load(Ordering::SeqCst) {
            rounds += 1;
        } else {
            // One that no route leads on counts as lost.
            let _ = client.send_to(b"hello", target);
            sent.fetch_add(1, Ordering::SeqCst);
        }
        std::thread::sleep(PACE);
        while client.recv(&mut buffer).is_ok() {
            answered.fetch_add(1, Ordering::SeqCst);
        }
    }
}
