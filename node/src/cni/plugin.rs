//! Keeps the plugin's binary in the directory that the container runtime calls it from. Without it
//! no pod of the node starts; another program of its name would put pods into no network of ours,
//! and its policy on none of them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use margay_proto::conf::PLUGIN;
use parking_lot::Mutex;

use super::host_file;

/// File mode, as the installer sets it.
const MODE: u32 = 0o755;
/// Age from which a change time tells writes apart: a second write within one tick of the kernel's
/// clock leaves the time as it is.
const SETTLED: Duration = Duration::from_secs(2);

/// The plugin's binary on the host, and the one of this agent's image that it must be equal to.
#[derive(Debug)]
pub struct PluginFile {
    source: PathBuf,
    folder: PathBuf,
    /// State of the host's file when it was last known to be equal.
    verified: Mutex<Option<FileState>>,
}

/// Attributes that change with any write to a file, so that its content is compared only then. The
/// change time cannot be set by a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileState {
    device: u64,
    inode: u64,
    size: u64,
    mode: u32,
    changed: (i64, i64),
}

impl FileState {
    /// Returns whether any later write changes this state.
    fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(self.changed.0)
            .is_ok_and(|seconds| now > Duration::from_secs(seconds) + SETTLED)
    }
}

impl PluginFile {
    /// `source` is the binary in the image, `folder` the host's directory of plugins.
    pub fn new(source: PathBuf, folder: PathBuf) -> Self {
        Self {
            source,
            folder,
            verified: Mutex::default(),
        }
    }

    /// Restores the binary if it is missing or differs; returns the remaining problem.
    pub fn check(&self, now: SystemTime) -> Option<String> {
        match self.restore(now) {
            Ok(true) => {
                tracing::warn!(
                    file = PLUGIN,
                    "the CNI plugin was missing or differed from the agent's; it has been restored"
                );
                None
            }
            Ok(false) => None,
            Err((path, error)) => Some(format!(
                "the CNI plugin {PLUGIN} in the host's plugin directory (mounted at {}) cannot be \
                 restored: {}: {error}; pods do not start on this node, or start without this \
                 network, while it is missing or differs; make the directory writable, or delete \
                 the agent's pod on this node, whose replacement installs the plugin",
                self.folder.display(),
                path.display()
            )),
        }
    }

    /// Returns whether the file had to be written; an error with the path that it is about.
    fn restore(&self, now: SystemTime) -> Result<bool, (PathBuf, io::Error)> {
        let target = self.folder.join(PLUGIN);
        let mut verified = self.verified.lock();
        let present = state_of(&target).map_err(|error| (target.clone(), error))?;
        if present.is_some() && *verified == present {
            return Ok(false);
        }
        let wanted = fs::read(&self.source).map_err(|error| (self.source.clone(), error))?;
        // The state is that from before the content was read: a write in between differs from it.
        let is_equal = present
            .is_some_and(|state| state.size == wanted.len() as u64 && state.mode & 0o7777 == MODE)
            && fs::read(&target).is_ok_and(|content| content == wanted);
        if !is_equal {
            host_file::replace(&self.folder, PLUGIN, &wanted, MODE)
                .map_err(|error| (target.clone(), error))?;
        }
        *verified = present.filter(|state| is_equal && state.is_settled(now));
        Ok(!is_equal)
    }
}

/// State of a regular file; `None` if there is none of that name, or something else.
fn state_of(path: &Path) -> io::Result<Option<FileState>> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => Ok(Some(FileState {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            mode: meta.mode(),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// What somebody does to the file, whose path is given.
    type Damage = fn(&Path);

    #[test]
    fn a_plugin_that_is_gone_or_replaced_is_put_back() {
        let host = tempfile::TempDir::new().unwrap();
        let (source, folder) = (host.path().join("margay-cni"), host.path().join("bin"));
        fs::create_dir(&folder).unwrap();
        fs::write(&source, "the plugin").unwrap();
        let target = folder.join(PLUGIN);
        let plugin = PluginFile::new(source.clone(), folder.clone());
        let table: [(&str, Damage); 8] = [
            ("not installed yet", |_| {}),
            ("removed", |path| fs::remove_file(path).unwrap()),
            ("of another program", |path| {
                fs::write(path, "something else").unwrap()
            }),
            ("of another program of the same size", |path| {
                fs::write(path, "The Plugin").unwrap()
            }),
            ("cut off", |path| fs::write(path, "the").unwrap()),
            ("not executable", |path| {
                fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap()
            }),
            ("SUID", |path| {
                fs::set_permissions(path, fs::Permissions::from_mode(0o4755)).unwrap()
            }),
            ("a link to another program", |path| {
                fs::remove_file(path).unwrap();
                symlink("/bin/true", path).unwrap();
            }),
        ];
        let now = SystemTime::now();
        for (what, damage) in table {
            damage(&target);
            assert_eq!(plugin.check(now), None, "{what}");
            let meta = fs::symlink_metadata(&target).unwrap();
            assert!(
                meta.is_file() && meta.permissions().mode() & 0o7777 == MODE,
                "{what}"
            );
            assert_eq!(fs::read_to_string(&target).unwrap(), "the plugin", "{what}");
            assert_eq!(
                fs::read_dir(&folder).unwrap().count(),
                1,
                "{what}: a draft is left"
            );
            assert!(
                matches!(plugin.restore(now), Ok(false)),
                "{what}: it is written without need"
            );
        }
        fs::remove_file(&target).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("kept"), "").unwrap();
        let problem = plugin.check(now).expect("it cannot be replaced");
        assert!(
            problem.contains("bin/margay: ") && problem.contains("pods do not start"),
            "{problem}"
        );
        fs::remove_dir_all(&folder).unwrap();
        assert!(plugin.check(now).is_some(), "there is no directory");
        fs::create_dir(&folder).unwrap();
        fs::remove_file(&source).unwrap();
        let problem = plugin.check(now).expect("there is nothing to put there");
        assert!(problem.contains("margay-cni: No such file"), "{problem}");
    }

    #[test]
    fn a_file_that_nobody_writes_is_read_once() {
        let host = tempfile::TempDir::new().unwrap();
        let source = host.path().join("margay-cni");
        fs::write(&source, "the plugin").unwrap();
        let plugin = PluginFile::new(source.clone(), host.path().to_owned());
        let now = SystemTime::now();
        assert!(matches!(plugin.restore(now), Ok(true)));
        assert!(matches!(plugin.restore(now + 2 * SETTLED), Ok(false)));
        fs::remove_file(&source).unwrap();
        assert_eq!(plugin.check(now), None, "nothing is compared");
        fs::write(host.path().join(PLUGIN), "another program").unwrap();
        assert!(plugin.check(now).is_some());
    }
}
