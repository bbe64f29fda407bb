//! Writes container images as OCI archives, so that images need neither a registry nor a container
//! engine.
//!
//! The same inputs give the same bytes: entries are sorted by destination, owned by root and dated
//! at the epoch. The layer is left uncompressed, because it is read back on the machine that wrote
//! it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use data_encoding::HEXLOWER;
use serde_json::json;
use sha2::{Digest, Sha256};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// Folders that programs expect even in an image that was made from nothing.
const FOLDERS: [(&str, u32); 8] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o755),
    ("run", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("var", 0o755),
];

/// An image of one layer.
#[derive(Debug, Clone)]
pub struct Image {
    /// Full reference, `host/path:tag`: what a pod names and what containerd stores the image as.
    pub name: String,
    /// Content of the layer.
    pub entries: Vec<Entry>,
    /// Program and first arguments of a container that names none.
    pub entrypoint: Vec<String>,
}

/// One thing in the layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// An executable file of mode 0755 with the content of `source`.
    File {
        /// Path of the source, on this machine.
        source: PathBuf,
        /// Path in the image.
        dest: PathBuf,
    },
    /// A symbolic link.
    Link {
        /// Target of the link.
        target: PathBuf,
        /// Path of the link in the image.
        dest: PathBuf,
    },
}

impl Entry {
    fn dest(&self) -> &Path {
        match self {
            Self::File { dest, .. } | Self::Link { dest, .. } => dest,
        }
    }
}

/// `SRC=DEST` is a file, `@TARGET=DEST` a symbolic link.
impl FromStr for Entry {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (source, dest) = text.split_once('=').with_context(|| {
            format!("`{text}`: an entry is SRC=DEST, or @TARGET=DEST for a link")
        })?;
        let dest = relative(dest)?;
        Ok(match source.strip_prefix('@') {
            Some(target) => Self::Link {
                target: target.into(),
                dest,
            },
            None => Self::File {
                source: source.into(),
                dest,
            },
        })
    }
}

impl Image {
    /// Writes the archive to `out`, which appears whole or not at all, and returns the manifest's
    /// digest.
    pub fn write(&self, out: &Path) -> Result<String> {
        let tag = self.tag()?;
        let folder = parent_of(out);
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let mut layer = Hashing::new(tempfile::tempfile_in(folder)?);
        self.write_layer(&mut layer)?;
        let (mut layer, layer_digest, layer_size) = layer.finish()?;

        let config = serde_json::to_vec(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Env": ["PATH=/usr/bin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": digest(&config), "size": config.len()},
            "layers": [{"mediaType": LAYER, "digest": layer_digest, "size": layer_size}],
        }))?;
        let index = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [{
                "mediaType": MANIFEST,
                "digest": digest(&manifest),
                "size": manifest.len(),
                "annotations": {
                    "io.containerd.image.name": self.name,
                    "org.opencontainers.image.ref.name": tag,
                },
            }],
        }))?;

        let archive = tempfile::NamedTempFile::new_in(folder)?;
        let mut tar = tar::Builder::new(io::BufWriter::new(archive.as_file()));
        append(
            &mut tar,
            "oci-layout",
            LAYOUT.len() as u64,
            &mut &LAYOUT[..],
        )?;
        append(
            &mut tar,
            "index.json",
            index.len() as u64,
            &mut index.as_slice(),
        )?;
        append(&mut tar, &blob(&layer_digest), layer_size, &mut layer)?;
        append(
            &mut tar,
            &blob(&digest(&config)),
            config.len() as u64,
            &mut config.as_slice(),
        )?;
        append(
            &mut tar,
            &blob(&digest(&manifest)),
            manifest.len() as u64,
            &mut manifest.as_slice(),
        )?;
        tar.into_inner()?.flush()?;
        archive
            .persist(out)
            .with_context(|| format!("cannot write {}", out.display()))?;
        Ok(digest(&manifest))
    }

    fn tag(&self) -> Result<&str> {
        match self.name.rsplit_once(':') {
            Some((path, tag)) if path.contains('/') && !tag.contains('/') && !tag.is_empty() => {
                Ok(tag)
            }
            _ => bail!("image name `{}`: containerd needs host/path:tag", self.name),
        }
    }

    fn write_layer(&self, out: &mut impl Write) -> Result<()> {
        let mut tar = tar::Builder::new(out);
        let by_dest: BTreeMap<&Path, &Entry> = self
            .entries
            .iter()
            .map(|entry| (entry.dest(), entry))
            .collect();
        ensure!(
            by_dest.len() == self.entries.len(),
            "image `{}`: two entries have the same destination",
            self.name
        );
        let parents: BTreeSet<&Path> = by_dest
            .keys()
            .flat_map(|dest| dest.ancestors().skip(1))
            .filter(|folder| !folder.as_os_str().is_empty())
            .collect();
        let mut folders: BTreeMap<&Path, u32> =
            parents.into_iter().map(|folder| (folder, 0o755)).collect();
        folders.extend(
            FOLDERS
                .iter()
                .map(|(folder, mode)| (Path::new(folder), *mode)),
        );
        folders.retain(|folder, _| !by_dest.contains_key(folder));
        for (folder, mode) in folders {
            tar.append_data(
                &mut header(tar::EntryType::Directory, mode, 0),
                folder,
                io::empty(),
            )?;
        }
        for entry in by_dest.values() {
            match entry {
                Entry::File { source, dest } => {
                    let file = File::open(source)
                        .with_context(|| format!("cannot read {}", source.display()))?;
                    let size = file.metadata()?.len();
                    tar.append_data(
                        &mut header(tar::EntryType::Regular, 0o755, size),
                        dest,
                        file,
                    )?;
                }
                Entry::Link { target, dest } => {
                    tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), dest, target)?;
                }
            }
        }
        tar.finish()?;
        Ok(())
    }
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append(
    tar: &mut tar::Builder<impl Write>,
    path: &str,
    size: u64,
    data: &mut impl Read,
) -> Result<()> {
    tar.append_data(
        &mut header(tar::EntryType::Regular, 0o644, size),
        path,
        data,
    )?;
    Ok(())
}

/// The architecture of the programs in the image, which are built for this machine, by Go's name as
/// OCI wants it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn digest(data: &[u8]) -> String {
    spell(Sha256::digest(data).as_slice())
}

fn spell(hash: &[u8]) -> String {
    format!("sha256:{}", HEXLOWER.encode(hash))
}

fn blob(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn relative(dest: &str) -> Result<PathBuf> {
    let path = PathBuf::from(dest.trim_start_matches('/'));
    let plain = path
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    ensure!(
        plain && !path.as_os_str().is_empty(),
        "destination `{dest}` must be a plain path in the image"
    );
    Ok(path)
}

/// The folder a file is in; the current one for a bare name.
fn parent_of(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// A file that knows the digest and length of what was written to it.
struct Hashing {
    file: io::BufWriter<File>,
    hash: Sha256,
    size: u64,
}

impl Hashing {
    fn new(file: File) -> Self {
        Self {
            file: io::BufWriter::new(file),
            hash: Sha256::new(),
            size: 0,
        }
    }

    fn finish(self) -> Result<(File, String, u64)> {
        let mut file = self.file.into_inner().context("cannot write the layer")?;
        file.seek(SeekFrom::Start(0))?;
        Ok((file, spell(self.hash.finalize().as_slice()), self.size))
    }
}

impl Write for Hashing {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.file.write(data)?;
        self.hash.update(&data[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests;
