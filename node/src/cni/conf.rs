//! Whether the container runtime calls our plugin. Another configuration in its folder, or none of ours there, takes pods out of this network and its policy
//! without a word, so the folder is looked at for as long as the agent runs.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use margay_proto::conf;

/// Between looks.
const PERIOD: Duration = Duration::from_secs(10);
/// What is read of a file, in bytes: far more than any configuration has.
const LONGEST: u64 = 1 << 20;

/// Looks at the folder from time to time, for ever; `report` is told what is wrong, or that nothing is, at first and when it changes.
pub async fn watch(folder: PathBuf, report: impl Fn(Option<&str>)) {
    let mut told = None;
    loop {
        let seen = folder.clone();
        let looked = tokio::task::spawn_blocking(move || wrong(&seen)).await;
        let now = looked.unwrap_or_else(|error| Some(error.to_string()));
        if told.as_ref() != Some(&now) {
            report(now.as_deref());
            told = Some(now);
        }
        tokio::time::sleep(PERIOD).await;
    }
}

fn wrong(folder: &Path) -> Option<String> {
    match files(folder) {
        Ok(files) => conf::bypass(&files).map(|bypass| bypass.to_string()),
        Err(error) => Some(format!(
            "the folder of network configurations, {} here, cannot be read: {error}; see that the host's folder is mounted there",
            folder.display()
        )),
    }
}

/// What runtimes read, by name. A file that cannot be read is one that no runtime can use either.
fn files(folder: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if conf::is_read(&name) {
            files.insert(name, content(&entry.path()).unwrap_or_else(|error| format!("cannot be read: {error}")));
        }
    }
    Ok(files)
}

fn content(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_comes_before_ours_is_found_and_so_is_ours_that_is_gone() {
        let folder = tempfile::TempDir::new().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert!(wrong(folder.path()).unwrap().contains("10-margay.conflist is not in"));
        write("10-margay.conflist", r#"{"plugins":[{"type":"margay"}]}"#);
        write("05-notes.txt", "{}");
        assert_eq!(wrong(folder.path()), None);
        write("05-other.conf", r#"{"type":"bridge"}"#);
        assert!(wrong(folder.path()).unwrap().contains("takes 05-other.conf"));
        std::fs::remove_file(folder.path().join("05-other.conf")).unwrap();
        assert_eq!(wrong(folder.path()), None);
        assert!(wrong(&folder.path().join("gone")).unwrap().contains("cannot be read"));
    }
}
