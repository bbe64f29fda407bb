//! Tokio runtime of a process, with as many threads as it can use instead of one per CPU.

use std::io;
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// Threads for blocking calls; more calls than that wait.
const BLOCKING: usize = 32;
/// Idle time after which a blocking thread ends.
const IDLE: Duration = Duration::from_secs(5);

/// Starts a runtime with at most `most` workers: each costs a stack and an arena of the allocator,
/// also on a machine with a hundred CPUs.
pub fn start(most: usize) -> io::Result<Runtime> {
    let workers = available_parallelism()
        .map_or(1, usize::from)
        .clamp(1, most.max(1));
    Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(BLOCKING)
        .thread_keep_alive(IDLE)
        .enable_all()
        .build()
}
