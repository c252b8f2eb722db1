//! What a tokenised dataset says of itself: a line of JSON, and the hash of that line.

use super::part::damaged;
use crate::data::summary::Summary;
use crate::error::{Error, Result};
use crate::files;
use crate::hex::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The file's name.
const FILE: &str = "dataset.json";
/// Tells these files from others.
const MAGIC: &str = "rlhf-dataset";
/// The layout. Whoever changes it, or what is read out of records, counts it up.
pub(in crate::data) const VERSION: u32 = 1;

/// What a dataset was made from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::data) struct MadeFrom {
    /// Hash of the settings that matter, the tokenizer, and the version of the trainer.
    pub recipe: String,
    /// The files of records, in the dataset's order.
    pub files: Vec<Source>,
}

impl MadeFrom {
    /// Hash of the one file's bytes; of several, of their hashes.
    pub fn file(&self) -> [u8; 32] {
        let hashes: Vec<[u8; 32]> = self.files.iter().map(|file| unhex(&file.sha256)).collect();
        match &hashes[..] {
            [one] => *one,
            all => Sha256::digest(all.concat()).into(),
        }
    }
}

/// A file of records as it was when it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::data) struct Source {
    /// What tells without reading it that it is still the same.
    pub stamp: Stamp,
    /// Hash of its bytes.
    pub sha256: String,
}

/// A file's length and when it was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::data) struct Stamp {
    bytes: u64,
    modified_seconds: i64,
    modified_nanoseconds: i64,
}

impl Stamp {
    /// That of the file as it is now.
    pub fn of(path: &Path) -> Result<Self> {
        let found = crate::data::records::open(path)?.metadata().map_err(|e| Error::storage(path, e))?;
        Ok(Self { bytes: found.len(), modified_seconds: found.mtime(), modified_nanoseconds: found.mtime_nsec() })
    }
}

/// What stands in the header.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::data) struct Header {
    magic: String,
    version: u32,
    /// What it was made from.
    pub made_from: MadeFrom,
    /// Its figures.
    pub summary: Summary,
    /// Hash of all rows of tokens, as checkpoints name the data of their run.
    pub rows: String,
    /// The bytes of each part.
    pub parts: BTreeMap<String, u64>,
}

impl Header {
    pub fn new(made_from: MadeFrom, summary: Summary, rows: String, parts: BTreeMap<String, u64>) -> Self {
        Self { magic: MAGIC.into(), version: VERSION, made_from, summary, rows, parts }
    }

    /// Writes it into the folder of a dataset. Returns its hash.
    pub fn write(&self, dir: &Path) -> Result<[u8; 32]> {
        let line = serde_json::to_string(self).map_err(|e| Error::bug(e.to_string()))?;
        let hash: [u8; 32] = Sha256::digest(&line).into();
        files::write(&dir.join(FILE), format!("{line}\n{}\n", hex(&hash)).as_bytes())?;
        Ok(hash)
    }

    /// What the dataset in a folder says that it was made by, whatever version wrote it; `None` where that cannot be told.
    pub fn recipe(dir: &Path) -> Option<String> {
        let text = std::fs::read_to_string(dir.join(FILE)).ok()?;
        let header: serde_json::Value = serde_json::from_str(text.lines().next()?).ok()?;
        Some(header.get("madeFrom")?.get("recipe")?.as_str()?.to_owned())
    }

    /// That of the dataset in a folder, with its hash; `None` where there is none.
    pub fn read(dir: &Path) -> Result<Option<(Self, [u8; 32])>> {
        let path = dir.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) if e.kind() == ErrorKind::InvalidData => return Err(damaged(&path, "its header is no text")),
            Err(e) => return Err(Error::storage(&path, e)),
        };
        let (line, said) = text.split_once('\n').unwrap_or_default();
        let hash: [u8; 32] = Sha256::digest(line).into();
        if said.trim_end() != hex(&hash) {
            return Err(damaged(&path, "its header is not what its hash says"));
        }
        let header: Self = serde_json::from_str(line).map_err(|e| damaged(&path, &e.to_string()))?;
        if header.magic != MAGIC || header.version != VERSION {
            return Err(damaged(
                &path,
                &format!("it is '{}' of version {}, not '{MAGIC}' of version {VERSION}", header.magic, header.version),
            ));
        }
        Ok(Some((header, hash)))
    }
}

/// The bytes that [`hex`] has written.
pub(super) fn unhex(text: &str) -> [u8; 32] {
    std::array::from_fn(|i| text.get(2 * i..2 * i + 2).and_then(|t| u8::from_str_radix(t, 16).ok()).unwrap_or_default())
}
