//! The CPU as libtorch sees it.

use std::ffi::c_void;

use crate::error::check;
use crate::{Result, ffi};

/// The instructions for which libtorch has chosen its own kernels on this CPU, such as `AVX512`. Others round otherwise.
pub fn cpu_capability() -> Result<String> {
    let mut name = Vec::new();
    // SAFETY: the call gives its bytes to `take` with the vector's address, before it returns.
    check(unsafe { ffi::c10d_cpu_capability(take, (&raw mut name).cast()) })?;
    Ok(String::from_utf8_lossy(&name).into_owned())
}

unsafe extern "C" fn take(name: *mut c_void, data: *const u8, size: usize) {
    // SAFETY: `name` is the vector of `cpu_capability`, and `data` holds `size` bytes during the call.
    unsafe { (*name.cast::<Vec<u8>>()).extend_from_slice(std::slice::from_raw_parts(data, size)) }
}
