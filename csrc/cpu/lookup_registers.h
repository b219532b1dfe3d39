// The forward of family `lookup` for tables of at most 16 rows of 8-bit integers and many tokens: the rows of 4 tables
// in one column are 64 bytes, a register, and one byte permutation looks 16 tokens up in all four. Included by level
// units only (see simd.h).
//
// Per 64 multiply-adds: one permutation and two byte products, instead of two and two of the streaming kernel and what
// it loads. Tables of 32 and 64 rows would take two and four permutations. Measured on Zen 4, 1024 tokens, 2048
// columns: 25 us a table here and 28 streamed at 16 rows; streamed 32 at 32 rows and 38 at 64, less than two and four
// would cost by count.
#pragma once

#include "cpu/lookup_bytes.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// `out` points to the first row of the plan's tokens.
class Registers {
 public:
  static bool pays(const LookupTables& a, int64_t tokens, LookupRoute route) {
    return ByteWeights::fits(a) && a.n <= kEntries && !a.packed &&
           (route == LookupRoute::registers || (route == LookupRoute::by_size && tokens >= kFewest));
  }
  // Bytes a thread needs: the columns of a task, transposed, and its sums.
  static int64_t bytes(const LookupTables& a, int64_t tokens) {
    return round_up(groups_of(a), kTogether) * kColumns * 64 + ceil_div(tokens, kTokens) * kColumns * kSums;
  }

  Registers(const LookupTables& tables, const ByteWeights& weights, const float* bias, float* out, int64_t tokens)
      : a_(tables), weights_(weights), bias_(bias), out_(out), tokens_(tokens), groups_(weights.groups()) {}

  // What every thread of a team does.
  void share(void* buffer) const {
    const int64_t blocks = weights_.blocks(), tasks = ceil_div(a_.h, kColumns);
    auto* const entries = static_cast<uint8_t*>(buffer);
    uint8_t* const sums = entries + round_up(groups_, kTogether) * kColumns * 64;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t c0 = task * kColumns;
      for (int64_t k = 0; k < groups_ * 4; k++) transpose(k, c0, entries);
      std::memset(sums, 0, static_cast<size_t>(blocks * kColumns * kSums));
      for (int64_t g = 0; g < groups_; g += kTogether)
        for (int64_t b = 0; b < blocks; b++)
          for (int64_t c = 0; c < kColumns; c += kAtOnce)
            add(weights_.block(b), g, entries + (g * kColumns + c * kTogether) * 64, sums + (b * kColumns + c) * kSums);
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t c = 0; c < kColumns && c0 + c < a_.h; c += kAtOnce)
          finish(weights_.block(b), sums + (b * kColumns + c) * kSums, b * kTokens, c0 + c);
    }
  }

 private:
  using Block = ByteWeights::Block;
  static constexpr int64_t kEntries = 16, kFewest = 64;
  static constexpr int64_t kTokens = ByteWeights::kTokens;
  static constexpr int64_t kColumns = 16;   // of a task
  static constexpr int kAtOnce = 8;         // columns, two accumulators each
  static constexpr int64_t kSums = 128;     // bytes of a column's two
  static constexpr int64_t kTogether = 16;  // groups whose entries stay in L1

  static int64_t groups_of(const LookupTables& a) { return ceil_div(a.K, int64_t(4)); }

  // entries [groups / kTogether, 2, kTogether, 8, 64]: the rows of table k in 16 columns, zeros where there is no row
  // or no column
  void transpose(int64_t k, int64_t c0, uint8_t* entries) const {
    __m128i row[16];
    for (int r = 0; r < 16; r++) {
      row[r] = _mm_setzero_si128();
      if (k >= a_.K || r >= a_.n) continue;
      const int8_t* const from = static_cast<const int8_t*>(a_.data) + (k * a_.n + r) * a_.h + c0;
      if (c0 + kColumns <= a_.h)
        std::memcpy(&row[r], from, kColumns);
      else
        std::memcpy(&row[r], from, static_cast<size_t>(a_.h - c0));
    }
    // Four rounds of interleaving rows r and r + 8.
    for (int round = 0; round < 4; round++) {
      __m128i next[16];
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++) {
        next[2 * r] = _mm_unpacklo_epi8(row[r], row[r + 8]);
        next[2 * r + 1] = _mm_unpackhi_epi8(row[r], row[r + 8]);
      }
      std::memcpy(row, next, sizeof row);
    }
    for (int64_t c = 0; c < kColumns; c++) std::memcpy(entries + place(k / 4, c) * 64 + k % 4 * kEntries, &row[c], 16);
  }
  static int64_t place(int64_t group, int64_t c) {
    return ((group / kTogether * 2 + c / kAtOnce) * kTogether + group % kTogether) * kAtOnce + c % kAtOnce;
  }

  // sums [8, 2, 16] of 32-bit integers += the products with the high and the low bytes, of kTogether groups from g0 on
  void add(const Block& b, int64_t g0, const uint8_t* entries, uint8_t* sums) const {
    __m512i high[kAtOnce], low[kAtOnce];
#pragma GCC unroll 8
    for (int j = 0; j < kAtOnce; j++) {
      high[j] = _mm512_loadu_si512(sums + j * kSums);
      low[j] = _mm512_loadu_si512(sums + j * kSums + 64);
    }
    for (int64_t g = g0; g < smaller(g0 + kTogether, groups_); g++, entries += kAtOnce * 64) {
      const __m512i places = _mm512_loadu_si512(b.codes + g * 64), wh = _mm512_loadu_si512(b.high + g * 64),
                    wl = _mm512_loadu_si512(b.low + g * 64);
#pragma GCC unroll 8
      for (int j = 0; j < kAtOnce; j++) {
        const __m512i values = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(entries + j * 64));
        high[j] = _mm512_dpbusd_epi32(high[j], wh, values);
        low[j] = _mm512_dpbusd_epi32(low[j], wl, values);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kAtOnce; j++) {
      _mm512_storeu_si512(sums + j * kSums, high[j]);
      _mm512_storeu_si512(sums + j * kSums + 64, low[j]);
    }
  }

  void finish(const Block& b, const uint8_t* from, int64_t t0, int64_t c0) const {
    using I = Lanes<float>::I;
    float sums[kAtOnce][kTokens];
    const Vec<float> scale = load<float>(b.scales);
    for (int j = 0; j < kAtOnce; j++) {
      I high, low;
      std::memcpy(&high, from + j * kSums, sizeof high);
      std::memcpy(&low, from + j * kSums + 64, sizeof low);
      store<float>(
          sums[j],
          (__builtin_convertvector(high, Vec<float>) * 256.f + __builtin_convertvector(low, Vec<float>)) * scale);
    }
    const int64_t cols = smaller<int64_t>(kAtOnce, a_.h - c0);
    for (int64_t t = 0; t < smaller(kTokens, tokens_ - t0); t++)
      for (int64_t j = 0; j < cols; j++) out_[(t0 + t) * a_.h + c0 + j] = sums[j][t] + (bias_ ? bias_[c0 + j] : 0.f);
  }

  const LookupTables& a_;
  const ByteWeights& weights_;
  const float* const bias_;
  float* const out_;
  const int64_t tokens_, groups_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
