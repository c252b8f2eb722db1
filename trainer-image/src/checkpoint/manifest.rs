//! What a checkpoint says of itself.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

/// The manifest's file name.
pub(super) const MANIFEST: &str = "manifest.json";
/// The version of the layout.
pub(super) const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Manifest {
    pub format: u32,
    pub job_uid: String,
    pub stage: String,
    pub step: u64,
    pub models: BTreeMap<String, ModelEntry>,
    pub state: Value,
    pub files: Vec<FileEntry>,
}

/// A model's optimizer steps, and the elements of each of its chunks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ModelEntry {
    pub updates: i64,
    pub chunks: Vec<i64>,
}

/// A rank's file; ranks are in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct FileEntry {
    pub name: String,
    pub sha256: String,
}

impl Manifest {
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self).map_err(|e| Error::bug(e.to_string()))
    }

    pub fn read(dir: &Path) -> std::result::Result<Self, String> {
        let text = std::fs::read(dir.join(MANIFEST)).map_err(|e| format!("{MANIFEST}: {e}"))?;
        let manifest: Self = serde_json::from_slice(&text).map_err(|e| format!("{MANIFEST}: {e}"))?;
        if manifest.format != FORMAT {
            return Err(format!("{MANIFEST}: format {} is not {FORMAT}", manifest.format));
        }
        Ok(manifest)
    }

    /// The manifest of a checkpoint whose every file has the hash it should have, or why it cannot be used.
    pub fn verified(dir: &Path, job_uid: &str, stage: &str) -> std::result::Result<Self, String> {
        let manifest = Self::read(dir)?;
        if manifest.job_uid != job_uid || manifest.stage != stage {
            return Err(format!("it belongs to stage '{}' of the job with UID {}", manifest.stage, manifest.job_uid));
        }
        for file in &manifest.files {
            let hash = sha256(&dir.join(&file.name)).map_err(|e| format!("{}: {e}", file.name))?;
            if hex(&hash) != file.sha256 {
                return Err(format!("{}: its content has changed since it was written", file.name));
            }
        }
        Ok(manifest)
    }
}

/// The hash of a file's content.
pub(super) fn sha256(path: &Path) -> std::io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().into())
}

pub(super) fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}
