//! What can be checked of a job before any device is taken: its volume, model, tokenizer, lengths and every record.
//!
//! The datasets are tokenised here, so that what passes here is what the stages map.

mod models;
mod room;

use crate::data::{self, Recipe, Summary};
use crate::error::{Error, Result};
use crate::files;
use crate::lease::Lease;
use crate::model::ModelSpec;
use crate::run::Run;
use crate::stages::refuse_unknown;
use crate::telemetry::Telemetry;
use models::Models;
use rlhf_api::config::{PrepareConfig, StageConfig};
use rlhf_api::report::{DatasetShape, MAX_PREPARED_BYTES, Prepared};
use rlhf_api::stage::StageKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of prepare's last word beside what it found.
const BESIDE_PREPARED: usize = 512;
/// How often a check that takes long is told in the log.
const LOG_EVERY: Duration = Duration::from_secs(30);
/// Written to see whether a folder can be written, and removed.
const PROBE: &str = ".rlhf-probe";

/// What was found of a job's model and datasets.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareReport {
    /// The shapes of the models that exist before the job, in the config's order.
    pub models: Vec<ModelSpec>,
    /// One for each stage, in the job's order.
    pub stages: Vec<StageReport>,
}

impl PrepareReport {
    /// What the operator plans with.
    ///
    /// # Errors
    /// There are so many models and stages that a termination message cannot tell of all.
    pub fn prepared(&self) -> Result<Prepared> {
        let bounded = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let shape = |report: &StageReport| DatasetShape {
            stage: report.stage.clone(),
            longest_tokens: bounded(report.dataset.longest_tokens),
            sequences: bounded(report.dataset.sequences),
            records: report.dataset.train + report.dataset.eval,
            tokens: report.dataset.tokens,
        };
        let prepared = Prepared { models: self.models.clone(), datasets: self.stages.iter().map(shape).collect() };
        prepared.check().map_err(|e| Error::input(format!("what was found cannot be planned with: {e}")))?;
        let bytes = serde_json::to_vec(&prepared).map_err(|e| Error::bug(e.to_string()))?.len();
        if bytes + BESIDE_PREPARED > MAX_PREPARED_BYTES {
            let (models, stages) = (self.models.len(), self.stages.len());
            return Err(Error::config(format!(
                "the job has {models} models and {stages} stages, more than a pod's last word can tell of ({MAX_PREPARED_BYTES} bytes): split it into jobs"
            )));
        }
        Ok(prepared)
    }
}

/// The figures of a stage's dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageReport {
    /// The stage's name.
    pub stage: String,
    /// Its dataset.
    pub dataset: Summary,
}

/// Checks the job of `config`, whose volume is mounted at `volume`.
///
/// # Errors
/// The first thing that is wrong: where it is, and what to do.
pub fn run(config: &PrepareConfig, volume: &Path, telemetry: &Telemetry) -> Result<PrepareReport> {
    let first = config.stages.first().ok_or_else(|| Error::config("the job has no stages; write one or more"))?;
    let mut parts = Parts::new(telemetry, config.models.len().max(1) + config.stages.len());
    for stage in &config.stages {
        refuse_unknown(&stage.kind).map_err(|e| e.context(format!("stage '{}'", stage.stage)))?;
        Run::new(stage, volume).check()?;
        output_dirs(stage, volume).iter().try_for_each(|dir| check_writable(dir))?;
    }
    let mut models = Models::open(config, &first.paths.base_model, volume, &mut parts)?;
    for stage in &config.stages {
        models.check_stage(stage).map_err(|e| e.context(format!("stage '{}'", stage.stage)))?;
    }
    let mut check = |stage: &StageConfig| {
        let files: Vec<_> = stage.kind.dataset().1.files().into_iter().map(|(_, source)| source).collect();
        parts.begin(format!("stage '{}': {}", stage.stage, files.join(", ")));
        let report = check_dataset(stage, volume)?;
        models
            .check_tokens(stage, report.dataset.highest_id)
            .map_err(|e| e.context(format!("stage '{}'", stage.stage)))?;
        Ok::<_, Error>(report)
    };
    let stages = config.stages.iter().map(&mut check).collect::<Result<_>>()?;
    // The tokenised datasets have their room by now.
    room::tell(&config.stages, &models, volume)?;
    Ok(PrepareReport { models: models.told, stages })
}

/// What is checked one after the other, told as progress: which of how many, and the records that have been read.
struct Parts<'a> {
    telemetry: &'a Telemetry,
    begun: u64,
    /// What is checked now, for the log of a long check.
    now: Arc<Mutex<String>>,
}

impl<'a> Parts<'a> {
    fn new(telemetry: &'a Telemetry, all: usize) -> Self {
        telemetry.set_total_steps(all as u64);
        telemetry.count_records();
        let now: Arc<Mutex<String>> = Arc::default();
        let told = Arc::downgrade(&now);
        // It ends at its first look after the last check.
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(LOG_EVERY);
                let Some(now) = told.upgrade() else { return };
                let what = now.lock().unwrap_or_else(PoisonError::into_inner).clone();
                tracing::info!(records = data::records_read(), "still checking {what}");
            }
        });
        Self { telemetry, begun: 0, now }
    }

    /// The next one begins.
    fn begin(&mut self, what: String) {
        self.telemetry.part_done(self.begun);
        self.telemetry.doing(format!("checking {what}"));
        self.begun += 1;
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }
}

/// The folders in which a stage makes its folders.
fn output_dirs(stage: &StageConfig, volume: &Path) -> [PathBuf; 2] {
    let output = volume.join(&stage.paths.output);
    [output.parent().map(Path::to_path_buf).unwrap_or(output), volume.join(&stage.paths.checkpoints)]
}

/// Makes a folder, and writes, flushes and removes a file in it.
fn check_writable(dir: &Path) -> Result<()> {
    files::make_dir(dir)?;
    let probe = dir.join(PROBE);
    files::write(&probe, PROBE.as_bytes())?;
    std::fs::remove_file(&probe).map_err(|e| Error::storage(&probe, e))
}

/// Tokenises a stage's whole dataset, where that is not done yet.
fn check_dataset(stage: &StageConfig, volume: &Path) -> Result<StageReport> {
    let load = || {
        // Of killed ones that came before; what an attempt writes is under a lease.
        let lease = Lease::default();
        files::remove_unfinished(Run::new(stage, volume).dir(), lease.number())?;
        Ok(Recipe::of(stage, volume)?.find_or_make(&lease)?.summary().clone())
    };
    let dataset = load().map_err(|e: Error| Error::new(e.exit, format!("stage '{}': {}", stage.stage, e.message)))?;
    log(stage, &dataset);
    Ok(StageReport { stage: stage.stage.clone(), dataset })
}

fn log(stage: &StageConfig, dataset: &Summary) {
    let Summary { records, train, eval, dropped, truncated, tokens, longest_tokens, .. } = dataset.clone();
    tracing::info!(
        stage = stage.stage,
        records,
        train,
        eval,
        dropped,
        truncated,
        tokens,
        longest_tokens,
        "dataset is good"
    );
    for warning in dataset.warnings() {
        tracing::warn!(stage = stage.stage, "{warning}");
    }
    let (setting, size) = match &stage.kind {
        StageKind::Sft(s) => ("batch.globalSize", s.batch.global_size),
        StageKind::RewardModel(s) => ("batch.globalSize", s.batch.global_size),
        StageKind::Ppo(s) => ("rolloutBatchSize", s.rollout_batch_size),
    };
    if u64::from(size) > dataset.packed_rows.unwrap_or(train) {
        tracing::warn!(stage = stage.stage, train, "{setting} is {size}, more than there are records to train on");
    }
}

#[cfg(test)]
mod tests;
