// Family `lookup` in CUDA C++: the forward of few tokens. No CUDA header here, so that the bindings need none.
#pragma once

#include <cstdint>

#include "common.h"

namespace pyrepr::cuda {

// out[t] = bias + sum over k of w[t, k] table_k[code[t, k]], codes and weights from x as in cpu/lookup.h.
struct LookupLinear {
  const void* x;  // [T, K bits], rows x_stride elements apart
  DType x_type;   // f32, bf16 or f16
  int64_t x_stride;
  const void* tables;   // [K, 2^bits, h] contiguous
  int table_type;       // a DType but f64, or 4: 8-bit integers
  const float* scales;  // [K, 2^bits] for 8-bit integers, else null
  const void* bias;     // [h] or null
  DType bias_type;      // f32, bf16 or f16
  void* out;            // [T, h] of x_type
  float* partial;       // [parts, T, h], null for one part
  int64_t parts;        // from lookup_linear_parts
  int64_t T, K, h;
  int bits;
  int weighting;  // as cpu::Weighting
  float slope;    // 2 / temperature
};

// Into how many parts K is cut, so that few tokens and narrow tables fill a GPU: from sizes alone, so that the result
// has the same bits everywhere.
int64_t lookup_linear_parts(int64_t T, int64_t K, int64_t h, int table_type);

// Launches on `stream` and does not wait. Returns null, or what CUDA says went wrong.
const char* lookup_linear(const LookupLinear& call, void* stream);

}  // namespace pyrepr::cuda
