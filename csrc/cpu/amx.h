// Products of tiles: registers of 16 rows of 64 bytes, multiplied sixteen multiply-adds a lane of bf16 pairs at a time
// (Intel AMX). A is [16, 32] bf16, row-major; B [32, 16] in pairs of rows, dword (i, j) being b[2i][j] and b[2i +
// 1][j]; C [16, 16] float. Subnormal numbers count as zero. Included by the level unit of amx only (see simd.h).
//
// Assembly and not the compiler's own functions: GCC's loads do not say that they read memory, so that it may store
// what they read after them.
#pragma once

#include <immintrin.h>

#include "cpu/gemm.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kTile = 16;         // rows of A and C, columns of B and C, pairs of a product
constexpr int64_t kTileColumns = 32;  // of the products below: two tiles side by side

// The tile registers of this thread while this lives: six for A and C, of this many rows, and two for B. It takes as
// long as ten products, so it belongs around many.
struct Tiles {
  explicit Tiles(uint8_t r) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {r, r, r, r, r, r, 16, 16}};
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
};

template <int N>
inline void tile_load(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(N) : "memory");
}
template <int N>
inline void tile_store(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(N) : "memory");
}
template <int N>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(N));
}
template <int C, int A, int B>
inline void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// The same of bytes with signs, [16, 64] and [64, 16] in fours of rows, summed in 32 bits.
template <int C, int A, int B>
inline void tile_dot_bytes() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Sums [16 R, 32] of products, in registers 0 to 2 R; R is 1 or 2, whose rows need not be neighbours.
template <int R>
struct TileSums {
  void zero() const {
    tile_zero<0>();
    tile_zero<1>();
    if constexpr (R == 2) {
      tile_zero<2>();
      tile_zero<3>();
    }
  }
  void load(const float* c0, const float* c1, int64_t ldc) const {
    tile_load<0>(c0, ldc * 4);
    tile_load<1>(c0 + kTile, ldc * 4);
    if constexpr (R == 2) {
      tile_load<2>(c1, ldc * 4);
      tile_load<3>(c1 + kTile, ldc * 4);
    }
  }
  void store(float* c0, float* c1, int64_t ldc) const {
    tile_store<0>(c0, ldc * 4);
    tile_store<1>(c0 + kTile, ldc * 4);
    if constexpr (R == 2) {
      tile_store<2>(c1, ldc * 4);
      tile_store<3>(c1 + kTile, ldc * 4);
    }
  }
  // += A (B + B'), A brought in once.
  void add(const void* a0, const void* a1, int64_t lda, const uint32_t* b, const uint32_t* b_, int64_t ldb,
           int64_t pairs) const {
    const char *left = static_cast<const char*>(a0), *right = static_cast<const char*>(a1);
    for (int64_t k = 0; k < pairs; k += kTile, left += 64, right += 64, b += kTile * ldb, b_ += kTile * ldb) {
      tile_load<4>(left, lda * 4);
      tile_load<6>(b, ldb * 4);
      if constexpr (R == 2) tile_load<5>(right, lda * 4);
      tile_load<7>(b + kTile, ldb * 4);
      tile_dot<0, 4, 6>();
      if constexpr (R == 2) tile_dot<2, 5, 6>();
      tile_dot<1, 4, 7>();
      if constexpr (R == 2) tile_dot<3, 5, 7>();
      tile_load<6>(b_, ldb * 4);
      tile_load<7>(b_ + kTile, ldb * 4);
      tile_dot<0, 4, 6>();
      if constexpr (R == 2) tile_dot<2, 5, 6>();
      tile_dot<1, 4, 7>();
      if constexpr (R == 2) tile_dot<3, 5, 7>();
    }
  }
  // += A B over `pairs` pairs: a0, a1 [16, pairs] in rows of lda pairs, b [pairs, 32] in rows of ldb.
  void add(const void* a0, const void* a1, int64_t lda, const uint32_t* b, int64_t ldb, int64_t pairs) const {
    const char *left = static_cast<const char*>(a0), *right = static_cast<const char*>(a1);
    for (int64_t k = 0; k < pairs; k += kTile, left += 64, right += 64, b += kTile * ldb) {
      tile_load<6>(b, ldb * 4);
      tile_load<4>(left, lda * 4);
      tile_load<7>(b + kTile, ldb * 4);
      tile_dot<0, 4, 6>();
      tile_dot<1, 4, 7>();
      if constexpr (R == 2) {
        tile_load<5>(right, lda * 4);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
      }
    }
  }
};

// C [rows, 32] (rows of ldc) = or += A [rows, pairs] B [pairs, 32], A in rows of lda pairs, B of 32, whole tiles of
// pairs; `rows` is what the registers were set up for, at most 16.
__attribute__((noinline)) inline void multiply_tiles(int64_t pairs, int64_t rows, const void* a, int64_t lda,
                                                     const void* b, float* c, int64_t ldc, bool add) {
  // Every other product goes to sums of its own: those of two tiles would wait for each other.
  alignas(64) float others[kTile * kTileColumns];
  const TileSums<1> sums;
  add ? sums.load(c, nullptr, ldc) : sums.zero();
  tile_zero<2>();
  tile_zero<3>();
  const char *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
  constexpr int64_t row = kTileColumns * 4, step = kTile * row;
  int64_t k = 0;
  for (; k + 2 * kTile <= pairs; k += 2 * kTile, left += 128, right += 2 * step) {
    tile_load<4>(left, lda * 4);
    tile_load<6>(right, row);
    tile_dot<0, 4, 6>();
    tile_load<7>(right + 64, row);
    tile_dot<1, 4, 7>();
    tile_load<5>(left + 64, lda * 4);
    tile_load<6>(right + step, row);
    tile_dot<2, 5, 6>();
    tile_load<7>(right + step + 64, row);
    tile_dot<3, 5, 7>();
  }
  if (k < pairs) sums.add(left, nullptr, lda, reinterpret_cast<const uint32_t*>(right), kTileColumns, kTile);
  sums.store(c, nullptr, ldc);
  if (pairs < 2 * kTile) return;
  tile_store<2>(others, row);
  tile_store<3>(others + kTile, row);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < kTileColumns; j += kTile)
      store<float>(c + i * ldc + j, load<float>(c + i * ldc + j) + load<float>(others + i * kTileColumns + j));
}

// x = high + low to 2^-17: high is x cut off after bf16's digits, in place.
inline Vec<float> cut(Vec<float> x) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Lanes<float>::U>(x) & 0xffff0000u);
}
// A row of 16 as bf16.
inline void store_row_high(void* to, Vec<float> x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(reinterpret_cast<__m512i>(x), 16)));
}
inline void store_row_low(void* to, Vec<float> x) {
  const __m256bh low = _mm512_cvtneps_pbh(x - cut(x));
  std::memcpy(to, &low, sizeof low);
}
// Rows 2i and 2i + 1, 16 columns, as a row of B's pairs.
inline void store_pair_high(uint32_t* to, Vec<float> even, Vec<float> odd) {
  using U = Lanes<float>::U;
  const U pairs = reinterpret_cast<U>(even) >> 16 | (reinterpret_cast<U>(odd) & 0xffff0000u);
  std::memcpy(to, &pairs, sizeof pairs);
}
inline void store_pair_low(uint32_t* to, Vec<float> even, Vec<float> odd) {
  const __m512i lanes = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh both = _mm512_cvtne2ps_pbh(odd - cut(odd), even - cut(even));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(lanes, reinterpret_cast<__m512i>(both)));
}

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
