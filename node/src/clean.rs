//! `margay clean`: removes what an agent has left on its node, once it is not to come back.
//!
//! What connects and isolates pods stays as long as there are any: it waits for their end. From its
//! beginning on, the plugin answers in the place of the agent, so that these pods can be deleted.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use margay_dataplane::nftables::Netfilter;
use margay_dataplane::routes::driver::Driver;
use margay_dataplane::routes::plan::Plan;
use margay_dataplane::routes::present::list_links;
use margay_netlink::route::RouteSocket;
use margay_proto::cni::{REMOVED, SOCKET};
use margay_proto::conf::{self, CONFLIST, ConfOwner, PLUGIN, SAVED};

use crate::cni::host_file;

/// Prefix of the host sides of pods.
const LINKS: &str = "cali";
/// Time limit of the end of what only waits.
const SHUTDOWN: Duration = Duration::from_secs(1);
/// Pause between two looks at the pods of the node.
const PAUSE: Duration = Duration::from_secs(1);
/// Pods that a message names, by their links.
const NAMED: usize = 5;

/// Command line of it; the folders are those of the agent.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Directory of what survives a reboot.
    #[arg(long, env = "MARGAY_STATE_DIR", default_value = "/var/lib/margay")]
    pub state_dir: PathBuf,
    /// Directory of the CNI socket.
    #[arg(long, env = "MARGAY_RUN_DIR", default_value = "/var/run/margay")]
    pub run_dir: PathBuf,
    /// Directory of the network configurations that the container runtime reads.
    #[arg(long, env = "MARGAY_CNI_CONF_DIR")]
    pub cni_conf_dir: PathBuf,
    /// Directory that the container runtime calls plugins from.
    #[arg(long, env = "MARGAY_CNI_BIN_DIR")]
    pub cni_bin_dir: PathBuf,
    /// Do nothing but wait for a signal: the container that says that the one before it is done.
    #[arg(long)]
    pub idle: bool,
}

/// Removes everything, and prints what.
pub async fn run(args: Args) -> Result<()> {
    if args.idle {
        let shutdown = margay_runtime::shutdown::Shutdown::on_signals(SHUTDOWN)?;
        shutdown.wait().await;
        return Ok(());
    }
    mark(&args)?;
    let mut known = 0;
    loop {
        let pods = tokio::task::spawn_blocking(links_of_pods).await??;
        if pods.is_empty() {
            break;
        }
        if pods.len() != known {
            known = pods.len();
            println!("margay clean: {}", waiting(&pods));
        }
        tokio::time::sleep(PAUSE).await;
    }
    let report = tokio::task::spawn_blocking(move || remove(&args)).await??;
    report
        .iter()
        .for_each(|line| println!("margay clean: {line}"));
    Ok(())
}

/// Marks the node, unless its agent is running.
fn mark(args: &Args) -> Result<()> {
    let socket = args.run_dir.join(file_name(SOCKET));
    ensure!(
        UnixStream::connect(&socket).is_err(),
        "the agent of this node is running (it listens at {}); delete the DaemonSet margay-node \
         before",
        socket.display()
    );
    fs::create_dir_all(&args.state_dir)?;
    host_file::replace(&args.state_dir, file_name(REMOVED), b"", 0o644)
        .context("the mark of the removal")
}

/// Why it waits, with some of the pods by their links.
fn waiting(pods: &[String]) -> String {
    let named = pods
        .iter()
        .take(NAMED)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    format!(
        "{} pods are on this node ({named}{}): what connects and isolates them stays until they \
         have gone; delete or drain them",
        pods.len(),
        if pods.len() > NAMED { ", ..." } else { "" },
    )
}

fn remove(args: &Args) -> Result<Vec<String>> {
    // The configuration goes first: from here on the runtime starts no pods in this network.
    let mut report = remove_files(&args.cni_conf_dir, &args.cni_bin_dir)?;
    let outcome = Driver::open()?.apply(&Plan::default())?;
    report.push(format!("{} routes, tunnels and neighbours", outcome.done));
    if let Some((part, reason)) = outcome.failed.first_key_value() {
        anyhow::bail!("{part} cannot be removed: {reason}");
    }
    Netfilter::open()?
        .remove_table()
        .context("the nftables table")?;
    report.push("the nftables table".to_owned());
    for folder in [&args.run_dir, &args.state_dir] {
        empty(folder).with_context(|| folder.display().to_string())?;
        report.push(format!("the content of {}", folder.display()));
    }
    Ok(report)
}

/// Removes the mark of a removal: the agent is back.
pub fn forget_removal(state_dir: &Path) -> io::Result<()> {
    match fs::remove_file(state_dir.join(file_name(REMOVED))) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn file_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

fn links_of_pods() -> Result<Vec<String>> {
    let mut socket = RouteSocket::open()?;
    let links = list_links(&mut socket)?;
    Ok(links
        .into_keys()
        .filter(|name| name.starts_with(LINKS))
        .collect())
}

/// Removes our configuration and plugin; those of others stay. Returns what was removed, and what
/// others may want back.
fn remove_files(conf_dir: &Path, bin_dir: &Path) -> Result<Vec<String>> {
    let mut report = Vec::new();
    let conflist = conf_dir.join(CONFLIST);
    match fs::read_to_string(&conflist) {
        Ok(text) if conf::owner_of(CONFLIST, &text) == ConfOwner::Ours => {
            fs::remove_file(&conflist).with_context(|| conflist.display().to_string())?;
            report.push(conflist.display().to_string());
        }
        Ok(_) => report.push(format!(
            "{} is another network's and stays",
            conflist.display()
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| conflist.display().to_string()),
    }
    let plugin = bin_dir.join(PLUGIN);
    match fs::remove_file(&plugin) {
        Ok(()) => report.push(plugin.display().to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| plugin.display().to_string()),
    }
    for entry in fs::read_dir(conf_dir).with_context(|| conf_dir.display().to_string())? {
        let name = entry?.file_name();
        if name.to_string_lossy().ends_with(SAVED) {
            report.push(format!(
                "{} is the configuration of a former network and stays",
                conf_dir.join(name).display()
            ));
        }
    }
    Ok(report)
}

/// Removes what is in a folder; the folder itself is where the host's is mounted.
fn empty(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = r#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"margay"}]}"#;
    const OTHERS: &str = r#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"bridge"}]}"#;

    #[test]
    fn files_of_ours_go_and_those_of_others_stay() {
        let folder = tempfile::tempdir().expect("a folder");
        let (conf, bin) = (folder.path().join("conf"), folder.path().join("bin"));
        for folder in [&conf, &bin] {
            fs::create_dir(folder).expect("created");
        }
        let write = |path: &Path, text: &str| fs::write(path, text).expect("written");
        write(&conf.join(CONFLIST), OURS);
        write(&conf.join("99-loopback.conf"), OTHERS);
        write(&conf.join(format!("10-calico.conflist{SAVED}")), OTHERS);
        write(&bin.join(PLUGIN), "");
        write(&bin.join("bridge"), "");
        let report = remove_files(&conf, &bin).expect("removed");
        assert_eq!(report.len(), 3, "{report:?}");
        assert!(!conf.join(CONFLIST).exists() && !bin.join(PLUGIN).exists());
        assert!(conf.join("99-loopback.conf").exists() && bin.join("bridge").exists());
        write(&conf.join(CONFLIST), OTHERS);
        let report = remove_files(&conf, &bin).expect("nothing to remove");
        assert!(conf.join(CONFLIST).exists());
        assert!(report[0].contains("stays"), "{report:?}");
    }

    #[test]
    fn the_mark_of_a_removal_goes_when_an_agent_comes() {
        let folder = tempfile::tempdir().expect("a folder");
        let mark = folder.path().join(file_name(REMOVED));
        fs::write(&mark, "").expect("written");
        forget_removal(folder.path()).expect("removed");
        forget_removal(folder.path()).expect("there is none");
        assert!(!mark.exists());
    }

    #[test]
    fn a_folder_is_emptied_and_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(folder.path().join("a/b")).expect("created");
        fs::write(folder.path().join("c"), "").expect("written");
        empty(folder.path()).expect("emptied");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
        empty(&folder.path().join("none")).expect("nothing to do");
    }
}
