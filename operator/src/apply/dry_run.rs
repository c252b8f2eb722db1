//! Asks the API server, before prepare and after a change of the spec, whether it would take the Jobs of all stages.
//!
//! Much of a pod only the API server can judge (requests above limits, tolerations, the names of runtime classes). What it
//! refuses of the last stage is found before the first has trained: by `create` with `dryRun=All`, which writes nothing.
//! That is one request for each stage, once for each generation of the spec.

use super::STAGES_AT_ONCE;
use super::error::Error;
use super::make::Writer;
use crate::build::{self, Attempt, Task};
use crate::context::Context;
use crate::decide::Decision;
use futures::{StreamExt, stream};
use rlhf_api::job::{RLHFJob, StagePhase};
use rlhf_api::names;

/// Whether the Jobs of the job as it is now have yet to be asked about.
///
/// What an operator before this process has let through need not be asked about again.
pub(super) fn is_due(job: &RLHFJob, decision: &Decision, ctx: &Context) -> bool {
    let begins = decision.make.iter().any(|children| children.stage == names::PREPARE);
    match ctx.known.checked(job) {
        _ if decision.make.is_empty() => false,
        None if !begins => {
            ctx.known.check_done(job);
            false
        }
        checked => checked != job.metadata.generation,
    }
}

/// Asks about the Jobs of all stages that have not succeeded.
///
/// # Errors
/// The API server finds a field of one invalid; or, before prepare, something else denies one; or there is no answer.
pub(super) async fn check(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Result<(), Error> {
    let slot = |task: &Task<'_>| decision.status.slot(task.name());
    let left = |task: &Task<'_>| slot(task).is_none_or(|slot| slot.phase != StagePhase::Succeeded);
    let asked: Vec<_> = Task::all(job).skip(1).filter(left).map(|task| ask(job, task, ctx)).collect();
    let answers: Vec<_> = stream::iter(asked).buffered(STAGES_AT_ONCE).collect().await;
    let begins = decision.make.iter().any(|children| children.stage == names::PREPARE);
    // What is wrong in the spec says more than what may pass.
    let (wrong, other): (Vec<_>, Vec<_>) = answers.into_iter().filter_map(Result::err).partition(Error::is_of_the_spec);
    let counts = |error: &Error| begins || !matches!(error, Error::Refused { .. });
    if let Some(error) = wrong.into_iter().chain(other.into_iter().filter(counts)).next() {
        return Err(error);
    }
    ctx.known.check_done(job);
    Ok(())
}

async fn ask(job: &RLHFJob, task: Task<'_>, ctx: &Context) -> Result<(), Error> {
    // The strategy is chosen once prepare is done; it is a word in a variable, which no API server judges.
    let spec = if let Task::Stage(stage) = task { job.strategy(stage) } else { job.spec.strategy };
    let attempt = Attempt { number: 1, strategy: spec.fixed().unwrap_or_default() };
    // What the spec itself forbids is said elsewhere.
    let Ok(children) = build::children(job, task, attempt, &ctx.settings) else { return Ok(()) };
    let child = children.attempt().map_err(|source| Error::Json { what: task.name().into(), source })?;
    match (Writer { job, child: &child, ctx }).create(true).await {
        Ok(_) => Ok(()),
        // A webhook with side effects cannot be asked. It is when the Job is made.
        Err(Error::Refused { status, .. }) if status.message.contains("does not support dry run") => Ok(()),
        Err(Error::Refused { what, status }) => {
            Err(Error::Refused { what: format!("stage {}: {what}", task.name()), status })
        }
        Err(error) => Err(error),
    }
}
