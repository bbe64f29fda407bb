//! Faults that are planted to see that they are found.
//!
//! Each makes one adapter between real parts behave as if the code behind it had lost a step: the
//! API server answers as if nobody had checked the answer, a frame is changed on its way, the
//! kernel hears of less than has changed, a storage forgets to compare. Nothing of this is in what
//! is shipped, and the real code runs unchanged around the fault.

/// A fault, and where it acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// Watch: what an incomplete list lacks is not asked for by name.
    BelievedList,
    /// Watch: a list that is older than what was received counts as new.
    BelievedOldList,
    /// Watch: after 410 the watch goes on without a list.
    IgnoredExpiry,
    /// Cache: a change is not applied.
    LostChange,
    /// Cache: a deletion is not applied.
    LostDeletion,
    /// Owner: hellos are answered before everything has been listed.
    EarlyAnswer,
    /// Upstream: a hello does not say how new what the node holds is.
    ForgottenVersions,
    /// Session: removals are sent before what replaces the removed.
    RemovalsFirst,
    /// Session: a frame loses its last change.
    TornFrame,
    /// Session: a frame is not sent.
    LostFrame,
    /// Hub: a bucket that differs is not resent.
    SkippedBucket,
    /// Upstream: a frame is applied twice.
    RepeatedFrame,
    /// Upstream: frames of the former stream are applied on the next one.
    StaleStream,
    /// Upstream: acknowledgements are not sent.
    LostAck,
    /// State: a changed record is not marked.
    MissedRecord,
    /// State: changed members are not marked.
    MissedMembers,
    /// Dataplane: a commit leaves out policies.
    TornCommit,
    /// Dataplane: a start empties the table before the view is complete.
    EmptiedTable,
    /// IPAM: blocks are written without comparing their version.
    UncheckedWrite,
    /// IPAM: handles are not written.
    LostHandle,
    /// IPAM: a release is answered and not done.
    LostRelease,
}

impl Plant {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::BelievedList,
        Self::BelievedOldList,
        Self::IgnoredExpiry,
        Self::LostChange,
        Self::LostDeletion,
        Self::EarlyAnswer,
        Self::ForgottenVersions,
        Self::RemovalsFirst,
        Self::TornFrame,
        Self::LostFrame,
        Self::SkippedBucket,
        Self::RepeatedFrame,
        Self::StaleStream,
        Self::LostAck,
        Self::MissedRecord,
        Self::MissedMembers,
        Self::TornCommit,
        Self::EmptiedTable,
        Self::UncheckedWrite,
        Self::LostHandle,
        Self::LostRelease,
    ];
}
