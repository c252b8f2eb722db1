//! One segment's parameters as a flat buffer, and what training adds to it.
//!
//! A chunk is the unit of reducing, optimising and checkpointing. Under data parallelism every rank holds it
//! whole; gradients of the micro-batches are summed here and reduced over the ranks once a step.

use super::group::Group;
use super::layout::ChunkLayout;
use crate::error::{Error, Result};
use crate::model::transformer::Params;
use c10d::{AdamW, Work};
use tch::{Device, Kind, Tensor};

/// Flat parameters `[numel]` in fp32, seen as one tensor a parameter.
pub struct Chunk {
    layout: ChunkLayout,
    flat: Tensor,
    params: Params,
    training: Option<Training>,
}

struct Training {
    gradient: Tensor,
    gradient_views: Vec<Tensor>,
    state: OptimizerState,
    reduction: Option<Work>,
}

/// AdamW's two moments, flat like the parameters.
pub struct OptimizerState {
    /// Mean of gradients.
    pub first: Tensor,
    /// Mean of squared gradients.
    pub second: Tensor,
}

impl Chunk {
    /// A chunk that holds these values, in the layout's order. A trainable one has a gradient and optimizer state beside it.
    ///
    /// # Errors
    /// Where the device has no room or a value has the wrong shape.
    pub fn new(layout: ChunkLayout, values: &[Tensor], device: Device, trainable: bool) -> Result<Self> {
        let zeros = || Tensor::f_zeros([layout.numel], (Kind::Float, device));
        let flat = zeros()?;
        let views = layout.views(&flat)?;
        if !views.iter().map(Tensor::size).eq(values.iter().map(Tensor::size)) {
            return Err(Error::bug("a chunk was given values of other shapes than its layout's"));
        }
        for (view, value) in views.iter().zip(values) {
            view.shallow_clone().f_copy_(value)?;
        }
        let leaves =
            views.into_iter().map(|v| Ok(v.f_detach()?.f_set_requires_grad(trainable)?)).collect::<Result<Vec<_>>>()?;
        let specs: Vec<_> = layout.slots.iter().map(|(s, _)| s.clone()).collect();
        let params = Params::new(&specs, leaves);
        let training = if trainable {
            let gradient = zeros()?;
            let gradient_views = layout.views(&gradient)?;
            Some(Training {
                gradient,
                gradient_views,
                state: OptimizerState { first: zeros()?, second: zeros()? },
                reduction: None,
            })
        } else {
            None
        };
        Ok(Self { layout, flat, params, training })
    }

    /// The parameters, as views into the chunk.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The flat parameters `[numel]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The optimizer's moments, where the chunk is trained.
    pub fn optimizer_state(&self) -> Option<&OptimizerState> {
        self.training.as_ref().map(|t| &t.state)
    }

    /// The gradient accumulated since the last step, one tensor a parameter, where the chunk is trained.
    pub fn gradients(&self) -> Option<&[Tensor]> {
        self.training.as_ref().map(|t| t.gradient_views.as_slice())
    }

    /// Adds gradients, one a parameter in order; `None` stands for zero.
    pub(super) fn accumulate<'a>(&mut self, gradients: impl IntoIterator<Item = &'a Option<Tensor>>) -> Result<()> {
        let Some(training) = &mut self.training else { return Ok(()) };
        for (view, gradient) in training.gradient_views.iter_mut().zip(gradients) {
            if let Some(gradient) = gradient {
                let _ = view.f_add_(gradient)?;
            }
        }
        Ok(())
    }

    /// Starts summing the gradient over the ranks; it is in flight until [`Chunk::finish_reduction`].
    pub(super) fn start_reduction(&mut self, group: &Group) -> Result<()> {
        let Some(training) = &mut self.training else { return Ok(()) };
        training.reduction = group.start_sum(&training.gradient)?;
        Ok(())
    }

    /// Waits for the reduction and returns the gradient's squared L2 norm as a tensor `[]`.
    pub(super) fn finish_reduction(&mut self) -> Result<Option<Tensor>> {
        let Some(training) = &mut self.training else { return Ok(None) };
        if let Some(work) = training.reduction.take() {
            work.wait()?;
        }
        Ok(Some(training.gradient.f_dot(&training.gradient)?))
    }

    /// One AdamW step with the gradient times `scale`; the gradient is zero afterwards. `step` counts from 1.
    pub(super) fn optimize(&mut self, adamw: &AdamW, weight_decay: f64, scale: f64, step: i64) -> Result<()> {
        let Some(training) = &mut self.training else { return Ok(()) };
        if scale != 1.0 {
            let _ = training.gradient.f_mul_scalar_(scale)?;
        }
        let (decayed, numel) = (self.layout.decayed, self.layout.numel);
        for (start, end, decay) in [(0, decayed, weight_decay), (decayed, numel, 0.0)] {
            if start < end {
                let part = |t: &Tensor| t.f_narrow(0, start, end - start);
                let adamw = AdamW { weight_decay: decay, ..*adamw };
                adamw.step(
                    &part(&self.flat)?,
                    &part(&training.gradient)?,
                    &part(&training.state.first)?,
                    &part(&training.state.second)?,
                    step,
                )?;
            }
        }
        let _ = training.gradient.f_zero_()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Param, ParamSpec};
    use serde_json::Value;

    fn numbers(json: &Value) -> Vec<f64> {
        json.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    /// torch's AdamW with gradient clipping, five steps: tests/golden/adamw.json. The reference is in fp64, so 1e-6 is fp32's rounding.
    #[test]
    fn five_clipped_steps_with_decay_equal_those_of_torch() {
        let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/adamw.json")).unwrap();
        let number = |field: &str| golden[field].as_f64().unwrap();
        let tensor = |json: &Value, shape: &[i64]| Tensor::from_slice(&numbers(json)).to_kind(Kind::Float).view(shape);
        let specs = vec![
            ParamSpec { param: Param::QueryWeight, shape: vec![2, 3] },
            ParamSpec { param: Param::QueryBias, shape: vec![3] },
        ];
        let of = |json: &Value| [tensor(&json["weight"], &[2, 3]), tensor(&json["bias"], &[3])];
        let mut chunk = Chunk::new(ChunkLayout::new(specs), &of(&golden["start"]), Device::Cpu, true).unwrap();
        let adamw = AdamW {
            lr: number("learning_rate"),
            beta1: number("beta1"),
            beta2: number("beta2"),
            epsilon: number("epsilon"),
            weight_decay: 0.0,
        };
        for (step, expected) in (1..).zip(golden["steps"].as_array().unwrap()) {
            chunk.accumulate(&of(&expected["gradient"]).map(Some)).unwrap();
            let norm = chunk.finish_reduction().unwrap().unwrap().sqrt().double_value(&[]);
            let scale = (number("max_grad_norm") / (norm + 1e-6)).min(1.0);
            chunk.optimize(&adamw, number("weight_decay"), scale, step).unwrap();
            for (name, actual) in ["weight", "bias"].iter().zip(chunk.params().tensors()) {
                let gap = (actual.flatten(0, -1).to_kind(Kind::Double)
                    - Tensor::from_slice(&numbers(&expected[*name])))
                .abs()
                .max()
                .double_value(&[]);
                assert!(gap < 1e-6, "step {step}, {name}: off by {gap}");
            }
        }
    }
}
