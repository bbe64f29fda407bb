//! Kernel of a node: what was committed. The dataplane above it knows of changes only what the
//! agent marks, so that a mark that is missing shows.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use margay_calc::digest;
use margay_calc::model::{Record, RecordId};
use margay_dataplane::{Attached, CommitError, Committed, Dataplane, Dirty, Links};
use parking_lot::Mutex;

use crate::judge;
use crate::oracle::{self, Records};
use crate::plant::Plant;
use crate::run::Run;

/// A stream over which the node's view came, or comes.
pub struct Source {
    /// What the replica behind it may know.
    pub oracle: oracle::Shared,
    /// Its state that the node has at least.
    pub since: usize,
}

/// Kernel and connections of one node.
#[derive(Default)]
pub struct Kernel {
    /// Number of the node.
    pub node: usize,
    /// What is enforced; `None`: nothing, all packets pass.
    pub records: Option<Records>,
    digests: BTreeMap<RecordId, u64>,
    /// The streams of this agent, newest last, back to the one of the last commit.
    pub sources: Vec<Source>,
    /// Sum of the view that the agent has started with.
    pub saved: Option<u64>,
    /// The view as it was saved last.
    pub store: Records,
    /// Number of commits with changes.
    pub commits: u64,
    /// Something has been committed since the node has booted.
    is_programmed: bool,
}

impl Kernel {
    /// Kernel of that node, which has just booted.
    pub fn new(node: usize) -> Self {
        Self {
            node,
            ..Self::default()
        }
    }

    /// The node has booted: its kernel holds nothing.
    pub fn reboot(&mut self) {
        self.records = None;
        self.digests.clear();
        self.is_programmed = false;
    }

    /// Returns true if what was enforced is gone.
    pub fn is_emptied(&self) -> bool {
        self.is_programmed && self.records.is_none()
    }

    fn sum(&self) -> u64 {
        self.digests.values().copied().fold(0, u64::wrapping_add)
    }

    fn digest_again(&mut self, records: &Records, id: &RecordId) {
        match records.get(id) {
            Some(record) => drop(self.digests.insert(id.clone(), digest::digest(id, record))),
            None => drop(self.digests.remove(id)),
        }
    }
}

/// Dataplane of one run of the agent.
pub struct Enforcer {
    run: Run,
    name: String,
    kernel: Arc<Mutex<Kernel>>,
    wanted: Records,
    has_committed: bool,
    dirty: Dirty,
    attached: BTreeMap<String, Attached>,
    links: Links,
}

impl Enforcer {
    /// Creates a dataplane that wants nothing yet.
    pub fn new(run: &Run, name: &str, kernel: &Arc<Mutex<Kernel>>) -> Self {
        if run.has(Plant::EmptiedTable) && kernel.lock().records.is_some() {
            kernel.lock().records = None;
        }
        Self {
            run: run.clone(),
            name: name.to_owned(),
            kernel: kernel.clone(),
            wanted: Records::new(),
            has_committed: false,
            dirty: Dirty::default(),
            attached: BTreeMap::new(),
            links: Links::new(),
        }
    }

    fn commit_changes(&mut self, records: &Records) {
        let mut dirty = std::mem::take(&mut self.dirty);
        let mut kernel = self.kernel.lock();
        if !std::mem::replace(&mut self.has_committed, true) || dirty.is_empty() {
            // The kernel is that of an earlier run.

            kernel.digests.clear();
            dirty.records.extend(self.wanted.keys().cloned());
        }
        let sets = dirty.members.keys().map(|set| RecordId::IpSet(set.clone()));
        for id in dirty.records.iter().cloned().chain(sets) {
            kernel.digest_again(&self.wanted, &id);
        }
        if self.wanted != *records {
            let differs = records
                .iter()
                .find(|(id, record)| self.wanted.get(*id) != Some(*record));
            let extra = self.wanted.keys().find(|id| !records.contains_key(*id));
            let id = differs.map(|(id, _)| id).or(extra);
            self.run.fail(
                &self.name,
                format_args!("{id:?} has changed and was not marked"),
            );
        }
        let mut committed = self.wanted.clone();
        if self.run.has(Plant::TornCommit) && kernel.commits % 3 == 2 {
            committed.retain(|id, _| !matches!(id, RecordId::Policy(_)));
            let torn: Vec<RecordId> = self
                .wanted
                .keys()
                .filter(|id| !committed.contains_key(*id))
                .cloned()
                .collect();
            torn.iter()
                .for_each(|id| kernel.digest_again(&committed, id));
        }
        kernel.commits += 1;
        self.run.note(&self.name, || {
            format!("commits {} records", committed.len())
        });
        judge::check_commit(&self.run, &self.name, &mut kernel, &committed);
        kernel.records = Some(committed);
        kernel.is_programmed = true;
    }
}

impl Dataplane for Enforcer {
    fn is_programmed(&mut self) -> io::Result<bool> {
        Ok(self.kernel.lock().records.is_some())
    }

    fn update(&mut self, records: &Records, dirty: &Dirty) {
        for id in &dirty.records {
            if self.wanted.contains_key(id) && self.run.has(Plant::MissedRecord) {
                continue;
            }
            match records.get(id) {
                Some(record) => drop(self.wanted.insert(id.clone(), record.clone())),
                None => drop(self.wanted.remove(id)),
            }
            self.dirty.mark(id.clone());
        }
        for (set, delta) in &dirty.members {
            let Some(Record::IpSet(held)) = self.wanted.get_mut(&RecordId::IpSet(set.clone()))
            else {
                continue;
            };
            if self.run.has(Plant::MissedMembers) {
                continue;
            }
            held.members
                .retain(|member| !delta.removed.contains(member));
            held.members.extend(delta.added.iter().cloned());
            for (members, came) in [(&delta.added, true), (&delta.removed, false)] {
                members
                    .iter()
                    .for_each(|member| self.dirty.mark_member(set, member.clone(), came));
            }
        }
    }

    fn attach(&mut self, interface: String, pod: Attached, _: &Records) {
        self.attached.insert(interface, pod);
    }

    fn detach(&mut self, interface: &str, _: &Records) {
        self.attached.remove(interface);
    }

    fn set_links(&mut self, links: Links) {
        self.links = links;
    }

    fn invalidate(&mut self) {}

    fn request_comparison(&mut self) {}

    fn retry_refused(&mut self, _: &Records, _: Instant) {}

    fn next_retry(&self) -> Option<Instant> {
        None
    }

    fn commit(&mut self, records: &Records, _: Instant) -> Result<Committed, CommitError> {
        if self.dirty.is_empty() && self.is_enforced() && self.wanted == *records {
            return Ok(Committed::default());
        }
        self.commit_changes(records);
        Ok(Committed {
            operations: 1,
            ..Committed::default()
        })
    }

    fn links(&self) -> &Links {
        &self.links
    }

    fn attached(&self) -> &BTreeMap<String, Attached> {
        &self.attached
    }

    fn has_policy(&self, _: &str) -> bool {
        true
    }

    fn refusal(&self, _: &str) -> Option<String> {
        None
    }

    fn errors(&self) -> BTreeMap<RecordId, String> {
        BTreeMap::new()
    }

    fn dump(&self, _: &Records) -> String {
        String::new()
    }
}

impl Enforcer {
    /// What an earlier run has committed is this run's.
    fn is_enforced(&self) -> bool {
        self.kernel.lock().records.as_ref() == Some(&self.wanted)
    }
}

impl Kernel {
    /// Finds the state that has been committed among those that may be: of the newest stream, of
    /// one before, or the saved one.
    pub fn find_state(&mut self) -> bool {
        let (sum, node) = (self.sum(), self.node);
        if self.saved == Some(sum) {
            return true;
        }
        for place in (0..self.sources.len()).rev() {
            let source = &mut self.sources[place];
            let found = source.oracle.lock().find(source.since, node, sum);
            if let Some(state) = found {
                source.since = state;
                self.sources.drain(..place);
                self.saved = None;
                return true;
            }
        }
        false
    }
}
