//! What the node knows of each pod interface that it made, kept on disk so that a restarted agent enforces before anybody tells it anything.
//!
//! One JSON file for each sandbox and interface, whose ending says how far it is: `adding` while an ADD is under way, `json` once it was answered, `gone`
//! after a DEL until the link has gone too. A file exists from before the first address is claimed until after the last one is released, so whatever a crash
//! leaves behind can be found and given back. A file that cannot be read costs its own pod only, and is put aside as `damaged`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use serde::{Deserialize, Serialize};

use margay_dataplane::Attached;

const ADDING: &str = "adding";
const FINISHED: &str = "json";
const GONE: &str = "gone";
const DAMAGED: &str = "damaged";
const TEMPORARY: &str = "tmp";

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
    /// MAC address in the pod.
    pub mac: String,
    /// MTU that its network configuration has; 0: that of the node. Former agents did not note it.
    #[serde(default)]
    pub mtu: u32,
    /// Whether its ADD was answered with success; the file's ending says it.
    #[serde(skip)]
    pub is_finished: bool,
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

    /// The pod as it is enforced.
    pub fn attached(&self) -> Attached {
        let addresses = self.addresses.iter().map(IpNet::addr).collect();
        Attached { endpoint: self.endpoint(), uid: self.uid.clone(), addresses }
    }
}

/// Calico's handle for the addresses of a sandbox.
pub fn handle(network: &str, id: &AttachmentId) -> String {
    format!("{network}.{}", id.container)
}

/// What a detached pod has left: its link, and the file that remembers it until the link has gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Host side interface.
    pub interface: String,
    /// The file.
    pub file: PathBuf,
}

/// The attachments of this node and their files.
pub struct Attachments {
    folder: PathBuf,
    known: BTreeMap<AttachmentId, Attachment>,
    leftovers: Vec<Leftover>,
    damaged: u64,
}

impl Attachments {
    /// Reads what an earlier run left. A file that cannot be understood is put aside: the address of its pod is given back by DEL or by the collector, and
    /// its link carries nothing.
    pub fn load(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let mut attachments =
            Self { folder: folder.to_owned(), known: BTreeMap::new(), leftovers: Vec::new(), damaged: 0 };
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            match path.extension().and_then(|ending| ending.to_str()) {
                Some(ending @ (ADDING | FINISHED | GONE)) => attachments.load_file(&path, ending),
                // A crash came before it was renamed.
                Some(TEMPORARY) => fs::remove_file(&path)?,
                _ => {}
            }
        }
        Ok(attachments)
    }

    fn load_file(&mut self, path: &Path, ending: &str) {
        let attachment = match self.read(path, ending) {
            Ok(attachment) => attachment,
            Err(error) => return self.put_aside(path, &error),
        };
        if ending == GONE {
            self.leftovers.push(Leftover { interface: attachment.interface, file: path.to_owned() });
            return;
        }
        // Of two files of one attachment that of the ADD under way is the newer one.
        let is_newer = ending == ADDING || !self.known.contains_key(&attachment.id);
        if is_newer {
            self.known.insert(attachment.id.clone(), attachment);
        }
    }

    fn read(&self, path: &Path, ending: &str) -> io::Result<Attachment> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        let mut attachment: Attachment =
            serde_json::from_slice(&fs::read(path)?).map_err(|error| invalid(error.to_string()))?;
        if self.path(&attachment.id, ending) != path {
            return Err(invalid(format!("it is of {}@{}", attachment.id.container, attachment.id.ifname)));
        }
        // Former agents wrote one without a MAC address before the ADD was answered.
        attachment.is_finished = ending == FINISHED && !attachment.mac.is_empty();
        Ok(attachment)
    }

    fn put_aside(&mut self, path: &Path, error: &io::Error) {
        self.damaged += 1;
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".{DAMAGED}"));
        tracing::error!(
            path = %path.display(), %error,
            "what is known of a pod's interface cannot be read: its pod has no network until it is made anew; the file is put aside as .{DAMAGED}"
        );
        if let Err(error) = fs::rename(path, aside) {
            tracing::error!(path = %path.display(), %error, "it cannot be put aside either");
        }
    }

    /// How many files could not be read.
    pub const fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Links that earlier runs have left; given once.
    pub fn take_leftovers(&mut self) -> Vec<Leftover> {
        std::mem::take(&mut self.leftovers)
    }

    /// All attachments, by identity.
    pub fn iter(&self) -> impl Iterator<Item = &Attachment> {
        self.known.values()
    }

    /// The attachment of this identity.
    pub fn get(&self, id: &AttachmentId) -> Option<&Attachment> {
        self.known.get(id)
    }

    /// Others that hold the same host side interface.
    pub fn rivals(&self, of: &Attachment) -> Vec<Attachment> {
        self.known.values().filter(|other| other.interface == of.interface && other.id != of.id).cloned().collect()
    }

    /// Writes an attachment whose ADD is under way, new or changed. A crash of the agent leaves it; that it outlives a loss of power is known once the file
    /// that is returned is synced, after which its name is there too on file systems with a journal. Where it is lost all the same, so is the pod's link, and
    /// DEL gives the addresses back by their handle.
    pub fn put(&mut self, attachment: Attachment) -> io::Result<File> {
        let (path, temporary) = (self.path(&attachment.id, ADDING), self.path(&attachment.id, TEMPORARY));
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(&attachment)?)?;
        fs::rename(&temporary, &path)?;
        remove(&self.path(&attachment.id, FINISHED))?;
        self.known.insert(attachment.id.clone(), Attachment { is_finished: false, ..attachment });
        Ok(file)
    }

    /// Notes that the ADD of an attachment is about to be answered. Its content stays as it was put, so nothing more has to be synced: without the new name
    /// it is taken for one that was not answered, and after a loss of power no pod is left that it was answered to.
    pub fn finish(&mut self, id: &AttachmentId) -> io::Result<()> {
        fs::rename(self.path(id, ADDING), self.path(id, FINISHED))?;
        if let Some(attachment) = self.known.get_mut(id) {
            attachment.is_finished = true;
        }
        Ok(())
    }

    /// Forgets an attachment whose addresses are released, but for its link.
    pub fn retire(&mut self, id: &AttachmentId) -> io::Result<Option<Leftover>> {
        let Some(attachment) = self.known.get(id) else { return Ok(None) };
        let leftover = Leftover { interface: attachment.interface.clone(), file: self.path(id, GONE) };
        for ending in [FINISHED, ADDING] {
            match fs::rename(self.path(id, ending), &leftover.file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
        self.known.remove(id);
        Ok(Some(leftover))
    }

    /// Forgets an attachment; one that is unknown is a success.
    pub fn remove(&mut self, id: &AttachmentId) -> io::Result<()> {
        remove(&self.path(id, FINISHED))?;
        remove(&self.path(id, ADDING))?;
        self.known.remove(id);
        Ok(())
    }

    fn path(&self, id: &AttachmentId, ending: &str) -> PathBuf {
        // Both parts are limited to letters, digits and `_.-` when a request is parsed, so neither can leave the folder.
        self.folder.join(format!("{}@{}.{ending}", id.container, id.ifname))
    }
}

impl Leftover {
    /// Forgets it, once the link has gone.
    pub fn forget(&self) -> io::Result<()> {
        remove(&self.file)
    }
}

/// Removes a file; one that is not there is a success.
fn remove(path: &Path) -> io::Result<()> {
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
            id: AttachmentId { container: container.to_owned(), ifname: "eth0".to_owned() },
            network: "k8s-pod-network".to_owned(),
            namespace: "x".to_owned(),
            pod: "a".to_owned(),
            uid: "u".to_owned(),
            netns: "/run/netns/a".to_owned(),
            interface: "cali0".to_owned(),
            addresses: vec!["10.0.0.1/32".parse().expect("an address")],
            mac: "02:00:00:00:00:01".to_owned(),
            mtu: 0,
            is_finished: false,
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("a folder");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
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
        let new = Attachment { is_finished: true, ..new };
        let mut restarted = Attachments::load(folder.path()).expect("two files");
        assert_eq!(restarted.iter().cloned().collect::<Vec<_>>(), [new.clone(), old.clone()]);
        assert_eq!(restarted.rivals(&new), std::slice::from_ref(&old));
        restarted.remove(&old.id).expect("remove");
        restarted.remove(&old.id).expect("removing twice is no error");
        let again = Attachments::load(folder.path()).expect("one file");
        assert_eq!(again.get(&old.id), None);
        assert_eq!(again.get(&new.id), Some(&new));
        assert_eq!(names(folder.path()), ["new@eth0.json"]);
    }

    #[test]
    fn an_add_that_is_repeated_and_not_answered_is_unfinished_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut attachments = Attachments::load(folder.path()).expect("an empty folder");
        let one = mk_attachment("one");
        attachments.put(one.clone()).expect("put");
        attachments.finish(&one.id).expect("finish");
        fs::copy(folder.path().join("one@eth0.json"), folder.path().join("kept")).expect("copy");
        attachments.put(one.clone()).expect("put again");
        assert_eq!(names(folder.path()), ["kept", "one@eth0.adding"]);
        // A crash came between the two names.
        fs::rename(folder.path().join("kept"), folder.path().join("one@eth0.json")).expect("rename");
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
            let leftover = attachments.retire(&attachment.id).expect("retire").expect("it was known");
            assert_eq!((leftover.interface.as_str(), attachments.get(&attachment.id)), ("cali0", None));
        }
        assert_eq!(attachments.retire(&one.id).expect("retire"), None, "twice is no error");
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
            attachments.finish(&mk_attachment(container).id).expect("finish");
        }
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("write");
        // Empty, as a loss of power leaves it; cut off; of another attachment; never renamed.
        write("three@eth0.json", "");
        write("four@eth0.adding", "{\"id\":");
        fs::copy(folder.path().join("one@eth0.json"), folder.path().join("five@eth0.json")).expect("copy");
        write("six@eth0.tmp", "{");
        let restarted = Attachments::load(folder.path()).expect("the others");
        let containers: Vec<&str> = restarted.iter().map(|attachment| attachment.id.container.as_str()).collect();
        assert_eq!((containers, restarted.damaged()), (vec!["one", "two"], 3));
        let aside = ["five@eth0.json.damaged", "four@eth0.adding.damaged", "three@eth0.json.damaged"];
        let mut wanted = vec!["one@eth0.json", "two@eth0.json"];
        wanted.extend(aside);
        wanted.sort_unstable();
        assert_eq!(names(folder.path()), wanted);
        assert_eq!(Attachments::load(folder.path()).expect("the others").damaged(), 0, "once is enough");
    }

    /// As agents before this one wrote them.
    #[test]
    fn files_of_former_agents_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        for (container, mac) in [("done", "02:00:00:00:00:01"), ("begun", "")] {
            let attachment = Attachment { mac: mac.to_owned(), ..mk_attachment(container) };
            let text = serde_json::to_vec(&attachment).expect("JSON");
            fs::write(folder.path().join(format!("{container}@eth0.json")), text).expect("write");
        }
        let mut attachments = Attachments::load(folder.path()).expect("two files");
        let finished: Vec<bool> = attachments.iter().map(|attachment| attachment.is_finished).collect();
        assert_eq!(finished, [false, true]);
        for attachment in attachments.iter().cloned().collect::<Vec<_>>() {
            attachments.retire(&attachment.id).expect("retire");
        }
        assert_eq!(Attachments::load(folder.path()).expect("what is left").iter().count(), 0);
    }
}
