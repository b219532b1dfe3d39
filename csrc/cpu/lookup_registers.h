// The forward of family `lookup` for tables of at most 16 rows of 8-bit integers and many tokens: the rows of 4 tables
// in one column are 64 bytes, a register, and one byte permutation looks 16 tokens up in all four. Included by level
// units only (see simd.h).
//
// Per 64 multiply-adds: one permutation and two byte products, instead of two and two of the streaming kernel and what
// it loads. Tables of 32 and 64 rows would take two and four permutations. Turning rows into registers costs a call the
// same for any number of tokens: K n h bytes, read by whole cache lines and ahead, and a seventh of an instruction
// each. Measured on Zen 4, one thread, 512 tables, 2048 columns, against rows gathered as bytes: 64 tokens 3.7 ms and
// 3.3, 256 tokens 8.0 and 9.3.
#pragma once

#include "cpu/lookup_bytes.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// `out` points to the first row of the plan's tokens.
class Registers {
 public:
  static bool pays(const LookupTables& a, int64_t tokens, LookupRoute route) {
    return ByteWeights::fits(a) && a.n <= kEntries &&
           (route == LookupRoute::registers || (route == LookupRoute::by_size && tokens >= kFewest));
  }
  // Bytes a thread needs: the columns of a task, transposed, and its sums.
  static int64_t bytes(int64_t tokens) { return kEntryBytes + smaller(ceil_div(tokens, kTokens), kBlocks) * C * kSums; }

  Registers(const LookupTables& tables, const ByteWeights& weights, const float* bias, float* out, int64_t tokens)
      : a_(tables),
        row_(tables.packed ? C : tables.h),
        tile_(tables.packed ? tables.K * tables.n * C : C),
        weights_(weights),
        bias_(bias),
        out_(out),
        tokens_(tokens),
        groups_(weights.groups()) {}

  // What every thread of a team does.
  void share(void* buffer) const {
    const int64_t parts = ceil_div(weights_.blocks(), kBlocks), tasks = ceil_div(a_.h, C) * parts;
    auto* const entries = static_cast<uint8_t*>(buffer);
    uint8_t* const sums = entries + kEntryBytes;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t tile = task / parts, b0 = task % parts * kBlocks;
      const int64_t blocks = smaller(kBlocks, weights_.blocks() - b0), cols = smaller(C, a_.h - tile * C);
      std::memset(sums, 0, static_cast<size_t>(blocks * C * kSums));
      for (int64_t g = 0; g < groups_; g += kTogether) {
        const int64_t count = smaller(kTogether, groups_ - g);
        for (int64_t k = 0; k < count * 4; k++) transpose(g * 4 + k, k, tile, cols, entries);
        for (int64_t c0 = 0; c0 < cols; c0 += 2 * kAtOnce)
          for (int64_t b = 0; b < blocks; b++)
            for (int64_t c = c0; c < c0 + 2 * kAtOnce; c += kAtOnce)
              add(weights_.block(b0 + b), g, count, entries + c * kTogether * 64, sums + (b * C + c) * kSums);
      }
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t c = 0; c < cols; c += kAtOnce)
          finish(weights_.block(b0 + b), sums + (b * C + c) * kSums, (b0 + b) * kTokens, tile * C + c);
    }
  }

 private:
  using Block = ByteWeights::Block;
  static constexpr int64_t C = kLookupTile;  // columns of a task
  static constexpr int64_t kEntries = 16, kFewest = 128;
  static constexpr int64_t kTokens = ByteWeights::kTokens;
  static constexpr int64_t kBlocks = 32;    // of tokens of a task: their sums, 256 KB, and weights stay in L2
  static constexpr int kAtOnce = 8;         // columns, two accumulators each
  static constexpr int64_t kSums = 128;     // bytes of a column's two
  static constexpr int64_t kTogether = 16;  // groups whose entries for 16 columns stay in L1
  static constexpr int64_t kEntryBytes = kTogether * C * 64;
  static constexpr int64_t kAhead = 4;  // tables between the one being transposed and the one being fetched

  // entries [C / 8, kTogether, 8, 4, 16]: the rows of table k in the columns of a tile, zeros where there is no row or
  // no column, as table number i of those together.
  void transpose(int64_t k, int64_t i, int64_t tile, int64_t cols, uint8_t* entries) const {
    const auto* const table = static_cast<const int8_t*>(a_.data) + k * a_.n * row_ + tile * tile_;
    for (int64_t r = 0; r < a_.n; r++) __builtin_prefetch(table + (kAhead * a_.n + r) * row_, 0, 2);
    const __mmask64 some = ~uint64_t(0) >> (C - cols);
    __m512i row[kEntries];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kEntries; r++)
      row[r] = k < a_.K && r < a_.n ? _mm512_maskz_loadu_epi8(some, table + r * row_) : _mm512_setzero_si512();
    // Four rounds of interleaving rows r and r + 8, in quarters of 16 columns.
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
      __m512i next[kEntries];
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++) {
        next[2 * r] = _mm512_unpacklo_epi8(row[r], row[r + 8]);
        next[2 * r + 1] = _mm512_unpackhi_epi8(row[r], row[r + 8]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kEntries; r++) row[r] = next[r];
    }
    uint8_t* const to = entries + i / 4 * kAtOnce * 64 + i % 4 * kEntries;
#pragma GCC unroll 16
    for (int c = 0; c < 16; c++) {
      uint8_t* const at = to + (c / kAtOnce * kTogether * kAtOnce + c % kAtOnce) * 64;
      constexpr int64_t quarter = 16 * kTogether * 64;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_castsi512_si128(row[c]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + quarter), _mm512_extracti32x4_epi32(row[c], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 2 * quarter), _mm512_extracti32x4_epi32(row[c], 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 3 * quarter), _mm512_extracti32x4_epi32(row[c], 3));
    }
  }

  // sums [8, 2, 16] of 32-bit integers += the products with the high and the low bytes, of `count` groups from g0 on
  static void add(const Block& b, int64_t g0, int64_t count, const uint8_t* entries, uint8_t* sums) {
    __m512i high[kAtOnce], low[kAtOnce];
#pragma GCC unroll 8
    for (int j = 0; j < kAtOnce; j++) {
      high[j] = _mm512_loadu_si512(sums + j * kSums);
      low[j] = _mm512_loadu_si512(sums + j * kSums + 64);
    }
    for (int64_t g = g0; g < g0 + count; g++, entries += kAtOnce * 64) {
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
  const int64_t row_, tile_;  // from a row to the next, from a tile of columns to the next
  const ByteWeights& weights_;
  const float* const bias_;
  float* const out_;
  const int64_t tokens_, groups_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
