//! A table whose kernel refuses everything, for tests of its callers.

use margay_api::rule::IpVersion;
use nix::errno::Errno;

use super::message::{Entry, PurgeAddress, Selection, TupleField};
use super::table::{ConntrackTable, TableError};

/// Table of [`super::Conntrack::refusing`].
pub(super) struct Refusing;

pub(super) const REFUSED: TableError = TableError::Refused {
    what: "list conntrack entries",
    errno: Errno::EPERM,
};

impl ConntrackTable for Refusing {
    fn flush(&mut self, _: PurgeAddress, _: TupleField) -> Result<bool, TableError> {
        Ok(false)
    }

    fn find(&mut self, _: IpVersion, _: Selection<'_>) -> Result<Vec<Entry>, TableError> {
        Err(REFUSED)
    }

    fn delete(&mut self, _: &Entry) -> Result<(), TableError> {
        Err(REFUSED)
    }
}
