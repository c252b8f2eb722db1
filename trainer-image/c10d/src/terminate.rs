//! The end of a process by an exception of C++ that nobody caught.
//!
//! Threads of libtorch's own throw some: NCCL's watchdog where a peer is lost or late, and Gloo's loop where ranks give a
//! collective different sizes. Left alone they abort the process without a word of what it was.

use std::ffi::CStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::abort;
use std::sync::OnceLock;

use libc::{c_char, c_int};

use crate::{Error, ffi};

/// What hears of the exception and gives the exit code.
type Told = Box<dyn Fn(Error) -> i32 + Send + Sync>;

static TOLD: OnceLock<Told> = OnceLock::new();

/// From now on an exception that nobody catches is told to `told`, on the thread that threw it, and the process ends at once
/// with the exit code that it returns; no destructor runs. Only the first call counts.
pub fn on_terminate(told: impl Fn(Error) -> i32 + Send + Sync + 'static) {
    TOLD.get_or_init(|| Box::new(told));
    // SAFETY: the function lives as long as the process.
    unsafe { ffi::c10d_on_terminate(end) }
}

unsafe extern "C" fn end(code: c_int, message: *const c_char) -> c_int {
    // SAFETY: the shim gives a NUL-terminated string that lives through this call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    let told = || TOLD.get().map(|told| told(Error::from_code(code, message)));
    catch_unwind(AssertUnwindSafe(told)).ok().flatten().unwrap_or_else(|| abort())
}
