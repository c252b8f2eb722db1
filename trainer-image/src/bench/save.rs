//! What a save costs training: the seconds by which one that goes on in the background lengthens it, beside those of the same
//! save while nothing else is done.

use crate::engine::Model;
use crate::error::Result;
use crate::files;
use crate::stages::Context;
use serde_json::Value;
use std::path::Path;
use std::time::Instant;

/// Seconds of saves, on average.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saves {
    /// Until a save is whole while training waits for it.
    pub foreground: f64,
    /// By which some steps take longer with a save at their beginning.
    pub stall: f64,
}

/// Measures `rounds` saves of each kind, and as many steps without one. `step` makes a step, which takes about `step_seconds`.
/// What was written is removed. Every rank calls it.
///
/// # Errors
/// Where a step or storage fails, or a peer was lost.
pub(super) fn measure(
    context: &Context,
    rounds: u32,
    model: &mut Model,
    step_seconds: f64,
    mut step: impl FnMut(&mut Model) -> Result<()>,
) -> Result<Saves> {
    let start = |number: u64, model: &Model| {
        context.checkpoints().start_save(&context.group, number, &[("model", model)], &Value::Null, |_| ())
    };
    // The first files of a folder cost more than those that follow.
    start(0, model)?.finish(&context.group)?;
    let (mut foreground, mut steps, mut stall) = (0.0, 0, 0.0);
    for round in 1..=u64::from(rounds) {
        let started = now(context)?;
        start(2 * round, model)?.finish(&context.group)?;
        let whole = started.elapsed().as_secs_f64();
        foreground += whole;
        if steps == 0 {
            // On every rank as many: twice as long as a save takes.
            steps = context.group.from_first((2.0 * whole / step_seconds).ceil() as i64)?.max(2);
        }
        let started = now(context)?;
        (0..steps).try_for_each(|_| step(model))?;
        let without = started.elapsed().as_secs_f64();
        let started = now(context)?;
        let saving = start(2 * round + 1, model)?;
        (0..steps).try_for_each(|_| step(model))?;
        saving.finish(&context.group)?;
        stall += started.elapsed().as_secs_f64() - without;
    }
    context.group.barrier()?;
    if context.group.is_first() {
        files::remove_dir(Path::new(&context.config.paths.checkpoints))?;
    }
    Ok(Saves { foreground: foreground / f64::from(rounds), stall: stall / f64::from(rounds) })
}

/// The time at which every rank is here.
fn now(context: &Context) -> Result<Instant> {
    context.group.barrier()?;
    Ok(Instant::now())
}
