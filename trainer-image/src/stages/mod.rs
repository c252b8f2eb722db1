//! The algorithms. Each stage reads as its paper does: data in, loss, step, figures out. What a rank, a shard or a
//! device copy is, only the engine knows; a stage splits its batches by [`crate::engine::Group::share`] and sums its figures.

mod context;
mod export;
pub mod math;
pub(crate) mod ppo;
pub(crate) mod reward_model;
pub(crate) mod sft;
pub(crate) mod supervised;

pub use context::Context;

use crate::error::{Error, Result};
use rlhf_api::report::Output;
use rlhf_api::stage::StageKind;

/// Refuses what a newer operator asks for and this version does not know: it would be done as if nothing had been said.
///
/// # Errors
/// Names the first such field.
pub fn refuse_unknown(kind: &StageKind) -> Result<()> {
    kind.unknown().map_or(Ok(()), |field| Err(unknown(&field)))
}

fn unknown(field: &str) -> Error {
    Error::config(format!(
        "{field} says something that this version of the trainer does not know; run the job with the trainer image of a newer one, or ask for what this one knows"
    ))
}

/// Runs the stage to its end (or resumes it) and writes its model. One that an attempt before has brought to its end is done.
///
/// # Errors
/// With the exit code that the operator acts on; [`rlhf_api::report::ExitCode::Terminated`] after a checkpoint where
/// the process was asked to stop.
pub fn run(context: Context) -> Result<Output> {
    refuse_unknown(&context.config.kind)?;
    if let Some(output) = context.begin()? {
        return Ok(output);
    }
    go(&context).map_err(|error| context.lease().cause_of(error))
}

fn go(context: &Context) -> Result<Output> {
    let output = context.conclude(match context.config.kind.clone() {
        StageKind::Sft(settings) => sft::run(context, &settings),
        StageKind::RewardModel(settings) => reward_model::run(context, &settings),
        StageKind::Ppo(settings) => ppo::run(context, &settings),
    })?;
    context.complete(&output)?;
    Ok(output)
}
