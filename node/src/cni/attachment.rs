//! Attachments: each pod interface that the agent created, stored on disk so that a restarted agent
//! enforces policy before it hears from anybody.
//!
//! One JSON file per sandbox and interface. The extension shows the state: `adding` during ADD,
//! `json` after its response, `gone` after DEL until the link is gone. A file exists from before
//! the first address is claimed until after the last one is released, so that whatever a crash
//! leaves behind is found and released. A file that cannot be read affects its own pod only, and is
//! renamed to `.damaged`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::host_port::HostPort;
use serde::{Deserialize, Serialize};

use margay_dataplane::Attached;

const ADDING: &str = "adding";
const FINISHED: &str = "json";
const GONE: &str = "gone";
const DAMAGED: &str = "damaged";
const TEMPORARY: &str = "tmp";

/// Identity of an attachment in the CNI specification: sandbox and interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AttachmentId {
    /// Container ID of the sandbox.
    pub container: String,
    /// Name of the interface in the pod.
    pub ifname: String,
}

/// Interface of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Container ID and interface.
    pub id: AttachmentId,
    /// Name of the network; part of the IPAM handle.
    pub network: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// UID of the pod, if the runtime passed it.
    pub uid: String,
    /// Path of the network namespace.
    pub netns: String,
    /// Host-side interface.
    pub interface: String,
    /// Addresses with full prefix length; empty while none is claimed.
    pub addresses: Vec<IpNet>,
    /// MAC address of the interface in the pod.
    pub mac: String,
    /// MTU of its network configuration; 0: that of the node. Absent in files of former agents.
    #[serde(default)]
    pub mtu: u32,
    /// Ports of the node that lead to the pod. Absent in files of former agents.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// Whether ADD has succeeded; stored as the file's extension.
    #[serde(skip)]
    pub is_finished: bool,
}

impl Attachment {
    /// IPAM handle of the sandbox's addresses, as in Calico.
    pub fn ipam_handle(&self) -> String {
        ipam_handle(&self.network, &self.id)
    }

    /// Key of the pod's endpoint.
    pub fn endpoint(&self) -> EndpointKey {
        EndpointKey::new(&self.namespace, &self.pod)
    }

    /// The pod as the dataplane attaches it.
    pub fn attached(&self) -> Attached {
        let addresses = self.addresses.iter().map(IpNet::addr).collect();
        Attached {
            endpoint: self.endpoint(),
            uid: self.uid.clone(),
            addresses,
            host_ports: self.host_ports.clone(),
        }
    }
}

/// IPAM handle of a sandbox's addresses, `<network>.<container id>` as Calico's CNI plugin has it.
pub fn ipam_handle(network: &str, id: &AttachmentId) -> String {
    format!("{network}.{}", id.container)
}

/// Link of a detached pod, and the file that records it until the link is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Host-side interface.
    pub interface: String,
    /// The file, with extension `gone`.
    pub file: PathBuf,
}

/// Attachments of this node and their files.
pub struct Attachments {
    folder: PathBuf,
    known: BTreeMap<AttachmentId, Attachment>,
    leftovers: Vec<Leftover>,
    damaged: u64,
}

impl Attachments {
    /// Loads the files of earlier runs. A file that cannot be read is set aside: DEL or the
    /// operator's collector releases the pod's address, and its link carries nothing.
    pub fn load(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let mut attachments = Self {
            folder: folder.to_owned(),
            known: BTreeMap::new(),
            leftovers: Vec::new(),
            damaged: 0,
        };
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            match path.extension().and_then(|ending| ending.to_str()) {
                Some(ending @ (ADDING | FINISHED | GONE)) => attachments.load_file(&path, ending),
                // Left by a crash before the rename.
                Some(TEMPORARY) => {
                    fs::remove_file(&path)
                        .unwrap_or_else(|error| attachments.put_aside(&path, &error));
                }
                _ => {}
            }
        }
        Ok(attachments)
    }

    fn load_file(&mut self, path: &Path, ending: &str) {
        let attachment = match self.read_file(path, ending) {
            Ok(attachment) => attachment,
            Err(error) => return self.put_aside(path, &error),
        };
        if ending == GONE {
            self.leftovers.push(Leftover {
                interface: attachment.interface,
                file: path.to_owned(),
            });
            return;
        }
        // Of two files of one attachment, that of the ADD in progress is newer.
        let is_newer = ending == ADDING || !self.known.contains_key(&attachment.id);
        if is_newer {
            self.known.insert(attachment.id.clone(), attachment);
        }
    }

    fn read_file(&self, path: &Path, ending: &str) -> io::Result<Attachment> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        let mut attachment: Attachment =
            serde_json::from_slice(&fs::read(path)?).map_err(|error| invalid(error.to_string()))?;
        if self.file_path(&attachment.id, ending) != path {
            return Err(invalid(format!(
                "it belongs to {}@{}",
                attachment.id.container, attachment.id.ifname
            )));
        }
        // Former agents wrote files without a MAC address before ADD had succeeded.
        attachment.is_finished = ending == FINISHED && !attachment.mac.is_empty();
        Ok(attachment)
    }

    fn put_aside(&mut self, path: &Path, error: &io::Error) {
        self.damaged += 1;
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".{DAMAGED}"));
        tracing::error!(
            path = %path.display(), %error,
            "the attachment file of a pod cannot be read: the pod has no network until it is \
             recreated; the file is renamed to .{DAMAGED}"
        );
        if let Err(error) = fs::rename(path, aside) {
            tracing::error!(
                path = %path.display(),
                %error,
                "the damaged attachment file cannot be renamed either",
            );
        }
    }

    /// Number of files that could not be read.
    pub const fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Takes the links left by earlier runs.
    pub fn take_leftovers(&mut self) -> Vec<Leftover> {
        std::mem::take(&mut self.leftovers)
    }

    /// All attachments, by identity.
    pub fn iter(&self) -> impl Iterator<Item = &Attachment> {
        self.known.values()
    }

    /// Attachment with this identity.
    pub fn get(&self, id: &AttachmentId) -> Option<&Attachment> {
        self.known.get(id)
    }

    /// Another pod's attachment that has one of these host ports, and that port.
    pub fn host_port_owner(&self, of: &Attachment) -> Option<(&Attachment, HostPort)> {
        let endpoint = of.endpoint();
        let others = self
            .known
            .values()
            .filter(|other| other.endpoint() != endpoint);
        let mut ports =
            others.flat_map(|other| other.host_ports.iter().map(move |port| (other, port)));
        ports.find_map(|(other, taken)| {
            let own = of.host_ports.iter().find(|port| port.overlaps(taken))?;
            Some((other, *own))
        })
    }

    /// Other attachments with the same host-side interface.
    pub fn others_on_interface(&self, of: &Attachment) -> Vec<Attachment> {
        self.known
            .values()
            .filter(|other| other.interface == of.interface && other.id != of.id)
            .cloned()
            .collect()
    }

    /// Writes an attachment whose ADD is in progress, new or changed. It survives a crash of the
    /// agent at once, and a loss of power once the returned file is synced; on file systems with a
    /// journal its name is durable then too. If it is lost all the same, so is the pod's link, and
    /// DEL releases the addresses by their handle.
    pub fn put(&mut self, attachment: Attachment) -> io::Result<File> {
        let (path, temporary) = (
            self.file_path(&attachment.id, ADDING),
            self.file_path(&attachment.id, TEMPORARY),
        );
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(&attachment)?)?;
        fs::rename(&temporary, &path)?;
        remove_file(&self.file_path(&attachment.id, FINISHED))?;
        self.known.insert(
            attachment.id.clone(),
            Attachment {
                is_finished: false,
                ..attachment
            },
        );
        Ok(file)
    }

    /// Marks an ADD as successful, right before its response. The content is as it was put, so
    /// nothing more has to be synced: without the new name the ADD counts as unfinished, and after
    /// a loss of power the pod that got the response is gone as well.
    pub fn finish(&mut self, id: &AttachmentId) -> io::Result<()> {
        fs::rename(self.file_path(id, ADDING), self.file_path(id, FINISHED))?;
        if let Some(attachment) = self.known.get_mut(id) {
            attachment.is_finished = true;
        }
        Ok(())
    }

    /// Removes an attachment whose addresses are released, except for its link.
    pub fn retire(&mut self, id: &AttachmentId) -> io::Result<Option<Leftover>> {
        let Some(attachment) = self.known.get(id) else {
            return Ok(None);
        };
        let leftover = Leftover {
            interface: attachment.interface.clone(),
            file: self.file_path(id, GONE),
        };
        for ending in [FINISHED, ADDING] {
            match fs::rename(self.file_path(id, ending), &leftover.file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
        self.known.remove(id);
        Ok(Some(leftover))
    }

    /// Removes an attachment; an unknown one is a success.
    pub fn remove(&mut self, id: &AttachmentId) -> io::Result<()> {
        remove_file(&self.file_path(id, FINISHED))?;
        remove_file(&self.file_path(id, ADDING))?;
        self.known.remove(id);
        Ok(())
    }

    fn file_path(&self, id: &AttachmentId, ending: &str) -> PathBuf {
        // Parsing restricts both parts to letters, digits and `_.-`, so neither can leave the
        // directory.
        self.folder
            .join(format!("{}@{}.{ending}", id.container, id.ifname))
    }
}

impl Leftover {
    /// Removes the file, once the link is gone.
    pub fn forget(&self) -> io::Result<()> {
        remove_file(&self.file)
    }
}

/// Removes a file; a missing one is a success.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_attachment(container: &str) -> Attachment {
        Attachment {
            id: AttachmentId {
                container: container.to_owned(),
                ifname: "eth0".to_owned(),
            },
            network: "k8s-pod-network".to_owned(),
            namespace: "x".to_owned(),
            pod: "a".to_owned(),
            uid: "u".to_owned(),
            netns: "/run/netns/a".to_owned(),
            interface: "cali0".to_owned(),
            addresses: vec!["10.0.0.1/32".parse().expect("an address")],
            mac: "02:00:00:00:00:01".to_owned(),
            mtu: 0,
            host_ports: vec![
                serde_json::from_str(r#"{"hostPort":8080,"containerPort":80,"hostIP":"::"}"#)
                    .expect("a mapping"),
            ],
            is_finished: false,
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("a folder");
        let mut names: Vec<String> = entries
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_was_put_is_there_after_a_restart_and_gone_after_removal() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut attachments = Attachments::load(folder.path()).expect("an empty folder");
        let (old, new) = (mk_attachment("old"), mk_attachment("new"));
        attachments.put(old.clone()).expect("put");
        attachments.put(new.clone()).expect("put");
        attachments.finish(&new.id).expect("finish");
        let new = Attachment {
            is_finished: true,
            ..new
        };
        let mut restarted = Attachments::load(folder.path()).expect("two files");
        assert_eq!(
            restarted.iter().cloned().collect::<Vec<_>>(),
            [new.clone(), old.clone()]
        );
        assert_eq!(
            restarted.others_on_interface(&new),
            std::slice::from_ref(&old)
        );
        restarted.remove(&old.id).expect("remove");
        restarted
            .remove(&old.id)
            .expect("removing twice is no error");
        let again = Attachments::load(folder.path()).expect("one file");
        assert_eq!(again.get(&old.id), None);
        assert_eq!(again.get(&new.id), Some(&new));
        assert_eq!(names(folder.path()), ["new@eth0.json"]);
    }

    #[test]
    fn a_file_of_a_former_agent_is_read_without_the_fields_that_it_did_not_know() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut attachments = Attachments::load(folder.path()).expect("an empty folder");
        let one = mk_attachment("one");
        attachments.put(one.clone()).expect("put");
        attachments.finish(&one.id).expect("finish");
        let path = folder.path().join("one@eth0.json");
        let text = fs::read(&path).expect("a file");
        let mut written: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let fields = written.as_object_mut().expect("an object");
        for field in ["mtu", "host_ports"] {
            assert!(fields.remove(field).is_some(), "{field}");
        }
        fs::write(&path, written.to_string()).expect("write");
        let read = Attachments::load(folder.path()).expect("one file");
        let wanted = Attachment {
            host_ports: Vec::new(),
            is_finished: true,
            ..one
        };
        assert_eq!(read.get(&wanted.id), Some(&wanted));
    }

    #[test]
    fn an_add_that_is_repeated_and_not_answered_is_unfinished_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut attachments = Attachments::load(folder.path()).expect("an empty folder");
        let one = mk_attachment("one");
        attachments.put(one.clone()).expect("put");
        attachments.finish(&one.id).expect("finish");
        fs::copy(
            folder.path().join("one@eth0.json"),
            folder.path().join("kept"),
        )
        .expect("copy");
        attachments.put(one.clone()).expect("put again");
        assert_eq!(names(folder.path()), ["kept", "one@eth0.adding"]);
        // A crash between the two renames.
        fs::rename(
            folder.path().join("kept"),
            folder.path().join("one@eth0.json"),
        )
        .expect("rename");
        let restarted = Attachments::load(folder.path()).expect("both");
        assert_eq!(restarted.get(&one.id), Some(&one));
    }

    #[test]
    fn what_a_detached_pod_leaves_is_remembered_until_its_link_has_gone() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut attachments = Attachments::load(folder.path()).expect("an empty folder");
        let (one, two) = (mk_attachment("one"), mk_attachment("two"));
        for attachment in [&one, &two] {
            attachments.put(attachment.clone()).expect("put");
        }
        attachments.finish(&one.id).expect("finish");
        for attachment in [&one, &two] {
            let leftover = attachments
                .retire(&attachment.id)
                .expect("retire")
                .expect("it was known");
            assert_eq!(
                (leftover.interface.as_str(), attachments.get(&attachment.id)),
                ("cali0", None)
            );
        }
        assert_eq!(
            attachments.retire(&one.id).expect("retire"),
            None,
            "twice is no error"
        );
        let mut restarted = Attachments::load(folder.path()).expect("two files");
        assert_eq!(restarted.iter().count(), 0);
        let leftovers = restarted.take_leftovers();
        assert_eq!((leftovers.len(), restarted.take_leftovers().len()), (2, 0));
        for leftover in leftovers {
            leftover.forget().expect("forget");
            leftover.forget().expect("twice is no error");
        }
        assert_eq!(names(folder.path()), Vec::<String>::new());
    }

    #[test]
    fn a_damaged_file_costs_its_own_pod_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut attachments = Attachments::load(folder.path()).expect("an empty folder");
        for container in ["one", "two", "three"] {
            attachments.put(mk_attachment(container)).expect("put");
            attachments
                .finish(&mk_attachment(container).id)
                .expect("finish");
        }
        let write =
            |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("write");
        // Empty, as after a loss of power; truncated; of another attachment; never renamed.
        write("three@eth0.json", "");
        write("four@eth0.adding", "{\"id\":");
        fs::copy(
            folder.path().join("one@eth0.json"),
            folder.path().join("five@eth0.json"),
        )
        .expect("copy");
        write("six@eth0.tmp", "{");
        // No file at all.
        for name in ["seven@eth0.tmp", "eight@eth0.json"] {
            fs::create_dir(folder.path().join(name)).expect("create");
        }
        let restarted = Attachments::load(folder.path()).expect("the others");
        let containers: Vec<&str> = restarted
            .iter()
            .map(|attachment| attachment.id.container.as_str())
            .collect();
        assert_eq!((containers, restarted.damaged()), (vec!["one", "two"], 5));
        let mut wanted = vec!["one@eth0.json", "two@eth0.json"];
        wanted.extend([
            "five@eth0.json.damaged",
            "four@eth0.adding.damaged",
            "three@eth0.json.damaged",
        ]);
        wanted.extend(["seven@eth0.tmp.damaged", "eight@eth0.json.damaged"]);
        wanted.sort_unstable();
        assert_eq!(names(folder.path()), wanted);
        assert_eq!(
            Attachments::load(folder.path())
                .expect("the others")
                .damaged(),
            0,
            "once is enough"
        );
    }

    /// Files as written by former agents.
    #[test]
    fn files_of_former_agents_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        for (container, mac) in [("done", "02:00:00:00:00:01"), ("begun", "")] {
            let attachment = Attachment {
                mac: mac.to_owned(),
                ..mk_attachment(container)
            };
            let text = serde_json::to_vec(&attachment).expect("JSON");
            fs::write(folder.path().join(format!("{container}@eth0.json")), text).expect("write");
        }
        let mut attachments = Attachments::load(folder.path()).expect("two files");
        let finished: Vec<bool> = attachments
            .iter()
            .map(|attachment| attachment.is_finished)
            .collect();
        assert_eq!(finished, [false, true]);
        for attachment in attachments.iter().cloned().collect::<Vec<_>>() {
            attachments.retire(&attachment.id).expect("retire");
        }
        assert_eq!(
            Attachments::load(folder.path())
                .expect("what is left")
                .iter()
                .count(),
            0
        );
    }
}
