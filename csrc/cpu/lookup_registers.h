// The forward of family `lookup` for tables of at most 16 rows of 8-bit integers and many tokens: the rows of 4 tables
// in one column are 64 bytes, a register, and one byte permutation looks 16 tokens up in all four. Their values are
// multiplied with weights of 16 bits, relative to the token's largest, as two products of bytes, and summed exactly.
// Included by level units only (see simd.h).
//
// Per 64 multiply-adds: one permutation and two byte products, instead of the 13 instructions of the streaming kernel.
#pragma once

#include <immintrin.h>

#include "cpu/lookup_rows.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// `out` points to the first row of the plan's tokens.
class Registers {
 public:
  static bool pays(const LookupTables& a, int64_t tokens, LookupRoute route) {
    const bool fits = a.n <= kEntries && !a.packed && a.K > 0 && a.K <= kMostTables;
    return fits && (route == LookupRoute::registers || (route == LookupRoute::by_size && tokens >= kFewest));
  }
  // Bytes a thread needs: the columns of a task, transposed, and its sums.
  static int64_t bytes(const LookupTables& a, int64_t tokens) {
    return round_up(groups_of(a), kTogether) * kColumns * 64 + ceil_div(tokens, kTokens) * kColumns * kSums;
  }

  Registers(const LookupTables& tables, const Plan<float>& plan, const float* bias, float* out, int64_t capacity)
      : a_(tables),
        plan_(plan),
        bias_(bias),
        out_(out),
        groups_(groups_of(tables)),
        memory_(ceil_div(capacity, kTokens) * block_bytes()) {}
  bool ok() const { return memory_.ok(); }

  // What every thread of a team does. Tokens whose weights 16 bits cannot hold (negative, infinite, NaN) take `rows`.
  void share(void* buffer, const Rows<StoreI8>& rows) const {
    const int64_t blocks = ceil_div(plan_.tokens(), kTokens), tasks = ceil_div(a_.h, kColumns);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) prepare(b);
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
            add(block(b), g, entries + (g * kColumns + c * kTogether) * 64, sums + (b * kColumns + c) * kSums);
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t c = 0; c < kColumns && c0 + c < a_.h; c += kAtOnce)
          finish(block(b), sums + (b * kColumns + c) * kSums, b * kTokens, c0 + c);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < plan_.tokens(); t++)
      if (!(block(t / kTokens).scales[t % kTokens] >= 0)) rows.token(t);
  }

 private:
  static constexpr int64_t kEntries = 16, kMostTables = int64_t(1) << 15, kFewest = 64;
  static constexpr int64_t kTokens = 16;    // of a block: 4 bytes of a register each
  static constexpr int64_t kColumns = 16;   // of a task
  static constexpr int kAtOnce = 8;         // columns, two accumulators each
  static constexpr int64_t kSums = 128;     // bytes of a column's two
  static constexpr int64_t kTogether = 16;  // groups whose entries stay in L1

  // Of 16 tokens: in byte 4 t + i of group g the place of token t's row in table 4 g + i, and its weight.
  struct Block {
    float* scales;  // [16]; NaN for tokens that are left to the other kernel
    uint8_t *places, *high, *low;
  };

  static int64_t groups_of(const LookupTables& a) { return ceil_div(a.K, int64_t(4)); }
  int64_t block_bytes() const { return 64 + 3 * groups_ * 64; }
  Block block(int64_t b) const {
    char* const at = memory_.as<char>(b * block_bytes());
    auto* const bytes = reinterpret_cast<uint8_t*>(at + 64);
    return {reinterpret_cast<float*>(at), bytes, bytes + groups_ * 64, bytes + 2 * groups_ * 64};
  }

  void prepare(int64_t b) const {
    const Block to = block(b);
    std::memset(to.scales, 0, static_cast<size_t>(block_bytes()));
    for (int64_t i = 0; i < kTokens && b * kTokens + i < plan_.tokens(); i++) {
      const int64_t t = b * kTokens + i;
      float largest = 0;
      bool fits = true;
      for (int64_t k = 0; k < a_.K; k++) {
        const float w = plan_.weights(k / kGroup, t)[k % kGroup];
        fits = fits && w >= 0 && w < 3e38f;
        largest = w > largest ? w : largest;
      }
      fits = fits && (largest == 0 || largest > 1e-30f);
      to.scales[i] = fits ? largest / 65535 : __builtin_nanf("");
      const float inverse = fits && largest > 0 ? 65535 / largest : 0;
      for (int64_t k = 0; fits && k < a_.K; k++) {
        const int64_t at = k / 4 * 64 + i * 4 + k % 4;
        const auto w = static_cast<uint32_t>(plan_.weights(k / kGroup, t)[k % kGroup] * inverse + 0.5f);
        to.places[at] = static_cast<uint8_t>(k % 4 * kEntries + plan_.codes(k / kGroup, t)[k % kGroup]);
        to.high[at] = static_cast<uint8_t>(smaller(w, 65535u) >> 8);
        to.low[at] = static_cast<uint8_t>(smaller(w, 65535u));
      }
    }
  }

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
      const __m512i places = _mm512_loadu_si512(b.places + g * 64), wh = _mm512_loadu_si512(b.high + g * 64),
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
    for (int64_t t = 0; t < smaller(kTokens, plan_.tokens() - t0); t++)
      for (int64_t j = 0; j < cols; j++) out_[(t0 + t) * a_.h + c0 + j] = sums[j][t] + (bias_ ? bias_[c0 + j] : 0.f);
  }

  const LookupTables& a_;
  const Plan<float>& plan_;
  const float* const bias_;
  float* const out_;
  const int64_t groups_;
  const Memory memory_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
