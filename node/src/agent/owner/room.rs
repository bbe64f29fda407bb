//! What is left out of the wanted table because the kernel does not take it.

use std::io;
use std::time::Instant;

use margay_runtime::backoff::jitter;

use super::Owner;
use margay_nft::{ExecError, Transaction};

/// Attempts in a row before a kernel that has no room is asked for less: until then the room may come back.
const ROOM: u32 = 10;

impl Owner {
    /// Leaves the largest part out of a transaction that the kernel does not take as a whole; returns whether the rest is to be tried at once. One that is too
    /// long will never be taken; where the kernel lacks memory, attempt after attempt twice as many parts are left out.
    pub(super) fn makes_room(&mut self, transaction: &Transaction, error: &ExecError) -> bool {
        if error.is_too_long() {
            return self.shed(transaction, error, 1);
        }
        if let Some(doublings) = self.attempts.checked_sub(ROOM).filter(|_| error.is_of_the_whole()) {
            self.shed(transaction, error, 1 << doublings.min(16));
        }
        false
    }

    /// Refuses the largest parts of what the kernel does not take as a whole, so that everything else is enforced; returns whether there was any.
    fn shed(&mut self, transaction: &Transaction, error: &ExecError, count: usize) -> bool {
        let parts = self.compiler.largest(transaction, count);
        for part in &parts {
            tracing::error!(?part, %error, "the kernel has no room for the table; its largest part is left out, and what depends on it is denied");
            let reason = format!("the kernel has no room for it, and it is the largest part of what changes: {error}");
            self.compiler.refuse(part.clone(), reason, self.state.records());
        }
        if !parts.is_empty() {
            self.due.forgive.get_or_insert_with(|| Instant::now() + self.forgive.next(jitter()));
        }
        !parts.is_empty()
    }

    /// Leaves the part out that an operation is about, which the kernel refuses; returns whether there is such a part.
    pub(super) fn refuse(&mut self, transaction: &Transaction, index: usize, source: &io::Error) -> bool {
        let part = transaction.ops().get(index).and_then(|op| self.compiler.part(op));
        let Some(part) = part.filter(|part| !self.compiler.has_refused(part)) else { return false };
        self.compiler.refuse(part, format!("the kernel refused it: {source}"), self.state.records());
        self.due.forgive.get_or_insert_with(|| Instant::now() + self.forgive.next(jitter()));
        true
    }
}
