//! How much room a job takes on its volume at most: what each stage's checkpoints and its model come to, told before any device
//! is taken.

use super::models::{Models, Trained};
use crate::engine::ChunkLayout;
use crate::error::{Error, Result};
use crate::model::{HeadKind, ModelSpec, ParamSpec, Segment};
use rlhf_api::config::{KeepCheckpoints, StageConfig};
use rlhf_api::stage::StageKind;
use std::collections::BTreeSet;
use std::path::Path;

/// Bytes of a trained number in a checkpoint: its value and two moments, in fp32 whatever the strategy, which only says which
/// rank writes them.
const SAVED: u64 = 12;
/// Bytes of a number of an adapter that is written.
const FP32: u64 = 4;

/// What one stage takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// A checkpoint.
    pub checkpoint: u64,
    /// The most at once: the checkpoints that are kept, and one that is being written or then the model.
    pub most: u64,
    /// The stage's model, and the adapters beside it.
    pub output: u64,
    /// What stays once the stage is done: that, and the checkpoints where they are kept.
    pub stays: u64,
}

/// What a stage takes.
pub(super) fn of(stage: &StageConfig, Trained { model, critic, kind }: Trained<'_>) -> Room {
    let elements = |params: Vec<ParamSpec>| ChunkLayout::new(params).numel.unsigned_abs();
    let adapters =
        |spec: &ModelSpec| stage.kind.lora().map(|lora| elements(spec.adapter_params(lora)) * spec.layers as u64);
    let saved = |spec: &ModelSpec, head: HeadKind| match adapters(spec) {
        None => spec.segments().into_iter().map(|segment| elements(spec.params(segment, head))).sum(),
        Some(adapters) if head == HeadKind::Scalar => adapters + elements(spec.params(Segment::Head, head)),
        Some(adapters) => adapters,
    };
    let (numbers, head) = match stage.kind {
        StageKind::Sft(_) => (saved(model, HeadKind::Lm), HeadKind::Lm),
        StageKind::RewardModel(_) => (saved(model, HeadKind::Scalar), HeadKind::Scalar),
        StageKind::Ppo(_) => {
            let critic = critic.map_or(0, |critic| saved(critic, HeadKind::Scalar));
            (saved(model, HeadKind::Lm) + critic, HeadKind::Lm)
        }
    };
    let checkpoint = SAVED * numbers;
    let written = kind.elt_size_in_bytes() as u64 * model.parameter_count(head).unsigned_abs();
    let output = written + FP32 * adapters(model).unwrap_or_default();
    let kept = u64::from(stage.checkpoint.keep) * checkpoint;
    let stays = output + if stage.keep_checkpoints == KeepCheckpoints::Always { kept } else { 0 };
    Room { checkpoint, most: kept + checkpoint.max(output), output, stays }
}

/// An upper bound of what stages take at once. One that needs another's model runs after it, and finds what that leaves; all
/// others may run at its side. They count in full even where they follow each other, or where the job's devices let only one
/// run: it may come to less, and never to more.
pub(super) fn most(stages: &[(&StageConfig, Room)]) -> u64 {
    // For each stage, those before it whose models it needs, and those whose models these need.
    let mut needed: Vec<BTreeSet<usize>> = Vec::new();
    for (i, (stage, _)) in stages.iter().enumerate() {
        let direct = (0..i).filter(|j| uses(stage, &stages[*j].0.paths.output));
        let all = direct.flat_map(|j| needed[j].iter().copied().chain([j])).collect();
        needed.push(all);
    }
    let at = |i: usize| -> u64 {
        let others = (0..stages.len()).filter(|j| *j != i && !needed[*j].contains(&i));
        let room = |j: usize| if needed[i].contains(&j) { stages[j].1.stays } else { stages[j].1.most };
        stages[i].1.most + others.map(room).sum::<u64>()
    };
    (0..stages.len()).map(at).max().unwrap_or_default()
}

/// Whether a stage uses the model at this path.
fn uses(stage: &StageConfig, model: &String) -> bool {
    let paths = &stage.paths;
    let one = [Some(&paths.start_model), paths.reference_model.as_ref(), paths.critic_model.as_ref()];
    one.into_iter().flatten().chain(paths.reward_models.values()).any(|path| path == model)
}

/// Tells what each stage takes at most, and warns where the volume has less left than all of them may come to.
///
/// # Errors
/// The volume does not say what is left of it.
pub(super) fn tell(stages: &[StageConfig], models: &Models, volume: &Path) -> Result<()> {
    let found = rustix::fs::statvfs(volume).map_err(|e| Error::storage(volume, e))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let mut rooms = Vec::new();
    for stage in stages {
        let Some(trained) = models.trained(stage) else { continue };
        let room @ Room { checkpoint, most, output, stays } = of(stage, trained);
        let (name, keep) = (&stage.stage, stage.checkpoint.keep);
        tracing::info!(
            stage = name,
            checkpoint,
            keep,
            most,
            output,
            stays,
            "bytes that the stage takes on the volume, at most and once it is done"
        );
        rooms.push((stage, room));
    }
    let needed = most(&rooms);
    match free < needed {
        true => tracing::warn!(
            needed,
            free,
            "the volume has less room than the job's checkpoints and models take at most, in bytes; stages that do not run side by side take less than this bound: give it more, or keep fewer (checkpoint.keep)"
        ),
        false => {
            tracing::info!(
                needed,
                free,
                "the volume has room for the most that the job's checkpoints and models take, in bytes"
            )
        }
    }
    Ok(())
}
