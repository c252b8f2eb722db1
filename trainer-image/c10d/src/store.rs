//! The key-value store through which ranks find each other: c10d's `TCPStore`.
//!
//! One process serves it, in a thread inside libtorch that lives as long as the store does; all others are clients. A
//! process group keeps a reference of its own, so the server outlives the handle that made the group.

use std::ptr::{NonNull, null_mut};
use std::time::Duration;

use libc::c_void;

use crate::error::{c_string, check};
use crate::{Error, Result, ffi};

/// A store of bytes under string keys, shared by all ranks.
pub struct Store(NonNull<ffi::CStore>);

// SAFETY: the handle is an owned intrusive pointer with an atomic count, and TCPStore serializes its operations.
unsafe impl Send for Store {}
// SAFETY: as above; every method takes the store's own lock.
unsafe impl Sync for Store {}

impl Store {
    /// Connects to the store at `host:port`; with `server`, first starts it there, on all interfaces. Returns when
    /// `world_size` processes have connected (0: at once). `timeout` bounds this and every later operation.
    pub fn tcp(host: &str, port: u16, server: bool, world_size: u32, timeout: Duration) -> Result<Store> {
        let (host, ms) = (c_string(host)?, millis(timeout));
        // SAFETY: the string lives through the call, which writes a new handle to `out`.
        Store::made(|out| unsafe { ffi::c10d_store_tcp(host.as_ptr(), port, server.into(), world_size, ms, out) })
    }

    /// The same store, with every key put after `prefix`.
    pub fn prefix(&self, prefix: &str) -> Result<Store> {
        let prefix = c_string(prefix)?;
        // SAFETY: `self` and the string live through the call, which writes a new handle to `out`.
        Store::made(|out| unsafe { ffi::c10d_store_prefix(self.as_ptr(), prefix.as_ptr(), out) })
    }

    /// Writes `value` under `key`.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let key = c_string(key)?;
        // SAFETY: `self`, the key and the bytes live through the call, which copies them.
        check(unsafe { ffi::c10d_store_set(self.as_ptr(), key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// Reads `key`, and waits for it where it is not there yet.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        unsafe extern "C" fn take(context: *mut c_void, data: *const u8, n: usize) {
            if n > 0 {
                // SAFETY: the shim passes `value` of the frame below, and `n` readable bytes.
                unsafe { (*context.cast::<Vec<u8>>()).extend_from_slice(std::slice::from_raw_parts(data, n)) }
            }
        }
        let key = c_string(key)?;
        let mut value: Vec<u8> = Vec::new();
        // SAFETY: `self`, the key and `value` live through the call; `take` is called at most once and within it.
        check(unsafe { ffi::c10d_store_get(self.as_ptr(), key.as_ptr(), take, (&raw mut value).cast()) })?;
        Ok(value)
    }

    /// Adds `amount` to the counter under `key` (0 where absent) and returns its new value.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64> {
        let key = c_string(key)?;
        let mut value = 0;
        // SAFETY: `self` and the key live through the call, which writes one number.
        check(unsafe { ffi::c10d_store_add(self.as_ptr(), key.as_ptr(), amount, &mut value) })?;
        Ok(value)
    }

    /// Waits until `key` is there, for at most `timeout` (then [`Error::Timeout`]).
    pub fn wait(&self, key: &str, timeout: Duration) -> Result<()> {
        let key = c_string(key)?;
        // SAFETY: `self` and the key live through the call.
        check(unsafe { ffi::c10d_store_wait(self.as_ptr(), key.as_ptr(), millis(timeout)) })
    }

    /// Bounds every later operation by `timeout`.
    pub(crate) fn set_timeout(&self, timeout: Duration) -> Result<()> {
        // SAFETY: `self` lives through the call.
        check(unsafe { ffi::c10d_store_set_timeout(self.as_ptr(), millis(timeout)) })
    }

    pub(crate) fn as_ptr(&self) -> *mut ffi::CStore {
        self.0.as_ptr()
    }

    fn made(make: impl FnOnce(*mut *mut ffi::CStore) -> libc::c_int) -> Result<Store> {
        let mut out = null_mut();
        check(make(&mut out))?;
        NonNull::new(out).map(Store).ok_or_else(|| Error::Torch("no store was made".into()))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the handle is owned, and freed once.
        unsafe { ffi::c10d_store_free(self.as_ptr()) }
    }
}

/// Milliseconds for the shim, where zero would mean "for ever".
pub(crate) fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX).clamp(1, i64::from(i32::MAX))
}
