//! Threads of a process: as many as it can use, not as many as the machine has.

use std::io;
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// Threads for calls that block; what needs more waits for one of them.
const BLOCKING: usize = 32;
/// A thread that has nothing to do ends after this time, and its stack with it.
const IDLE: Duration = Duration::from_secs(5);

/// Starts at most `most` workers: a thread more is a stack and a share of the allocator's memory, also on a machine of a hundred cores.
pub fn start(most: usize) -> io::Result<Runtime> {
    let workers = available_parallelism().map_or(1, usize::from).clamp(1, most.max(1));
    Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(BLOCKING)
        .thread_keep_alive(IDLE)
        .enable_all()
        .build()
}
