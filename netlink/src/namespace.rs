//! Running code in another network namespace.

use std::fs::File;
use std::io;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

/// Runs `work` in a network namespace and returns its result.
///
/// It runs on a new thread, which ends afterwards: a thread that has changed its namespace must not
/// be reused.
///
/// # Errors
/// If the thread cannot enter the namespace, or if `work` panics.
pub fn within<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
                .map(|()| work())
        });
        inside.join().unwrap_or_else(|_| {
            Err(io::Error::other(
                "a thread in another network namespace panicked",
            ))
        })
    })
}

/// Opens a namespace by path, such as the `CNI_NETNS` of a container runtime.
///
/// # Errors
/// If the file cannot be opened; of kind `InvalidInput` if it is not a namespace.
pub fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a namespace",
        ));
    }
    Ok(file)
}
