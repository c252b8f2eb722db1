//! Work beside that of the device: a stream of its own for copies.
//!
//! A CUDA device computes in the order in which work was queued. What is queued on another stream runs beside it, and comes
//! after what a [`Mark`] says and before what waits for a [`Mark`]. Where the CPU is the device there is one order anyway:
//! everything here is then done at once and nothing is waited for.

use std::ptr::null_mut;

use libc::c_int;
use tch::{Device, Tensor};

use crate::Result;
use crate::error::{c_index, check};
use crate::ffi::{self, ptr};

/// A stream of a device beside that on which it computes.
#[derive(Debug, Default)]
pub struct SideStream(Option<Cuda>);

#[derive(Debug)]
struct Cuda {
    device: c_int,
    stream: *mut ffi::CStream,
}

/// A place in the order of a stream's work.
#[derive(Debug)]
pub struct Mark(Option<Event>);

#[derive(Debug)]
struct Event {
    device: c_int,
    event: *mut ffi::CEvent,
}

impl SideStream {
    /// A side stream of `device`.
    ///
    /// # Errors
    /// CUDA fails.
    pub fn new(device: Device) -> Result<Self> {
        let Device::Cuda(index) = device else { return Ok(Self(None)) };
        let (device, mut stream) = (c_index(index)?, null_mut());
        // SAFETY: the call writes a new handle, owned here.
        check(unsafe { ffi::c10d_stream_new(device, &mut stream) })?;
        Ok(Self(Some(Cuda { device, stream })))
    }

    /// Marks what has been queued so far on the stream on which the device computes.
    ///
    /// # Errors
    /// CUDA fails.
    pub fn mark(&self) -> Result<Mark> {
        self.0.as_ref().map(|cuda| Event::record(cuda.device)).transpose().map(Mark)
    }

    /// Queues `work` on this stream, after `start`, and marks its end. What it allocates on the device belongs to this
    /// stream, so it ought to write to memory that is there already.
    ///
    /// # Errors
    /// Those of `work`, or CUDA fails.
    pub fn after<T, E: From<crate::Error>>(
        &self,
        start: &Mark,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(T, Mark), E> {
        let Some(cuda) = &self.0 else { return Ok((work()?, Mark(None))) };
        let _entered = cuda.enter()?;
        start.pass()?;
        let done = work()?;
        Ok((done, Mark(Some(Event::record(cuda.device)?))))
    }
}

/// Puts the stream back that was current before.
struct Entered(*mut ffi::CStream);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut side = null_mut();
        // SAFETY: the handle is valid until it is freed here; the other one is written by the call, or stays null.
        unsafe {
            let _ = ffi::c10d_stream_enter(self.0, &mut side);
            ffi::c10d_stream_free(side);
            ffi::c10d_stream_free(self.0);
        }
    }
}

impl Cuda {
    fn enter(&self) -> Result<Entered> {
        let mut before = null_mut();
        // SAFETY: the stream is valid as long as `self`; the call writes a new handle, owned by the guard.
        check(unsafe { ffi::c10d_stream_enter(self.stream, &mut before) })?;
        Ok(Entered(before))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // SAFETY: owned, and freed once. The stream itself belongs to libtorch's pool.
        unsafe { ffi::c10d_stream_free(self.stream) }
    }
}

impl Mark {
    /// What is queued from now on, on the stream that is current, comes after this.
    ///
    /// # Errors
    /// CUDA fails.
    pub fn pass(&self) -> Result<()> {
        let Some(Event { device, event }) = &self.0 else { return Ok(()) };
        // SAFETY: the event is valid as long as `self`.
        check(unsafe { ffi::c10d_event_block(*event, *device) })
    }
}

impl Event {
    /// Marks the current stream of `device`.
    fn record(device: c_int) -> Result<Self> {
        let mut event = null_mut();
        // SAFETY: the call writes a new handle, owned here.
        check(unsafe { ffi::c10d_event_record(device, &mut event) })?;
        Ok(Self { device, event })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: owned, and freed once; CUDA keeps what work still needs of it.
        unsafe { ffi::c10d_event_free(self.event) }
    }
}

/// Copies `source` into `target` in the order of the current stream, without waiting for it where one of them is on a GPU and
/// the other page-locked. Neither may change until a mark behind the copy has passed.
///
/// # Errors
/// Shapes differ, or CUDA fails.
pub fn copy(target: &Tensor, source: &Tensor) -> Result<()> {
    // SAFETY: both tensors live through the call; the runtime keeps their storages' memory in stream order.
    check(unsafe { ffi::c10d_copy(ptr(target), ptr(source)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn on_the_cpu_work_is_done_at_once() {
        let side = SideStream::new(Device::Cpu).unwrap();
        let (source, target) =
            (Tensor::arange(4, (Kind::Float, Device::Cpu)), Tensor::zeros([4], (Kind::Float, Device::Cpu)));
        let start = side.mark().unwrap();
        let (_, end) = side.after(&start, || copy(&target, &source)).unwrap();
        assert_eq!(target, source);
        end.pass().unwrap();
        assert!(
            side.after::<(), crate::Error>(&start, || copy(&target, &Tensor::zeros([3], (Kind::Float, Device::Cpu))))
                .is_err()
        );
    }
}
