//! What a checkpoint says of itself.

use super::machine::Machine;
use crate::engine::{Chunk, LossScale, Model, Skips};
use crate::error::{Error, Result};
use crate::hex::hex;
use crate::run::RunId;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

/// The manifest's file name.
pub(super) const MANIFEST: &str = "manifest.json";
/// The version of the layout.
pub(super) const FORMAT: u32 = 3;
/// This trainer's own version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Manifest {
    pub format: u32,
    pub run: RunId,
    pub step: u64,
    pub models: BTreeMap<String, ModelEntry>,
    pub state: Value,
    /// Hash of the data that the run learns from.
    pub data: String,
    /// What the run was rounded by (older checkpoints do not say).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    pub files: Vec<FileEntry>,
}

/// A model's optimizer steps, its loss scale where it is trained in fp16, the batches that it may still skip, the elements of each of its chunks, and a hash of where
/// each parameter lies in them (older checkpoints have none).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ModelEntry {
    pub updates: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    #[serde(default, skip_serializing_if = "Skips::are_whole")]
    pub skips: Skips,
    pub chunks: Vec<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
}

impl ModelEntry {
    /// Of a model as it is now.
    pub fn of(model: &Model) -> Self {
        let mut hasher = Sha256::new();
        model.trained().for_each(|chunk| chunk.layout().digest(&mut hasher));
        Self {
            updates: model.updates(),
            loss_scale: model.loss_scale(),
            skips: model.skips(),
            chunks: model.trained().map(Chunk::numel).collect(),
            layout: Some(hex(&hasher.finalize())),
        }
    }

    /// Whether numbers that were saved of this model lie where `model` has them.
    pub fn fits(&self, model: &Model) -> bool {
        let other = Self::of(model);
        self.chunks == other.chunks && (self.layout.is_none() || self.layout == other.layout)
    }
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

    /// Reads the manifest in `dir`. One that is JSON, and yet not what this version writes, is not damaged: damage would not
    /// leave it JSON.
    pub fn read(dir: &Path) -> std::result::Result<Self, ReadError> {
        let bytes = std::fs::read(dir.join(MANIFEST))?;
        let any: Value = serde_json::from_slice(&bytes)?;
        let run = any.get("run").and_then(|run| RunId::deserialize(run).ok());
        let other = |what: String| ReadError::OtherVersion { what, run };
        match any.get("format").and_then(Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => serde_json::from_slice(&bytes)
                .map_err(|e| other(format!("it is of format {FORMAT} with a change ({e})"))),
            Some(format) => Err(other(format!("it is of format {format}"))),
            None => Err(other("it tells no format".into())),
        }
    }

    /// Whether the checkpoint was written by this run.
    pub fn is_of(&self, run: RunId) -> bool {
        self.run == run
    }
}

impl FileEntry {
    /// Whether the file in `dir` is there and has the content that was written.
    pub fn is_intact(&self, dir: &Path) -> std::io::Result<bool> {
        match sha256(&dir.join(&self.name)) {
            Ok(digest) => Ok(hex(&digest) == self.sha256),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// Why a manifest cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("{MANIFEST}: {0}")]
    Io(#[from] std::io::Error),
    #[error("{MANIFEST}: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{MANIFEST}: {what}, and this trainer, of version {VERSION}, reads format {FORMAT} as it writes it")]
    OtherVersion {
        what: String,
        /// The run that it says it is of.
        run: Option<RunId>,
    },
}

/// The hash of a file's content.
pub(super) fn sha256(path: &Path) -> std::io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str) -> std::result::Result<Manifest, ReadError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(MANIFEST), text).unwrap();
        Manifest::read(dir.path())
    }

    fn manifest() -> Value {
        json!({
            "format": FORMAT, "run": "00000000000000aa", "step": 3, "data": "", "state": null, "files": [],
            "models": {"model": {"updates": 3, "chunks": [8]}}
        })
    }

    #[test]
    fn what_another_version_wrote_is_told_from_what_is_damaged() {
        assert_eq!(read(&manifest().to_string()).unwrap().step, 3);
        type Change = fn(&mut Value);
        let changes: [(Change, &str); 5] = [
            (|m| m["format"] = json!(FORMAT + 1), "of format 4,"),
            (|m| m["format"] = json!("new"), "no format"),
            (|m| m["novelty"] = json!(1), "novelty"),
            (|m| m["models"]["model"]["novelty"] = json!(1), "novelty"),
            (|m| m["step"] = json!({"whole": 3}), "format 3 with a change"),
        ];
        for (change, said) in changes {
            let mut other = manifest();
            change(&mut other);
            let error = read(&other.to_string()).unwrap_err();
            let message = error.to_string();
            assert!(
                message.contains(said) && message.contains(VERSION) && message.contains("reads format 3"),
                "{message}"
            );
            let ReadError::OtherVersion { run, .. } = error else { panic!("{message}") };
            assert_eq!(run.map(String::from).as_deref(), Some("00000000000000aa"));
        }
        let mut text = manifest().to_string();
        text.truncate(40);
        assert!(matches!(read(&text).unwrap_err(), ReadError::Json(_)));
    }

    /// Versions before they were would refuse it.
    #[test]
    fn what_versions_before_do_not_know_is_written_only_where_it_says_something() {
        let plain: Manifest = serde_json::from_value(manifest()).unwrap();
        let written: Value = serde_json::from_slice(&plain.to_json().unwrap()).unwrap();
        assert_eq!(written, manifest());
    }
}
