//! The error type, and how codes and messages of the shim (and of `tch`) become one.

use std::ffi::{CStr, CString};

use libc::c_int;

use crate::ffi;

/// What went wrong inside libtorch, by what the caller can do about it. The text is libtorch's, without backtrace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An operation refused its arguments, or failed inside.
    #[error("{0}")]
    Torch(String),
    /// A peer or the store is gone. The group is dead: meet again under a new attempt.
    #[error("{0}")]
    Distributed(String),
    /// A peer or the store did not answer in time. The group is dead, as above.
    #[error("{0}")]
    Timeout(String),
    /// The ranks were given different things where they must have the same. Meeting again will not help.
    #[error("{0}")]
    Disagreement(String),
    /// Memory of the device or the host ran out.
    #[error("{0}")]
    OutOfMemory(String),
    /// The operation does not exist for this kind, device or build.
    #[error("{0}")]
    NotImplemented(String),
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Builds the error of a shim's return code (`shim::Code` in guard.h).
    pub(crate) fn from_code(code: c_int, message: String) -> Error {
        match code {
            2 => Error::Distributed(message),
            3 => Error::Timeout(message),
            4 => Error::OutOfMemory(message),
            5 => Error::NotImplemented(message),
            _ => Error::Torch(message),
        }
    }

    /// The same error, its message put after `context`.
    pub(crate) fn context(self, context: &str) -> Error {
        match self {
            Error::Torch(m) => Error::Torch(format!("{context}: {m}")),
            Error::Distributed(m) => Error::Distributed(format!("{context}: {m}")),
            Error::Timeout(m) => Error::Timeout(format!("{context}: {m}")),
            Error::Disagreement(m) => Error::Disagreement(format!("{context}: {m}")),
            Error::OutOfMemory(m) => Error::OutOfMemory(format!("{context}: {m}")),
            Error::NotImplemented(m) => Error::NotImplemented(format!("{context}: {m}")),
        }
    }
}

/// `tch` reports the message with a C++ backtrace of twenty lines, and does not tell memory from the rest.
impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Error {
        let text = error.to_string();
        let end = ["\nException raised from", "\nframe #0"].iter().filter_map(|mark| text.find(mark)).min();
        let message = &text[..end.unwrap_or(text.len())];
        let message = message.strip_prefix("Internal torch error: ").unwrap_or(message).trim_end().to_owned();
        let out_of_memory = ["out of memory", "DefaultCPUAllocator: "].iter().any(|part| message.contains(part));
        if out_of_memory { Error::OutOfMemory(message) } else { Error::Torch(message) }
    }
}

/// Turns a shim's return code into a result.
pub(crate) fn check(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the shim returns a NUL-terminated string that lives until this thread's next call into it.
    let message = unsafe { CStr::from_ptr(ffi::c10d_last_error()) };
    Err(Error::from_code(code, message.to_string_lossy().into_owned()))
}

/// A string for the shim.
pub(crate) fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Torch(format!("{text:?} contains a NUL byte")))
}

/// A count or rank for the shim.
pub(crate) fn c_index(value: impl TryInto<c_int> + Copy + std::fmt::Display) -> Result<c_int> {
    value.try_into().map_err(|_| Error::Torch(format!("{value} is out of range")))
}
