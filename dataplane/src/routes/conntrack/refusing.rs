//! A table whose kernel refuses everything, for tests of its callers.

use std::collections::BTreeSet;

use margay_api::rule::IpVersion;
use nix::errno::Errno;

use super::message::{Entry, Place, Subject};
use super::table::{Table, TableError};

/// Table of [`super::Conntrack::refusing`].
pub(super) struct Refusing;

pub(super) const REFUSED: TableError = TableError::Refused { what: "list conntrack entries", errno: Errno::EPERM };

impl Table for Refusing {
    fn flush(&mut self, _: Subject, _: Place) -> Result<bool, TableError> {
        Ok(false)
    }

    fn find(&mut self, _: IpVersion, _: &BTreeSet<Subject>) -> Result<Vec<Entry>, TableError> {
        Err(REFUSED)
    }

    fn delete(&mut self, _: &Entry) -> Result<(), TableError> {
        Err(REFUSED)
    }
}
