//! What the node knows of each pod interface that it made, kept on disk so that a restarted agent enforces before anybody tells it anything.
//!
//! One JSON file for each sandbox and interface. A file exists from before the first address is claimed until after the last one is released, so
//! whatever a crash leaves behind can be found and given back.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use serde::{Deserialize, Serialize};

/// Identity of an attachment, as the CNI specification has it: sandbox and interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AttachmentId {
    /// Sandbox (container id).
    pub container: String,
    /// Interface name in the pod.
    pub ifname: String,
}

/// A pod interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Identity.
    pub id: AttachmentId,
    /// Name of the network, part of the handle that its addresses are kept under.
    pub network: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// UID of the pod, if the runtime gave it.
    pub uid: String,
    /// Path of the network namespace.
    pub netns: String,
    /// Host side interface.
    pub interface: String,
    /// Addresses, each with full prefix length; empty while none is claimed.
    pub addresses: Vec<IpNet>,
    /// MAC address in the pod, once made.
    pub mac: String,
}

impl Attachment {
    /// Calico's handle for the addresses of the sandbox.
    pub fn handle(&self) -> String {
        handle(&self.network, &self.id)
    }

    /// The pod as endpoint.
    pub fn endpoint(&self) -> EndpointKey {
        EndpointKey::new(&self.namespace, &self.pod)
    }
}

/// Calico's handle for the addresses of a sandbox.
pub fn handle(network: &str, id: &AttachmentId) -> String {
    format!("{network}.{}", id.container)
}

/// The attachments of this node and their files.
pub struct Attachments {
    folder: PathBuf,
    known: BTreeMap<AttachmentId, Attachment>,
}

impl Attachments {
    /// Reads what an earlier run left. A file that cannot be understood is an error: guessing would lose an address or a rule.
    pub fn load(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let mut known = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let named = |error: String| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{}: {error}; move the file away to go on without it", path.display()),
                )
            };
            let attachment: Attachment =
                serde_json::from_slice(&fs::read(&path)?).map_err(|error| named(error.to_string()))?;
            known.insert(attachment.id.clone(), attachment);
        }
        Ok(Self { folder: folder.to_owned(), known })
    }

    /// All attachments, by identity.
    pub fn iter(&self) -> impl Iterator<Item = &Attachment> {
        self.known.values()
    }

    /// The attachment of this identity.
    pub fn get(&self, id: &AttachmentId) -> Option<&Attachment> {
        self.known.get(id)
    }

    /// Other sandboxes that hold the same host side interface: leftovers of the same pod's earlier sandboxes.
    pub fn rivals(&self, of: &Attachment) -> Vec<Attachment> {
        self.known.values().filter(|other| other.interface == of.interface && other.id != of.id).cloned().collect()
    }

    /// Writes an attachment, new or changed; it is on disk when this returns.
    pub fn put(&mut self, attachment: Attachment) -> io::Result<()> {
        let path = self.path(&attachment.id);
        let temporary = path.with_extension("tmp");
        fs::write(&temporary, serde_json::to_vec(&attachment)?)?;
        fs::rename(&temporary, &path)?;
        self.known.insert(attachment.id.clone(), attachment);
        Ok(())
    }

    /// Forgets an attachment; one that is unknown is a success.
    pub fn remove(&mut self, id: &AttachmentId) -> io::Result<()> {
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.known.remove(id);
        Ok(())
    }

    fn path(&self, id: &AttachmentId) -> PathBuf {
        // Both parts are limited to letters, digits and `_.-` when a request is parsed, so neither can leave the folder.
        self.folder.join(format!("{}@{}.json", id.container, id.ifname))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_attachment(container: &str) -> Attachment {
        Attachment {
            id: AttachmentId { container: container.to_owned(), ifname: "eth0".to_owned() },
            network: "k8s-pod-network".to_owned(),
            namespace: "x".to_owned(),
            pod: "a".to_owned(),
            uid: "u".to_owned(),
            netns: "/run/netns/a".to_owned(),
            interface: "cali0".to_owned(),
            addresses: vec!["10.0.0.1/32".parse().expect("an address")],
            mac: String::new(),
        }
    }

    #[test]
    fn what_was_put_is_there_after_a_restart_and_gone_after_removal() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut attachments = Attachments::load(folder.path()).expect("an empty folder");
        let (old, new) = (mk_attachment("old"), mk_attachment("new"));
        attachments.put(old.clone()).expect("put");
        attachments.put(new.clone()).expect("put");
        let mut restarted = Attachments::load(folder.path()).expect("two files");
        assert_eq!(restarted.iter().cloned().collect::<Vec<_>>(), [new.clone(), old.clone()]);
        assert_eq!(restarted.rivals(&new), std::slice::from_ref(&old));
        restarted.remove(&old.id).expect("remove");
        restarted.remove(&old.id).expect("removing twice is no error");
        let again = Attachments::load(folder.path()).expect("one file");
        assert_eq!(again.get(&old.id), None);
        assert_eq!(again.get(&new.id), Some(&new));
    }

    #[test]
    fn a_damaged_file_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("c@eth0.json"), "{").expect("write");
        let error = Attachments::load(folder.path()).err().expect("a damaged file is refused").to_string();
        assert!(error.contains("c@eth0.json"), "{error}");
    }
}
