// Products of 16-bit numbers: pairs that neighbour each other along the sum are multiplied and added up by one
// instruction, two multiply-adds a lane. Layouts are those of gemm.h with a pair in place of an element: A has rows of
// kPanelStride pairs, B panels of [pairs][kPairColumns]. Included by the level unit of avx512_bf16 only (see simd.h).
#pragma once

#include <immintrin.h>

#include "cpu/gemm.h"
#if defined(PYREPR_LEVEL_amx)
#include "cpu/amx.h"
#endif

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int kPairRows = 14, kPairColumns = 32;  // of a block of the product, in 28 of 32 registers

// bf16 with sums in float, and whole numbers with sums in 32 bits, exact as long as those do not overflow.
struct Bf16Pairs {
  using Sum = float;
  using V = Lanes<float>::V;
  static V dot(V sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
struct WholePairs {
  using Sum = int32_t;
  using V = Lanes<float>::I;
  static V dot(V sum, __m512i a, __m512i b) {
    return reinterpret_cast<V>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), a, b));
  }
};

// Stands around products of pairs of bf16.
#if defined(PYREPR_LEVEL_amx)
struct PairProducts : Tiles {
  PairProducts() : Tiles(kPairRows) {}
};
#else
struct PairProducts {
  PairProducts() {}  // not trivial, as unused it would be warned of
};
#endif

// C [14, 32] (rows of ldc) = or += A [14, count] B [count, 32], counted in pairs. With `transposed`, A is [count, 14].
template <class Pairs, bool transposed = false>
__attribute__((noinline)) void multiply_pairs(int64_t count, const int32_t* __restrict a, const int32_t* __restrict b,
                                              typename Pairs::Sum* __restrict c, int64_t ldc, bool add) {
#if defined(PYREPR_LEVEL_amx)
  if constexpr (std::is_same_v<Pairs, Bf16Pairs> && !transposed) {
    const int64_t whole = count / kTile * kTile;
    if (whole > 0) {
      multiply_tiles(whole, kPairRows, a, kPanelStride, b, c, ldc, add);
      if (whole == count) return;
      a += whole;
      b += whole * kPairColumns;
      count -= whole;
      add = true;
    }
  }
#endif
  using V = typename Pairs::V;
  V sum[kPairRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kPairRows; i++) sum[i][0] = sum[i][1] = V{};
  for (int64_t k = 0; k < count; k++) {
    const __m512i left = _mm512_loadu_si512(b + k * kPairColumns);
    const __m512i right = _mm512_loadu_si512(b + k * kPairColumns + 16);
#pragma GCC unroll 16
    for (int i = 0; i < kPairRows; i++) {
      const __m512i pair = _mm512_set1_epi32(a[transposed ? k * kPanelStride + i : i * kPanelStride + k]);
      sum[i][0] = Pairs::dot(sum[i][0], pair, left);
      sum[i][1] = Pairs::dot(sum[i][1], pair, right);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPairRows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      auto* const at = c + i * ldc + j * 16;
      V old{};
      if (add) std::memcpy(&old, at, sizeof old);
      old += sum[i][j];
      std::memcpy(at, &old, sizeof old);
    }
}

// Panels of B from 32 rows of pairs that lie `stride` pairs apart: out [count rounded up to 16][32].
inline void pack_pairs(const int32_t* rows, int64_t stride, int64_t count, int32_t* out) {
  for (int64_t k = 0; k < count; k += 16)
    for (int half = 0; half < 2; half++) {
      Vec<float> v[16];
      for (int i = 0; i < 16; i++) std::memcpy(&v[i], rows + (16 * half + i) * stride + k, sizeof v[i]);
      transpose_registers<float>(v);
      for (int i = 0; i < 16; i++) std::memcpy(out + (k + i) * kPairColumns + 16 * half, &v[i], sizeof v[i]);
    }
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
