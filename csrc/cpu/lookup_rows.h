// The forward of family `lookup` for few tokens: rows are gathered token by token. Also the plan, which all forward
// kernels read. Included by level units only (see simd.h).
#pragma once

#if defined(PYREPR_LEVEL_avx512) || defined(PYREPR_LEVEL_avx512_bf16) || defined(PYREPR_LEVEL_avx2)
#include <immintrin.h>
#endif

#include "cpu/lookup_hash.h"

namespace pyrepr {
inline namespace PYREPR_LEVEL {
namespace {

struct StoreI8 {
  using T = float;
  using Memory = int8_t;
};
template <>
inline Vec<float> load_as<StoreI8>(const int8_t* p) {
  using I = Lanes<float>::I;
#if defined(PYREPR_LEVEL_avx512) || defined(PYREPR_LEVEL_avx512_bf16)
  const I wide = reinterpret_cast<I>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(PYREPR_LEVEL_avx2)
  const I wide = reinterpret_cast<I>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
  const I wide = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), I);
#endif
  return __builtin_convertvector(wide, Vec<float>);
}

}  // namespace
}  // namespace PYREPR_LEVEL

namespace cpu::PYREPR_LEVEL {
namespace {

constexpr int64_t kGroup = 8;  // tables whose codes and weights stand together

// Codes and weights of a block of tokens in the order the forward kernels read them: [K / kGroup, tokens, kGroup]. The
// row scales of 8-bit tables are folded into the weights. Filled by every thread of a team for its share of the tokens.
template <class T>
class Plan {
 public:
  Plan(const LookupTables& tables, int64_t capacity)
      : tables_(tables),
        size_(ceil_div(tables.K, kGroup) * kGroup * capacity),
        memory_(size_ * int64_t(4 + sizeof(T)) + 64) {}
  bool ok() const { return memory_.ok(); }
  const int32_t* codes(int64_t group, int64_t t) const {
    return memory_.template as<int32_t>() + at(group * kGroup, t);
  }
  const T* weights(int64_t group, int64_t t) const { return weights_begin() + at(group * kGroup, t); }
  int64_t tokens() const { return tokens_; }
  void start(int64_t tokens) { tokens_ = tokens; }

  template <class X>
  void hash(const LookupHash& p, int64_t t0, void* buffer) const {
    share_of_tokens<X>(p, t0, t0 + tokens_, buffer, [&](Chunks<T>& chunks, int64_t t) { put(chunks, t - t0); });
  }
  // The chunks of token t of the plan.
  void put(Chunks<T>& chunks, int64_t t) const {
    chunks.hash();
    put(t, chunks.codes(), chunks.weights());
  }

  void copy(const int32_t* codes, const T* weights) const {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens_; t++) put(t, codes + t * tables_.K, weights + t * tables_.K);
  }

 private:
  int64_t at(int64_t k, int64_t t) const { return (k / kGroup * tokens_ + t) * kGroup + k % kGroup; }
  T* weights_begin() const { return memory_.template as<T>(round_up(size_ * 4, 64)); }

  void put(int64_t t, const int32_t* codes, const T* weights) const {
    for (int64_t k = 0; k < tables_.K; k += kGroup, codes += kGroup, weights += kGroup) {
      const int64_t count = smaller(kGroup, tables_.K - k);
      T* const w = weights_begin() + at(k, t);
      std::memcpy(memory_.template as<int32_t>() + at(k, t), codes, static_cast<size_t>(count) * sizeof *codes);
      if (tables_.scales) {
        for (int64_t i = 0; i < count; i++)
          w[i] = weights[i] * static_cast<T>(tables_.scales[(k + i) * tables_.n + codes[i]]);
      } else {
        std::memcpy(w, weights, static_cast<size_t>(count) * sizeof *w);
      }
    }
  }

  const LookupTables& tables_;
  const int64_t size_;
  const Memory memory_;
  int64_t tokens_ = 0;
};

// `out` points to the first row of the plan's tokens.
template <class S>
class Rows {
 public:
  using T = typename S::T;
  using M = typename S::Memory;
  static constexpr int W = Lanes<T>::W;

  Rows(const LookupTables& tables, const Plan<T>& plan, const T* bias, T* out)
      : a_(tables), data_(static_cast<const M*>(tables.data)), plan_(plan), bias_(bias), out_(out) {}

  void token(int64_t t) const { columns(t, t + 1, 0, a_.h); }

  // What every thread of a team of `threads` does. Threads share the columns first (they then read different parts of
  // the same rows), then the tokens.
  void share(int64_t threads) const {
    const int64_t unit = a_.packed ? kLookupTile : 2 * kLine;
    const int64_t across = smaller(threads, larger<int64_t>(1, a_.h / unit));
    const int64_t down = smaller(ceil_div(threads, across), plan_.tokens());
    const int64_t cols = round_up(ceil_div(a_.h, across), a_.packed ? kLookupTile : kLine);
    const int64_t tokens = ceil_div(plan_.tokens(), down);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < across * down; part++) {
      const int64_t c0 = part % across * cols, t0 = part / across * tokens;
      const int64_t c1 = smaller(c0 + cols, a_.h), t1 = smaller(t0 + tokens, plan_.tokens());
      if (c0 < c1 && t0 < t1) columns(t0, t1, c0, c1);
    }
  }

 private:
  static constexpr int64_t kRows = 4;   // rows added at a time
  static constexpr int64_t kAhead = 8;  // rows between the one being added and the one being fetched
  static constexpr int64_t kBlock =
      32;  // tables a token visits in one go: several tokens meet in a row while it is in L3
  static constexpr int64_t kLine = 64 / int64_t(sizeof(M));  // elements of a cache line
  static constexpr int kVectors = 8;                         // of a slab of columns, whose sums stay in registers
  // Of a visit of slabs: as many tables as fill what is fetched ahead, 32 pieces of rows of 8-bit integers.
  static constexpr int64_t kVisit = 32 / int64_t(sizeof(M));

  // Measured on Zen 4: many tokens of small elements wait for arithmetic, all others for memory.
  static bool in_slabs(int64_t tokens) { return sizeof(M) <= 2 && tokens >= 8; }

  void columns(int64_t t0, int64_t t1, int64_t c0, int64_t c1) const {
    const auto bytes = static_cast<size_t>(c1 - c0) * sizeof(T);
    for (int64_t t = t0; t < t1; t++) {
      T* const row = out_ + t * a_.h + c0;
      // Not `bias_ ? bias_[j] : 0`: as a masked load of address 0 that takes AMD's processors 300 cycles.
      if (bias_)
        std::memcpy(row, bias_ + c0, bytes);
      else
        std::memset(row, 0, bytes);
    }
    if (!a_.packed && in_slabs(t1 - t0))
      gather_slabs(t0, t1, c0, c1 - c0);
    else if (!a_.packed)
      gather(t0, t1, c0, c1 - c0, data_ + c0, a_.h);
    for (int64_t c = c0; a_.packed && c < c1; c += kLookupTile)
      gather(t0, t1, c, kLookupTile, data_ + c * a_.K * a_.n, kLookupTile);
  }

  // Columns c0 ... c0 + cols of some tokens; in `data` rows are `stride` apart.
  void gather(int64_t t0, int64_t t1, int64_t c0, int64_t cols, const M* data, int64_t stride) const {
    const auto row = [&](int64_t k, int64_t t) {
      return data + (k * a_.n + plan_.codes(k / kGroup, t)[k % kGroup]) * stride;
    };
    const M* rows[kBlock + kAhead];
    T weights[kBlock];
    for (int64_t k0 = 0; k0 < a_.K; k0 += kBlock)
      for (int64_t t = t0; t < t1; t++) {
        const int64_t count = smaller(kBlock, a_.K - k0);
        for (int64_t i = 0; i < count; i++) {
          const int64_t k = k0 + i;
          rows[i] = row(k, t);
          weights[i] = plan_.weights(k / kGroup, t)[k % kGroup];
        }
        // What comes after this token's share of the block: the next token's, or the first token's of the next block.
        const bool last = t + 1 == t1;
        const int64_t k1 = last ? k0 + kBlock : k0, next = last ? t0 : t + 1;
        for (int64_t i = 0; i < kAhead; i++) rows[count + i] = k1 + i < a_.K ? row(k1 + i, next) : rows[0];
        int64_t i = 0;
        for (; i + kRows <= count; i += kRows) add_rows<kRows>(rows + i, weights + i, cols, out_ + t * a_.h + c0);
        for (; i < count; i++) add_rows<1>(rows + i, weights + i, cols, out_ + t * a_.h + c0);
      }
  }

  template <int R>
  static void add_rows(const M* const* rows, const T* weights, int64_t cols, T* out) {
    Vec<T> w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) w[r] = splat<T>(weights[r]);
    int64_t j = 0;
    for (; j + kLine <= cols; j += kLine) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) __builtin_prefetch(rows[r + kAhead] + j);
#pragma GCC unroll 16
      for (int64_t v = 0; v < kLine; v += W) {
        Vec<T> sum = load<T>(out + j + v);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum += w[r] * load_as<S>(rows[r] + j + v);
        store<T>(out + j + v, sum);
      }
    }
    for (; j < cols; j += W) {
      const int64_t count = smaller<int64_t>(W, cols - j);
      Vec<T> sum = load_some<StoreOf<T>>(out + j, count);
      for (int r = 0; r < R; r++) sum += w[r] * load_some<S>(rows[r] + j, count);
      store_some<StoreOf<T>>(out + j, count, sum);
    }
  }

  // A token's rows of kVisit tables, from the thread's first column on.
  struct Visit {
    int64_t count;
    const M* rows[kVisit];
    T weights[kVisit];
  };
  // The rows of the next visit, fetched piece by piece while this one's are added.
  struct Ahead {
    const M* const* rows;
    int64_t pieces, rows_left, piece;

    void fetch() {
      if (rows_left <= 0) return;
#pragma GCC unroll 8
      for (int64_t c = 0; c < kVectors * W; c += kLine) __builtin_prefetch(*rows + piece * kVectors * W + c, 0, 2);
      if (++piece == pieces) piece = 0, rows++, rows_left--;
    }
  };

  // The same slab by slab: a slab's sums stay in registers while the rows of a visit are added.
  void gather_slabs(int64_t t0, int64_t t1, int64_t c0, int64_t cols) const {
    Visit visits[2];
    visit(0, t0, c0, visits[0]);
    int now = 0;
    for (int64_t k0 = 0; k0 < a_.K; k0 += kVisit)
      for (int64_t t = t0; t < t1; t++, now ^= 1) {
        const bool last = t + 1 == t1;
        visit(last ? k0 + kVisit : k0, last ? t0 : t + 1, c0, visits[now ^ 1]);
        add_visit(visits[now], visits[now ^ 1], cols, out_ + t * a_.h + c0);
      }
  }
  void visit(int64_t k0, int64_t t, int64_t c0, Visit& to) const {
    to.count = smaller(kVisit, a_.K - k0);
    for (int64_t i = 0; i < to.count; i++) {
      const int64_t k = k0 + i;
      to.rows[i] = data_ + (k * a_.n + plan_.codes(k / kGroup, t)[k % kGroup]) * a_.h + c0;
      to.weights[i] = plan_.weights(k / kGroup, t)[k % kGroup];
    }
  }
  static void add_visit(const Visit& visit, const Visit& next, int64_t cols, T* out) {
    Ahead ahead{next.rows, cols / (kVectors * W), next.count, 0};
    int64_t j = 0;
    for (; j + kVectors * W <= cols; j += kVectors * W) add_slab<kVectors>(visit, j, &ahead, out + j);
    for (; j + W <= cols; j += W) add_slab<1>(visit, j, nullptr, out + j);
    if (j == cols) return;
    Vec<T> sum = load_some<StoreOf<T>>(out + j, cols - j);
    for (int64_t i = 0; i < visit.count; i++) sum += visit.weights[i] * load_some<S>(visit.rows[i] + j, cols - j);
    store_some<StoreOf<T>>(out + j, cols - j, sum);
  }
  template <int V>
  static void add_slab(const Visit& visit, int64_t j, Ahead* ahead, T* out) {
    Vec<T> sum[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[v] = load<T>(out + v * W);
    for (int64_t i = 0; i < visit.count; i++) {
      if constexpr (V == kVectors) ahead->fetch();
      const M* const row = visit.rows[i] + j;
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[v] += visit.weights[i] * load_as<S>(row + v * W);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store<T>(out + v * W, sum[v]);
  }

  const LookupTables& a_;
  const M* const data_;
  const Plan<T>& plan_;
  const T* const bias_;
  T* const out_;
};

}  // namespace
}  // namespace cpu::PYREPR_LEVEL
}  // namespace pyrepr
