// Weights of family `lookup` as two bytes each, relative to the token's largest: with them, tables of 8-bit integers
// are summed four at a time by the products of bytes, exactly. The rounding to 16 bits is the only error, some 1e-5 of
// the result. Included by level units only (see simd.h), of avx512_bf16 only.
#pragma once

#include "cpu/lookup_rows.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

class ByteWeights {
 public:
  static constexpr int64_t kTokens = 16;  // of a block: four bytes of a register each

  // Of 16 tokens: byte 4 t + i of group g belongs to token t and table 4 g + i.
  struct Block {
    float* scales;                // [16]; NaN for tokens whose weights two bytes cannot hold
    uint8_t *codes, *high, *low;  // the code's lowest 4 bits, plus 16 i
  };

  // The sums stay below 2^31 up to this number of tables.
  static bool fits(const LookupTables& a) { return a.type == TableType::i8 && a.K > 0 && a.K <= int64_t(1) << 15; }

  ByteWeights(const LookupTables& a, const Plan<float>& plan, int64_t capacity)
      : tables_(a.K),
        groups_(ceil_div(a.K, int64_t(4))),
        plan_(plan),
        memory_(ceil_div(capacity, kTokens) * block_bytes()) {}
  bool ok() const { return memory_.ok(); }
  int64_t groups() const { return groups_; }
  int64_t blocks() const { return ceil_div(plan_.tokens(), kTokens); }
  float scale(int64_t t) const { return block(t / kTokens).scales[t % kTokens]; }
  bool fits(int64_t t) const { return scale(t) >= 0; }
  Block block(int64_t b) const {
    char* const at = memory_.as<char>(b * block_bytes());
    auto* const bytes = reinterpret_cast<uint8_t*>(at + 64);
    return {reinterpret_cast<float*>(at), bytes, bytes + groups_ * 64, bytes + 2 * groups_ * 64};
  }

  // What every thread of a team does, after the plan is filled.
  void share() const {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks(); b++) {
      const Block to = block(b);
      std::memset(to.scales, 0, static_cast<size_t>(block_bytes()));
      for (int64_t i = 0; i < smaller(kTokens, plan_.tokens() - b * kTokens); i++) fill(to, b * kTokens + i, i);
    }
  }

 private:
  int64_t block_bytes() const { return 64 + 3 * groups_ * 64; }

  // Eight tables at a time, as they stand in the plan; those beyond the last get weight 0.
  void fill(const Block& to, int64_t t, int64_t i) const {
    float largest = 0;
    bool fits = true;
    for (int64_t k = 0; k < tables_; k += kGroup) {
      const float* const w = plan_.weights(k / kGroup, t);
      for (int64_t j = 0; j < smaller(kGroup, tables_ - k); j++) {
        fits &= (w[j] >= 0) & (w[j] < 3e38f);
        largest = w[j] > largest ? w[j] : largest;
      }
    }
    fits = fits && (largest == 0 || largest > 1e-30f);
    to.scales[i] = fits ? largest / 65535 : __builtin_nanf("");
    const float inverse = largest > 0 ? 65535 / largest : 0;
    for (int64_t k = 0; fits && k < tables_; k += kGroup) {
      const int64_t count = smaller(kGroup, tables_ - k);
      alignas(32) float w[kGroup] = {};
      alignas(32) int32_t codes[kGroup] = {};
      std::memcpy(w, plan_.weights(k / kGroup, t), static_cast<size_t>(count) * sizeof *w);
      std::memcpy(codes, plan_.codes(k / kGroup, t), static_cast<size_t>(count) * sizeof *codes);
      alignas(8) uint8_t bytes[3][kGroup];
      for (int j = 0; j < kGroup; j++) {
        const auto scaled = static_cast<int32_t>(w[j] * inverse + 0.5f);
        const int32_t rounded = scaled < 65535 ? scaled : 65535;
        bytes[0][j] = static_cast<uint8_t>(j % 4 * 16 + codes[j] % 16);
        bytes[1][j] = static_cast<uint8_t>(rounded >> 8);
        bytes[2][j] = static_cast<uint8_t>(rounded);
      }
      const int64_t at = k / 4 * 64 + i * 4;
      for (int64_t half = 0; half < smaller<int64_t>(2, groups_ - k / 4); half++) {
        std::memcpy(to.codes + at + half * 64, bytes[0] + half * 4, 4);
        std::memcpy(to.high + at + half * 64, bytes[1] + half * 4, 4);
        std::memcpy(to.low + at + half * 64, bytes[2] + half * 4, 4);
      }
    }
  }

  const int64_t tables_, groups_;
  const Plan<float>& plan_;
  const Memory memory_;
};

// Sums of a tile of 64 columns over some tables, four at a time: products with the high and the low bytes. Rows are
// interleaved so that the four values of a column stand together, which moves the columns: in quarter q of vector v
// stand columns 16 q + 4 v ...
struct ByteSums {
  __m512i high[4] = {}, low[4] = {};

  void add(__m512i a, __m512i b, __m512i c, __m512i d, const uint8_t* w_high, const uint8_t* w_low) {
    const __m512i ab = _mm512_unpacklo_epi8(a, b), ba = _mm512_unpackhi_epi8(a, b);
    const __m512i cd = _mm512_unpacklo_epi8(c, d), dc = _mm512_unpackhi_epi8(c, d);
    const __m512i values[4] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd),
                               _mm512_unpacklo_epi16(ba, dc), _mm512_unpackhi_epi16(ba, dc)};
    int32_t words[2];
    std::memcpy(words, w_high, 4);
    std::memcpy(words + 1, w_low, 4);
    const __m512i wh = _mm512_set1_epi32(words[0]), wl = _mm512_set1_epi32(words[1]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      high[v] = _mm512_dpbusd_epi32(high[v], wh, values[v]);
      low[v] = _mm512_dpbusd_epi32(low[v], wl, values[v]);
    }
  }
  // Vector v in units of the token's scale.
  __m512 sum(int v) const {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[v]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low[v]));
  }
  // out [64] = start [64] + scale times the vectors' columns, put in order.
  static void restore(__m512 v0, __m512 v1, __m512 v2, __m512 v3, float scale, const float* start, float* out) {
    const __m512 a = _mm512_shuffle_f32x4(v0, v1, 0x44), b = _mm512_shuffle_f32x4(v2, v3, 0x44);
    const __m512 c = _mm512_shuffle_f32x4(v0, v1, 0xee), d = _mm512_shuffle_f32x4(v2, v3, 0xee);
    const __m512 whole[4] = {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd),
                             _mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd)};
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++)
      _mm512_storeu_ps(out + q * 16, _mm512_fmadd_ps(_mm512_set1_ps(scale), whole[q], _mm512_loadu_ps(start + q * 16)));
  }
};

// What the streaming kernel adds with, four tables at a time.
class ByteRows {
 public:
  static constexpr int64_t C = kLookupTile;

  ByteRows(const Plan<float>& plan, const ByteWeights& weights, int64_t n) : plan_(plan), weights_(weights), n_(n) {}

  // sums [t1 - t0, 4, 16] += the tokens' rows [count, n, C] of the tables from k on, a multiple of 4, in units of the
  // token's scale
  void add(int64_t k, int64_t count, int64_t t0, int64_t t1, const int8_t* rows, float* sums) const {
    const int64_t table = n_ * C, next = kGroup * plan_.tokens();  // from a plan's group to the one after
    for (int64_t t = t0; t < t1; t++, sums += C) {
      const ByteWeights::Block block = weights_.block(t / ByteWeights::kTokens);
      const int64_t at = k / 4 * 64 + t % ByteWeights::kTokens * 4;
      const uint8_t *high = block.high + at, *low = block.low + at;
      const int32_t* codes = plan_.codes(k / kGroup, t) + k % kGroup;
      const int8_t* tile = rows;
      ByteSums s;
      const auto row = [](const int8_t* p) { return _mm512_loadu_si512(p); };
      int64_t left = count;
      for (; left >= 8; left -= 8, codes += next, tile += 8 * table, high += 128, low += 128) {
        s.add(row(tile + codes[0] * C), row(tile + table + codes[1] * C), row(tile + 2 * table + codes[2] * C),
              row(tile + 3 * table + codes[3] * C), high, low);
        s.add(row(tile + 4 * table + codes[4] * C), row(tile + 5 * table + codes[5] * C),
              row(tile + 6 * table + codes[6] * C), row(tile + 7 * table + codes[7] * C), high + 64, low + 64);
      }
      for (; left > 0; left -= 4, codes += 4, tile += 4 * table, high += 64, low += 64) {
        const int8_t* const first = tile + codes[0] * C;  // a table that is missing has weight 0: any row will do
        s.add(row(first), row(left > 1 ? tile + table + codes[1] * C : first),
              row(left > 2 ? tile + 2 * table + codes[2] * C : first),
              row(left > 3 ? tile + 3 * table + codes[3] * C : first), high, low);
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++)
        _mm512_storeu_ps(sums + v * 16, _mm512_add_ps(_mm512_loadu_ps(sums + v * 16), s.sum(v)));
    }
  }

  // out [C] = bias + the token's scale times the sums.
  void restore(int64_t t, const float* sums, const float* bias, float* out) const {
    ByteSums::restore(_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums + 32),
                      _mm512_loadu_ps(sums + 48), weights_.scale(t), bias, out);
  }

 private:
  const Plan<float>& plan_;
  const ByteWeights& weights_;
  const int64_t n_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
