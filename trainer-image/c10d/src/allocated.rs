//! Bytes in tensors, by where they lie: the device that computes, and the host.
//!
//! On CUDA the caching allocator counts the device's. Where the CPU is the device, libtorch's CPU allocator is replaced by one
//! that keeps two domains apart: what [`on_host`] allocates would lie in host memory beside a GPU, everything else on the GPU.
//! So the memory of an offloading trainer can be measured where there is no GPU.

use tch::{Device, Tensor};

use crate::error::{c_index, check};
use crate::ffi::{self, ptr};
use crate::{Result, device_memory};

/// Bytes now, and the most since the start or [`reset_peaks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Now.
    pub current: u64,
    /// At the peak.
    pub peak: u64,
}

/// Bytes in tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocated {
    /// On the device that computes.
    pub device: Usage,
    /// In host memory.
    pub host: Usage,
}

const HOST: libc::c_int = 1;

/// Runs `work`; what it allocates on the CPU counts as host memory, whenever it is freed.
pub fn on_host<T>(work: impl FnOnce() -> T) -> T {
    struct Restore(libc::c_int);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: sets a number of this thread.
            unsafe { ffi::c10d_set_domain(self.0) };
        }
    }
    // SAFETY: as above.
    let _restore = Restore(unsafe { ffi::c10d_set_domain(HOST) });
    work()
}

/// Locks the memory under a whole CPU tensor in place until it is freed, so that CUDA device `device` reads and writes it
/// without a copy in between; exactly as much as the tensor has. Whether that went well: where it did not, copies only take
/// longer.
///
/// # Errors
/// The tensor has no storage, or the device is not there.
pub fn page_lock(tensor: &Tensor, device: usize) -> Result<bool> {
    let mut locked = 0;
    // SAFETY: the tensor lives through the call, which writes one number.
    check(unsafe { ffi::c10d_page_lock(ptr(tensor), c_index(device)?, &mut locked) })?;
    Ok(locked != 0)
}

/// Bytes in tensors of a process that computes on `device`, counted since [`crate::init`].
///
/// # Errors
/// The device is a GPU that is not there.
pub fn allocated(device: Device) -> Result<Allocated> {
    let mut counted = [0i64; 4];
    // SAFETY: the call writes four numbers.
    unsafe { ffi::c10d_counted(counted.as_mut_ptr()) };
    let [device_now, device_peak, host_now, host_peak] = counted.map(|n| n.max(0).unsigned_abs());
    if let Device::Cuda(index) = device {
        let memory = device_memory(index)?;
        let device = Usage { current: memory.allocated, peak: memory.allocated_peak };
        return Ok(Allocated { device, host: Usage { current: device_now + host_now, peak: device_peak + host_peak } });
    }
    Ok(Allocated {
        device: Usage { current: device_now, peak: device_peak },
        host: Usage { current: host_now, peak: host_peak },
    })
}

/// Starts peaks anew from what is allocated now.
///
/// # Errors
/// The device is a GPU that is not there.
pub fn reset_peaks(device: Device) -> Result<()> {
    // SAFETY: sets numbers of the allocator.
    unsafe { ffi::c10d_reset_counted_peaks() };
    if let Device::Cuda(index) = device {
        device_memory(index)?;
        // SAFETY: the device is there, as the line above found.
        check(unsafe { ffi::c10d_reset_device_peak(c_index(index)?) })?;
    }
    Ok(())
}
