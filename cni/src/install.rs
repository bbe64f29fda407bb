//! `margay-cni install`: installs the plugin and its configuration where the container runtime of
//! the node looks.
//!
//! It runs as an init container of the agent's pod. Each file is replaced atomically, the
//! configuration last, because the runtime starts to call the plugin when it sees it. Then
//! configurations of former networks that sort before ours are renamed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use margay_proto::conf::{self, CONFLIST, ConfOwner, PLUGIN, SAVED};
use serde_json::Value;

use crate::config::Version;

const BIN_DIR: &str = "/host/opt/cni/bin";
const CONF_DIR: &str = "/host/etc/cni/net.d";
const BIN_MODE: u32 = 0o755;
/// Restrictive, as it names a socket that only root can open, and may come to hold more.
const CONF_MODE: u32 = 0o600;

/// Reasons why the installation failed or is incomplete.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The configuration is not set.
    #[error(
        "CNI_CONFLIST is not set: must hold the text of {CONFLIST}; the operator sets it in the \
         DaemonSet"
    )]
    Unset,
    /// The configuration would not work.
    #[error("CNI_CONFLIST: {rule}; correct the operator's Installation, which it is rendered from")]
    Conflist {
        /// The violated rule.
        rule: String,
    },
    /// A folder of the host is missing.
    #[error(
        "{path}: not a folder; mount the host's folder there (hostPath of type \
         DirectoryOrCreate)",
        path = path.display(),
    )]
    Folder {
        /// The folder.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error(
        "{path}: {source}; the container must run as root and {path} must be on a writable \
         file system with space left",
        path = path.display(),
    )]
    File {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
}

/// Installs both files and returns a report. `env` is the environment: `CNI_BIN_DIR`,
/// `CNI_CONF_DIR`, `CNI_CONFLIST`.
pub fn run(env: &dyn Fn(&str) -> Option<String>) -> Result<Vec<String>, InstallError> {
    let folder = |name: &str, default: &str| {
        let path = PathBuf::from(
            env(name)
                .filter(|v| !v.is_empty())
                .unwrap_or(default.to_owned()),
        );
        if path.is_dir() {
            Ok(path)
        } else {
            Err(InstallError::Folder { path })
        }
    };
    let conflist = env("CNI_CONFLIST").filter(|text| !text.trim().is_empty());
    let conflist = conflist.ok_or(InstallError::Unset)?;
    let types = validate(&conflist)?;
    let bin_dir = folder("CNI_BIN_DIR", BIN_DIR)?;
    let conf_dir = folder("CNI_CONF_DIR", CONF_DIR)?;
    let own = PathBuf::from("/proc/self/exe");
    let binary = fs::read(&own).map_err(|source| InstallError::File { path: own, source })?;
    let mut report = vec![
        put(&bin_dir, PLUGIN, &binary, BIN_MODE)?,
        put(&conf_dir, CONFLIST, conflist.as_bytes(), CONF_MODE)?,
    ];
    report.extend(set_aside(&conf_dir)?);
    report.extend(missing(&bin_dir, &types));
    Ok(report)
}

/// Checks what a runtime would refuse, and returns the types of the plugins in the chain.
fn validate(conflist: &str) -> Result<Vec<String>, InstallError> {
    let refuse = |rule: String| InstallError::Conflist { rule };
    let value: Value = serde_json::from_str(conflist).map_err(|error| refuse(error.to_string()))?;
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    if Version::parse(text("cniVersion")).is_none() {
        let rule = format!(
            "cniVersion={:?}: must be one of {}",
            text("cniVersion"),
            Version::LIST
        );
        return Err(refuse(rule));
    }
    if text("name").is_empty() {
        return Err(refuse("name: must be the network's name".to_owned()));
    }
    let plugins = value
        .get("plugins")
        .and_then(Value::as_array)
        .map(Vec::as_slice);
    let types: Option<Vec<String>> = plugins
        .unwrap_or_default()
        .iter()
        .map(|plugin| {
            plugin
                .get("type")
                .and_then(Value::as_str)
                .map(str::to_owned)
        })
        .collect();
    let types = types.ok_or_else(|| refuse("plugins: each must have a type".to_owned()))?;
    if !types.iter().any(|kind| kind == PLUGIN) {
        return Err(refuse(format!("plugins: one must be of type {PLUGIN:?}")));
    }
    Ok(types)
}

/// Writes a file atomically and durably: readers see the former or the new content, also after a
/// power loss. An equal file is left alone, because runtimes reload the configuration whenever it
/// is written.
fn put(folder: &Path, name: &str, content: &[u8], mode: u32) -> Result<String, InstallError> {
    let path = folder.join(name);
    let failed = |source| InstallError::File {
        path: path.clone(),
        source,
    };
    if is_equal(&path, content, mode).map_err(failed)? {
        return Ok(format!("{} is up to date", path.display()));
    }
    // Hidden and without a known suffix, so that no runtime takes it for a configuration.
    let temporary = folder.join(format!(".{name}.new"));
    write_whole(&temporary, content, mode)
        .and_then(|()| fs::rename(&temporary, &path))
        .and_then(|()| File::open(folder)?.sync_all())
        .map_err(|source| {
            // The temporary file may not exist; the error that matters is the first one.
            let _ = fs::remove_file(&temporary);
            failed(source)
        })?;
    Ok(format!("{} written", path.display()))
}

fn is_equal(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let same_form =
        meta.is_file() && meta.size() == content.len() as u64 && meta.mode() & 0o7777 == mode;
    if !same_form {
        return Ok(false);
    }
    let mut present = Vec::with_capacity(content.len());
    File::open(path)?.read_to_end(&mut present)?;
    Ok(present == content)
}

fn write_whole(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
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

/// Renames configurations of former networks that sort before ours, to a name that no runtime
/// reads. Those that call our plugin stay, and so do unknown ones, which may be there on purpose.
fn set_aside(conf_dir: &Path) -> Result<Vec<String>, InstallError> {
    let failed = |source| InstallError::File {
        path: conf_dir.to_owned(),
        source,
    };
    let listed = fs::read_dir(conf_dir)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .map_err(failed)?;
    let names = listed
        .iter()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let mut first: Vec<String> = names
        .filter(|name| conf::is_read(name) && name.as_str() < CONFLIST)
        .collect();
    first.sort();
    let mut report = Vec::new();
    for name in first {
        let path = conf_dir.join(&name);
        match read(&path) {
            ConfOwner::Ours | ConfOwner::Empty => {}
            ConfOwner::LeftBehind(network) => {
                let aside = conf_dir.join(format!("{name}{SAVED}"));
                fs::rename(&path, &aside).map_err(|source| InstallError::File {
                    path: path.clone(),
                    source,
                })?;
                report.push(format!(
                    "{} of {network} set aside as {}",
                    path.display(),
                    aside.display()
                ));
            }
            ConfOwner::Foreign(what) => report.push(format!(
                "warning: {} sorts before {CONFLIST}, so the container runtime uses it instead, \
                 and it {what}; remove it to use Margay",
                path.display()
            )),
        }
    }
    if !report.is_empty() {
        File::open(conf_dir)
            .and_then(|folder| folder.sync_all())
            .map_err(failed)?;
    }
    Ok(report)
}

/// Classifies a file; one that cannot be read is of an unknown network.
fn read(path: &Path) -> ConfOwner {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match fs::read(path) {
        Ok(content) => conf::owner_of(&name, &String::from_utf8_lossy(&content)),
        Err(error) => ConfOwner::Foreign(format!("cannot be read, {error}")),
    }
}

/// Returns a warning for each plugin that the configuration calls and the host does not have.
fn missing(bin_dir: &Path, types: &[String]) -> Vec<String> {
    let missing = types.iter().filter(|kind| !bin_dir.join(kind).exists());
    let text = |kind: &String| {
        format!(
            "warning: {CONFLIST} calls the plugin {kind:?}, which is not in {}; install it or pods \
             will not start",
            bin_dir.display()
        )
    };
    missing.map(text).collect()
}
