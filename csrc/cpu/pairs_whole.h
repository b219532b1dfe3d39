// Products of vectors of 16-bit whole numbers, exact in 32 bits, for the screening of top-k: pairs of numbers by the
// processor's product of pairs or, where it has tiles, each number as 256 high + low, two bytes with signs, and
//
//   sum x y = 65536 sum high high + 256 (sum high low + sum low high) + sum low low
//
// A WholeProduct is of vectors [width], whose rows on the A side and panels of kGroup columns on the B side it lays
// out. Included by the level units of avx512_bf16 and amx only.
#pragma once

#include "cpu/dots.h"
#include "cpu/pairs_columns.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

static_assert(kGroup == kPairColumns);

#if defined(PYREPR_LEVEL_amx)
class WholeProduct {
 public:
  using Scope = PairProducts;
  static constexpr int64_t kUnit = 64;       // what a width is a multiple of
  static constexpr double kLargest = 32639;  // 256 * 127 + 127

  explicit WholeProduct(int64_t width) : width_(width) {}
  int64_t words(int64_t rows) const { return rows * width_ / 2; }  // of rows on the A side: their highs, their lows

  void keep(const int16_t* whole, int64_t i, int32_t* rows) const {
    int32_t* const to = rows + i * width_ / 2;
    for (int64_t k = 0; k < width_; k += 32) {
      const __m512i x = _mm512_loadu_si512(whole + k), high = high_of(x);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k / 4), _mm512_cvtepi16_epi8(high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + width_ / 4 + k / 4), low_of(x, high));
    }
  }
  // whole [kGroup, width] -> panel [high, low][halves of the columns][width / 4 fours][16]
  void pack(const int16_t* whole, int32_t* panel) const {
    const int64_t part = width_ / 4 * kTile;
    for (int64_t half = 0; half < 2; half++)
      for (int64_t k = 0; k < width_; k += 64) {
        Vec<float> high[16], low[16];
        for (int64_t i = 0; i < 16; i++) {
          const int16_t* const from = whole + (16 * half + i) * width_ + k;
          const __m512i x = _mm512_loadu_si512(from), y = _mm512_loadu_si512(from + 32);
          const __m512i of_x = high_of(x), of_y = high_of(y);
          high[i] = both(_mm512_cvtepi16_epi8(of_x), _mm512_cvtepi16_epi8(of_y));
          low[i] = both(low_of(x, of_x), low_of(y, of_y));
        }
        transpose_registers<float>(high);
        transpose_registers<float>(low);
        for (int64_t i = 0; i < 16; i++) {
          int32_t* const to = panel + half * part + (k / 4 + i) * kTile;
          std::memcpy(to, &high[i], sizeof high[i]);
          std::memcpy(to + 2 * part, &low[i], sizeof low[i]);
        }
      }
  }
  // sums [kPairRows, kGroup] of rows from i on.
  void multiply(const int32_t* rows, int64_t i, const int32_t* panel, int32_t* sums) const {
    const char* const a = reinterpret_cast<const char*>(rows + i * width_ / 2);
    const int64_t part = width_ / 4 * kTile;
    alignas(64) int32_t of[4][kPairRows * kTile];
    for (int64_t half = 0; half < 2; half++) {
      const int32_t* const b = panel + half * part;
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
      for (int64_t k = 0; k < width_; k += 64) {
        tile_load<4>(a + k, 2 * width_);
        tile_load<6>(b + k * 4, 64);
        tile_dot_bytes<0, 4, 6>();
        tile_load<7>(b + 2 * part + k * 4, 64);
        tile_dot_bytes<1, 4, 7>();
        tile_load<5>(a + width_ + k, 2 * width_);
        tile_dot_bytes<2, 5, 6>();
        tile_dot_bytes<3, 5, 7>();
      }
      tile_store<0>(of[0], 64);
      tile_store<1>(of[1], 64);
      tile_store<2>(of[2], 64);
      tile_store<3>(of[3], 64);
      for (int64_t r = 0; r < kPairRows; r++) {
        const auto sum = [&](int q) { return _mm512_load_si512(of[q] + r * kTile); };
        const __m512i mixed = _mm512_slli_epi32(_mm512_add_epi32(sum(1), sum(2)), 8);
        const __m512i all = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(sum(0), 16), mixed), sum(3));
        _mm512_store_si512(sums + r * kGroup + half * kTile, all);
      }
    }
  }

 private:
  static __m512i high_of(__m512i x) { return _mm512_srai_epi16(_mm512_add_epi16(x, _mm512_set1_epi16(128)), 8); }
  static __m256i low_of(__m512i x, __m512i high) {
    return _mm512_cvtepi16_epi8(_mm512_sub_epi16(x, _mm512_slli_epi16(high, 8)));
  }
  static Vec<float> both(__m256i first, __m256i second) {
    return reinterpret_cast<Vec<float>>(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
  }

  const int64_t width_;
};
#else
class WholeProduct {
 public:
  struct Scope {
    Scope() {}
  };
  static constexpr int64_t kUnit = 32;
  static constexpr double kLargest = 32767;

  explicit WholeProduct(int64_t width) : pairs_(width / 2) {}
  int64_t words(int64_t) const { return ceil_div(pairs_, kDepth) * kQueries * kPanelStride; }

  void keep(const int16_t* whole, int64_t i, int32_t* rows) const {
    for (int64_t k = 0; k < pairs_; k += kDepth)
      std::memcpy(rows + row(k, i), whole + 2 * k, static_cast<size_t>(smaller(kDepth, pairs_ - k)) * 4);
  }
  void pack(const int16_t* whole, int32_t* panel) const {
    pack_pairs(reinterpret_cast<const int32_t*>(whole), pairs_, pairs_, panel);
  }
  void multiply(const int32_t* rows, int64_t i, const int32_t* panel, int32_t* sums) const {
    for (int64_t k = 0; k < pairs_; k += kDepth)
      multiply_pairs<WholePairs>(smaller(kDepth, pairs_ - k), rows + row(k, i), panel + k * kGroup, sums, kGroup,
                                 k > 0);
  }

 private:
  static int64_t row(int64_t k, int64_t i) { return (k / kDepth * kQueries + i) * kPanelStride; }

  const int64_t pairs_;
};
#endif

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
