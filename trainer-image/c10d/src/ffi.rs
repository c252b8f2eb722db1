//! The C ABI of `shim/shim.cpp`, as it stands there. `T` arguments are `at::Tensor*`, which is what `tch` holds.

use libc::{c_char, c_int, c_void};
use tch::Tensor;
use torch_sys::C_tensor;

/// `at::Tensor*`
pub type T = *mut C_tensor;

/// `c10::intrusive_ptr<c10d::Store>`
#[repr(C)]
pub struct CStore([u8; 0]);
/// `c10::intrusive_ptr<c10d::Backend>`
#[repr(C)]
pub struct CGroup([u8; 0]);
/// `c10::intrusive_ptr<c10d::Work>`
#[repr(C)]
pub struct CWork([u8; 0]);

/// `c10::Stream`
#[repr(C)]
pub struct CStream([u8; 0]);
/// `c10::Event`
#[repr(C)]
pub struct CEvent([u8; 0]);

/// Receives a value of the store.
pub type Sink = unsafe extern "C" fn(*mut c_void, *const u8, usize);
/// Hears of an exception that nobody caught, by its code and its text, and gives the exit code.
pub type Ending = unsafe extern "C" fn(c_int, *const c_char) -> c_int;
/// Gives up the owner of foreign memory.
pub type Release = unsafe extern "C" fn(*mut c_void);

unsafe extern "C" {
    pub fn c10d_last_error() -> *const c_char;

    pub fn c10d_init_logging(level: c_int) -> c_int;
    pub fn c10d_load_cuda() -> c_int;
    pub fn c10d_cuda_device_count(out: *mut c_int) -> c_int;
    pub fn c10d_cuda_begin() -> c_int;
    pub fn c10d_on_terminate(ending: Ending);
    pub fn c10d_cpu_capability(sink: Sink, context: *mut c_void) -> c_int;
    pub fn c10d_device_memory(device: c_int, out: *mut i64) -> c_int;

    pub fn c10d_store_tcp(
        host: *const c_char,
        port: u16,
        server: c_int,
        workers: u32,
        timeout_ms: i64,
        out: *mut *mut CStore,
    ) -> c_int;
    pub fn c10d_store_prefix(store: *mut CStore, prefix: *const c_char, out: *mut *mut CStore) -> c_int;
    pub fn c10d_store_set_timeout(store: *mut CStore, timeout_ms: i64) -> c_int;
    pub fn c10d_store_set(store: *mut CStore, key: *const c_char, data: *const u8, n: usize) -> c_int;
    pub fn c10d_store_get(store: *mut CStore, key: *const c_char, sink: Sink, context: *mut c_void) -> c_int;
    pub fn c10d_store_add(store: *mut CStore, key: *const c_char, amount: i64, out: *mut i64) -> c_int;
    pub fn c10d_store_wait(store: *mut CStore, key: *const c_char, timeout_ms: i64) -> c_int;
    pub fn c10d_store_free(store: *mut CStore);

    pub fn c10d_group_gloo(
        store: *mut CStore,
        rank: c_int,
        size: c_int,
        host: *const c_char,
        timeout_ms: i64,
        out: *mut *mut CGroup,
    ) -> c_int;
    pub fn c10d_group_all_reduce(group: *mut CGroup, tensor: T, op: c_int, out: *mut *mut CWork) -> c_int;
    pub fn c10d_group_all_gather(group: *mut CGroup, output: T, input: T, out: *mut *mut CWork) -> c_int;
    pub fn c10d_group_reduce_scatter(group: *mut CGroup, output: T, input: T, op: c_int, out: *mut *mut CWork)
    -> c_int;
    pub fn c10d_group_all_to_all(group: *mut CGroup, output: T, input: T, out: *mut *mut CWork) -> c_int;
    pub fn c10d_group_broadcast(group: *mut CGroup, tensor: T, root: c_int, out: *mut *mut CWork) -> c_int;
    pub fn c10d_group_barrier(group: *mut CGroup, device: c_int, out: *mut *mut CWork) -> c_int;
    pub fn c10d_group_free(group: *mut CGroup);
    pub fn c10d_work_wait(work: *mut CWork) -> c_int;
    pub fn c10d_work_free(work: *mut CWork);

    pub fn c10d_grad(
        outputs: *const T,
        n: usize,
        grads: *const T,
        n_grads: usize,
        inputs: *const T,
        m: usize,
        keep_graph: c_int,
        result: *mut T,
    ) -> c_int;
    pub fn c10d_adamw(
        param: T,
        grad: T,
        exp_avg: T,
        exp_avg_sq: T,
        step: i64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        epsilon: f64,
    ) -> c_int;

    pub fn c10d_from_blob(
        data: *mut c_void,
        shape: *const i64,
        dims: usize,
        kind: c_int,
        release: Release,
        owner: *mut c_void,
        out: *mut T,
    ) -> c_int;
    pub fn c10d_storage_bytes(tensor: T, out: *mut usize) -> c_int;
    pub fn c10d_resize_storage(tensor: T, bytes: usize) -> c_int;

    pub fn c10d_count_memory() -> c_int;
    pub fn c10d_page_lock(tensor: T, device: c_int, out: *mut c_int) -> c_int;
    pub fn c10d_set_domain(domain: c_int) -> c_int;
    pub fn c10d_counted(out: *mut i64);
    pub fn c10d_reset_counted_peaks();
    pub fn c10d_reset_device_peak(device: c_int) -> c_int;

    pub fn c10d_stream_new(device: c_int, out: *mut *mut CStream) -> c_int;
    pub fn c10d_stream_free(stream: *mut CStream);
    pub fn c10d_stream_enter(stream: *mut CStream, out: *mut *mut CStream) -> c_int;
    pub fn c10d_event_record(device: c_int, out: *mut *mut CEvent) -> c_int;
    pub fn c10d_event_block(event: *mut CEvent, device: c_int) -> c_int;
    pub fn c10d_event_free(event: *mut CEvent);
    pub fn c10d_copy(target: T, source: T) -> c_int;

    pub fn c10d_rng_state(device: c_int, out: *mut T) -> c_int;
    pub fn c10d_rng_set_state(device: c_int, state: T) -> c_int;
}

/// The shim's view of a tensor. It changes the tensor's contents at most, never the handle.
pub fn ptr(tensor: &Tensor) -> T {
    tensor.as_ptr().cast_mut()
}

/// The shim's view of several tensors.
pub fn ptrs(tensors: &[&Tensor]) -> Vec<T> {
    tensors.iter().map(|tensor| ptr(tensor)).collect()
}
