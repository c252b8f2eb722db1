//! Memory: tensors over mapped files, storages that come and go under their views, and what the process uses.

use std::fs;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_int, c_void};
use memmap2::Mmap;
use tch::{Kind, Tensor};

use crate::error::check;
use crate::ffi::{self, ptr};
use crate::{Error, Result};

/// The most bytes of main memory that this process had held when the kernel was last made to forget it.
static PEAK_BEFORE: AtomicU64 = AtomicU64::new(0);

/// Maps a file read-only. It must not be cut while it is mapped: touching bytes that are gone ends the process. Files that
/// this project writes are replaced by renaming, never cut.
///
/// # Errors
/// The file cannot be opened or mapped.
pub fn map_file(path: &Path) -> std::io::Result<Arc<Mmap>> {
    let file = fs::File::open(path)?;
    // SAFETY: the map is only read, and the rule above keeps its bytes in place.
    Ok(Arc::new(unsafe { Mmap::map(&file) }?))
}

/// A tensor of `shape` and `kind` over the bytes of `map` from `offset` on, which stay mapped until the last view of it is
/// gone. No byte is read before it is used. The map is read-only: **writing to the tensor ends the process with a
/// segmentation fault**, so copy before any in-place operation. Where `offset` is not aligned for `kind` (old files), the
/// bytes are copied.
pub fn from_mmap(map: Arc<Mmap>, offset: usize, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let code = kind_code(kind)?;
    let bytes = byte_size(shape, kind);
    let Some(range) = bytes.and_then(|n| map.get(offset..offset.checked_add(n)?)) else {
        let len = map.len();
        return Err(Error::Torch(format!("a {kind:?} tensor of {shape:?} at byte {offset} is not within {len} bytes")));
    };
    if range.as_ptr().align_offset(kind.elt_size_in_bytes()) != 0 || range.is_empty() {
        return Ok(Tensor::f_from_data_size(range, shape, kind)?);
    }
    let data = range.as_ptr().cast_mut().cast::<c_void>();
    let owner = Arc::into_raw(map).cast_mut().cast::<c_void>();
    let mut out = null_mut();
    // SAFETY: `data` holds as many bytes as shape and kind need and lives as long as `owner`, one count of the Arc, which
    // the call takes (errors included) and gives back by `release_map` after the last use.
    check(unsafe { ffi::c10d_from_blob(data, shape.as_ptr(), shape.len(), code, release_map, owner, &mut out) })?;
    // SAFETY: the call made a new tensor, owned here.
    Ok(unsafe { Tensor::from_ptr(out) })
}

unsafe extern "C" fn release_map(owner: *mut c_void) {
    // SAFETY: `owner` is the count that `from_mmap` gave away, and comes back once.
    drop(unsafe { Arc::from_raw(owner.cast::<Mmap>().cast_const()) });
}

/// The value of `c10::ScalarType`.
fn kind_code(kind: Kind) -> Result<c_int> {
    Ok(match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::Bool => 11,
        Kind::BFloat16 => 15,
        other => return Err(Error::NotImplemented(format!("a mapped tensor of kind {other:?}"))),
    })
}

/// Bytes of a contiguous tensor; `None` where a dimension is negative or the product overflows.
fn byte_size(shape: &[i64], kind: Kind) -> Option<usize> {
    shape.iter().try_fold(kind.elt_size_in_bytes(), |n, dim| n.checked_mul(usize::try_from(*dim).ok()?))
}

/// Bytes of the storage under `tensor`, all views together; 0 for a tensor without one.
pub fn storage_bytes(tensor: &Tensor) -> usize {
    let mut bytes = 0;
    // SAFETY: the tensor lives through the call, which writes one number or, on an error, nothing.
    let _ = unsafe { ffi::c10d_storage_bytes(ptr(tensor), &mut bytes) };
    bytes
}

/// Frees the storage under `tensor` (`bytes` 0) or makes it anew, with undefined contents, for all views at once. Other
/// sizes must have room for `tensor`, which therefore ought to be the whole buffer. **Using a view while the storage is
/// away ends the process with a segmentation fault** (its address is null plus the view's offset, which is never mapped).
pub fn resize_storage(tensor: &Tensor, bytes: usize) -> Result<()> {
    // SAFETY: the tensor lives through the call, which refuses storages that libtorch did not allocate and sizes that the
    // tensor would reach beyond.
    check(unsafe { ffi::c10d_resize_storage(ptr(tensor), bytes) })
}

/// Bytes of main memory that this process holds now (`VmRSS`); 0 where the kernel does not say.
pub fn host_bytes() -> u64 {
    status_bytes("VmRSS:")
}

/// Bytes of those that lie in no file (`RssAnon`); 0 where the kernel does not say.
pub fn anonymous_host_bytes() -> u64 {
    status_bytes("RssAnon:")
}

/// The most bytes of main memory that this process has held; 0 where the kernel does not say.
pub fn peak_host_bytes() -> u64 {
    // In this order: whoever makes the kernel forget its peak has noted it before.
    recent_peak_host_bytes().max(PEAK_BEFORE.load(Ordering::SeqCst))
}

/// The most bytes of main memory that this process has held since [`restart_recent_peak`] (`VmHWM`), or ever.
pub fn recent_peak_host_bytes() -> u64 {
    status_bytes("VmHWM:")
}

/// Makes [`recent_peak_host_bytes`] begin anew from what is held now, and says whether the kernel allows it.
pub fn restart_recent_peak() -> bool {
    PEAK_BEFORE.fetch_max(recent_peak_host_bytes(), Ordering::SeqCst);
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn status_bytes(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}
