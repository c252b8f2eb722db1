//! CUDA, where it is there at run time.
//!
//! The program links the CPU half of libtorch alone. [`init`] loads the `libtorch_cuda.so` beside it, if there is one, so
//! one binary serves both images. NCCL needs symbols of that library, so its shim is a shared object of its own: it is
//! built where the CUDA headers are, embedded here, and loaded from memory on first use.

use std::ffi::{CStr, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::null_mut;
use std::sync::OnceLock;

use libc::{c_char, c_int};

use crate::error::{c_index, c_string, check};
use crate::{Error, Result, Store, ffi};

/// The NCCL half of the shim; empty if the build had no CUDA headers.
static SHIM: &[u8] = include_bytes!(env!("C10D_CUDA_SHIM"));

/// c10's level under which nothing is printed (`c10::GLOG_FATAL`).
const FATAL: c_int = 3;
/// The one under which errors are.
const ERROR: c_int = 2;

/// How the loading of libtorch_cuda.so went.
static LOADED: OnceLock<Result<()>> = OnceLock::new();

/// Prepares libtorch. The first torch call of a process, since libtorch looks for CUDA once and keeps the answer. With
/// `log_quiet`, libtorch's own log lines are not printed (a lost peer brings dozens), but for errors where there are CUDA
/// devices: NCCL's watchdog says there alone which collective it waited for. `TORCH_CPP_LOG_LEVEL` overrides it.
pub fn init(log_quiet: bool) {
    LOADED.get_or_init(|| {
        // SAFETY: three calls without arguments that point anywhere. The allocator is exchanged before the first tensor.
        unsafe {
            check(ffi::c10d_init_logging(if log_quiet { FATAL } else { -1 }))?;
            check(ffi::c10d_count_memory())?;
            check(ffi::c10d_load_cuda())?;
        }
        if log_quiet && count_devices()? > 0 {
            // SAFETY: as above.
            unsafe { check(ffi::c10d_init_logging(ERROR))? };
        }
        Ok(())
    });
}

/// Whether there is a CUDA device that libtorch can use.
pub fn has_cuda() -> bool {
    device_count().is_ok_and(|count| count > 0)
}

fn device_count() -> Result<c_int> {
    init(false);
    count_devices()
}

fn count_devices() -> Result<c_int> {
    let mut count = 0;
    // SAFETY: the call writes one number.
    check(unsafe { ffi::c10d_cuda_device_count(&mut count) })?;
    Ok(count)
}

/// Makes sure that there are at least so many CUDA devices.
///
/// # Errors
/// [`Error::NotImplemented`] with why there are not: what CUDA or the loader says of it, or how many there are.
pub fn require_devices(wanted: u32) -> Result<()> {
    if wanted == 0 {
        return Ok(());
    }
    require_cuda()?;
    match device_count()? {
        found if u32::try_from(found).is_ok_and(|found| found >= wanted) => Ok(()),
        found => Err(Error::NotImplemented(format!("{found} CUDA devices are there of {wanted}"))),
    }
}

/// Why there is no CUDA, as an error.
fn require_cuda() -> Result<()> {
    let missing = |why: &Error| Error::NotImplemented(format!("CUDA is not available: {why}"));
    init(false);
    if let Some(Err(error)) = LOADED.get() {
        return Err(missing(error));
    }
    if device_count()? > 0 {
        return Ok(());
    }
    // What counts devices says 0 for every reason; what begins to use one says which.
    // SAFETY: a call without arguments.
    check(unsafe { ffi::c10d_cuda_begin() }).map_err(|error| missing(&error))?;
    Err(missing(&Error::NotImplemented("no device was found".into())))
}

/// What libtorch's caching allocator holds on one CUDA device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In tensors now.
    pub allocated: u64,
    /// In tensors, at the peak.
    pub allocated_peak: u64,
    /// Taken from the device now, cached blocks included.
    pub reserved: u64,
    /// Taken from the device, at the peak.
    pub reserved_peak: u64,
    /// Free on the device, for anyone.
    pub free: u64,
    /// On the device altogether.
    pub total: u64,
}

/// Memory of CUDA device `device`. [`Error::NotImplemented`] where there is no CUDA.
pub fn device_memory(device: usize) -> Result<DeviceMemory> {
    require_cuda()?;
    let mut values = [0i64; 6];
    // SAFETY: the call writes six numbers.
    check(unsafe { ffi::c10d_device_memory(c_index(device)?, values.as_mut_ptr()) })?;
    let [allocated, allocated_peak, reserved, reserved_peak, free, total] = values.map(|v| v.max(0).unsigned_abs());
    Ok(DeviceMemory { allocated, allocated_peak, reserved, reserved_peak, free, total })
}

type LastError = unsafe extern "C" fn() -> *const c_char;
type GroupNccl = unsafe extern "C" fn(*mut ffi::CStore, c_int, c_int, i64, *mut *mut ffi::CGroup) -> c_int;

/// The functions of the loaded NCCL shim.
struct Nccl {
    last_error: LastError,
    group: GroupNccl,
}

/// A new NCCL group, owned by the caller.
pub(crate) fn nccl(store: &Store, rank: c_int, world_size: c_int, timeout_ms: i64) -> Result<*mut ffi::CGroup> {
    static NCCL: OnceLock<Result<Nccl>> = OnceLock::new();
    let shim = NCCL.get_or_init(load).as_ref().map_err(Clone::clone)?;
    let mut out = null_mut();
    // SAFETY: the store lives through the call, which writes a new handle.
    let code = unsafe { (shim.group)(store.as_ptr(), rank, world_size, timeout_ms, &mut out) };
    if code == 0 {
        return Ok(out);
    }
    // SAFETY: a NUL-terminated string that lives until this thread's next call into the shim.
    let message = unsafe { CStr::from_ptr((shim.last_error)()) };
    Err(Error::from_code(code, message.to_string_lossy().into_owned()))
}

fn load() -> Result<Nccl> {
    require_cuda()?;
    if SHIM.is_empty() {
        let why = "this program was built without the CUDA headers (CUDA_HEADERS)";
        return Err(Error::NotImplemented(format!("NCCL is not available: {why}")));
    }
    let library = open_shim().map_err(|why| Error::Torch(format!("the NCCL shim cannot be loaded: {why}")))?;
    let (last_error, group) = (symbol(library, c"c10d_cuda_last_error")?, symbol(library, c"c10d_cuda_group_nccl")?);
    // SAFETY: the symbols are functions of shim_cuda.cpp, which has them with these types; the library stays loaded.
    Ok(unsafe {
        Nccl {
            last_error: std::mem::transmute::<*mut c_void, LastError>(last_error),
            group: std::mem::transmute::<*mut c_void, GroupNccl>(group),
        }
    })
}

/// Loads the embedded shim from an anonymous file, since the container's file system is read-only.
fn open_shim() -> std::result::Result<*mut c_void, String> {
    // SAFETY: the name is a NUL-terminated string; a result that is not negative is a new descriptor, owned here.
    let mut file = unsafe {
        match libc::memfd_create(c"c10d_cuda".as_ptr(), libc::MFD_CLOEXEC) {
            -1 => return Err(std::io::Error::last_os_error().to_string()),
            fd => File::from_raw_fd(fd),
        }
    };
    file.write_all(SHIM).map_err(|e| e.to_string())?;
    let path = c_string(&format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|e| e.to_string())?;
    // SAFETY: loads this build's own library, whose initializers only register C++ types; dlerror's text is copied.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        if library.is_null() {
            return Err(CStr::from_ptr(libc::dlerror()).to_string_lossy().into_owned());
        }
        Ok(library)
    }
}

fn symbol(library: *mut c_void, name: &CStr) -> Result<*mut c_void> {
    // SAFETY: the library is loaded and stays so.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    if address.is_null() { Err(Error::Torch(format!("the NCCL shim has no {name:?}"))) } else { Ok(address) }
}
