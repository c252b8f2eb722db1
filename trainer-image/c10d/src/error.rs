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
    /// A device fails, or is lost to this process: nothing more can be run on it, but it or another may serve again.
    #[error("{0}")]
    Device(String),
    /// Memory of the device or the host ran out.
    #[error("{0}")]
    OutOfMemory(String),
    /// The operation does not exist for this kind, device or build.
    #[error("{0}")]
    NotImplemented(String),
}

/// Texts of memory that ran out: the allocators', the driver's, cuBLAS' and cuDNN's.
const OUT_OF_MEMORY: &[&str] = &[
    "out of memory",
    "DefaultCPUAllocator: ",
    "STATUS_ALLOC_FAILED",
    "STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
];
/// Texts of collectives that took too long, among them those of NCCL's watchdog.
const LATE_PEER: &[&str] = &["Watchdog caught collective operation timeout", "Operation timed out"];
/// Texts of NCCL where this rank's own device failed.
const FAILED_DEVICE: &[&str] = &["ncclUnhandledCudaError", "unhandled cuda error"];
/// Texts of NCCL where a peer or the network between did.
const LOST_PEER: &[&str] = &["NCCL error", "ncclRemoteError", "ncclSystemError", "NCCL communicator was aborted"];
/// How errors of CUDA and its libraries begin. What can be said of them in general is that the device takes no more work: after
/// an ECC error, a bus that is lost or an illegal access every further call fails.
const CUDA: &[&str] = &["CUDA error: ", "CUDA driver error: ", "CUBLAS_STATUS_", "CUDNN_STATUS_", "cuDNN error: "];
/// Those of them that are the caller's mistake, which another device would not mend.
const WRONG_CALL: &[&str] = &[
    "device-side assert triggered",
    "invalid argument",
    "invalid configuration argument",
    "invalid device ordinal",
    "no kernel image is available",
    "STATUS_INVALID_VALUE",
    "STATUS_BAD_PARAM",
    "STATUS_NOT_SUPPORTED",
];

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
            _ => Error::by_text(message),
        }
    }

    /// The error of a text of which libtorch does not tell more: it throws CUDA's, cuBLAS', cuDNN's and NCCL's errors, and those
    /// of host memory, as one type.
    fn by_text(message: String) -> Error {
        let has = |parts: &[&str]| parts.iter().any(|part| message.contains(part));
        if has(OUT_OF_MEMORY) {
            Error::OutOfMemory(message)
        } else if has(LATE_PEER) {
            Error::Timeout(message)
        } else if has(FAILED_DEVICE) {
            Error::Device(message)
        } else if has(LOST_PEER) {
            Error::Distributed(message)
        } else if has(CUDA) && !has(WRONG_CALL) {
            Error::Device(message)
        } else {
            Error::Torch(message)
        }
    }

    /// The same error, its message put after `context`.
    pub(crate) fn context(self, context: &str) -> Error {
        match self {
            Error::Torch(m) => Error::Torch(format!("{context}: {m}")),
            Error::Distributed(m) => Error::Distributed(format!("{context}: {m}")),
            Error::Timeout(m) => Error::Timeout(format!("{context}: {m}")),
            Error::Disagreement(m) => Error::Disagreement(format!("{context}: {m}")),
            Error::Device(m) => Error::Device(format!("{context}: {m}")),
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
        Error::by_text(message)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts as libtorch 2.11, CUDA 13 and NCCL 2.28 write them (their sources).
    #[test]
    fn errors_of_devices_and_peers_are_told_apart_by_their_texts() {
        type Make = fn(String) -> Error;
        let table: [(Make, &[&str]); 5] = [
            (
                Error::OutOfMemory,
                &[
                    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
                    "CUDA error: out of memory",
                    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
                ],
            ),
            (
                Error::Device,
                &[
                    "CUDA error: uncorrectable ECC error encountered",
                    "CUDA error: an illegal memory access was encountered",
                    "CUDA error: unspecified launch failure",
                    "CUDA error: the launch timed out and was terminated",
                    "CUDA error: all CUDA-capable devices are busy or unavailable",
                    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
                    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
                    "NCCL error in: ../torch/NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
                    "NCCL error: ncclUnhandledCudaError: Call to CUDA function failed.",
                ],
            ),
            (
                Error::Distributed,
                &[
                    "NCCL error in: ../torch/ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error",
                    "NCCL error: ncclSystemError: System call (e.g. socket, malloc) or external library call failed",
                ],
            ),
            (
                Error::Timeout,
                &[
                    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600 ms",
                ],
            ),
            (
                Error::Torch,
                &[
                    "CUDA error: device-side assert triggered",
                    "CUDA error: no kernel image is available for execution on the device",
                    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
                ],
            ),
        ];
        for (make, texts) in table {
            for text in texts {
                assert_eq!(Error::from_code(1, text.to_string()), make(text.to_string()));
                let traced =
                    format!("{text}\nException raised from f at x.cpp:1 (most recent call first):\nframe #0: c10");
                assert_eq!(Error::from(tch::TchError::Torch(traced)), make(text.to_string()));
            }
        }
    }
}
