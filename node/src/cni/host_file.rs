//! Files of the host that the agent keeps as they must be: checked periodically, replaced
//! atomically.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Interval of checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Calls `check` periodically, for ever, where it may block. `report` is called at first and on
/// each change with the problem that it returns, or with `None`.
pub async fn watch(
    check: impl Fn() -> Option<String> + Send + Sync + 'static,
    report: impl Fn(Option<&str>),
) {
    let check = Arc::new(check);
    let mut reported = None;
    loop {
        let checking = Arc::clone(&check);
        let checked = tokio::task::spawn_blocking(move || checking()).await;
        let now = checked.unwrap_or_else(|error| Some(error.to_string()));
        if reported.as_ref() != Some(&now) {
            report(now.as_deref());
            reported = Some(now);
        }
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
}

/// Writes a file of that content and mode. The rename is atomic, so readers see the former file or
/// this one, also after a power loss.
pub fn replace(folder: &Path, name: &str, content: &[u8], mode: u32) -> io::Result<()> {
    // Hidden and without a known suffix, so that no runtime reads it as a configuration.
    let draft = folder.join(format!(".{name}.agent"));
    let written =
        write_whole(&draft, content, mode).and_then(|()| fs::rename(&draft, folder.join(name)));
    if written.is_err() {
        // It may not exist; the error that matters is the first one.
        let _ = fs::remove_file(&draft);
    }
    written?;
    File::open(folder)?.sync_all()
}

fn write_whole(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    // What an end in the middle has left, or somebody has put there: it is not written through.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    // The umask restricts the mode given at creation.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()
}
