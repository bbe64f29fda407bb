//! Digests of what is held, for the hello. The server compares them with its own.

use std::collections::BTreeMap;

use margay_calc::model::{Record, RecordId};
use sha2::{Digest, Sha256};

/// Number of buckets.
const BUCKETS: u64 = 256;

/// The bucket of a record.
pub fn bucket(id: &RecordId) -> u32 {
    let hash = Sha256::digest(format!("{id:?}"));
    let first = u64::from_be_bytes(hash[..8].try_into().expect("a hash has 32 bytes"));
    u32::try_from(first % BUCKETS).expect("below the number of buckets")
}

/// One digest per bucket; none says that everything has to be told.
pub fn buckets(_records: &BTreeMap<RecordId, Record>) -> Vec<u64> {
    Vec::new()
}
