//! Gradients with incoming gradients, which is what block-wise recomputation and pipelines need: `tch` can only start a
//! backward pass from ones.

use std::ptr::null_mut;

use tch::Tensor;

use crate::error::check;
use crate::ffi::{self, T, ptrs};
use crate::{Error, Result};

/// The gradients of `inputs`, where `grad_outputs[i]` (of the shape of `outputs[i]`) is the gradient of the final scalar
/// with respect to `outputs[i]`. `None` for an input that the outputs do not depend on. Without `keep_graph` the graph
/// is freed on the way. Empty `grad_outputs` stand for ones, where all outputs are scalars.
pub fn grad(
    outputs: &[&Tensor],
    grad_outputs: &[&Tensor],
    inputs: &[&Tensor],
    keep_graph: bool,
) -> Result<Vec<Option<Tensor>>> {
    if !grad_outputs.is_empty() && grad_outputs.len() != outputs.len() {
        let (have, want) = (grad_outputs.len(), outputs.len());
        return Err(Error::Torch(format!("grad: {have} incoming gradients for {want} outputs")));
    }
    let (outs, grads, ins) = (ptrs(outputs), ptrs(grad_outputs), ptrs(inputs));
    let mut result: Vec<T> = vec![null_mut(); inputs.len()];
    // SAFETY: the arrays have the lengths given and their tensors live through the call, which fills `result`.
    check(unsafe {
        ffi::c10d_grad(
            outs.as_ptr(),
            outs.len(),
            grads.as_ptr(),
            grads.len(),
            ins.as_ptr(),
            ins.len(),
            keep_graph.into(),
            result.as_mut_ptr(),
        )
    })?;
    // SAFETY: every pointer that is not null is a new tensor, owned by whoever takes it.
    Ok(result.into_iter().map(|t| (!t.is_null()).then(|| unsafe { Tensor::from_ptr(t) })).collect())
}
