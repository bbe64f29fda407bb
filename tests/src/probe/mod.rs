//! Probes from inside a pod's network. No program is started in the pod: a socket belongs to the
//! network namespace in which it was made, so a thread of this process enters the pod's namespace
//! and opens it there.
//!
//! [`attempt`] is one question, [`ask`] a whole table at once, [`prober`] many tables from one
//! thread, [`paced`] the same question again and again with exact times, [`flow`] one long
//! connection. [`serve`] is the other side: who answers. [`sctp`] speaks that protocol where the
//! kernel does not; [`icmp`] asks what any kernel answers.

pub mod attempt;
pub mod flow;
pub mod icmp;
pub mod paced;
pub mod prober;
pub mod sctp;
pub mod serve;

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::namespace::Namespace;

pub use self::attempt::{Attempt, Protocol, Verdict};

/// The image of pods that serve, and that connect from their first instruction.
pub const IMAGE: &str = "margay.test/probe:1";
/// Time without an answer after which a question counts as denied: shorter than the first
/// retransmission of a SYN.
pub const DENIED_AFTER: Duration = Duration::from_millis(150);
/// Environment variable with the factor by which this machine is slower than others, as an emulated
/// one is.
pub const SLOWNESS: &str = "MARGAY_SLOWNESS";

/// How many times slower than others this machine is, by [`SLOWNESS`].
pub fn slowness() -> u32 {
    let slowness = std::env::var(SLOWNESS)
        .ok()
        .and_then(|value| value.parse().ok());
    slowness.filter(|slowness| *slowness > 0).unwrap_or(1)
}

/// [`DENIED_AFTER`] on this machine.
pub fn denied_after() -> Duration {
    DENIED_AFTER * slowness()
}

/// A network namespace to ask from, held open.
#[derive(Debug)]
pub struct Place {
    file: File,
}

/// Target of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// How.
    pub protocol: Protocol,
    /// Where.
    pub address: SocketAddr,
}

impl Target {
    /// A port of an address.
    pub fn new(protocol: Protocol, address: impl Into<IpAddr>, port: u16) -> Self {
        Self {
            protocol,
            address: SocketAddr::new(address.into(), port),
        }
    }
}

impl Place {
    /// The network namespace of a process.
    pub fn of_process(pid: i32) -> Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The network namespace at a path.
    pub fn open(path: &Path) -> Result<Self> {
        let file =
            File::open(path).with_context(|| format!("no network namespace {}", path.display()))?;
        Ok(Self { file })
    }

    /// A namespace of this process.
    pub fn of_namespace(namespace: &Namespace) -> Result<Self> {
        Ok(Self {
            file: namespace.file().try_clone()?,
        })
    }

    /// Runs `work` in a thread inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        margay_netlink::namespace::within(&self.file, work).context("cannot enter a pod's network")
    }

    fn handle(&self) -> Result<File> {
        Ok(self.file.try_clone()?)
    }
}

/// Asks every target at once and returns the verdicts in their order.
pub fn ask(place: &Place, targets: &[Target]) -> Result<Vec<Verdict>> {
    place.run(|| {
        let attempts: Vec<Attempt> = targets
            .iter()
            .map(|target| Attempt::start(*target))
            .collect();
        prober::verdicts(&attempts, denied_after())
    })?
}

/// Asks from many places at the same time.
pub fn ask_all(questions: &[(&Place, Vec<Target>)]) -> Result<Vec<Vec<Verdict>>> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = questions
            .iter()
            .map(|(place, targets)| scope.spawn(|| ask(place, targets)))
            .collect();
        asked
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}
