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
  bool fits(int64_t t) const { return block(t / kTokens).scales[t % kTokens] >= 0; }
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

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
