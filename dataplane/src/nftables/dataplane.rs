//! The nftables dataplane: it collects the compiler's transactions and commits them as one.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use margay_calc::model::RecordId;
use margay_nft::{ExecError, Ruleset, Transaction};
use margay_runtime::backoff::{Backoff, jitter};

use super::compiler::Compiler;
use super::kernel::Kernel;
use super::names;
use crate::{Attached, CommitError, Committed, Dataplane, Dirty, Links, Records};

/// Reads of the table that other programs may interrupt before it is replaced without reading.
const MAX_READS: u32 = 3;
/// Failed attempts before parts are left out for a kernel that lacks memory: until then memory may
/// become free.
const ATTEMPTS_WITHOUT_ROOM: u32 = 10;
/// Delay until refused parts are retried; it doubles up to the second value.
const REFUSED_RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));

/// The dataplane of one node: owns the wanted table and the pending operations. The kernel may be
/// any [`Kernel`].
pub struct Nftables {
    compiler: Compiler,
    kernel: Box<dyn Kernel>,
    /// Operations that lead from the last committed table to the wanted one.
    pending: Transaction,
    /// Kernel state unknown: after a start, a failed commit or a foreign change. The next commit
    /// reads the table back, so nothing is queued in `pending` meanwhile.
    needs_resync: bool,
    /// The next commit compares the whole table with the kernel.
    compare_next: bool,
    attempts: u32,
    retry: Backoff,
    /// When refused parts are retried.
    retry_refused_at: Option<Instant>,
}

impl Nftables {
    /// Creates the dataplane of a node, with the table of an empty view.
    pub fn new(node: &str, kernel: Box<dyn Kernel>) -> Self {
        Self {
            compiler: Compiler::new(node),
            kernel,
            pending: Transaction::new(names::table()),
            needs_resync: true,
            compare_next: false,
            attempts: 0,
            retry: Backoff::new(REFUSED_RETRY.0, REFUSED_RETRY.1),
            retry_refused_at: None,
        }
    }

    fn enqueue(&mut self, transaction: &Transaction) {
        // Before a resync there is nothing to add to: it computes the whole difference anyway.
        if !self.needs_resync {
            transaction
                .ops()
                .iter()
                .for_each(|op| self.pending.push(op.clone()));
        }
    }

    fn try_commit(&mut self, records: &Records, now: Instant) -> Result<Committed, ExecError> {
        let pending = std::mem::replace(&mut self.pending, Transaction::new(names::table()));
        let mut committed = if self.needs_resync {
            self.resync(records, now)?
        } else {
            self.exec(&pending)?;
            Committed {
                operations: pending.ops().len(),
                ..Committed::default()
            }
        };
        if self.needs_resync {
            // Another program committed while our monitor was detached, so nobody knows what it
            // changed.
            let again = self.resync(records, now)?;
            committed.operations += again.operations;
            committed.repairs += again.repairs;
        }
        if std::mem::take(&mut self.compare_next) {
            self.compare(records, &mut committed)?;
        }
        Ok(committed)
    }

    /// Reads the table back and commits the difference to the wanted one.
    fn resync(&mut self, records: &Records, now: Instant) -> Result<Committed, ExecError> {
        loop {
            let wanted = self.compiler.ruleset(records);
            let transaction = self.read_back(&wanted)?;
            self.needs_resync = false;
            match self.exec(&transaction) {
                Ok(()) => {
                    let operations = transaction.ops().len();
                    return Ok(Committed {
                        operations,
                        repairs: u64::from(operations > 0),
                        is_unread: false,
                    });
                }
                // The part is left out, and the loop compiles and diffs again: everything else must
                // be enforced.
                Err(ExecError::Refused {
                    index: Some(index),
                    operation,
                    source,
                    message,
                }) if self.refuse(&transaction, index, &source, records, now) => {
                    tracing::error!(
                        operation,
                        %source,
                        message,
                        "the kernel refused a part of the table; what depends on it is denied",
                    );
                }
                Err(error) if self.make_room(&transaction, &error, records, now) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads the table and returns the difference to the wanted one. Where other programs commit
    /// all the time it cannot be read; then it is replaced, which needs no reading.
    fn read_back(&mut self, wanted: &Ruleset) -> Result<Transaction, ExecError> {
        for _ in 0..MAX_READS {
            match self.kernel.read_diff(wanted) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map_err(ExecError::Unanswered),
            }
        }
        tracing::info!(
            "nftables kept changing while our table was read; replacing the whole table"
        );
        Ok(Transaction::replace(wanted))
    }

    /// Compares the whole table and repairs it. A failed read changes nothing.
    fn compare(&mut self, records: &Records, committed: &mut Committed) -> Result<(), ExecError> {
        let wanted = self.compiler.ruleset(records);
        match self.kernel.read_diff(&wanted) {
            Ok(transaction) => {
                self.exec(&transaction)?;
                committed.repairs += u64::from(!transaction.is_empty());
                committed.operations += transaction.ops().len();
            }
            Err(error) => {
                tracing::debug!(
                    %error,
                    "the table could not be compared with the kernel; trying again later",
                );
                committed.is_unread = true;
            }
        }
        Ok(())
    }

    fn exec(&mut self, transaction: &Transaction) -> Result<(), ExecError> {
        if transaction.is_empty() {
            return Ok(());
        }
        let _committing =
            tracing::info_span!("node.commit", operations = transaction.ops().len()).entered();
        self.needs_resync |= self.kernel.exec(transaction)?;
        Ok(())
    }

    /// Leaves the largest parts out of a transaction that is too large for the kernel; returns
    /// whether to commit the rest at once. A transaction that is too long will never be accepted;
    /// where the kernel lacks memory, each attempt leaves out twice as many parts.
    fn make_room(
        &mut self,
        transaction: &Transaction,
        error: &ExecError,
        records: &Records,
        now: Instant,
    ) -> bool {
        if error.is_oversized() {
            return self.refuse_largest(transaction, error, 1, records, now);
        }
        if let Some(doublings) = self
            .attempts
            .checked_sub(ATTEMPTS_WITHOUT_ROOM)
            .filter(|_| error.is_batch_error())
        {
            self.refuse_largest(transaction, error, 1 << doublings.min(16), records, now);
        }
        false
    }

    /// Refuses the largest parts of a transaction, so that everything else is enforced; returns
    /// whether there were any.
    fn refuse_largest(
        &mut self,
        transaction: &Transaction,
        error: &ExecError,
        count: usize,
        records: &Records,
        now: Instant,
    ) -> bool {
        let parts = self.compiler.largest_parts(transaction, count);
        for part in &parts {
            tracing::error!(
                ?part,
                %error,
                "the table is too large for the kernel; its largest part is left out, and what \
                 depends on it is denied",
            );
            let reason = format!(
                "the table is too large for the kernel, and this is the largest part of what \
                 changes: {error}"
            );
            self.compiler.refuse(part.clone(), reason, records);
        }
        if !parts.is_empty() {
            self.retry_later(now);
        }
        !parts.is_empty()
    }

    /// Leaves out the part whose operation the kernel refused; returns whether there is such a
    /// part.
    fn refuse(
        &mut self,
        transaction: &Transaction,
        index: usize,
        source: &io::Error,
        records: &Records,
        now: Instant,
    ) -> bool {
        let part = transaction
            .ops()
            .get(index)
            .and_then(|op| self.compiler.part_of(op));
        let Some(part) = part.filter(|part| !self.compiler.has_refused(part)) else {
            return false;
        };
        self.compiler
            .refuse(part, format!("the kernel refused it: {source}"), records);
        self.retry_later(now);
        true
    }

    fn retry_later(&mut self, now: Instant) {
        if self.retry_refused_at.is_none() {
            self.retry_refused_at = Some(now + self.retry.next(jitter()));
        }
    }
}

impl Dataplane for Nftables {
    fn is_programmed(&mut self) -> io::Result<bool> {
        self.kernel.is_programmed(&names::table())
    }

    fn update(&mut self, records: &Records, dirty: &Dirty) {
        let transaction = self.compiler.apply(records, dirty);
        self.enqueue(&transaction);
    }

    fn attach(&mut self, interface: String, pod: Attached, records: &Records) {
        let transaction = self.compiler.attach(interface, pod, records);
        self.enqueue(&transaction);
    }

    fn detach(&mut self, interface: &str, records: &Records) {
        let transaction = self.compiler.detach(interface, records);
        self.enqueue(&transaction);
    }

    fn set_links(&mut self, links: Links) {
        let transaction = self.compiler.set_links(links);
        self.enqueue(&transaction);
    }

    fn invalidate(&mut self) {
        self.needs_resync = true;
    }

    fn request_comparison(&mut self) {
        self.compare_next = true;
    }

    fn retry_refused(&mut self, records: &Records, now: Instant) {
        if self.retry_refused_at.take_if(|due| now >= *due).is_some() {
            self.needs_resync |= self.compiler.retry_refused(records);
        }
    }

    fn next_retry(&self) -> Option<Instant> {
        self.retry_refused_at
    }

    fn commit(&mut self, records: &Records, now: Instant) -> Result<Committed, CommitError> {
        match self.try_commit(records, now) {
            Ok(committed) => {
                self.attempts = 0;
                Ok(committed)
            }
            Err(error) => {
                // `pending` has been taken, and without an answer the kernel may have committed it:
                // only reading back shows where to go on.
                self.needs_resync = true;
                self.attempts += 1;
                Err(CommitError {
                    reason: error.to_string(),
                    attempts: self.attempts,
                })
            }
        }
    }

    fn links(&self) -> &Links {
        self.compiler.links()
    }

    fn attached(&self) -> &BTreeMap<String, Attached> {
        self.compiler.attached()
    }

    fn has_policy(&self, interface: &str) -> bool {
        self.compiler.has_policy(interface)
    }

    fn refusal(&self, interface: &str) -> Option<String> {
        self.compiler.refusal_of(interface)
    }

    fn errors(&self) -> BTreeMap<RecordId, String> {
        self.compiler.errors()
    }

    fn dump(&self, records: &Records) -> String {
        format!(
            "{}\n{}",
            self.compiler.ruleset(records),
            self.compiler.describe_origins()
        )
    }
}

#[cfg(test)]
mod tests;
