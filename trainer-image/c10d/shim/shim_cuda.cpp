// The NCCL half of the shim. It needs libtorch_cuda.so when it is loaded, so it is a shared object of its own, which
// cuda.rs loads after libtorch_cuda.so; the group it makes goes through the same virtual calls as Gloo's.
#define USE_C10D_NCCL 1
#define USE_CUDA 1
#include "guard.h"
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

using Store = c10::intrusive_ptr<c10d::Store>;
using Group = c10::intrusive_ptr<c10d::Backend>;

extern "C" {

const char* c10d_cuda_last_error() noexcept { return shim::last_error().c_str(); }

int c10d_cuda_group_nccl(Store* store, int rank, int size, int64_t timeout_ms, Group** out) noexcept GUARD(
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = std::chrono::milliseconds(timeout_ms);
  *out = new Group(c10::make_intrusive<c10d::ProcessGroupNCCL>(*store, rank, size, options)))

}  // extern "C"
