//! The saved view, so that a node that boots without typha isolates its pods as before. Attachments
//! of pods are stored by the CNI service.
//!
//! The file holds a checksum and one frame: a damaged view is discarded.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use margay_calc::model::{Record, RecordId};
use margay_proto::sync::{self, Change, ChangeRef, Trailer, wire};
use prost::Message;
use sha2::{Digest, Sha256};

/// First bytes of the file; they change with the format.
const MAGIC: &[u8; 8] = b"margay1\n";
const CHECKSUM: usize = 32;

/// Records by id.
type Records = BTreeMap<RecordId, Record>;

/// File of the saved view.
#[derive(Clone, Debug)]
pub struct ViewStore {
    path: PathBuf,
}

impl ViewStore {
    /// The file `view.bin` in the agent's state directory.
    pub fn new(folder: &Path) -> Self {
        Self {
            path: folder.join("view.bin"),
        }
    }

    /// Loads the saved view; empty if there is none or if it is damaged, which is logged.
    pub fn load(&self) -> Records {
        match self.read() {
            Ok(records) => records,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Records::new(),
            Err(error) => {
                tracing::warn!(
                    path = %self.path.display(),
                    %error,
                    "the saved view cannot be used; waiting for the view from typha",
                );
                Records::new()
            }
        }
    }

    fn read(&self) -> io::Result<Records> {
        let bytes = fs::read(&self.path)?;
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or_else(|| invalid("not a saved view of this version"))?;
        let (checksum, frame) = rest
            .split_at_checked(CHECKSUM)
            .ok_or_else(|| invalid("the file is truncated"))?;
        if Sha256::digest(frame).as_slice() != checksum {
            return Err(invalid("the checksum does not match"));
        }
        let frame = wire::Frame::decode(frame).map_err(|error| invalid(&error.to_string()))?;
        let frame = sync::decode_frame(frame).map_err(|error| invalid(&error.to_string()))?;
        let upserts = frame.changes.into_iter().filter_map(|change| match change {
            Change::Upsert(id, record) => Some((id, record)),
            Change::Remove(_) | Change::Members(..) => None,
        });
        Ok(upserts.collect())
    }

    /// Replaces the file atomically: a crash leaves the old or the new one.
    pub fn save(&self, encoded: &[u8]) -> io::Result<()> {
        let temporary = self.path.with_extension("tmp");
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(encoded)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)
    }
}

/// Encodes records in the file's format.
pub fn encode(records: &Records) -> Vec<u8> {
    let mut frame = Vec::new();
    for (id, record) in records {
        frame.extend_from_slice(&sync::encode_change(ChangeRef::Upsert(id, record)));
    }
    frame.extend_from_slice(&sync::encode_trailer(&Trailer {
        in_sync: true,
        ..Trailer::default()
    }));
    let mut bytes = Vec::with_capacity(MAGIC.len() + CHECKSUM + frame.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&Sha256::digest(&frame));
    bytes.extend_from_slice(&frame);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_calc::model::PoolRecord;

    fn mk_records() -> Records {
        let pool = PoolRecord {
            nat_outgoing: true,
            encapsulation: margay_api::network::Encapsulation::Vxlan,
        };
        BTreeMap::from([(
            RecordId::Pool("10.0.0.0/16".parse().expect("a range")),
            Record::Pool(pool),
        )])
    }

    #[test]
    fn what_was_saved_is_there_after_a_restart_and_damage_is_no_view() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = ViewStore::new(folder.path());
        assert_eq!(store.load(), Records::new());
        let encoded = encode(&mk_records());
        store.save(&encoded).expect("save");
        assert_eq!(store.load(), mk_records());
        for cut in [0, 4, MAGIC.len() + 3, encoded.len() - 1] {
            store.save(&encoded[..cut]).expect("save");
            assert_eq!(store.load(), Records::new(), "cut at {cut}");
        }
        let mut flipped = encoded.clone();
        *flipped.last_mut().expect("not empty") ^= 1;
        store.save(&flipped).expect("save");
        assert_eq!(store.load(), Records::new());
    }
}
