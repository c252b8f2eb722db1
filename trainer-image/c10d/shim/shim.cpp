// C ABI over the parts of libtorch 2.11 that tch 0.24 leaves out. Links libtorch_cpu and libc10 only: everything CUDA
// goes through device-generic virtual calls, so one object file works with and without libtorch_cuda.so in the process.
// Objects are handed out as heap boxes of intrusive pointers, each with a `_free`. Tensors are tch's `at::Tensor*`.
// For the error path see guard.h.
#define USE_C10D_GLOO 1
#include "guard.h"
#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Version.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/alignment.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Logging.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <dlfcn.h>
#include <unistd.h>
#include <atomic>
#include <exception>
#include <thread>

using at::Tensor;
using std::chrono::milliseconds;
using Store = c10::intrusive_ptr<c10d::Store>;
using Group = c10::intrusive_ptr<c10d::Backend>;
using Work = c10::intrusive_ptr<c10d::Work>;

namespace {

std::vector<Tensor> tensors(Tensor* const* list, size_t n) {
  std::vector<Tensor> result;
  result.reserve(n);
  for (size_t i = 0; i < n; i++) result.push_back(*list[i]);
  return result;
}

c10d::ReduceOp reduce_op(int op) { return c10d::ReduceOp(static_cast<c10d::ReduceOp::RedOpType>(op)); }

at::Device cuda(int index) { return at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index)); }

// index < 0: the CPU's
at::Generator generator(int index) {
  return at::globalContext().defaultGenerator(index < 0 ? at::Device(at::kCPU) : cuda(index));
}

// What locks host memory in place for a GPU: CUDA's own functions, where libtorch_cuda.so has brought them.
struct PageLock {
  int (*lock)(void*, size_t, unsigned) = nullptr;
  int (*unlock)(void*) = nullptr;
  int (*wait)() = nullptr;
  int (*forget_error)() = nullptr;

  static const PageLock& get() {
    static const PageLock functions = [] {
      PageLock f;
      const auto find = [](auto& target, const char* name) {
        target = reinterpret_cast<std::decay_t<decltype(target)>>(dlsym(RTLD_DEFAULT, name));
        return target != nullptr;
      };
      const bool all = find(f.lock, "cudaHostRegister") && find(f.unlock, "cudaHostUnregister") &&
          find(f.wait, "cudaDeviceSynchronize") && find(f.forget_error, "cudaGetLastError");
      return all ? f : PageLock{};
    }();
    return functions;
  }
};

// CPU memory by who asked for it: what stands for a device's memory where the CPU is the device, and what is host memory in
// any case. Each block carries its size and domain in front of it, so that it is taken off where it was added.
struct Counting final : c10::Allocator {
  struct alignas(c10::gAlignment) Header {
    size_t bytes;
    int domain;
    // The CUDA device for which it is locked in place, or -1.
    int locked;
  };

  std::atomic<int64_t> current[2] = {};
  std::atomic<int64_t> peak[2] = {};

  static Counting& get() {
    static auto* counting = new Counting;
    return *counting;
  }

  static int& domain() {
    static thread_local int domain = 0;
    return domain;
  }

  void add(int domain, int64_t bytes) {
    const auto now = current[domain].fetch_add(bytes, std::memory_order_relaxed) + bytes;
    auto most = peak[domain].load(std::memory_order_relaxed);
    while (now > most && !peak[domain].compare_exchange_weak(most, now, std::memory_order_relaxed)) {
    }
  }

  at::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, at::Device(at::kCPU)};
    auto* header = static_cast<Header*>(c10::alloc_cpu(bytes + sizeof(Header)));
    *header = {bytes, domain(), -1};
    add(header->domain, static_cast<int64_t>(bytes));
    return {header + 1, header + 1, &release, at::Device(at::kCPU)};
  }

  static void release(void* data) {
    if (!data) return;
    auto* header = static_cast<Header*>(data) - 1;
    if (header->locked >= 0) {
      // A copy may still be under way.
      const c10::DeviceGuard guard(cuda(header->locked));
      PageLock::get().wait();
      PageLock::get().unlock(data);
    }
    get().current[header->domain].fetch_sub(static_cast<int64_t>(header->bytes), std::memory_order_relaxed);
    c10::free_cpu(header);
  }

  at::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

}  // namespace

extern "C" {

const char* c10d_last_error() noexcept { return shim::last_error().c_str(); }

// ---------------------------------------------------------------- process

// level < 0 leaves it. TORCH_CPP_LOG_LEVEL, which initLogging reads, comes first.
int c10d_init_logging(int level) noexcept GUARD(
    c10::initLogging();
    if (level >= 0 && !std::getenv("TORCH_CPP_LOG_LEVEL")) FLAGS_caffe2_log_level = level)

// Loads the libtorch_cuda.so beside the libtorch_cpu.so that is in the process already; an error where there is none.
// It must come before any question about CUDA: libtorch keeps the first answer for good.
int c10d_load_cuda() noexcept GUARD(
    auto* known = reinterpret_cast<void*>(&c10d::ProcessGroupGloo::createDefaultDevice);
    Dl_info info;
    TORCH_CHECK(dladdr(known, &info) && info.dli_fname, "cannot tell where libtorch_cpu.so lies");
    std::string path = info.dli_fname;
    path = path.substr(0, path.rfind('/') + 1) + "libtorch_cuda.so";
    TORCH_CHECK(dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL), dlerror()))

int c10d_cuda_device_count(int* out) noexcept GUARD(
    *out = at::hasCUDA() ? static_cast<int>(at::accelerator::deviceCount()) : 0)

// Begins to use CUDA, which says why it cannot.
int c10d_cuda_begin() noexcept GUARD(at::detail::getCUDAHooks().init())

// What libtorch's own kernels were chosen for on this CPU, such as "AVX2".
int c10d_cpu_capability(void (*sink)(void*, const uint8_t*, size_t), void* context) noexcept GUARD(
    const auto name = at::get_cpu_capability();
    sink(context, reinterpret_cast<const uint8_t*>(name.data()), name.size()))

// Exceptions that nobody catches are told to `told`, whose answer is the exit code of the process. Threads of c10d's own throw
// some: NCCL's watchdog at a lost peer, and Gloo's loop where ranks give different sizes.
void c10d_on_terminate(int (*told)(int code, const char* message)) noexcept {
  static std::atomic<int (*)(int, const char*)> ending = nullptr;
  ending = told;
  std::set_terminate([] {
    int code = 0;
    if (std::current_exception()) code = shim::record_exception();
    // The first one is the cause. Others wait for the end that it brings.
    static std::atomic<bool> ended = false;
    if (ended.exchange(true)) std::this_thread::sleep_for(std::chrono::minutes(1));
    _exit(ending.load()(code, code ? shim::last_error().c_str() : "std::terminate was called"));
  });
}

// out: bytes allocated, allocated at the peak, reserved, reserved at the peak, free on the device, total of the device
int c10d_device_memory(int device, int64_t out[6]) noexcept GUARD(
    auto* allocator = c10::getDeviceAllocator(c10::kCUDA);
    const auto stats = allocator->getDeviceStats(cuda(device).index());
    const auto [free, total] = allocator->getMemoryInfo(cuda(device).index());
    out[0] = stats.allocated_bytes[0].current;
    out[1] = stats.allocated_bytes[0].peak;
    out[2] = stats.reserved_bytes[0].current;
    out[3] = stats.reserved_bytes[0].peak;
    out[4] = static_cast<int64_t>(free);
    out[5] = static_cast<int64_t>(total))

// ---------------------------------------------------------------- store

// workers > 0: returns when that many have connected
int c10d_store_tcp(const char* host, uint16_t port, int server, uint32_t workers, int64_t timeout_ms,
                   Store** out) noexcept GUARD(
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = server;
    options.waitWorkers = workers > 0;
    options.numWorkers = workers;
    options.timeout = milliseconds(timeout_ms);
    *out = new Store(c10::make_intrusive<c10d::TCPStore>(std::string(host), options)))

int c10d_store_prefix(Store* store, const char* prefix, Store** out) noexcept GUARD(
    *out = new Store(c10::make_intrusive<c10d::PrefixStore>(prefix, *store)))

int c10d_store_set_timeout(Store* store, int64_t timeout_ms) noexcept GUARD(
    (*store)->setTimeout(milliseconds(timeout_ms)))

int c10d_store_set(Store* store, const char* key, const uint8_t* data, size_t n) noexcept GUARD(
    (*store)->set(key, std::vector<uint8_t>(data, data + n)))

// Gives the value to `sink`, so that nobody has to free it.
int c10d_store_get(Store* store, const char* key, void (*sink)(void*, const uint8_t*, size_t),
                   void* context) noexcept GUARD(
    const auto value = (*store)->get(key);
    sink(context, value.data(), value.size()))

int c10d_store_add(Store* store, const char* key, int64_t amount, int64_t* out) noexcept GUARD(
    *out = (*store)->add(key, amount))

int c10d_store_wait(Store* store, const char* key, int64_t timeout_ms) noexcept GUARD(
    (*store)->wait({key}, milliseconds(timeout_ms)))

void c10d_store_free(Store* store) noexcept { delete store; }

// ---------------------------------------------------------------- process group

int c10d_group_gloo(Store* store, int rank, int size, const char* host, int64_t timeout_ms,
                    Group** out) noexcept GUARD(
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(host));
    *out = new Group(c10::make_intrusive<c10d::ProcessGroupGloo>(*store, rank, size, options)))

int c10d_group_all_reduce(Group* group, Tensor* tensor, int op, Work** out) noexcept GUARD(
    c10d::AllreduceOptions options;
    options.reduceOp = reduce_op(op);
    std::vector<Tensor> list{*tensor};
    *out = new Work((*group)->allreduce(list, options)))

int c10d_group_all_gather(Group* group, Tensor* output, Tensor* input, Work** out) noexcept GUARD(
    *out = new Work((*group)->_allgather_base(*output, *input)))

int c10d_group_reduce_scatter(Group* group, Tensor* output, Tensor* input, int op, Work** out) noexcept GUARD(
    c10d::ReduceScatterOptions options;
    options.reduceOp = reduce_op(op);
    *out = new Work((*group)->_reduce_scatter_base(*output, *input, options)))

int c10d_group_all_to_all(Group* group, Tensor* output, Tensor* input, Work** out) noexcept GUARD(
    std::vector<int64_t> equal;  // no sizes: equal parts
    *out = new Work((*group)->alltoall_base(*output, *input, equal, equal)))

int c10d_group_broadcast(Group* group, Tensor* tensor, int root, Work** out) noexcept GUARD(
    c10d::BroadcastOptions options;
    options.rootRank = root;
    std::vector<Tensor> list{*tensor};
    *out = new Work((*group)->broadcast(list, options)))

// device < 0: the group works on the CPU
int c10d_group_barrier(Group* group, int device, Work** out) noexcept GUARD(
    c10d::BarrierOptions options;
    if (device >= 0) options.device = cuda(device);
    *out = new Work((*group)->barrier(options)))

void c10d_group_free(Group* group) noexcept { delete group; }

int c10d_work_wait(Work* work) noexcept GUARD((*work)->wait())

void c10d_work_free(Work* work) noexcept { delete work; }

// ---------------------------------------------------------------- autograd and optimizer

// result[i]: a new tensor, or null where input i does not reach the outputs. n_grads is n, or 0 for scalar outputs.
int c10d_grad(Tensor* const* outputs, size_t n, Tensor* const* grads, size_t n_grads, Tensor* const* inputs, size_t m,
              int keep_graph, Tensor** result) noexcept GUARD(
    const auto found = torch::autograd::grad(tensors(outputs, n), tensors(inputs, m), tensors(grads, n_grads),
                                             keep_graph != 0, /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < m; i++) result[i] = found[i].defined() ? new Tensor(found[i]) : nullptr)

int c10d_adamw(Tensor* param, Tensor* grad, Tensor* exp_avg, Tensor* exp_avg_sq, int64_t step, double lr, double beta1,
               double beta2, double weight_decay, double epsilon) noexcept GUARD(
    at::NoGradGuard no_grad;
    const auto count = at::full({}, step, param->options().dtype(at::kFloat));
    at::_fused_adamw_({*param}, {*grad}, {*exp_avg}, {*exp_avg_sq}, {}, {count}, lr, beta1, beta2, weight_decay,
                      epsilon, /*amsgrad=*/false, /*maximize=*/false))

// ---------------------------------------------------------------- storage

// A CPU tensor over memory of `owner`. Takes the owner in every case, errors included: `release(owner)` is called once,
// when the last tensor over the memory is gone.
int c10d_from_blob(void* data, const int64_t* shape, size_t dims, int kind, void (*release)(void*), void* owner,
                   Tensor** out) noexcept GUARD(
    std::shared_ptr<void> keep(owner, release);
    const auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind)).device(at::kCPU);
    *out = new Tensor(at::from_blob(data, at::IntArrayRef(shape, dims), [keep](void*) {}, options)))

int c10d_storage_bytes(Tensor* tensor, size_t* out) noexcept GUARD(*out = tensor->storage().nbytes())

// As FSDP does it: the storage changes, all tensors over it stay.
int c10d_resize_storage(Tensor* tensor, size_t bytes) noexcept GUARD(
    auto* storage = tensor->storage().unsafeGetStorageImpl();
    TORCH_CHECK(storage->resizable() && storage->allocator(), "this storage is not libtorch's own: it cannot be resized");
    const auto need = at::detail::computeStorageNbytes(tensor->sizes(), tensor->strides(), tensor->itemsize(),
                                                       tensor->storage_offset());
    TORCH_CHECK(bytes == 0 || bytes >= need, "a storage of ", bytes, " bytes is too small for its tensor, which needs ",
                need);
    if (bytes == storage->nbytes()) return shim::kOk;
    storage->set_data_ptr(storage->allocator()->allocate(bytes));
    storage->set_nbytes(bytes))

// Counts CPU memory from now on. Memory that was taken before stays uncounted.
int c10d_count_memory() noexcept GUARD(c10::SetCPUAllocator(&Counting::get(), 1))

// Locks the memory under a whole CPU tensor in place, exactly as much as it has (libtorch's own pinned memory comes in
// powers of two), until it is freed. out: whether that went well; where not, copies only take longer.
int c10d_page_lock(Tensor* tensor, int device, int* out) noexcept GUARD(
    *out = 0;
    const auto& storage = tensor->storage().data_ptr();
    void* data = storage.get();
    const auto& cuda = PageLock::get();
    if (storage.get_deleter() != &Counting::release || !data || !cuda.lock) return shim::kOk;
    auto* header = static_cast<Counting::Header*>(data) - 1;
    if (header->locked >= 0) return shim::kOk;
    // CUDA's own functions mean the current device, which nobody else sets.
    const c10::DeviceGuard guard(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
    *out = cuda.lock(data, header->bytes, 0) == 0;
    if (*out) header->locked = device;
    else cuda.forget_error())

// The domain of what this thread allocates from now on (0: device, 1: host); returns the one before.
int c10d_set_domain(int domain) noexcept {
  std::swap(domain, Counting::domain());
  return domain;
}

// current and peak bytes of the device domain, then of the host domain
void c10d_counted(int64_t out[4]) noexcept {
  for (int domain : {0, 1}) {
    out[2 * domain] = Counting::get().current[domain];
    out[2 * domain + 1] = Counting::get().peak[domain];
  }
}

void c10d_reset_counted_peaks() noexcept {
  for (int domain : {0, 1}) Counting::get().peak[domain] = Counting::get().current[domain].load();
}

int c10d_reset_device_peak(int device) noexcept GUARD(
    c10::getDeviceAllocator(c10::kCUDA)->resetPeakStats(cuda(device).index()))

// ---------------------------------------------------------------- streams

// One of the streams of a CUDA device beside that on which it computes.
int c10d_stream_new(int device, c10::Stream** out) noexcept GUARD(
    const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
    *out = new c10::Stream(guard.getStreamFromGlobalPool(cuda(device))))

void c10d_stream_free(c10::Stream* stream) noexcept { delete stream; }

// Marks how far the current stream of a CUDA device is.
int c10d_event_record(int device, c10::Event** out) noexcept GUARD(
    const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
    auto event = std::make_unique<c10::Event>(c10::kCUDA);
    event->record(guard.getStream(cuda(device)));
    *out = event.release())

// What is queued on the current stream of a CUDA device from now on comes after the event.
int c10d_event_block(c10::Event* event, int device) noexcept GUARD(
    const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
    event->block(guard.getStream(cuda(device))))

void c10d_event_free(c10::Event* event) noexcept { delete event; }

// Makes `stream` the current one; out: the one before.
int c10d_stream_enter(c10::Stream* stream, c10::Stream** out) noexcept GUARD(
    const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
    *out = new c10::Stream(guard.exchangeStream(*stream)))

// Copies without waiting for it; the order is that of the current stream.
int c10d_copy(Tensor* target, Tensor* source) noexcept GUARD(target->copy_(*source, /*non_blocking=*/true))

// ---------------------------------------------------------------- random state

int c10d_rng_state(int device, Tensor** out) noexcept GUARD(
    auto source = generator(device);
    std::lock_guard<std::mutex> lock(source.mutex());
    *out = new Tensor(source.get_state()))

int c10d_rng_set_state(int device, Tensor* state) noexcept GUARD(
    auto source = generator(device);
    std::lock_guard<std::mutex> lock(source.mutex());
    source.set_state(*state))

}  // extern "C"
