// What every part of the native code shares: element types, matrix views, status codes. No Python, no PyTorch.
#pragma once

#include <cstdint>

namespace pyrepr {

// The codes Python passes; `dtype_code` in pyrepr/ops/_native.py holds the same numbers.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// What the delta rule's state decays by; `Gate` in pyrepr/reference/delta_rule.py holds the same numbers.
enum class Gate : int { none = 0, per_head = 1, per_key = 2 };

enum class Status : int { ok = 0, out_of_memory = 1 };

// A matrix somewhere in memory: element (i, j) stands at data + i * row_stride + j * col_stride (in elements).
struct View {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;
};

}  // namespace pyrepr
