//! The fused AdamW step (Loshchilov & Hutter, "Decoupled Weight Decay Regularization"), PyTorch's own kernel: one pass
//! over memory instead of a dozen, on CPU and CUDA.

use tch::{Kind, Tensor};

use crate::error::check;
use crate::ffi::{self, ptr};
use crate::{Error, Result};

/// AdamW's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Share of the parameter that is taken off, times `lr`, in each step.
    pub weight_decay: f64,
}

impl AdamW {
    /// Updates `param` and the moments `exp_avg` and `exp_avg_sq` in place by `grad`. All four: fp32, contiguous, the same
    /// shape and device (slices of flat buffers do). `step` is the number of this step, from 1.
    pub fn step(&self, param: &Tensor, grad: &Tensor, exp_avg: &Tensor, exp_avg_sq: &Tensor, step: i64) -> Result<()> {
        let all = [("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)];
        for (name, tensor) in all {
            check_tensor(name, tensor, param)?;
        }
        if step < 1 {
            return Err(Error::Torch(format!("AdamW: step {step}, but steps are counted from 1")));
        }
        let AdamW { lr, beta1, beta2, epsilon, weight_decay } = *self;
        let (param, grad, exp_avg, exp_avg_sq) = (ptr(param), ptr(grad), ptr(exp_avg), ptr(exp_avg_sq));
        // SAFETY: the tensors live through the call and, as checked above, are what the kernel takes them for.
        check(unsafe {
            ffi::c10d_adamw(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, weight_decay, epsilon)
        })
    }
}

/// The kernel walks raw memory: it asks for none of this itself.
fn check_tensor(name: &str, tensor: &Tensor, like: &Tensor) -> Result<()> {
    let (kind, shape, device) = (tensor.f_kind()?, tensor.size(), tensor.device());
    if kind != Kind::Float || !tensor.is_contiguous() {
        let layout = if tensor.is_contiguous() { "contiguous" } else { "not contiguous" };
        return Err(Error::Torch(format!("AdamW: {name} must be contiguous fp32, and is {layout} {kind:?}")));
    }
    if shape != like.size() || device != like.device() {
        let (size, place) = (like.size(), like.device());
        return Err(Error::Torch(format!("AdamW: {name} is {shape:?} on {device:?}, param {size:?} on {place:?}")));
    }
    Ok(())
}
