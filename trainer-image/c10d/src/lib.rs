//! What `tch` lacks of libtorch, behind a safe interface.
//!
//! A distributed trainer needs process groups with a store and a rendezvous, gradients of one block from an incoming
//! gradient, a fused optimizer, tensors over memory-mapped files, control over storage, memory statistics and random
//! states. libtorch has all of it, exported from its shared objects, and `tch` binds none of it. One small C++ shim
//! (`shim/`) does; this crate is its owner and the only place in the project with `unsafe` code.
//!
//! Promises: no C++ exception crosses into Rust, every failure is an [`Error`] with a message free of C++ backtraces, and
//! no collective waits for longer than its group's timeout. The name is that of PyTorch's own library of collectives,
//! which does the work.
//!
//! [`init`] comes before the first use of torch in a process.

mod allocated;
mod autograd;
mod cpu;
mod cuda;
mod error;
mod ffi;
mod memory;
mod optim;
mod process_group;
mod rendezvous;
pub mod rng;
mod store;
mod stream;
mod terminate;

pub use allocated::{Allocated, Usage, allocated, on_host, page_lock, reset_peaks};
pub use autograd::grad;
pub use cpu::cpu_capability;
pub use cuda::{DeviceMemory, device_memory, has_cuda, init, require_devices};
pub use error::{Error, Result};
pub use memory::{
    anonymous_host_bytes, from_mmap, host_bytes, map_file, peak_host_bytes, recent_peak_host_bytes, resize_storage,
    restart_recent_peak, storage_bytes,
};
pub use optim::AdamW;
pub use process_group::{ProcessGroup, ReduceOp, Work};
pub use rendezvous::Rendezvous;
pub use store::Store;
pub use stream::{Mark, SideStream, copy};
pub use terminate::on_terminate;
