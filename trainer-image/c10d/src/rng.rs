//! States of libtorch's random generators, so that a resumed run draws the numbers that the first would have drawn.

use std::ptr::null_mut;

use libc::c_int;
use tch::{Device, Tensor};

use crate::error::{c_index, check};
use crate::{Error, Result, ffi};

/// The state of `device`'s default generator: a CPU tensor of bytes.
pub fn state(device: Device) -> Result<Tensor> {
    let mut out = null_mut();
    // SAFETY: the call writes a new tensor to `out`.
    check(unsafe { ffi::c10d_rng_state(code(device)?, &mut out) })?;
    // SAFETY: the tensor is owned here.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Puts back a state that [`state`] gave for the same kind of device.
pub fn set_state(device: Device, state: &Tensor) -> Result<()> {
    // SAFETY: the tensor lives through the call, which copies it and checks its size and kind.
    check(unsafe { ffi::c10d_rng_set_state(code(device)?, ffi::ptr(state)) })
}

fn code(device: Device) -> Result<c_int> {
    match device {
        Device::Cpu => Ok(-1),
        Device::Cuda(index) => c_index(index),
        other => Err(Error::NotImplemented(format!("the random state of {other:?}"))),
    }
}
