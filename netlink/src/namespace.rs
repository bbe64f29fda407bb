//! Running a piece of work inside another network namespace.

use std::fs::File;
use std::io;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

/// Runs `work` on a fresh thread inside the namespace; the caller's own namespace is not touched. The thread ends with the work, because a
/// thread that has changed its namespace must not serve anybody else.
pub fn within<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let inside =
            scope.spawn(|| setns(namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from).map(|()| work()));
        inside.join().unwrap_or_else(|_| Err(io::Error::other("the work inside the namespace panicked")))
    })
}

/// Opens the namespace at a path, such as the one a container runtime gives. A file that is no namespace is invalid input.
pub fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a namespace"));
    }
    Ok(file)
}
