// The forward of family `lookup` for tables of 8-bit integers and some dozens or hundreds of tokens: rows are gathered
// token by token, as in lookup_rows.h, and summed four at a time by products of bytes. Included by level units only
// (see simd.h), of avx512_bf16 only.
//
// Per four rows of 64 columns, 256 multiply-adds: four loads, eight interleavings, eight products, where floats take 16
// times a widening, a conversion and a product. What is left is memory: K h bytes a token, in pieces of a row. Measured
// on Zen 4, 64 tokens of 256 tables of 2048 columns, each the fastest of 25, one thread and two: the same bytes in
// sequence 1.19 and .76 ms; fetched 32 tables ahead 1.89 and 1.28, 64 ahead 1.76 and 1.04, a whole token ahead 1.48 and
// .92, and not fetched ahead 3.24 and 2.22; into L1 instead of L2 no better than not at all.
#pragma once

#include "cpu/lookup_bytes.h"

namespace pyrepr::cpu::PYREPR_LEVEL {
namespace {

// `out` points to the first row of the plan's tokens.
class GatheredBytes {
 public:
  static bool pays(const LookupTables& a, int64_t tokens) { return tokens >= kFewest && a.h >= 2 * C; }

  GatheredBytes(const LookupTables& tables, const Plan<float>& plan, const ByteWeights& weights, const float* bias,
                float* out)
      : a_(tables),
        row_(tables.packed ? C : tables.h),
        tile_(tables.packed ? tables.K * tables.n * C : C),
        plan_(plan),
        weights_(weights),
        visit_(smaller(kVisit, larger<int64_t>(kVisitBytes / tables.h / 4 * 4, 4))),
        bias_(bias),
        out_(out) {}

  // What every thread of a team of `threads` does. Threads share the columns first (they then read different parts of
  // the same rows), then the tokens.
  void share(int64_t threads) const {
    const int64_t tiles = ceil_div(a_.h, C), tokens = plan_.tokens();
    const int64_t across = smaller(threads, tiles), down = smaller(ceil_div(threads, across), tokens);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < across * down; part++) {
      const int64_t i = part % across, j = part / across;
      columns(tokens * j / down, tokens * (j + 1) / down, tiles * i / across, tiles * (i + 1) / across);
    }
  }

 private:
  static constexpr int64_t C = kLookupTile;
  static constexpr int64_t kFewest = 8;
  static constexpr int64_t kVisit = 256;                      // tables a token visits in one go at most
  static constexpr int64_t kVisitBytes = int64_t(512) << 10;  // of their rows: this visit's and the next's share L2
  static constexpr int64_t kLines = 4;                        // fetched with every four rows that are added

  // A token's rows of some tables, from a thread's first tile of columns on; as many as are whole fours.
  struct Visit {
    int64_t t, k, count;
    const int8_t* rows[kVisit];
  };
  // The rows of the next visit, fetched piece by piece while this one's are added.
  struct Ahead {
    const int8_t* const* rows;
    int64_t tile, tiles, left, at;

    void fetch() {
      if (left <= 0) return;
#pragma GCC unroll 4
      for (int64_t i = 0; i < kLines; i++) __builtin_prefetch(*rows + (at + i) * tile, 0, 2);
      if ((at += kLines) >= tiles) at = 0, rows++, left--;
    }
  };

  // Tiles begin ... end of some tokens.
  void columns(int64_t t0, int64_t t1, int64_t begin, int64_t end) const {
    Visit visits[2];
    visit(0, t0, begin, visits[0]);
    int now = 0;
    for (int64_t k = 0; k < a_.K; k += visit_)
      for (int64_t t = t0; t < t1; t++, now ^= 1) {
        const bool last = t + 1 == t1;
        visit(last ? k + visit_ : k, last ? t0 : t + 1, begin, visits[now ^ 1]);
        Ahead ahead{visits[now ^ 1].rows, tile_, end - begin, visits[now ^ 1].count, 0};
        for (int64_t tile = begin; tile < end; tile++) add(visits[now], tile, (tile - begin) * tile_, ahead);
      }
  }

  void visit(int64_t k, int64_t t, int64_t tile, Visit& to) const {
    const int64_t tables = larger<int64_t>(smaller(visit_, a_.K - k), 0);
    to.t = t, to.k = k, to.count = round_up(tables, 4);
    const auto* const data = static_cast<const int8_t*>(a_.data) + tile * tile_;
    for (int64_t i = 0; i < to.count; i++) {
      const int64_t from = k + smaller(i, tables - 1);  // a table that is missing has weight 0: any row will do
      to.rows[i] = data + (from * a_.n + plan_.codes(from / kGroup, t)[from % kGroup]) * row_;
    }
  }

  void add(const Visit& visit, int64_t tile, int64_t at, Ahead& ahead) const {
    const int64_t c0 = tile * C, cols = smaller(C, a_.h - c0), t = visit.t;
    float* const out = out_ + t * a_.h + c0;
    const ByteSums s = cols == C ? sums(visit, at, ahead, [](const int8_t* row) { return _mm512_loadu_si512(row); })
                                 : sums(visit, at, ahead, [cols](const int8_t* row) {
                                     return _mm512_maskz_loadu_epi8((uint64_t(1) << cols) - 1, row);
                                   });
    float start[C] = {}, whole[C];
    const float* const from = visit.k ? out : bias_ ? bias_ + c0 : nullptr;
    if (from) std::memcpy(start, from, static_cast<size_t>(cols) * sizeof *start);
    ByteSums::restore(s.sum(0), s.sum(1), s.sum(2), s.sum(3), weights_.scale(t), start, cols == C ? out : whole);
    if (cols < C) std::memcpy(out, whole, static_cast<size_t>(cols) * sizeof *out);
  }
  template <class Load>
  ByteSums sums(const Visit& visit, int64_t at, Ahead& ahead, Load load) const {
    const ByteWeights::Block block = weights_.block(visit.t / ByteWeights::kTokens);
    const int64_t first = visit.k / 4 * 64 + visit.t % ByteWeights::kTokens * 4;
    const uint8_t *high = block.high + first, *low = block.low + first;
    ByteSums s;
    for (int64_t i = 0; i < visit.count; i += 4, high += 64, low += 64) {
      ahead.fetch();
      const int8_t* const* const rows = visit.rows + i;
      s.add(load(rows[0] + at), load(rows[1] + at), load(rows[2] + at), load(rows[3] + at), high, low);
    }
    return s;
  }

  const LookupTables& a_;
  const int64_t row_, tile_;  // from a row to the next, from a tile of columns to the next
  const Plan<float>& plan_;
  const ByteWeights& weights_;
  const int64_t visit_;  // tables of a visit: of sizes alone, so that sums are the same for any number of threads
  const float* const bias_;
  float* const out_;
};

}  // namespace
}  // namespace pyrepr::cpu::PYREPR_LEVEL
