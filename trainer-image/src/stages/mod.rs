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

use crate::error::Result;
use rlhf_api::report::Output;
use rlhf_api::stage::StageKind;

/// Runs the stage to its end (or resumes it) and writes its model. One that an attempt before has brought to its end is done.
///
/// # Errors
/// With the exit code that the operator acts on; [`rlhf_api::report::ExitCode::Terminated`] after a checkpoint where
/// the process was asked to stop.
pub fn run(context: Context) -> Result<Output> {
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
