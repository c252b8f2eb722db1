//! How much room a job takes on its volume: what each stage's checkpoints and its model come to, told before any device is taken.

use super::models::Models;
use crate::error::{Error, Result};
use crate::model::{HeadKind, ModelSpec, ParamSpec, Segment};
use rlhf_api::config::StageConfig;
use rlhf_api::stage::StageKind;
use std::path::Path;

/// Bytes of a trained number in a checkpoint: its value and two moments, in fp32.
const SAVED: u64 = 12;
/// Bytes of a number in a model that is written.
const WRITTEN: u64 = 4;

/// What one stage takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// A checkpoint.
    pub checkpoint: u64,
    /// All checkpoints at their most: those that are kept, and one that is being written.
    pub checkpoints: u64,
    /// The stage's model.
    pub output: u64,
}

/// What a stage takes that trains a model of this shape and, in PPO, a critic of that.
pub(super) fn of(stage: &StageConfig, [model, critic]: [&ModelSpec; 2]) -> Room {
    let trained = |model: &ModelSpec, head: HeadKind| match stage.kind.lora() {
        None => model.parameter_count(head).unsigned_abs(),
        Some(lora) => {
            let numbers = |params: Vec<ParamSpec>| params.iter().map(|p| p.shape.iter().product::<i64>()).sum::<i64>();
            let scalar_head = if head == HeadKind::Scalar { numbers(model.params(Segment::Head, head)) } else { 0 };
            (numbers(model.adapter_params(lora)) * model.layers as i64 + scalar_head).unsigned_abs()
        }
    };
    let (numbers, head) = match stage.kind {
        StageKind::Sft(_) => (trained(model, HeadKind::Lm), HeadKind::Lm),
        StageKind::RewardModel(_) => (trained(model, HeadKind::Scalar), HeadKind::Scalar),
        StageKind::Ppo(_) => (trained(model, HeadKind::Lm) + trained(critic, HeadKind::Scalar), HeadKind::Lm),
    };
    let checkpoint = SAVED * numbers;
    let checkpoints = (u64::from(stage.checkpoint.keep) + 1) * checkpoint;
    Room { checkpoint, checkpoints, output: WRITTEN * model.parameter_count(head).unsigned_abs() }
}

/// Tells what each stage takes, and warns where the volume has less left than all of them.
///
/// # Errors
/// The volume does not say what is left of it.
pub(super) fn tell(stages: &[StageConfig], models: &Models, volume: &Path) -> Result<()> {
    let found = rustix::fs::statvfs(volume).map_err(|e| Error::storage(volume, e))?;
    let (free, mut all) = (found.f_bavail.saturating_mul(found.f_frsize), 0);
    for stage in stages {
        let Some(trained) = models.trained(stage) else { continue };
        let Room { checkpoint, checkpoints, output } = of(stage, trained);
        let (name, keep) = (&stage.stage, stage.checkpoint.keep);
        tracing::info!(stage = name, checkpoint, keep, checkpoints, output, "bytes that the stage takes on the volume");
        all += checkpoints + output;
    }
    match free < all {
        true => tracing::warn!(
            needed = all,
            free,
            "the volume has less room than the job's checkpoints and models may take, in bytes: give it more, or keep fewer (checkpoint.keep)"
        ),
        false => {
            tracing::info!(needed = all, free, "the volume has room for the job's checkpoints and models, in bytes")
        }
    }
    Ok(())
}
