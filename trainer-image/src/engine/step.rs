//! Optimizer steps.
//!
//! A gradient that is not finite changes nothing: the step is skipped. In fp16 it has overflowed, and the loss scale falls. In
//! the other formats a batch is to blame, of which training survives a few ([`Skips`]); where models learn from one batch
//! together, none of them steps without the others.

use super::chunk::Chunk;
use super::model::Model;
use crate::error::{Error, Result};
use c10d::AdamW;
use rlhf_api::report::ExitCode;
use rlhf_api::stage::Optimizer;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Batches that may be skipped before [`GOOD_STEPS`] steps are made in a row: a few bad records are forgiven in every epoch of
/// some size, while a model that has gone astray is found out within six steps.
const SKIPS: u32 = 5;
/// Steps in a row after which all [`SKIPS`] may be used again.
const GOOD_STEPS: u32 = 100;

/// What an optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// It was made; the gradient's global norm before clipping.
    Made(f64),
    /// The gradient of this norm, or that of a model that steps with it, is not finite: the parameters are as they were.
    Skipped(f64),
}

/// The batches that may still be skipped, and the good steps since the last one was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Skips {
    left: u32,
    good_steps: u32,
}

impl Default for Skips {
    fn default() -> Self {
        Self { left: SKIPS, good_steps: 0 }
    }
}

impl Skips {
    /// Whether all of them are left.
    pub fn are_whole(&self) -> bool {
        self.left == SKIPS
    }

    fn made(&mut self) {
        self.good_steps += 1;
        if self.good_steps == GOOD_STEPS {
            *self = Self::default();
        }
    }

    fn skip(&mut self, norm: f64) -> Result<()> {
        let left = self.left.checked_sub(1).ok_or_else(|| {
            let message =
                format!("the gradient's norm is {norm}, and {SKIPS} batches before were skipped for the same reason");
            Error::new(ExitCode::NotFinite, message)
        })?;
        *self = Self { left, good_steps: 0 };
        Ok(())
    }
}

/// Clips each model's gradient by its global norm and makes one AdamW step, of each model with its settings and learning rate;
/// of none where the gradient of any is not finite. Every rank calls it.
///
/// # Errors
/// Where a peer was lost, or too many gradients were not finite (the parameters are then as they were).
pub fn step_together(models: Vec<(&mut Model, &Optimizer, f64)>) -> Result<Vec<Step>> {
    let norms: Vec<f64> = models.iter().map(|(model, ..)| model.gradient_norm()).collect::<Result<_>>()?;
    let finite = norms.iter().all(|norm| norm.is_finite());
    for (norm, (model, settings, learning_rate)) in norms.iter().zip(models) {
        if finite { model.make_step(settings, learning_rate, *norm)? } else { model.skip(*norm)? }
    }
    Ok(norms.into_iter().map(|norm| if finite { Step::Made(norm) } else { Step::Skipped(norm) }).collect())
}

impl Model {
    /// [`step_together`] of this model alone.
    ///
    /// # Errors
    /// As that.
    pub fn step(&mut self, settings: &Optimizer, learning_rate: f64) -> Result<Step> {
        let steps = step_together(vec![(self, settings, learning_rate)])?;
        steps.into_iter().next().ok_or_else(|| Error::bug("a step is lost"))
    }

    /// Forgets the gradient, as if its batch had never been run.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn forget_gradient(&mut self) -> Result<()> {
        self.trained_mut().try_for_each(Chunk::skip)
    }

    fn make_step(&mut self, settings: &Optimizer, learning_rate: f64, norm: f64) -> Result<()> {
        // As torch.nn.utils.clip_grad_norm_.
        let clip = (settings.max_grad_norm / (norm + 1e-6)).min(1.0);
        let adamw = AdamW {
            lr: learning_rate,
            beta1: settings.beta1,
            beta2: settings.beta2,
            epsilon: settings.epsilon.unwrap_or(Optimizer::EPSILON),
            weight_decay: 0.0,
        };
        let scale = self.scale_of_loss();
        self.updates += 1;
        let updates = self.updates;
        for chunk in self.trained_mut() {
            chunk.optimize(&adamw, settings.weight_decay, clip / scale, updates)?;
        }
        self.publish()?;
        match &mut self.loss_scale {
            Some(scale) => scale.grow(),
            None => self.skips.made(),
        }
        Ok(())
    }

    /// What the loss, and so the gradient, is multiplied by.
    pub(super) fn scale_of_loss(&self) -> f64 {
        self.loss_scale.map_or(1.0, |s| s.scale)
    }

    /// The L2 norm of the whole gradient of the loss, over all ranks.
    fn gradient_norm(&self) -> Result<f64> {
        let squares = self.trained().map(Chunk::squared_norm).collect::<Result<Vec<_>>>()?;
        let squares: Vec<Tensor> = squares.into_iter().flatten().collect();
        let mut sum = [Tensor::f_stack(&squares, 0)?.f_sum(Kind::Double)?.f_double_value(&[])?];
        if self.placement.shards_state() {
            self.group.sum(&mut sum)?;
        }
        Ok(sum[0].sqrt() / self.scale_of_loss())
    }

    /// Gives a step up. `norm` is finite where another model is to blame.
    fn skip(&mut self, norm: f64) -> Result<()> {
        if !norm.is_finite() {
            let step = self.updates + 1;
            let blamed = match &mut self.loss_scale {
                Some(scale) => scale.shrink(),
                None => self.skips.skip(norm),
            };
            blamed.map_err(|e| e.context(format!("optimizer step {step}")))?;
        }
        self.forget_gradient()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_batches_are_skipped_and_forgiven_after_many_good_steps() {
        let mut skips = Skips::default();
        for _ in 0..3 {
            (0..SKIPS).for_each(|_| skips.skip(f64::NAN).unwrap());
            (0..GOOD_STEPS).for_each(|_| skips.made());
        }
        for _ in 0..SKIPS {
            skips.skip(f64::INFINITY).unwrap();
            (1..GOOD_STEPS).for_each(|_| skips.made());
        }
        let error = skips.skip(f64::NAN).unwrap_err();
        assert!(error.exit == ExitCode::NotFinite && error.message.contains("NaN"), "{error}");
    }
}
