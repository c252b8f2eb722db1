// Declarations only, here and in the files around: what ProcessGroupGloo.hpp of torch 2.11 names from gloo. The wheel
// ships no gloo headers, while the code is inside libtorch_cpu.so. The shim makes no object of these types.
#pragma once
#include <chrono>
#include <memory>

namespace gloo {
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};
}  // namespace gloo
