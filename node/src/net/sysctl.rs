//! Kernel parameters under `/proc/sys/net`, of the calling thread's network namespace.

use std::fs;
use std::io;
use std::path::Path;

/// Writes a parameter if its value differs. The error names the parameter.
pub fn set(parameter: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys/net").join(parameter);
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    if fs::read_to_string(&path).map_err(named)?.trim() == value {
        return Ok(());
    }
    fs::write(&path, value).map_err(named)
}
