// Family `lookup` on the CPU: what csrc/bindings/lookup.cpp calls and lookup.cpp defines once per instruction set.
//
// A row of x [T, d], less `centre` and times `scale` where they are given, is cut into K chunks z, of `bits` elements
// or of bits / 2. code(z) = sum over i of [z_i >= 0] 2^i (one_bit) or of ([z_i >= 0] + 2 [|z_i| >= 1]) 4^i (two_bit),
// and with the sizes s_i = |z_i| the weight w(z) is prod sigmoid(2 s_i / t) (probability), that times sum s_i (scaled),
// the mean of s_i (l1) or 1.
//   linear    out[t] = bias + sum over k of w[t, k] table_k[code[t, k]];  with a low-rank part, of x - inner down for
//   inner = x down^T, plus inner up
//   signs     out[t] = bias + scales (f weight^T) plus the same low-rank part, for the features f of the codes
//   backward  segments_k[c] = sum over t with code[t, k] = c of w[t, k] grad[t];  dots[t, k] = <grad[t],
//   table_k[code[t, k]]>
//
// Accumulation is in float, in double for f64. T stands for that type in comments.
#pragma once

#include "common.h"

namespace pyrepr::cpu {

// The codes Python passes: DType's, and 8-bit integers. `TABLE_CODES` in pyrepr/ops/lookup.py holds the same numbers.
enum class TableType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, i8 = 4 };

// `WEIGHTINGS` in pyrepr/reference/lookup.py holds the same order.
enum class Weighting : int { probability = 0, scaled = 1, l1 = 2, none = 3 };

// What an element is hashed to; the number is that of its bits. `HASHES` in pyrepr/reference/lookup.py holds the same.
enum class Hash : int { one_bit = 1, two_bit = 2 };

// Which forward kernel: by size; tokens outside, rows gathered; tables outside, each read once; tables of few 8-bit
// rows looked up in registers, or rows of 8-bit integers gathered as bytes (both by avx512_bf16 only). One that cannot
// run is replaced by another.
enum class LookupRoute : int { by_size = 0, rows = 1, stream = 2, registers = 3, bytes = 4 };

// Columns of a tile: what packed tables are cut into, and what a thread of the streaming kernel works on. `TILE` in
// pyrepr/reference/lookup.py holds the same number.
constexpr int64_t kLookupTile = 64;

struct LookupTables {
  const void* data;  // [K, n, h], or packed [h / kLookupTile, K, n, kLookupTile]; contiguous
  TableType type;
  const float* scales;  // [K, n] for i8, else null
  int64_t K, n, h;
  bool packed;  // for linear and sum only
  int threads;
};

struct LookupHash {
  View x;  // [T, d], contiguous rows
  DType dtype;
  int64_t bits;
  Weighting weighting;
  double temperature;
  int threads;
  Hash kind = Hash::one_bit;
  const void *centre = nullptr, *scale = nullptr;  // [d] of T, both or neither
};

struct LookupLowRank {
  int64_t rank = 0;            // 0: there is none
  const void* down = nullptr;  // [rank, d] of T, contiguous
  const void* up = nullptr;    // [rank, h] of T, contiguous
};

// What a linear map of signs has: the features are the bits of the codes, 1 or -1, with two bits of an element its sign
// and sign times whether it is large, 1 or -1.
struct LookupSigns {
  const int8_t* weight;  // [h, features], contiguous
  const float* scales;   // [h]
  int64_t h, features;
  int threads;
};

struct LookupFunctions {
  // codes [T, K], weights [T, K] of T
  Status (*hash)(const LookupHash&, int32_t* codes, void* weights);
  // grad [T, d] of T = grad_weights [T, K] of T times the derivative of the weights with respect to x
  Status (*hash_backward)(const LookupHash&, const void* grad_weights, void* grad);
  // out [T, h] of T; bias [h] of T or null
  Status (*linear)(const LookupTables&, const LookupHash&, const LookupLowRank&, const void* bias, LookupRoute,
                   void* out);
  // out [T, h] of T from codes [T, K] within [0, n) and weights [T, K]
  Status (*sum)(const LookupTables&, int64_t tokens, const int32_t* codes, const void* weights, LookupRoute, void* out);
  // segments [K, n, h] of T or null; with first [K + 1] only the rows that occur, those of table k from row first[k]
  // on. dots [T, K] of T or null, times the scales.
  Status (*backward)(const LookupTables&, const View& grad, const int32_t* codes, const void* weights,
                     const int64_t* first, void* segments, void* dots);
  // out [T, h] = bias (or null) + scales (features weight^T) + inner up; x of any dtype but f64, at most 8 bits a code,
  // weighting none. NaN in a token makes its row NaN.
  Status (*signs)(const LookupSigns&, const LookupHash&, const LookupLowRank&, const float* bias, float* out);
};

}  // namespace pyrepr::cpu
