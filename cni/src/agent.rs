//! One question to the agent of this node, and its answer, within a bounded time.

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

/// How long the plugin waits.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// The end of the call.
    pub until: Instant,
    /// The time that the whole call has, for messages.
    pub whole: Duration,
    /// How long the socket may be away: an agent that is being restarted is back within this time, and the caller
    /// would come back only after many seconds.
    pub grace: Duration,
}

impl Patience {
    /// What is left of the call.
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

/// Asks the agent that listens at `socket`.
///
/// When it is not there, the answer is always "try again": for DEL and GC too, because only the agent can free
/// an address, and a success would lose it for ever. The caller repeats DEL until it succeeds.
pub fn ask(socket: &Path, request: Request, patience: Patience) -> Result<Outcome, Error> {
    let (answers, answer) = mpsc::sync_channel(1);
    let path = socket.to_owned();
    // Connecting to a unix socket blocks without limit when its queue is full, and nothing in std bounds it; so the
    // exchange has a thread of its own, which ends with the process.
    thread::spawn(move || {
        // Fails only if nobody waits any more.
        let _ = answers.send(exchange(path, &request, patience));
    });
    match answer.recv_timeout(patience.left()) {
        Ok(answer) => answer,
        Err(RecvTimeoutError::Timeout) => {
            Err(Error::AgentSilent { socket: socket.to_owned(), patience: patience.whole })
        }
        Err(RecvTimeoutError::Disconnected) => Err(Error::Misunderstood("a panic of the plugin")),
    }
}

fn exchange(socket: PathBuf, request: &Request, patience: Patience) -> Result<Outcome, Error> {
    let mut stream = connect(&socket, patience)?;
    let answer = cni::write(&mut stream, request).and_then(|()| cni::read(&mut stream));
    let response: Response = answer.map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData => Error::Misunderstood("bytes that are no answer"),
        _ => Error::AgentGone { socket, source },
    })?;
    response.outcome.ok_or(Error::Misunderstood("an outcome that this plugin does not know"))
}

fn connect(socket: &Path, patience: Patience) -> Result<UnixStream, Error> {
    let give_up = patience.until.min(Instant::now() + patience.grace);
    loop {
        let source = match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(source) => source,
        };
        let socket = || socket.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => {
                return Err(Error::Forbidden { socket: socket(), source });
            }
            _ if Instant::now() + RETRY >= give_up => {
                return Err(Error::AgentAway { socket: socket(), source });
            }
            _ => thread::sleep(RETRY),
        }
    }
}
