//! The dynamic loss scale that keeps fp16 gradients within fp16's range (Micikevicius 2018).
//!
//! The loss is multiplied by it and the gradient divided. A step whose gradient overflows is skipped and halves it; a run
//! of good steps doubles it. All ranks see the same gradient norm, so all hold the same scale.

use crate::error::{Error, Result};
use rlhf_api::report::ExitCode;
use serde::{Deserialize, Serialize};

/// The start, as in torch's GradScaler.
const START: f64 = 65536.0;
/// Good steps after which the scale is doubled: fewer than torch's 2000, as a stage may have only some hundred steps.
const GROWTH_STEPS: u32 = 1000;
/// Below this the gradient itself is out of range and no scale helps.
const LEAST: f64 = 1.0 / 65536.0;

/// A loss scale and the good steps since it last changed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LossScale {
    /// What the loss is multiplied by.
    pub scale: f64,
    good_steps: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: START, good_steps: 0 }
    }
}

impl LossScale {
    /// After a step with a finite gradient.
    pub fn grow(&mut self) {
        self.good_steps += 1;
        if self.good_steps == GROWTH_STEPS {
            *self = Self { scale: self.scale * 2.0, good_steps: 0 };
        }
    }

    /// After a step that was skipped.
    ///
    /// # Errors
    /// The scale is as low as it can usefully be.
    pub fn shrink(&mut self) -> Result<()> {
        if self.scale <= LEAST {
            return Err(Error::new(
                ExitCode::NotFinite,
                format!("the gradient is not finite, and was not at any loss scale down to {LEAST:.1e}"),
            ));
        }
        *self = Self { scale: self.scale / 2.0, good_steps: 0 };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_doubles_after_good_steps_and_halves_after_a_bad_one_until_no_scale_helps() {
        let mut scale = LossScale::default();
        (0..GROWTH_STEPS).for_each(|_| scale.grow());
        assert_eq!(scale.scale, 2.0 * START);
        (0..33).for_each(|_| scale.shrink().unwrap());
        assert_eq!((scale.scale, scale.good_steps), (LEAST, 0));
        let error = scale.shrink().unwrap_err();
        assert_eq!(error.exit, ExitCode::NotFinite);
    }
}
