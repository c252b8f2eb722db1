//! The adapters of a model's blocks (LoRA, Hu 2021) as values: fresh ones, and what they come to once they are merged.
//!
//! Each target's weight `W` `[out, in]` counts as `W + alpha / rank * B A`. A starts from the law of PEFT (uniform, as
//! `torch.nn.Linear`), B from zero, so that a fresh adapter changes nothing.

use super::{ModelSpec, Param, ParamSpec};
use crate::error::{Error, Result};
use crate::random;
use rlhf_api::stage::Lora;
use tch::{Device, Kind, Tensor};

/// Sets the draws of adapters apart from a stage's others.
const STREAM: u64 = 0x6c6f_7261;

/// A model's adapters, in fp32 on the CPU.
#[derive(Debug)]
pub struct Adapters {
    /// Their rank, scale and targets.
    pub lora: Lora,
    /// The values of [`ModelSpec::adapter_params`], block after block.
    pub blocks: Vec<Vec<Tensor>>,
}

impl Adapters {
    /// Adapters that change nothing yet.
    ///
    /// # Errors
    /// The model has none of the targets.
    pub fn fresh(spec: &ModelSpec, lora: &Lora, seed: u64) -> Result<Self> {
        let specs = Self::check(spec, lora)?;
        let block =
            |i: usize| (0u64..).zip(&specs).map(|(slot, s)| start(s, &[seed, STREAM, i as u64, slot])).collect();
        let blocks = c10d::on_host(|| (0..spec.layers).map(block).collect::<Result<_>>())?;
        Ok(Self { lora: lora.clone(), blocks })
    }

    /// The same adapters, nothing of whose inputs is dropped in training: they may come from a stage that asked for it.
    pub fn without_dropout(self) -> Self {
        Self { lora: Lora { dropout: 0.0, ..self.lora }, ..self }
    }

    /// The parameters that the adapters of a block of this model have.
    ///
    /// # Errors
    /// The model has none of the targets.
    pub fn check(spec: &ModelSpec, lora: &Lora) -> Result<Vec<ParamSpec>> {
        let specs = spec.adapter_params(lora);
        if specs.is_empty() {
            return Err(Error::config(format!(
                "lora.targets: the model's blocks have none of {:?}; choose other targets, or leave the field out for all",
                lora.targets
            )));
        }
        Ok(specs)
    }
}

/// Adds to a block's parameters, which are `values` in the order of `params`, what its adapters come to: `factors`, in the
/// order of [`ModelSpec::adapter_params`]. The values are changed in place.
///
/// # Errors
/// Where libtorch fails.
pub fn merge_adapters(
    lora: &Lora,
    factors: &[Tensor],
    spec: &ModelSpec,
    params: &[ParamSpec],
    values: &[Tensor],
) -> Result<()> {
    let named: Vec<(Param, &Tensor)> = spec.adapter_params(lora).iter().map(|s| s.param).zip(factors).collect();
    let find = |param: Param| named.iter().find(|(p, _)| *p == param).map(|(_, value)| *value);
    for (param, value) in params.iter().zip(values) {
        let Some(linear) = param.param.as_weight() else { continue };
        if let (Some(a), Some(b)) = (find(Param::LoraA(linear)), find(Param::LoraB(linear))) {
            let _ = value.shallow_clone().f_add_(&b.f_matmul(a)?.f_mul_scalar_(lora.scale())?)?;
        }
    }
    Ok(())
}

/// A factor's start: `kaiming_uniform_(a=sqrt(5))`, which is uniform within one over the root of the inputs, or zero.
fn start(spec: &ParamSpec, coordinates: &[u64; 4]) -> Result<Tensor> {
    let shape = spec.shape.as_slice();
    let (&[_, inputs], Param::LoraA(_)) = (shape, spec.param) else {
        return Ok(Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?);
    };
    let bound = 1.0 / (inputs as f64).sqrt();
    let draw = random::bits(coordinates);
    let numel = shape.iter().product::<i64>() as u64;
    let values: Vec<f32> = (0..numel).map(|i| ((2.0 * random::uniform(&[draw, i]) - 1.0) * bound) as f32).collect();
    Ok(Tensor::from_slice(&values).f_view(shape)?)
}
