//! Checkpoints: whole or absent, verified by hash, independent of the world size that wrote them.
//!
//! `step-N/` holds one safetensors file a rank with that rank's range of every chunk (parameters and moments),
//! `manifest.json`, and `dataset.sha256` with the hash of the dataset's file. All ranks write into a folder beside it while training goes on, and rank 0 renames that as soon
//! as every file is flushed and its hash is known. Random draws are made by counter, so a step number and a stage's own state are all
//! that a resumed run needs to go on exactly.

mod data;
mod headroom;
mod machine;
mod manifest;
mod shard_file;

use crate::engine::{Group, Lent, Model};
use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::files;
use crate::hex::hex;
use crate::lease::Lease;
use crate::run::RunId;
pub use data::DataHashes;
pub use headroom::Headroom;
use machine::Machine;
use manifest::{FileEntry, MANIFEST, Manifest, ModelEntry, ReadError};
use rlhf_api::config::StageConfig;
use rlhf_api::report::Checkpoint;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

/// Time between two looks at what others are still writing.
const POLL: Duration = Duration::from_millis(20);

/// The checkpoints of one run.
pub struct Checkpoints {
    dir: PathBuf,
    relative: String,
    run: RunId,
    keep: usize,
    lease: Lease,
    /// Ranks that share this one's memory.
    workers_per_node: u64,
    data: DataHashes,
    headroom: Headroom,
}

/// A checkpoint that is being written.
pub struct Saving {
    checkpoint: Checkpoint,
    /// What came of this rank's part: its file, and on rank 0 the whole.
    outcome: Receiver<Result<()>>,
    done: bool,
}

impl Saving {
    /// Steps (PPO: iterations) that it holds.
    pub fn step(&self) -> u64 {
        self.checkpoint.step
    }

    /// Whether the checkpoint is whole. Every rank must ask.
    ///
    /// # Errors
    /// Where storage failed or a peer was lost; the checkpoints that were there are still there.
    pub fn is_whole(&mut self, group: &Group) -> Result<bool> {
        if !self.done {
            match self.outcome.try_recv() {
                Ok(outcome) => {
                    outcome?;
                    self.done = true;
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Err(Error::bug("the writer of a checkpoint panicked")),
            }
        }
        Ok(!group.any(!self.done)?)
    }

    /// Waits until the checkpoint is whole. Every rank must call it.
    ///
    /// # Errors
    /// As [`Saving::is_whole`].
    pub fn finish(mut self, group: &Group) -> Result<Checkpoint> {
        self.wait(group)?;
        Ok(self.checkpoint)
    }

    fn wait(&mut self, group: &Group) -> Result<()> {
        while !self.is_whole(group)? {
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

/// What a checkpoint is to hold of this rank: tensors as they were when they were lent, and what is said of them.
pub struct Kept {
    lent: Vec<(String, Arc<Lent>)>,
    manifest: Manifest,
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
    /// The checkpoints of a run of the stage with this config, whose data have these hashes.
    pub fn new(
        config: &StageConfig,
        environment: &Environment,
        run: RunId,
        lease: &Lease,
        data: DataHashes,
        headroom: &Headroom,
    ) -> Self {
        Self {
            lease: lease.clone(),
            headroom: headroom.clone(),
            run,
            workers_per_node: environment.workers_per_node.into(),
            data,
            dir: environment.volume.join(&config.paths.checkpoints),
            relative: config.paths.checkpoints.clone(),
            keep: config.checkpoint.keep as usize,
        }
    }

    fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step}"))
    }

    fn describe(&self, step: u64) -> Checkpoint {
        Checkpoint { step, path: format!("{}/step-{step}", self.relative) }
    }

    /// Keeps what a checkpoint after `step` steps would hold, so that [`Checkpoints::start_save`] can write it though training
    /// has gone on: training copies it before it changes it. `None` where host memory has no room for the copies. Every rank
    /// must call it.
    ///
    /// # Errors
    /// Where libtorch fails or a peer was lost.
    pub fn keep(&self, group: &Group, step: u64, models: &[(&str, &Model)], state: &Value) -> Result<Option<Kept>> {
        if !self.has_room(group, models)? {
            return Ok(None);
        }
        Ok(Some(Kept { lent: shard_file::lend(models)?, manifest: self.manifest(step, models, state) }))
    }

    /// Whether every rank's host memory has room to copy what a checkpoint of these models holds while training goes on.
    fn has_room(&self, group: &Group, models: &[(&str, &Model)]) -> Result<bool> {
        let bytes = shard_file::bytes(models);
        let has_room = !group.any(!self.headroom.fits(bytes, self.workers_per_node))?;
        if has_room {
            self.headroom.take(bytes);
        }
        Ok(has_room)
    }

    /// Starts saving the models and the stage's state after `step` steps: what this rank keeps is written in the background,
    /// while training goes on, which copies what is not written before the optimizer changes it; what lies on a GPU is copied
    /// before it returns. Where host memory has no room
    /// for the copies, everything is written before it returns. `told` hears of the whole checkpoint on rank 0, as soon as it is whole. Every rank must call it, and
    /// [`Saving::finish`] later.
    ///
    /// # Errors
    /// Where storage failed or a peer was lost; the checkpoints that were there are still there.
    pub fn start_save(
        self,
        group: &Group,
        step: u64,
        models: &[(&str, &Model)],
        state: &Value,
        told: impl FnOnce(Checkpoint) + Send + 'static,
    ) -> Result<Saving> {
        match self.keep(group, step, models, state)? {
            Some(kept) => {
                kept.lent.iter().try_for_each(|(_, lent)| lent.leave_device())?;
                self.write(group, kept, told)
            }
            None => {
                tracing::info!(step, "host memory has no room to copy what is saved: training waits for it");
                let kept = Kept { lent: shard_file::lend(models)?, manifest: self.manifest(step, models, state) };
                let mut saving = self.write(group, kept, told)?;
                saving.wait(group)?;
                Ok(saving)
            }
        }
    }

    /// Starts writing what was kept. Every rank must call it, and [`Saving::finish`] later.
    ///
    /// # Errors
    /// Where storage failed or a peer was lost; the checkpoints that were there are still there.
    pub fn write(self, group: &Group, kept: Kept, told: impl FnOnce(Checkpoint) + Send + 'static) -> Result<Saving> {
        let Kept { lent, manifest } = kept;
        let step = manifest.step;
        let temporary = files::unfinished(&self.path(step), &self.lease);
        if group.is_first() {
            self.remove_unfinished()?;
            files::make_dir(&temporary)?;
        }
        group.barrier()?;
        let (checkpoint, rank) = (self.describe(step), group.rank());
        let whole = group.is_first().then_some(group.world_size());
        let write = move || {
            shard_file::write(&temporary, rank, lent)
                .inspect_err(|_| remove_failed(shard_file::remove(&temporary, rank)))?;
            let publish = |world_size| self.publish(&temporary, manifest, world_size, told);
            whole.map_or(Ok(()), publish).inspect_err(|_| remove_failed(files::remove_dir(&temporary)))
        };
        let (send, outcome) = channel();
        // Nobody hears it where the process ends for another reason.
        std::thread::spawn(move || drop(send.send(write())));
        Ok(Saving { checkpoint, outcome, done: false })
    }

    /// Waits for the files of all ranks, which say by a file beside them that they are whole, and gives the checkpoint its
    /// name. Ranks need not meet for that, so it does not wait for the end of a long step. Older checkpoints beyond the number
    /// to keep are deleted.
    fn publish(
        &self,
        temporary: &Path,
        mut manifest: Manifest,
        world_size: u32,
        told: impl FnOnce(Checkpoint),
    ) -> Result<()> {
        for rank in 0..world_size {
            let seal = temporary.join(shard_file::seal(rank));
            let sha256 = loop {
                match std::fs::read_to_string(&seal) {
                    Ok(sha256) => break sha256,
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound && temporary.exists() => {
                        std::thread::sleep(POLL);
                    }
                    Err(e) => return Err(Error::storage(&seal, e)),
                }
            };
            std::fs::remove_file(&seal).map_err(|e| Error::storage(&seal, e))?;
            manifest.files.push(FileEntry { name: shard_file::name(rank), sha256 });
        }
        self.data.write(temporary)?;
        files::write(&temporary.join(MANIFEST), &manifest.to_json()?)?;
        files::sync_dir(temporary)?;
        files::publish_dir(temporary, &self.path(manifest.step), &self.lease)?;
        told(self.describe(manifest.step));
        self.prune(manifest.step)
    }

    /// The manifest, without the ranks' files.
    fn manifest(&self, step: u64, models: &[(&str, &Model)], state: &Value) -> Manifest {
        Manifest {
            format: manifest::FORMAT,
            run: self.run,
            step,
            models: models.iter().map(|(name, model)| (name.to_string(), ModelEntry::of(model))).collect(),
            state: state.clone(),
            data: hex(&self.data.rows),
            machine: models.first().map(|(_, model)| Machine::here(model.group().world_size(), model.device())),
            files: vec![],
        }
    }

    /// Deletes all but the newest checkpoints of this job, what interrupted saves left, and all but the newest of those that were
    /// set aside as damaged.
    fn prune(&self, newest: u64) -> Result<()> {
        let own = |step: &u64| Manifest::read(&self.path(*step)).is_ok_and(|m| m.is_of(self.run)) && *step <= newest;
        for step in self.steps()?.into_iter().filter(own).skip(self.keep) {
            files::remove_dir(&self.path(step))?;
        }
        self.remove_unfinished()?;
        let names = self.names()?;
        let mut damaged: Vec<(u64, &String)> = names.iter().filter_map(|n| Some((damaged_step(n)?, n))).collect();
        damaged.sort_unstable();
        damaged.pop();
        damaged.into_iter().try_for_each(|(_, name)| files::remove_dir(&self.dir.join(name)))
    }

    /// Removes what interrupted saves of this attempt and of those before it have left.
    fn remove_unfinished(&self) -> Result<()> {
        files::remove_unfinished(&self.dir, self.lease.number())
    }

    /// What lies in the checkpoints' folder.
    fn names(&self) -> Result<Vec<String>> {
        files::names(&self.dir)
    }

    /// The steps of the checkpoints on disk, newest first.
    fn steps(&self) -> Result<Vec<u64>> {
        let names = self.names()?;
        let mut steps: Vec<u64> = names.iter().filter_map(|n| n.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    /// Restores the newest checkpoint that is whole and belongs to this run; every rank must call it.
    /// Damaged ones are skipped with the reason in the log. What interrupted saves have left is removed first.
    ///
    /// # Errors
    /// Where the checkpoint is of models of another shape, of a run on other data or of another version of the trainer, storage
    /// failed, or a peer was lost.
    pub fn restore(&self, group: &Group, models: &mut [(&str, &mut Model)]) -> Result<Option<Restored>> {
        if group.is_first() {
            self.remove_unfinished()?;
        }
        let Some((step, manifest)) = self.newest(group)? else { return Ok(None) };
        if manifest.data != hex(&self.data.rows) {
            let path = self.path(step);
            return Err(Error::input(format!(
                "{}: {}, or delete the checkpoint to start the stage anew",
                path.display(),
                self.data.why_others(&path)
            )));
        }
        if let (Some((_, model)), Some(before)) = (models.first(), &manifest.machine) {
            let now = Machine::here(group.world_size(), model.device());
            if group.is_first() && *before != now {
                tracing::warn!(
                    "the checkpoint was written by {before}, and {now} go on: sums round otherwise, so that the run will not end bit for bit as it would have"
                );
            }
        }
        for (name, model) in models.iter_mut() {
            let entry =
                manifest.models.get(*name).ok_or_else(|| self.mismatch(step, format!("it has no model '{name}'")))?;
            if !entry.fits(model) {
                let what = format!("its model '{name}' has another shape, or its parameters another order");
                return Err(self.mismatch(step, what));
            }
            shard_file::read(&self.path(step), &manifest.files, name, model)?;
            model.restored(entry.updates, entry.loss_scale, entry.skips)?;
        }
        Ok(Some(Restored { step, state: manifest.state, checkpoint: self.describe(step) }))
    }

    fn mismatch(&self, step: u64, what: String) -> Error {
        Error::input(format!("{}: {what}; delete the checkpoint to start the stage anew", self.path(step).display()))
    }

    /// The newest checkpoint of this run whose files are what they were. Each rank reads its share of the
    /// files, and all of them go through the same checkpoints. Rank 0 sets damaged ones aside.
    fn newest(&self, group: &Group) -> Result<Option<(u64, Manifest)>> {
        let mut steps = if group.is_first() { self.steps()? } else { vec![] }.into_iter();
        loop {
            let next = steps.next().map_or(-1, |step| step as i64);
            let Ok(step) = u64::try_from(group.from_first(next)?) else { return Ok(None) };
            let path = self.path(step);
            let checked = self.check(group, &path)?;
            let damaged = group.any(matches!(checked, Err(Unusable::Damaged(_))))?;
            match checked {
                Ok(manifest) if !damaged => return Ok(Some((step, manifest))),
                Ok(_) => {}
                Err(Unusable::Damaged(reason) | Unusable::Foreign(reason)) => {
                    tracing::warn!(checkpoint = %path.display(), reason, "skipping a checkpoint");
                }
            }
            if damaged && group.is_first() {
                files::publish_dir(&path, &files::sibling(&path, "damaged"), &self.lease)?;
            }
        }
    }

    fn foreign(&self, run: RunId) -> Unusable {
        Unusable::Foreign(format!("it belongs to run {run}, not to {}", self.run))
    }

    /// Whether this rank's share of a checkpoint is sound.
    ///
    /// # Errors
    /// Another version of the trainer wrote it for this run, or storage failed.
    fn check(&self, group: &Group, path: &Path) -> Result<std::result::Result<Manifest, Unusable>> {
        let manifest = match Manifest::read(path) {
            Ok(manifest) => manifest,
            Err(ReadError::Io(e)) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::storage(path, e)),
            Err(ReadError::OtherVersion { run: Some(run), .. }) if run != self.run => {
                return Ok(Err(self.foreign(run)));
            }
            Err(e @ ReadError::OtherVersion { .. }) => {
                return Err(Error::input(format!(
                    "{}: {e}: another version of the trainer wrote it; go on with the image of that version, or name another storage.runPath to start anew",
                    path.display()
                )));
            }
            Err(e) => return Ok(Err(Unusable::Damaged(e.to_string()))),
        };
        if !manifest.is_of(self.run) {
            return Ok(Err(self.foreign(manifest.run)));
        }
        for file in group.share(&manifest.files) {
            match file.is_intact(path) {
                Ok(true) => {}
                Ok(false) => return Ok(Err(Unusable::Damaged(format!("{}: it is not what was written", file.name)))),
                Err(e) => return Err(Error::storage(&path.join(&file.name), e)),
            }
        }
        Ok(Ok(manifest))
    }
}

/// What a failed save leaves would take the room that the next attempt needs. The save's own error is the one to tell.
fn remove_failed(removed: Result<()>) {
    if let Err(error) = removed {
        tracing::warn!("an unfinished checkpoint is left: {error}");
    }
}

/// The step of a checkpoint of this name that was set aside as damaged.
fn damaged_step(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?.strip_suffix(".damaged")?.parse().ok()
}

/// Why a checkpoint is not resumed from.
enum Unusable {
    Damaged(String),
    Foreign(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_that_was_set_aside_tells_its_step() {
        assert_eq!(["step-20.damaged", "step-20", "step-20.old"].map(damaged_step), [Some(20), None, None]);
    }
}
