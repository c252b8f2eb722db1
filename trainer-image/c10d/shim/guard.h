// The one error path of the C ABI. Every function that can fail is `noexcept`, has the body `GUARD(...)`, returns a
// `Code`, and leaves the message (without C++ backtrace) in a thread-local string that `last_error()` shows.
#pragma once
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/exception.h>
#include <cxxabi.h>
#include <algorithm>
#include <cstdlib>
#include <string>

namespace shim {

enum Code { kOk = 0, kTorch = 1, kDistributed = 2, kTimeout = 3, kOutOfMemory = 4, kNotImplemented = 5 };

inline std::string& last_error() noexcept {
  static thread_local std::string text;
  return text;
}

inline bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

inline int fail(Code code, std::string text) {
  // Some messages carry the backtrace of an inner error in their own text.
  for (const char* mark : {"\nException raised from", "\nframe #0"}) {
    text.resize(std::min(text.size(), text.find(mark)));
  }
  last_error() = std::move(text);
  return code;
}

// gloo throws types of its own, for which the wheel has no headers: they are told apart by name and text.
inline std::string exception_type() {
  const std::type_info* type = abi::__cxa_current_exception_type();
  if (!type) return "unknown exception";
  char* name = abi::__cxa_demangle(type->name(), nullptr, nullptr, nullptr);
  std::string text = name ? name : type->name();
  std::free(name);
  return text;
}

inline bool is_timeout(const std::string& text) {
  return contains(text, "imed out") || contains(text, "timeout after") || contains(text, "Timeout");
}

// Call inside a catch block only.
inline int record_exception() noexcept {
  try {
    throw;
  } catch (const c10::OutOfMemoryError& e) {
    return fail(kOutOfMemory, e.what_without_backtrace());
  } catch (const c10d::TimeoutError& e) {
    return fail(kTimeout, e.what_without_backtrace());
  } catch (const c10::DistError& e) {
    return fail(is_timeout(e.what_without_backtrace()) ? kTimeout : kDistributed, e.what_without_backtrace());
  } catch (const c10::NotImplementedError& e) {
    return fail(kNotImplemented, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    const std::string text = e.what_without_backtrace();
    if (contains(text, "DefaultCPUAllocator: ")) return fail(kOutOfMemory, text);
    return fail(contains(text, "Operation timed out") ? kTimeout : kTorch, text);
  } catch (const std::bad_alloc& e) {
    return fail(kOutOfMemory, e.what());
  } catch (const std::exception& e) {
    const std::string type = exception_type(), text = type + ": " + e.what();
    if (!contains(type, "gloo::")) return fail(kTorch, text);
    return fail(is_timeout(text) ? kTimeout : kDistributed, text);
  } catch (...) {
    return fail(kTorch, exception_type());
  }
}

}  // namespace shim

#define GUARD(...)                     \
  {                                    \
    try {                              \
      __VA_ARGS__;                     \
      return shim::kOk;                \
    } catch (...) {                    \
      return shim::record_exception(); \
    }                                  \
  }
