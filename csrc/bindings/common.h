// What the bindings of all families share. Python passes integers (pointers, sizes, strides, codes); here is checked
// what a pointer cannot say. Only pyrepr/ops calls the module: torch's dispatcher has then resolved fake, negated and
// conjugated tensors. A binding reads every Python object first, then releases the GIL and calls.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "cpu/dispatch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyrepr {

namespace py = pybind11;

// The instruction set in use, chosen at the first use. Throws where PYREPR_SIMD asks for what there is not.
const cpu::Level& current_level();

// (data pointer, rows, cols, row stride, col stride), as made by `matrix` in pyrepr/ops/_native.py
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;

template <class T>
T* pointer(uintptr_t address, const char* what, bool may_be_null = false) {
  if (!address && !may_be_null)
    throw std::invalid_argument(std::string(what) + " has no memory (a fake or meta tensor, or a freed storage)");
  return reinterpret_cast<T*>(address);
}

inline DType dtype_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("dtype code " + std::to_string(code) + " is unknown");
  return static_cast<DType>(code);
}

inline void check(Status status) {
  if (status == Status::out_of_memory) throw std::bad_alloc();
}

// Asks the system to hold this memory in huge pages: a gather from small ones waits for address translation more than
// for data, and a large fresh result costs more in page faults than in writes. With `now`, pages already in use are
// moved too (MADV_COLLAPSE, Linux 6.1). Contents and addresses stay; true if nothing was refused.
inline bool huge_pages(uintptr_t address, int64_t bytes, bool now) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t start = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (end <= start) return false;
  void* const data = reinterpret_cast<void*>(start);
  if (madvise(data, end - start, MADV_HUGEPAGE)) return false;
#if !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25
#endif
  return !now || madvise(data, end - start, MADV_COLLAPSE) == 0;
#else
  (void)address, (void)bytes, (void)now;
  return false;
#endif
}

// One function per family, each in the file of its name.
#define PYREPR_FAMILY(family, Functions, bf16, tiles) void bind_##family(py::module_& m);
#include "families.h"

}  // namespace pyrepr
