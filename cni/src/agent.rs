//! Client of the node's agent: one request and its answer, within a bounded time.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use margay_proto::cni::{self, Outcome, Request, Response};

use crate::error::Error;

/// Pause between two attempts to connect while the agent is away.
const RETRY: Duration = Duration::from_millis(50);

/// Time limits of a call.
#[derive(Debug, Clone, Copy)]
pub struct TimeLimits {
    /// Deadline of the call.
    pub until: Instant,
    /// Time limit of the whole call, for messages.
    pub whole: Duration,
    /// Time that the socket may be absent: an agent that is being restarted is back within this
    /// time, while the runtime would retry only after many seconds.
    pub grace: Duration,
}

impl TimeLimits {
    /// Returns the time until the deadline.
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

/// Sends a request to the agent that listens at `socket`, and returns its answer.
///
/// If it cannot be reached, the error is always "try again", also for DEL and GC, because only the
/// agent can free an address and a success would leak it. The caller retries DEL until it succeeds.
pub fn call(socket: &Path, request: Request, limits: TimeLimits) -> Result<Outcome, Error> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let path = socket.to_owned();
    // Connecting to a unix socket blocks without limit when its backlog is full, and std has no
    // timeout for it; so the exchange has a thread of its own, which ends with the process.
    thread::spawn(move || {
        // Fails only if the caller has timed out.
        let _ = sender.send(exchange(path, &request, limits));
    });
    match receiver.recv_timeout(limits.left()) {
        Ok(answer) => answer,
        Err(RecvTimeoutError::Timeout) => Err(Error::AgentSilent {
            socket: socket.to_owned(),
            timeout: limits.whole,
        }),
        Err(RecvTimeoutError::Disconnected) => Err(Error::UnexpectedAnswer("the plugin panicked")),
    }
}

fn exchange(socket: PathBuf, request: &Request, limits: TimeLimits) -> Result<Outcome, Error> {
    let mut stream = connect(&socket, limits)?;
    let answer = cni::write(&mut stream, request).and_then(|()| cni::read(&mut stream));
    let response: Response = answer.map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData => Error::UnexpectedAnswer("not a valid message"),
        _ => Error::AgentGone { socket, source },
    })?;
    response
        .outcome
        .ok_or(Error::UnexpectedAnswer("an unknown outcome"))
}

fn connect(socket: &Path, limits: TimeLimits) -> Result<UnixStream, Error> {
    let give_up = limits.until.min(Instant::now() + limits.grace);
    loop {
        let source = match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(source) => source,
        };
        let socket = || socket.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => {
                return Err(Error::Forbidden {
                    socket: socket(),
                    source,
                });
            }
            _ if Instant::now() + RETRY >= give_up => {
                return Err(Error::AgentAway {
                    socket: socket(),
                    source,
                });
            }
            _ => thread::sleep(RETRY),
        }
    }
}
