//! Checkpoints: whole or absent, verified by hash, independent of the world size that wrote them.
//!
//! `step-N/` holds one safetensors file a rank with that rank's range of every chunk (parameters and moments),
//! and `manifest.json`. All ranks write into a folder beside it, which rank 0 renames once every file is flushed
//! and its hash is known. Random draws are made by counter, so a step number and a stage's own state are all
//! that a resumed run needs to go on exactly.

mod manifest;
mod shard_file;

use crate::engine::{Group, Model};
use crate::error::{Error, Result};
use crate::files;
use manifest::{FileEntry, MANIFEST, Manifest, ModelEntry};
use rlhf_api::config::StageConfig;
use rlhf_api::report::Checkpoint;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The checkpoints of one stage of one job.
pub struct Checkpoints {
    dir: PathBuf,
    relative: String,
    job_uid: String,
    stage: String,
    keep: usize,
}

/// What a checkpoint holds beside the models.
#[derive(Clone, Debug, PartialEq)]
pub struct Restored {
    /// Steps (PPO: iterations) finished.
    pub step: u64,
    /// The stage's own state, as it was saved.
    pub state: Value,
    /// Where it lies.
    pub checkpoint: Checkpoint,
}

impl Checkpoints {
    /// The checkpoints of the stage with this config, on the volume mounted at `volume`.
    pub fn new(config: &StageConfig, volume: &Path) -> Self {
        Self {
            dir: volume.join(&config.paths.checkpoints),
            relative: config.paths.checkpoints.clone(),
            job_uid: config.job.uid.clone(),
            stage: config.stage.clone(),
            keep: config.checkpoint.keep as usize,
        }
    }

    fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step}"))
    }

    fn describe(&self, step: u64) -> Checkpoint {
        Checkpoint { step, path: format!("{}/step-{step}", self.relative) }
    }

    /// Saves the models and the stage's state after `step` steps; every rank must call it. Older checkpoints
    /// beyond the number to keep are deleted.
    ///
    /// # Errors
    /// Where storage failed or a peer was lost; the checkpoints that were there are still there.
    pub fn save(&self, group: &Group, step: u64, models: &[(&str, &Model)], state: &Value) -> Result<Checkpoint> {
        let temporary = files::sibling(&self.path(step), "tmp");
        if group.is_first() {
            files::remove_dir(&temporary)?;
            files::make_dir(&temporary)?;
        }
        group.barrier()?;
        let digest = shard_file::write(&temporary, group, models)?;
        let digests = group.gather_digests(&digest)?;
        if group.is_first() {
            let manifest = self.manifest(step, models, state, &digests);
            files::write(&temporary.join(MANIFEST), &manifest.to_json()?)?;
            files::sync_dir(&temporary)?;
            files::publish_dir(&temporary, &self.path(step))?;
            self.prune(step)?;
        }
        group.barrier()?;
        Ok(self.describe(step))
    }

    fn manifest(&self, step: u64, models: &[(&str, &Model)], state: &Value, digests: &[[u8; 32]]) -> Manifest {
        let entry = |model: &Model| ModelEntry {
            updates: model.updates(),
            chunks: model.chunks().iter().map(|c| c.flat().size()[0]).collect(),
        };
        Manifest {
            format: manifest::FORMAT,
            job_uid: self.job_uid.clone(),
            stage: self.stage.clone(),
            step,
            models: models.iter().map(|(name, model)| (name.to_string(), entry(model))).collect::<BTreeMap<_, _>>(),
            state: state.clone(),
            files: digests
                .iter()
                .enumerate()
                .map(|(rank, d)| FileEntry { name: shard_file::name(rank as u32), sha256: manifest::hex(d) })
                .collect(),
        }
    }

    /// Deletes all but the newest checkpoints, and what an interrupted save left.
    fn prune(&self, newest: u64) -> Result<()> {
        let mut steps = self.steps()?;
        steps.retain(|&s| s <= newest);
        for step in steps.into_iter().skip(self.keep) {
            files::remove_dir(&self.path(step))?;
        }
        Ok(())
    }

    /// The steps of the checkpoints on disk, newest first.
    fn steps(&self) -> Result<Vec<u64>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            Err(e) => return Err(Error::storage(&self.dir, e)),
        };
        let names = entries.filter_map(|e| e.ok()?.file_name().into_string().ok());
        let mut steps: Vec<u64> = names.filter_map(|n| n.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    /// Restores the newest checkpoint that is whole and belongs to this job and stage; every rank must call it.
    /// Damaged ones are skipped with the reason in the log.
    ///
    /// # Errors
    /// Where the checkpoint is of models of another shape, storage failed, or a peer was lost.
    pub fn restore(&self, group: &Group, models: &mut [(&str, &mut Model)]) -> Result<Option<Restored>> {
        let found = if group.is_first() { self.newest()?.map_or(-1, |m| m.step as i64) } else { -1 };
        let step = group.from_first(found)?;
        let Ok(step) = u64::try_from(step) else { return Ok(None) };
        let manifest = Manifest::read(&self.path(step)).map_err(|e| Error::storage(&self.path(step), e))?;
        for (name, model) in models.iter_mut() {
            let entry =
                manifest.models.get(*name).ok_or_else(|| self.mismatch(step, format!("it has no model '{name}'")))?;
            let chunks: Vec<i64> = model.chunks().iter().map(|c| c.flat().size()[0]).collect();
            if entry.chunks != chunks {
                return Err(self.mismatch(step, format!("its model '{name}' has another shape")));
            }
            shard_file::read(&self.path(step), &manifest.files, name, model)?;
            model.set_updates(entry.updates);
        }
        Ok(Some(Restored { step, state: manifest.state, checkpoint: self.describe(step) }))
    }

    fn mismatch(&self, step: u64, what: String) -> Error {
        Error::input(format!("{}: {what}; delete the checkpoint to start the stage anew", self.path(step).display()))
    }

    fn newest(&self) -> Result<Option<Manifest>> {
        for step in self.steps()? {
            match Manifest::verified(&self.path(step), &self.job_uid, &self.stage) {
                Ok(manifest) => return Ok(Some(manifest)),
                Err(reason) => tracing::warn!(checkpoint = %self.path(step).display(), reason, "skipping a checkpoint"),
            }
        }
        Ok(None)
    }
}
