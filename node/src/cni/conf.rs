//! Checks that the container runtime calls our plugin. Another configuration in its directory, or
//! none of ours, silently takes pods out of this network and its policy, so the directory is
//! checked for as long as the agent runs. Ours is restored when it is missing or no longer calls
//! our plugin; what others have added to it, as service meshes do, stays.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use margay_proto::conf::{self, CONFLIST, ConfOwner};

use super::host_file;

/// Maximal number of bytes read of a file, far more than any configuration has.
const MAX_FILE_SIZE: u64 = 1 << 20;
/// File mode, as the installer sets it.
const MODE: u32 = 0o600;

/// Restores our configuration `own` if necessary (`None`: it is not this agent's to restore);
/// returns the remaining problem.
pub fn check_folder(folder: &Path, own: Option<&str>) -> Option<String> {
    match own.map(|text| restore_own(folder, text)) {
        Some(Ok(true)) => {
            tracing::warn!(
                file = CONFLIST,
                "the network configuration was missing or did not call the plugin; it has been \
                 restored"
            );
        }
        Some(Err(error)) => {
            tracing::warn!(file = CONFLIST, %error, "the network configuration cannot be restored");
        }
        Some(Ok(false)) | None => {}
    }
    find_problem(folder)
}

/// Writes our configuration if necessary and returns whether it was.
fn restore_own(folder: &Path, text: &str) -> io::Result<bool> {
    match read_file(&folder.join(CONFLIST)) {
        Ok(present) if conf::owner_of(CONFLIST, &present) == ConfOwner::Ours => return Ok(false),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    host_file::replace(folder, CONFLIST, text.as_bytes(), MODE)?;
    Ok(true)
}

fn find_problem(folder: &Path) -> Option<String> {
    match read_files(folder) {
        Ok(files) => conf::bypass(&files).map(|bypass| bypass.to_string()),
        Err(error) => Some(format!(
            "the directory of network configurations (mounted at {}) cannot be read: {error}; \
             mount the host's directory there",
            folder.display()
        )),
    }
}

/// Reads the files that runtimes read, by name. A file that cannot be read is one that no runtime
/// can use either.
fn read_files(folder: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if conf::is_read(&name) {
            files.insert(
                name,
                read_file(&entry.path()).unwrap_or_else(|error| format!("cannot be read: {error}")),
            );
        }
    }
    Ok(files)
}

fn read_file(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(MAX_FILE_SIZE)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_that_comes_before_ours_is_found_and_so_is_ours_that_is_gone() {
        let folder = tempfile::TempDir::new().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert!(
            find_problem(folder.path())
                .unwrap()
                .contains("10-margay.conflist is missing")
        );
        write("10-margay.conflist", r#"{"plugins":[{"type":"margay"}]}"#);
        write("05-notes.txt", "{}");
        assert_eq!(find_problem(folder.path()), None);
        write("05-other.conf", r#"{"type":"bridge"}"#);
        assert!(
            find_problem(folder.path())
                .unwrap()
                .contains("uses 05-other.conf")
        );
        std::fs::remove_file(folder.path().join("05-other.conf")).unwrap();
        assert_eq!(find_problem(folder.path()), None);
        assert!(
            find_problem(&folder.path().join("gone"))
                .unwrap()
                .contains("cannot be read")
        );
    }

    #[test]
    fn ours_is_put_back_and_what_others_add_to_it_stays() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join(CONFLIST);
        let own = r#"{"plugins":[{"type":"margay"}]}"#;
        let extended = r#"{"plugins":[{"type":"margay"},{"type":"istio-cni"}]}"#;
        let table = [
            ("gone", None, own),
            ("as it was", Some(own), own),
            ("extended", Some(extended), extended),
            (
                "of another plugin",
                Some(r#"{"plugins":[{"type":"bridge"}]}"#),
                own,
            ),
            ("empty", Some(""), own),
            ("in pieces", Some("{"), own),
        ];
        for (what, before, after) in table {
            match before {
                Some(text) => fs::write(&path, text).unwrap(),
                None => fs::remove_file(&path).unwrap_or_default(),
            }
            assert_eq!(check_folder(folder.path(), Some(own)), None, "{what}");
            assert_eq!(fs::read_to_string(&path).unwrap(), after, "{what}");
            let is_new = before != Some(after);
            assert!(
                !is_new || fs::metadata(&path).unwrap().permissions().mode() & 0o777 == MODE,
                "{what}"
            );
            assert_eq!(
                fs::read_dir(folder.path()).unwrap().count(),
                1,
                "{what}: a draft is left"
            );
        }
        fs::remove_file(&path).unwrap();
        assert!(
            check_folder(folder.path(), None)
                .unwrap()
                .contains("is missing"),
            "it is not this agent's to write"
        );
        fs::create_dir(&path).unwrap();
        assert!(
            check_folder(folder.path(), Some(own)).is_some(),
            "it cannot be written"
        );
    }
}
